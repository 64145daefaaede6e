//! Pages come from another process, which may end. Needs `/dev/kvm` and `/dev/userfaultfd`.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::process::{Child, Command, Stdio};

use jailer::seccomp::{ThreadKind, restrict};
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};

#[path = "../../../../tests/harness/page_server.rs"]
mod page_server;

use super::*;
use crate::kvm::dirty_log::tests::{COPY, Machine};
use crate::memory::{Backing, MemoryError, Template};

const RAM: u64 = 4 << 20;

/// What a child is told: where the socket and the memory file are, and how many pages are served before the server ends.
const DIRECTORY: &str = "PAGING_TEST_DIRECTORY";
const MOST: &str = "PAGING_TEST_MOST";

fn directory() -> PathBuf {
    std::env::var_os(DIRECTORY).expect("run by another test").into()
}

fn start(child: &str, directory: &Path, most: usize) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--ignored", "--nocapture", "--test-threads", "1", "--exact"]);
    command.arg(format!("memory::paging::tests::{child}"));
    command.env(DIRECTORY, directory).env(MOST, most.to_string());
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// A server, from when it listens.
struct Server(Child);

impl Server {
    fn start(directory: &Path, most: usize) -> Self {
        let mut child = start("server", directory, most);
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let ready = lines.map_while(Result::ok).any(|line| line.contains("listening"));
        assert!(ready, "the server ended");
        Self(child)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        self.0.wait().unwrap();
    }
}

#[test]
#[ignore = "the other tests run it in a process of its own"]
fn server() {
    let listener = UnixListener::bind(directory().join("socket")).unwrap();
    let file = File::open(directory().join("memory")).unwrap();
    let most: usize = std::env::var(MOST).unwrap().parse().unwrap();
    println!("listening");
    page_server::serve(&listener, &file, most);
}

/// A memory file: the guest of `dirty_log`, and a word at RAM's end.
fn memory_file(directory: &Path) {
    let file = File::create(directory.join("memory")).unwrap();
    file.set_len(RAM).unwrap();
    file.write_all_at(&COPY, 0x1000).unwrap();
    file.write_all_at(&[7], 0x5000).unwrap();
    file.write_all_at(b"last", RAM - 4).unwrap();
}

fn served(directory: &Path) -> (Memory, Arc<PageServer>) {
    let memory = Memory::map(Backing::nothing(RAM)).unwrap();
    let source = PageSource::connect(&directory.join("socket")).unwrap();
    let server = source.serve(&memory).unwrap();
    (memory, Arc::new(server))
}

#[test]
fn guest_and_host_find_the_pages_that_another_process_serves() {
    let directory = TempDir::new().unwrap();
    memory_file(directory.path());
    let _server = Server::start(directory.path(), usize::MAX);
    let (memory, _pages) = served(directory.path());
    let ram = memory.ram().clone();
    let mut machine = Machine::of(memory);
    assert_eq!(machine.run(), 7, "the guest's code and its data");
    let mut word = [0; 4];
    ram.read_slice(&mut word, GuestAddress(RAM - 4)).unwrap();
    assert_eq!(&word, b"last");
    // System calls of the host wait for pages as well.
    let file = tempfile::tempfile().unwrap();
    ram.write_volatile_to(GuestAddress(0x2ffe), &mut file.try_clone().unwrap(), 4).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 4);
}

#[test]
fn a_server_that_is_no_longer_needed_may_end() {
    let directory = TempDir::new().unwrap();
    memory_file(directory.path());
    let server = Server::start(directory.path(), usize::MAX);
    let (mut memory, pages) = served(directory.path());
    assert_eq!(memory.ram().read_obj::<u8>(GuestAddress(0x5000)).unwrap(), 7);
    let (said, heard) = std::sync::mpsc::channel();
    let end = said.clone();
    pages.watch(move || said.send("began").unwrap(), move || end.send("missed").unwrap()).unwrap();
    let template = Template::build(RAM, |_| Ok::<_, MemoryError>(())).unwrap().0;
    memory.replace(Backing::private(&template).unwrap()).unwrap();
    pages.dismiss();
    drop(server);
    // Until the thread has ended, and with it whatever it could say.
    assert_eq!(heard.iter().collect::<Vec<_>>(), ["began"]);
    let end = memory.ram().read_obj::<u32>(GuestAddress(RAM - 4)).unwrap();
    assert_eq!(end, 0, "nobody is asked for pages that come from elsewhere");
}

#[test]
#[ignore = "another test runs it in a process of its own"]
fn machine() {
    let (memory, pages) = served(&directory());
    // (A thread of a test ends with calls that none of the program's makes, but this one ends with its process.)
    pages.watch(|| restrict(ThreadKind::Pages).unwrap(), || end_without_pages()).unwrap();
    let mut machine = Machine::of(memory);
    println!("the guest read {}", machine.run());
}

/// Two pages are served, of code and of data; the third is the one to which the guest writes.
#[test]
fn a_server_that_ends_ends_the_machine_with_a_line_that_says_so() {
    let directory = TempDir::new().unwrap();
    memory_file(directory.path());
    for most in [0, 2] {
        let server = Server::start(directory.path(), most);
        let child = start("machine", directory.path(), 0);
        let output = child.wait_with_output().unwrap();
        drop(server);
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        assert!(text.contains("cleanslate: the page server is gone"), "{text}");
        assert!(!String::from_utf8_lossy(&output.stdout).contains("the guest read"), "{output:?}");
        std::fs::remove_file(directory.path().join("socket")).unwrap();
    }
}

#[test]
fn a_server_that_is_not_there_is_told_by_its_name() {
    let directory = TempDir::new().unwrap();
    let error = PageSource::connect(&directory.path().join("absent")).unwrap_err().to_string();
    assert!(error.contains("connect to the page server's socket") && error.contains("absent"));
}
