//! Runs the built program, and looks for what it left behind.

pub mod probe;
pub mod raw;
pub mod runner;

use std::ffi::OsStr;
use std::fmt;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

/// Longest time that anything in a test may take; far above what it needs, so that a hang ends and is seen.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Waits for a signal, but not for ever, should the test that was to send it have failed.
pub fn pause() -> ! {
    let began = Instant::now();
    while began.elapsed() < 2 * PATIENCE {
        std::thread::sleep(PATIENCE);
    }
    std::process::exit(99);
}

/// What a run of the program left.
pub struct Outcome {
    pub command: String,
    pub status: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { command, status, stdout, stderr } = self;
        write!(
            f,
            "$ {command}\nstatus: {status:?}\n--- stdout\n{stdout}\n--- stderr\n{stderr}\n---"
        )
    }
}

impl Outcome {
    #[track_caller]
    pub fn expect_status(self, status: i32) -> Self {
        assert_eq!(self.status, Some(status), "{self}");
        self
    }

    #[track_caller]
    pub fn expect_stdout(self, text: &str) -> Self {
        assert!(self.stdout.contains(text), "stdout lacks {text:?}: {self}");
        self
    }

    /// One line that contains `text`; with an empty text, nothing at all.
    #[track_caller]
    pub fn expect_stderr(self, text: &str) -> Self {
        let lines = usize::from(!text.is_empty());
        assert_eq!(self.stderr.lines().count(), lines, "{self}");
        assert!(self.stderr.contains(text), "stderr lacks {text:?}: {self}");
        self
    }
}

/// A name for a jail that no other test uses.
pub fn new_id() -> String {
    use std::sync::atomic::{AtomicU32, Ordering};
    static COUNT: AtomicU32 = AtomicU32::new(0);
    format!("e2e-{}-{}x", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed))
}

/// The program with arguments, not yet started.
pub fn jailer(arguments: &[&str]) -> Command {
    let mut command = Command::new(runner::program());
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Runs the program to its end.
#[track_caller]
pub fn run(arguments: &[&str]) -> Outcome {
    finish(jailer(arguments))
}

/// Runs what a probe does in a jail with these flags.
#[track_caller]
pub fn run_probe(id: &str, flags: &[&str], what: &[&str]) -> Outcome {
    finish(jail_probe(id, flags, what))
}

/// A jail with these flags for a probe, not yet started.
pub fn jail_probe(id: &str, flags: &[&str], what: &[&str]) -> Command {
    let probe = runner::this_program();
    let mut command = jailer(&["--id", id]);
    command.args(flags).arg("--").arg(probe).args(["probe", id]).args(what);
    command
}

/// Runs a command to its end, and kills it when it takes for ever.
#[track_caller]
pub fn finish(command: Command) -> Outcome {
    finish_within(PATIENCE, command)
}

/// As [`finish`], with another patience.
#[track_caller]
pub fn finish_within(patience: Duration, mut command: Command) -> Outcome {
    let words = [command.get_program()].into_iter().chain(command.get_args());
    let words = words.map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" ");
    let mut child = command.spawn().unwrap_or_else(|error| panic!("start {words}: {error}"));
    let stdout = read_all(child.stdout.take());
    let stderr = read_all(child.stderr.take());
    let status = wait(&mut child, patience);
    let command = words;
    let [stdout, mut stderr] = [stdout, stderr].map(|reader| reader.join().unwrap());
    if !rustix::process::geteuid().is_root() {
        // Somebody who is in more groups than one is told that they stay.
        stderr = stderr
            .lines()
            .filter(|line| !line.contains("weaker"))
            .map(|line| format!("{line}\n"))
            .collect();
    }
    Outcome { command, status, stdout, stderr }
}

/// Waits for a child's end, and kills it when it takes for ever; `None` if it was ended by a signal.
fn wait(child: &mut Child, patience: Duration) -> Option<i32> {
    let began = Instant::now();
    let mut is_killed = false;
    loop {
        match child.try_wait().expect("wait for a child") {
            Some(status) if is_killed => {
                eprintln!("it never ended and was killed");
                return status.code();
            }
            Some(status) => return status.code(),
            None if began.elapsed() > patience && !is_killed => {
                is_killed = true;
                child.kill().expect("kill a child");
            }
            None => std::thread::sleep(Duration::from_millis(2)),
        }
    }
}

/// Reads beside the waiting, so that a full pipe stops nobody.
fn read_all(stream: Option<impl Read + Send + 'static>) -> std::thread::JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut stream) = stream {
            let _ = stream.read_to_end(&mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// A started jail whose probe has said its first line.
pub struct Started {
    pub child: Child,
    pub first_line: String,
    stdout: BufReader<ChildStdout>,
}

impl Started {
    #[track_caller]
    pub fn new(mut command: Command) -> Self {
        let mut child = command.stderr(Stdio::inherit()).spawn().expect("start the program");
        let stdout = BufReader::new(child.stdout.take().expect("stdout is a pipe"));
        let mut started = Self { child, first_line: String::new(), stdout };
        started.first_line = started.next_line();
        started
    }

    /// What the probe says next; waits for it.
    #[track_caller]
    pub fn next_line(&mut self) -> String {
        let mut line = String::new();
        self.stdout.read_line(&mut line).expect("read stdout");
        assert!(!line.is_empty(), "the probe said nothing more");
        line.trim_end().into()
    }

    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).expect("signal a child");
    }

    /// Waits for the jailer's end; `None` if it was ended by a signal.
    pub fn wait(&mut self) -> Option<i32> {
        wait(&mut self.child, PATIENCE)
    }

    /// Waits until everybody who could write to stdout is dead; returns what they wrote after the first line.
    pub fn read_to_end(&mut self) -> String {
        let mut rest = String::new();
        self.stdout.read_to_string(&mut rest).expect("read stdout");
        rest
    }
}

/// Waits until `condition` holds; fails the test when it never does.
#[track_caller]
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let began = Instant::now();
    while !condition() {
        assert!(began.elapsed() < PATIENCE, "never happened: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// What there is of a jail with this name: control groups, and processes that have the name in their command line.
pub fn traces(id: &str) -> Vec<String> {
    let mut found = Vec::new();
    find_groups(Path::new("/sys/fs/cgroup"), id, &mut found);
    for entry in std::fs::read_dir("/proc").expect("read /proc").flatten() {
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        // The dead have none, even if nobody has waited for them yet.
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        if line.contains(id) {
            found.push(format!("{}: {line}", entry.path().display()));
        }
    }
    found
}

fn find_groups(dir: &Path, id: &str, found: &mut Vec<String>) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            if entry.file_name() == id {
                found.push(entry.path().display().to_string());
            }
            find_groups(&entry.path(), id, found);
        }
    }
}

/// Fails the test if there is anything left of a jail.
#[track_caller]
pub fn expect_no_traces(id: &str) {
    let found = traces(id);
    assert!(found.is_empty(), "left behind: {found:?}");
}

/// A directory that is gone with the test and that everybody may enter.
pub fn temp_dir() -> tempfile::TempDir {
    let dir = tempfile::Builder::new().prefix("jailer-test-").tempdir().expect("make a directory");
    std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o755)).unwrap();
    dir
}

/// A shell that is a dynamic program, and all that the loader takes to run it.
pub fn dynamic_shell() -> Vec<PathBuf> {
    let mut loader = Command::new("/lib64/ld-linux-x86-64.so.2");
    loader.args(["--list", "/bin/sh"]).stdout(Stdio::piped());
    let list = finish(loader).expect_status(0).stdout;
    let files = list.split_whitespace().filter(|word| word.starts_with('/'));
    ["/bin/sh"].into_iter().chain(files).map(PathBuf::from).collect()
}

/// What is in a directory, all the way down.
pub fn contents(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        found.push(entry.path());
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.extend(contents(&entry.path()));
        }
    }
    found
}

/// True if this host's control groups are of version 2.
pub fn groups_are_v2() -> bool {
    Path::new("/sys/fs/cgroup/cgroup.controllers").exists()
}

/// What a test says that has found a jail's process in a group of version 2.
pub const V2_SEEN: &str = "its group is of version 2";

/// The setting that allows a group so many bytes, on this host.
pub fn memory_setting(bytes: u64) -> String {
    format!("{}={bytes}", if groups_are_v2() { "memory.max" } else { "memory.limit_in_bytes" })
}

/// The setting that keeps a group from using a swap area instead of memory.
pub fn swap_setting() -> &'static str {
    if groups_are_v2() { "memory.swap.max=0" } else { "memory.swappiness=0" }
}

/// Says that a part of a test was not run, or fails it where `REQUIRE_ALL=1` demands that all are.
#[track_caller]
pub fn not_run(reason: &str) {
    let required = std::env::var_os("REQUIRE_ALL").is_some_and(|value| value == "1");
    assert!(!required, "not run: {reason}");
    println!("NOT RUN: {reason}");
}
