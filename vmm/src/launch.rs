//! Launches: jailed sandboxes by the hundred, each of which does a job of the agent's.
//!
//! This process is the coordinator. It has one thread, since it makes processes by copying itself, and one loop that waits for
//! all of its sandboxes at once. It runs no machine, and believes nothing that comes from a sandbox but what the kernel says of it.

mod cell;
pub mod coordinator;
pub mod figures;
pub mod idle;
pub mod memory;
pub mod report;

mod watch;

use std::time::Duration;

use jailer::Running;

use crate::sandbox::Sandbox;

/// Where a sandbox that takes a job comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Origin {
    /// Each is made for one job, and ends after it.
    Cold,
    /// Each is a copy of one machine that was kept as a snapshot, and ends after its job.
    Snapshot,
    /// It is reset in place after each job, and takes the next if it proves that nothing is left.
    Recycle,
}

impl Origin {
    /// The name that options and JSON use.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cold => "cold",
            Self::Snapshot => "snapshot",
            Self::Recycle => "recycle",
        }
    }
}

/// What is to be done.
#[derive(Clone, Debug)]
pub struct Plan {
    /// How many jobs.
    pub count: u64,
    /// How many are done at once.
    pub concurrency: usize,
    /// By what.
    pub origin: Origin,
    /// How many sandboxes wait for jobs beside those that do some.
    pub warm: usize,
    /// The job's name.
    pub job: String,
    /// What it is given.
    pub input: Vec<u8>,
    /// How long a sandbox may take for anything.
    pub timeout: Duration,
}

/// Makes a sandbox of this number in a jail.
pub type Starter<'a> =
    &'a mut dyn FnMut(u64) -> Result<(Running, Sandbox), Box<dyn std::error::Error>>;
