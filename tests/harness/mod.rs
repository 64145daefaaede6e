//! Runs the built program and shows everything about a run that did not go as expected.

pub mod agent;
pub mod api;
pub mod bochs;
pub mod browser;
pub mod client;
pub mod guest;
pub mod held;
pub mod holdings;
pub mod lab;
pub mod page_server;
pub mod process;
pub mod vm;
pub mod vsock_guest;

use std::fmt;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;

/// Longest time that any run may take; far above what it needs, so that a hang ends and is seen.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// The variable that names a directory for traces of system calls: each process that a test starts is then traced into it.
pub const TRACES: &str = "CLEANSLATE_TRACES";

/// What a run of the program left.
pub struct Outcome {
    command: String,
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
    /// Fails the test unless the program ended with `status`.
    #[track_caller]
    pub fn expect_status(self, status: i32) -> Self {
        assert_eq!(self.status, Some(status), "{self}");
        self
    }

    /// Fails the test unless stdout contains `text`.
    #[track_caller]
    pub fn expect_stdout(self, text: &str) -> Self {
        assert!(self.stdout.contains(text), "stdout lacks {text:?}: {self}");
        self
    }

    /// Fails the test unless stderr contains `text`.
    #[track_caller]
    pub fn expect_stderr(self, text: &str) -> Self {
        assert!(self.stderr.contains(text), "stderr lacks {text:?}: {self}");
        self
    }

    /// Fails the test unless stderr is one line.
    #[track_caller]
    pub fn expect_one_line_of_stderr(self) -> Self {
        assert_eq!(self.stderr.trim_end().lines().count(), 1, "{self}");
        self
    }

    /// stdout as one JSON object.
    #[track_caller]
    pub fn json(&self) -> Value {
        match serde_json::from_str(&self.stdout) {
            Ok(value) => value,
            Err(error) => panic!("stdout is no JSON ({error}): {self}"),
        }
    }
}

/// The program with arguments, not yet started. Fails loudly on a machine without KVM: nothing here can be shown there.
#[track_caller]
pub fn cleanslate(arguments: &[&str]) -> Command {
    assert!(Path::new("/dev/kvm").exists(), "these tests need /dev/kvm; this machine has none");
    let program = env!("CARGO_BIN_EXE_cleanslate");
    let mut command = match std::env::var_os(TRACES) {
        Some(directory) => traced(program, Path::new(&directory)),
        None => Command::new(program),
    };
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// `program` under strace, which writes a file for each thread: numbers instead of names, and no data. The tracer is the
/// child's child, so that signals meant for the program reach it; it holds the pipes of the child, so that whoever reads
/// these to their end finds the files complete.
fn traced(program: &str, directory: &Path) -> Command {
    static RUNS: AtomicU32 = AtomicU32::new(0);
    let run = RUNS.fetch_add(1, Ordering::Relaxed);
    let mut command = Command::new("strace");
    command.args(["-D", "-ff", "-qq", "-X", "raw", "-s", "0", "-o"]);
    command.arg(directory.join(format!("run{run}"))).arg(program);
    command
}

/// Runs the program to its end.
#[track_caller]
pub fn run(arguments: &[&str]) -> Outcome {
    Started::new(cleanslate(arguments)).finish(&format!("cleanslate {}", arguments.join(" ")))
}

/// A program that runs. It is killed with the test that fails.
pub struct Started {
    pub child: Child,
}

impl Started {
    #[track_caller]
    pub fn new(mut command: Command) -> Self {
        Self { child: command.spawn().unwrap_or_else(|error| panic!("start {command:?}: {error}")) }
    }

    /// Waits for its end, and kills it when it takes for ever.
    #[track_caller]
    pub fn finish(self, command: &str) -> Outcome {
        self.finish_within(PATIENCE, command)
    }

    /// The same for what may take another time.
    #[track_caller]
    pub fn finish_within(mut self, patience: Duration, command: &str) -> Outcome {
        let stdout = read_all(self.child.stdout.take());
        let stderr = read_all(self.child.stderr.take());
        let began = Instant::now();
        let status = loop {
            match self.child.try_wait().expect("wait for a child") {
                Some(status) => break status,
                None if began.elapsed() > patience => {
                    let _ = self.child.kill();
                    break self.child.wait().expect("wait for a killed child");
                }
                None => std::thread::sleep(Duration::from_millis(2)),
            }
        };
        Outcome {
            command: command.into(),
            status: status.code(),
            stdout: stdout.join().expect("read stdout"),
            stderr: stderr.join().expect("read stderr"),
        }
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        // Has no effect on a child that was waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
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

/// Says that a test was not run, or fails it where `REQUIRE_ALL=1` demands that all are.
#[track_caller]
pub fn skipped(reason: &str) {
    let required = std::env::var_os("REQUIRE_ALL").is_some_and(|value| value == "1");
    assert!(!required, "not run: {reason}");
    eprintln!("NOT RUN: {reason}");
}

/// Sends `signal` to a child.
pub fn signal(child: &Child, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_child(child);
    rustix::process::kill_process(pid, signal).expect("signal a child");
}

/// The number of the jailed process that runs `child`'s machine; waits until there is one. It is the child of `child` that
/// has a second number, in a namespace of its own.
#[track_caller]
pub fn machine_of(child: &Child) -> u32 {
    machine_of_process(child.id())
}

/// As [`machine_of`], for a program by its number.
#[track_caller]
pub fn machine_of_process(program: u32) -> u32 {
    let parent = program.to_string();
    let mut found = None;
    eventually("there is a process for the machine", || {
        let pids = std::fs::read_dir("/proc").unwrap().filter_map(|entry| {
            entry.unwrap().file_name().to_str().and_then(|name| name.parse::<u32>().ok())
        });
        found = pids.into_iter().find(|pid| {
            let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            let values = |name| {
                let line = status.lines().find_map(|line| line.strip_prefix(name));
                line.unwrap_or_default().split_whitespace()
            };
            values("PPid:").eq([parent.as_str()]) && values("NSpid:").count() == 2
        });
        found.is_some()
    });
    found.unwrap()
}

/// Waits until `condition` holds; fails the test when it never does.
#[track_caller]
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let began = Instant::now();
    while !condition() {
        assert!(began.elapsed() < PATIENCE, "never happened: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A directory that is gone with the test, unless the test failed to remove something it promised to.
pub fn temp_dir() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("cleanslate-test-").tempdir().expect("make a directory")
}

/// Writes a file into `dir` and returns its path.
pub fn file(dir: &tempfile::TempDir, name: &str, bytes: &[u8]) -> PathBuf {
    let path = dir.path().join(name);
    std::fs::write(&path, bytes).expect("write a file");
    path
}
