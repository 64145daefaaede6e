//! A machine that is kept running.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::Child;

use super::{Outcome, cleanslate, finish, machine_of, signal, temp_dir};

/// A machine that is kept running for clients of its socket.
pub struct Held {
    child: Option<Child>,
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
        let mut child = cleanslate(&[&basic[..], arguments].concat()).spawn().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        // After the verdict the machine is there for others.
        let verdict = stdout.lines().map_while(Result::ok).find(|line| line.contains("clean: "));
        assert_eq!(verdict.as_deref(), Some("clean: 1 life, no findings"));
        Self { child: Some(child), path, _dir: dir }
    }

    /// The program as it was started: the caller of the jailed process.
    pub fn child(&self) -> &Child {
        self.child.as_ref().expect("it runs")
    }

    /// The number of the process that runs the machine.
    pub fn process(&self) -> u32 {
        machine_of(self.child())
    }

    /// Ends the machine as Ctrl-C does.
    #[track_caller]
    pub fn end(mut self) {
        let child = self.child.take().unwrap();
        signal(&child, rustix::process::Signal::INT);
        finish(child, "cleanslate run --hold".into()).expect_status(0);
        assert!(!self.path.exists(), "the socket was left behind");
    }
}

impl Held {
    /// Waits for an end that somebody else has brought about.
    #[track_caller]
    pub fn outcome(mut self) -> Outcome {
        finish(self.child.take().expect("it runs"), "cleanslate run --hold".into())
    }
}

impl Drop for Held {
    /// A test that failed leaves no machine behind.
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
