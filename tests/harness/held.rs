//! A machine that is kept running.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::Duration;

use agent_protocol::AGENT_PORT;
use vmm::agent::{Agent, AgentError};

use super::holdings::Holdings;
use super::{Outcome, Started, cleanslate, eventually, machine_of, signal, temp_dir};

/// Connects to the agent of life `life` through the socket at `path`; waits until that has begun.
#[track_caller]
pub fn agent_at(path: &Path, life: u32) -> Agent {
    let mut found = None;
    eventually("the agent greets", || {
        // A connection to the life before may be closed at any point.
        found = connect(path).ok().filter(|agent| agent.hello().life == life);
        found.is_some()
    });
    found.unwrap()
}

fn connect(path: &Path) -> Result<Agent, AgentError> {
    const PATIENCE: Duration = Duration::from_secs(60);
    let mut stream = UnixStream::connect(path).map_err(AgentError::Io)?;
    writeln!(stream, "CONNECT {AGENT_PORT}").map_err(AgentError::Io)?;
    // Byte by byte: what comes behind the line is the agent's.
    let mut answer = Vec::new();
    while !answer.ends_with(b"\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).map_err(AgentError::Io)?;
        answer.extend(byte);
    }
    assert!(answer.starts_with(b"OK "), "{answer:?}");
    Agent::greet(stream, PATIENCE)
}

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

    /// A conversation with the agent of life `life`, which any client of the socket can have.
    #[track_caller]
    pub fn agent(&self, life: u32) -> Agent {
        agent_at(&self.path, life)
    }

    /// Fails unless the machine comes to hold no more than `before`: memory within what an allocator keeps for later.
    #[track_caller]
    pub fn expect_no_more(&self, before: Holdings) {
        const SLACK_KIB: u64 = 256;
        // The vsock device's interrupt gets its eventfd when it is raised first: in an agent that was never idle, that is later.
        // No other device of an agent's has an interrupt that it lets through.
        const INTERRUPTS: usize = 1;
        let now = || Holdings::of(self.process());
        eventually("descriptors are let go of", || {
            now().descriptors <= before.descriptors + INTERRUPTS
        });
        let now = now();
        assert_eq!(now.threads, before.threads);
        assert!(now.resident_kib <= before.resident_kib + SLACK_KIB, "{before:?} became {now:?}");
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
