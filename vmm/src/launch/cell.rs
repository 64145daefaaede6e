//! A sandbox as the coordinator has it: its process, its socket, and what it is doing.

use std::time::{Duration, Instant};

use jailer::{End, Running};

use super::figures::Failure;
use crate::sandbox::Sandbox;

/// What a sandbox is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// It boots, or is reset in place; its agent's hello and the verdict are to come.
    Preparing,
    /// It waits for a job.
    Ready,
    /// It does the job of this launch.
    Working(u64),
    /// It was killed. Nothing that it says counts any more.
    Ending,
}

/// One sandbox.
#[derive(Debug)]
pub(super) struct Cell {
    pub running: Running,
    pub sandbox: Sandbox,
    pub stage: Stage,
    /// It has been in this life since then: before its process was made, or when it was told to recycle.
    pub began: Instant,
    /// Since when it does its job.
    pub handed: Instant,
    /// Jobs that it has done.
    pub jobs: u64,
    /// The socket did not take all of an order.
    pub waits_for_room: bool,
    /// How long it has been in this stage, as far as the coordinator was there to see it.
    pub waited: Duration,
}

impl Cell {
    pub fn enter(&mut self, stage: Stage) {
        (self.stage, self.waited) = (stage, Duration::ZERO);
    }
}

/// What the end of a process says that nobody had asked to end.
pub(super) fn judge_end(end: End) -> Failure {
    match end {
        End::Exited(status) => {
            Failure::new("exited", format!("its process ended, status {status}"))
        }
        End::Forbidden(call) => Failure::new(
            "forbidden-call",
            format!("its filter forbids a call that it made: {call}"),
        ),
        End::OutOfMemory => {
            Failure::new("out-of-memory", "it used more memory than its control group may".into())
        }
        End::Killed(signal) => Failure::new("killed", format!("it was killed by signal {signal}")),
    }
}
