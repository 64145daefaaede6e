//! The lab: QEMU runs a Linux that runs this program, so that there is a KVM with hardware virtualization, if an emulated one,
//! wherever QEMU is.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use images::kernel::Kernel;
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::{FdFlags, fcntl_setfd};

use crate::machine::Interrupts;

/// The emulator.
pub const QEMU: &str = "qemu-system-x86_64";

/// What its kernel is told: nothing on the console but why it panics, which ends it; and to wait for nobody who reads kernel
/// data without a lock, of which a jail makes many.
const COMMAND_LINE: &str =
    "console=ttyS0 loglevel=1 panic=-1 reboot=t mitigations=off rcupdate.rcu_expedited=1";

/// Lines of the console that are kept.
const CONSOLE_LINES: usize = 20;

/// What carries the lab.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Accelerator {
    /// Emulation: works everywhere, and its processor has AMD's SVM
    #[default]
    Tcg,
    /// KVM, where that lets guests run guests
    Kvm,
}

/// A lab to be run.
#[derive(Debug)]
pub struct Lab {
    /// Its kernel.
    pub kernel: Kernel,
    /// Its file system.
    pub file_system: Vec<u8>,
    /// What carries it.
    pub accelerator: Accelerator,
    /// Processors.
    pub vcpus: u32,
    /// RAM in MiB.
    pub mem_mib: u64,
    /// How long it may run.
    pub timeout: Duration,
}

/// Why a lab gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// QEMU is not there.
    #[error(
        "there is no {QEMU} in the PATH: install it, on Debian with the package qemu-system-x86"
    )]
    NoQemu,
    /// It cannot be started.
    #[error("start {QEMU}")]
    Qemu(#[source] io::Error),
    /// The host has no descriptor, thread or memory left.
    #[error("{0}")]
    Host(&'static str, #[source] io::Error),
    /// It was not done in time.
    #[error("the lab was not done after {0:?}, and was ended; give --timeout more{1}")]
    Timeout(Duration, Tail),
    /// It ended without a status.
    #[error("the lab ended before its command did ({0}){1}")]
    NoAnswer(ExitStatus, Tail),
    /// A signal came.
    #[error("interrupted")]
    Interrupted,
}

/// The end of a console, for an error's line.
#[derive(Debug)]
pub struct Tail(Vec<String>);

impl std::fmt::Display for Tail {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0.as_slice() {
            [] => f.write_str("; its console is silent"),
            lines => write!(f, "; its console ends with: {}", lines.join(" | ")),
        }
    }
}

/// What became of the lab's command.
#[derive(Debug)]
pub struct Answer {
    /// Its exit status.
    pub status: u8,
    /// The archive (cpio, newc) of the files that were to come back.
    pub files: Vec<u8>,
}

enum Event {
    /// All of the third port.
    Results(Vec<u8>),
    /// A copy of output came to its end.
    Copied,
    Signal,
}

impl Lab {
    /// Runs it; what its command prints goes where this process prints.
    ///
    /// # Errors
    /// [`RunError`].
    pub fn run(self, interrupts: Interrupts) -> Result<Answer, RunError> {
        let host = |what| move |error| RunError::Host(what, error);
        let path = std::env::var_os("PATH").unwrap_or_default();
        if !std::env::split_paths(&path).any(|directory| directory.join(QEMU).is_file()) {
            return Err(RunError::NoQemu);
        }
        let image = self.image().map_err(host("keep the lab's file system in memory"))?;
        let pairs = || -> io::Result<[(UnixStream, UnixStream); 4]> {
            Ok([UnixStream::pair()?, UnixStream::pair()?, UnixStream::pair()?, UnixStream::pair()?])
        };
        let pairs = pairs().map_err(host("make sockets for the lab"))?;
        let [ours, theirs] =
            [0, 1].map(|end| pairs.each_ref().map(|pair| if end == 0 { &pair.0 } else { &pair.1 }));
        for descriptor in theirs.map(AsFd::as_fd).into_iter().chain([image.as_fd()]) {
            let inherited = fcntl_setfd(descriptor, FdFlags::empty());
            inherited.map_err(|error| RunError::Host("hand sockets to the lab", error.into()))?;
        }
        let child = self.qemu(&image, theirs).spawn().map_err(RunError::Qemu)?;
        let mut machine = Machine { child };
        let ours = ours.map(UnixStream::try_clone);
        drop((pairs, image));
        let [console, output, errors, results] = ours;
        let (outbox, inbox) = channel();
        let tail = Arc::<Mutex<VecDeque<String>>>::default();
        let start = || -> io::Result<()> {
            keep_lines(console?, Arc::clone(&tail))?;
            copy(output?, io::stdout(), outbox.clone())?;
            copy(errors?, io::stderr(), outbox.clone())?;
            read_results(results?, outbox.clone())?;
            watch_signals(interrupts, outbox)
        };
        start().map_err(host("listen to the lab"))?;
        let results = self.await_results(&inbox);
        if results.is_err() {
            machine.kill();
        }
        let ended = machine.child.wait().map_err(host("wait for the lab"))?;
        let last = || {
            let lines = tail.lock().unwrap_or_else(PoisonError::into_inner);
            Tail(lines.iter().cloned().collect())
        };
        match results {
            Ok(results) => parse(&results).ok_or_else(|| RunError::NoAnswer(ended, last())),
            Err(Some(timeout)) => Err(RunError::Timeout(timeout, last())),
            Err(None) => Err(RunError::Interrupted),
        }
    }

    /// All that came, once both copies of output are complete. `Err` if it took too long, or a signal came.
    fn await_results(&self, inbox: &Receiver<Event>) -> Result<Vec<u8>, Option<Duration>> {
        let deadline = Instant::now() + self.timeout;
        let (mut results, mut copied) = (None, 0);
        loop {
            if let (Some(results), 2..) = (&mut results, copied) {
                return Ok(std::mem::take(results));
            }
            match inbox.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(Event::Results(bytes)) => results = Some(bytes),
                Ok(Event::Copied) => copied += 1,
                Ok(Event::Signal) | Err(RecvTimeoutError::Disconnected) => return Err(None),
                Err(RecvTimeoutError::Timeout) => return Err(Some(self.timeout)),
            }
        }
    }

    /// A file without a name that holds the file system.
    fn image(&self) -> io::Result<File> {
        let mut file = File::from(memfd_create("lab", MemfdFlags::CLOEXEC)?);
        file.write_all(&self.file_system)?;
        Ok(file)
    }

    fn qemu(&self, image: &File, ports: [&UnixStream; 4]) -> Command {
        // This program first, so that QEMU does not outlive it.
        let mut qemu = Command::new("/proc/self/exe");
        qemu.args(["lab", "--machine-of", &std::process::id().to_string(), "--", QEMU]);
        match self.accelerator {
            // Each level of page tables costs an emulator time: not five of them. Its SVM does not intercept XSETBV, so KVM would
            // not know what a guest has in XCR0, and put back something else at the next exit.
            Accelerator::Tcg => {
                qemu.args(["-accel", "tcg,thread=multi", "-cpu", "max,la57=off,xsave=off"]);
            }
            Accelerator::Kvm => {
                qemu.args(["-accel", "kvm", "-cpu", "host"]);
            }
        }
        qemu.args(["-M", "q35", "-no-reboot", "-nodefaults", "-display", "none"]);
        qemu.args(["-smp", &self.vcpus.to_string(), "-m", &self.mem_mib.to_string()]);
        qemu.arg("-kernel").arg(&self.kernel.path);
        qemu.args(["-initrd", &format!("/proc/self/fd/{}", image.as_raw_fd())]);
        qemu.args(["-append", COMMAND_LINE, "-device", "virtio-serial-pci"]);
        for (number, port) in ports.iter().enumerate() {
            qemu.args(["-chardev", &format!("socket,id=port{number},fd={}", port.as_raw_fd())]);
            match number {
                0 => qemu.args(["-serial", "chardev:port0"]),
                _ => {
                    let device = format!("virtserialport,chardev=port{number},nr={number}");
                    qemu.args(["-device", &device])
                }
            };
        }
        qemu.stdin(Stdio::null()).stdout(Stdio::null());
        qemu
    }
}

/// QEMU's process, which goes with this.
struct Machine {
    child: Child,
}

impl Machine {
    fn kill(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.kill();
        let _ = self.child.wait();
    }
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    thread::Builder::new().name(name.into()).spawn(work).map(|_| ())
}

/// The console: the last lines, printable.
fn keep_lines(console: UnixStream, tail: Arc<Mutex<VecDeque<String>>>) -> io::Result<()> {
    spawn("console", move || {
        for line in BufReader::new(console).split(b'\n').map_while(Result::ok) {
            let text = String::from_utf8_lossy(&line);
            let text: String = text.chars().filter(|c| !c.is_control()).collect();
            let mut tail = tail.lock().unwrap_or_else(PoisonError::into_inner);
            if !text.trim().is_empty() {
                tail.push_back(text);
            }
            if tail.len() > CONSOLE_LINES {
                tail.pop_front();
            }
        }
    })
}

/// One direction of the command's output. Who reads ours may go away; the command goes on.
fn copy(
    mut from: UnixStream,
    mut to: impl Write + Send + 'static,
    outbox: Sender<Event>,
) -> io::Result<()> {
    spawn("output", move || {
        let mut bytes = [0; 16 * 1024];
        let mut open = true;
        while let Ok(len @ 1..) = from.read(&mut bytes) {
            open = open && to.write_all(&bytes[..len]).and_then(|()| to.flush()).is_ok();
        }
        let _ = outbox.send(Event::Copied);
    })
}

fn read_results(from: UnixStream, outbox: Sender<Event>) -> io::Result<()> {
    spawn("results", move || {
        /// More than a lab with the RAM that it has by default can hold.
        const MOST: u64 = 1 << 30;
        let mut bytes = Vec::new();
        // An end that is no clean one shows in what is missing.
        let _ = from.take(MOST).read_to_end(&mut bytes);
        let _ = outbox.send(Event::Results(bytes));
    })
}

fn watch_signals(mut interrupts: Interrupts, outbox: Sender<Event>) -> io::Result<()> {
    spawn("signals", move || {
        interrupts.wait();
        let _ = outbox.send(Event::Signal);
        // Signals are caught as long as this is kept.
        loop {
            interrupts.wait();
        }
    })
}

/// `status N`, a line feed, and what follows.
fn parse(results: &[u8]) -> Option<Answer> {
    let end = results.iter().position(|byte| *byte == b'\n')?;
    let line = std::str::from_utf8(&results[..end]).ok()?;
    let status = line.strip_prefix("status ")?.parse().ok()?;
    Some(Answer { status, files: results[end + 1..].to_vec() })
}

/// Where a file of the archive belongs: what is fetched comes back by the name that it was asked for by.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// The archive ends in the middle.
    #[error("the lab's files came back broken")]
    Broken(#[source] io::Error),
    /// The command left none of that name.
    #[error("the command left no file {0:?} in the lab")]
    Missing(String),
    /// What it left of that name is a directory or a link.
    #[error("{0:?} is no regular file in the lab")]
    NoFile(String),
    /// It cannot be written here.
    #[error("write {path:?}")]
    Write {
        /// Its path here.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// Writes the files called `names` into the working directory, under their last names.
///
/// # Errors
/// [`FetchError`]; files before the one that failed are there.
pub fn fetch(mut archive: &[u8], names: &[String]) -> Result<(), FetchError> {
    let mut missing = names.to_vec();
    while !missing.is_empty() {
        let reader = cpio::newc::Reader::new(archive).map_err(FetchError::Broken)?;
        if reader.entry().is_trailer() {
            return Err(FetchError::Missing(missing.swap_remove(0)));
        }
        let name = reader.entry().name().to_owned();
        // The lab is not trusted to name files here.
        let wanted = missing.iter().position(|wanted| plain(wanted) == plain(&name));
        archive = match wanted.map(|place| missing.swap_remove(place)) {
            Some(name) => {
                let path = PathBuf::from(name.rsplit('/').next().unwrap_or_default());
                const KIND: u32 = 0o170_000;
                const REGULAR: u32 = 0o100_000;
                if reader.entry().mode() & KIND != REGULAR {
                    return Err(FetchError::NoFile(name));
                }
                let mut reader = reader;
                let mut bytes = Vec::new();
                reader.read_to_end(&mut bytes).map_err(FetchError::Broken)?;
                write_whole(&path, &bytes).map_err(|source| FetchError::Write { path, source })?;
                reader.finish().map_err(FetchError::Broken)?
            }
            None => reader.finish().map_err(FetchError::Broken)?,
        };
    }
    Ok(())
}

/// Under another name first, so that what has the name is whole.
fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut unfinished = path.as_os_str().to_owned();
    unfinished.push(".part");
    let written = std::fs::write(&unfinished, bytes);
    let renamed = written.and_then(|()| std::fs::rename(&unfinished, path));
    if renamed.is_err() {
        // It is of no use to anybody.
        let _ = std::fs::remove_file(&unfinished);
    }
    renamed
}

fn plain(name: &str) -> &str {
    name.trim_start_matches("./").trim_start_matches('/')
}

/// Becomes the program `words`, which dies with the process `parent`.
///
/// # Errors
/// If that is not the parent, or the program cannot be started.
pub fn become_machine(parent: u32, words: &[String]) -> io::Error {
    use std::os::unix::process::CommandExt;

    use rustix::process::{Signal, getppid, set_parent_process_death_signal};
    if let Err(error) = set_parent_process_death_signal(Some(Signal::KILL)) {
        return error.into();
    }
    // It may have ended before.
    let is_parent = getppid().is_some_and(|pid| u32::try_from(pid.as_raw_pid()) == Ok(parent));
    match words.split_first() {
        Some((program, arguments)) if is_parent => Command::new(program).args(arguments).exec(),
        _ => io::Error::other("--machine-of is for the program itself"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_a_status_and_an_archive() {
        let answer = parse(b"status 3\narchive").unwrap();
        assert_eq!((answer.status, answer.files.as_slice()), (3, &b"archive"[..]));
        for nonsense in [&b""[..], b"status 3", b"status\n", b"status 256\n", b"status x\n", b"\n"]
        {
            assert!(parse(nonsense).is_none(), "{nonsense:?}");
        }
    }

    #[test]
    fn files_that_are_not_there_are_named() {
        let mut archive = images::archive::Archive::default();
        archive.file("/other", b"1");
        let archive = archive.finish();
        let error = fetch(&archive, &["wanted".into()]).unwrap_err();
        assert_eq!(error.to_string(), "the command left no file \"wanted\" in the lab");
        let mut directory = images::archive::Archive::default();
        directory.directory("/wanted");
        let error = fetch(&directory.finish(), &["wanted".into()]).unwrap_err();
        assert_eq!(error.to_string(), "\"wanted\" is no regular file in the lab");
        assert!(fetch(&archive[..20], &["wanted".into()]).is_err());
        assert!(fetch(&[], &[]).is_ok());
    }
}
