//! A machine that is kept running.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::Child;

use super::{Outcome, Started, cleanslate, machine_of, signal, temp_dir};

/// A machine that is kept running for clients of its socket.
pub struct Held {
    program: Started,
    pub path: PathBuf,
    _dir: tempfile::TempDir,
}

impl Held {
    #[track_caller]
    pub fn start() -> Self {
        Self::start_with(&[])
    }

    /// With more arguments for `cleanslate run`.
    #[track_caller]
    pub fn start_with(arguments: &[&str]) -> Self {
        let dir = temp_dir();
        let path = dir.path().join("vsock");
        let basic = ["run", "--hold", "--uds", path.to_str().unwrap()];
        let mut program = Started::new(cleanslate(&[&basic[..], arguments].concat()));
        let stdout = BufReader::new(program.child.stdout.take().unwrap());
        // After the verdict the machine is there for others.
        let verdict = stdout.lines().map_while(Result::ok).find(|line| line.contains("clean: "));
        assert_eq!(verdict.as_deref(), Some("clean: 1 life, no findings"));
        Self { program, path, _dir: dir }
    }

    /// The program as it was started: the caller of the jailed process.
    pub fn child(&self) -> &Child {
        &self.program.child
    }

    /// The number of the process that runs the machine.
    pub fn process(&self) -> u32 {
        machine_of(self.child())
    }

    /// Ends the machine as Ctrl-C does.
    #[track_caller]
    pub fn end(self) {
        signal(self.child(), rustix::process::Signal::INT);
        self.program.finish("cleanslate run --hold").expect_status(0);
        assert!(!self.path.exists(), "the socket was left behind");
    }

    /// Waits for an end that somebody else has brought about.
    #[track_caller]
    pub fn outcome(self) -> Outcome {
        self.program.finish("cleanslate run --hold")
    }
}
