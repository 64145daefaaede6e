//! What a machine's process says of itself, a line each: written by `run --json-lines`, read by a soak.

use agent_protocol::{Cause, Report};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::device::virtio::audit::AuditSummary;
use crate::device::vsock::VsockStats;
use crate::kvm::host::HostInfo;
use crate::lifecycle::Trace;
use crate::schedule::Moment;
use crate::verify;

/// One line.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "line", rename_all = "kebab-case")]
pub enum Line {
    /// Before the machine runs, what the user should know: such as how its jail is weaker than it should be.
    Notice {
        /// In words.
        text: String,
    },
    /// The machine runs.
    Machine(Machine),
    /// A life is over.
    Life(Life),
    /// The last: "clean", "findings", or none if it was interrupted.
    Verdict {
        /// The verdict.
        verdict: Option<String>,
    },
    /// After `--hold`: what the machine has seen of its guest in all its time.
    Held(Box<Held>),
    /// Instead of the last: the machine's process is gone, or the host failed.
    End {
        /// How.
        how: End,
        /// In words.
        detail: String,
    },
}

/// What runs the machine.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Machine {
    /// The host.
    pub host: HostInfo,
    /// What became of the policy for performance counters, in words.
    pub pmu: String,
    /// Findings that this host cannot show.
    pub unchecked: Vec<String>,
}

/// One life.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Life {
    /// Its number; the first is 1.
    pub life: u32,
    /// Why it began. None if nobody knows, since it ended before it was told of.
    pub cause: Option<Cause>,
    /// In the middle of what.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub moment: Option<Moment>,
    /// Microseconds to the agent's hello.
    pub hello_us: Option<u64>,
    /// Its performance counters, in a word.
    pub pmu: Option<String>,
    /// How many NMIs it had.
    pub nmis: Option<u32>,
    /// What was found in it.
    pub findings: Vec<Found>,
    /// For explaining that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub evidence: Option<Box<Evidence>>,
}

impl Life {
    /// The same without what explains it.
    pub fn without_evidence(&self) -> Self {
        let Self { life, cause, moment, hello_us, nmis, .. } = *self;
        let (pmu, findings) = (self.pmu.clone(), self.findings.clone());
        Self { life, cause, moment, hello_us, pmu, nmis, findings, evidence: None }
    }
}

/// A finding of one life; see [`verify::Finding`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Found {
    /// Stable name.
    pub name: String,
    /// What was seen.
    pub detail: String,
}

/// What goes with a finding.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Evidence {
    /// The report of the life before.
    pub before: Value,
    /// The life with its report and its residue.
    pub life: Value,
    /// The end of the guest's console.
    pub console: Vec<String>,
    /// What was done to the machine lately, and when.
    pub trace: Vec<String>,
}

impl Evidence {
    /// Collects it.
    pub fn new(
        before: Option<Report>,
        life: &verify::Life,
        console: Vec<String>,
        trace: &Trace,
    ) -> Self {
        // Plain data: it always becomes JSON.
        let json = |value: Result<Value, serde_json::Error>| value.unwrap_or_default();
        let (before, life) = (json(serde_json::to_value(before)), json(serde_json::to_value(life)));
        Self { before, life, console, trace: trace.lines() }
    }
}

/// What a machine has seen of its guest.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Held {
    /// By the DMA audit, if there was one.
    pub dma_audit: Option<AuditSummary>,
    /// Rules that the guest broke, in words.
    pub offences: Vec<String>,
    /// What the vsock device counted.
    pub vsock: VsockStats,
}

/// How a machine's process ended if it was not by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum End {
    /// Its control group had no more memory.
    OutOfMemory,
    /// By a signal.
    Killed,
    /// It made a system call that its filter forbids.
    ForbiddenCall,
    /// The host failed, or was asked for something impossible.
    Failed,
}
