//! What a sandbox is told to do, and what it answers.

use agent_protocol::{Cause, Report};
use serde::{Deserialize, Serialize};

use crate::verify::Finding;

/// What the machine's process is told. Each order gets one [`Answer`], in turn.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Order {
    /// Build the machine and let it run. The first order, and given once.
    Boot {
        /// Whether to wait for the agent's hello and to judge its first report. For guests that have one.
        greet: bool,
    },
    /// Have the agent do a job.
    Job {
        /// Which one.
        name: String,
        /// What it is given, up to [`agent_protocol::MAX_JOB_BYTES`].
        input: Vec<u8>,
    },
    /// Reset the machine in place and judge whether it came back clean: the next job may go in then. Only after a greeting.
    Recycle,
    /// Ask the agent for its report and judge it.
    Verdict,
    /// Have nothing of the machine run any more.
    Pause,
    /// Have it go on.
    Resume,
    /// Write what the machine, which is paused, is to two empty files that come with the order: one for its state, one for RAM.
    Snapshot {
        /// What of RAM was written since the last one, instead of all.
        layer: bool,
    },
    /// Reset the machine in place.
    Reset,
    /// Queue an NMI on the first vCPU.
    Nmi,
    /// Count what the guest did.
    Stats,
    /// The console's last lines.
    Console {
        /// How many.
        lines: u32,
    },
    /// What the DMA audit saw so far.
    DmaAudit,
    /// End the machine and the process.
    End,
}

/// What the machine's process says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Answer {
    /// The order was carried out.
    Done,
    /// To [`Order::Boot`] with a greeting, [`Order::Recycle`] and [`Order::Verdict`].
    Judged(Judged),
    /// To [`Order::Job`]: what came out of it.
    Job(Vec<u8>),
    /// To [`Order::Stats`] and [`Order::DmaAudit`]: a JSON object.
    Json(String),
    /// To [`Order::Console`].
    Console(Vec<String>),
    /// The order could not be carried out, for this reason. The machine is as it was.
    Refused(String),
    /// A life began without an order. It is no answer, and comes at any time.
    Reset {
        /// Its number.
        life: u32,
        /// Why it began.
        cause: Cause,
    },
    /// The last: the machine is over, whatever was ordered.
    Ended(Ended),
}

/// A life that was judged.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Judged {
    /// Its number.
    pub life: u32,
    /// Why it began.
    pub cause: Cause,
    /// Microseconds from its beginning to the agent's hello: from the order to boot in life 1, from the reset later.
    pub hello_us: Option<u64>,
    /// What was found. Empty: it is clean.
    pub findings: Vec<Found>,
    /// The agent's report, if it gave one.
    pub report: Option<Box<Report>>,
}

/// A finding on its way between processes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Found {
    /// [`Finding::name`].
    pub name: String,
    /// [`Finding::life`].
    pub life: u32,
    /// [`Finding::detail`].
    pub detail: String,
}

impl From<&Finding> for Found {
    fn from(finding: &Finding) -> Self {
        let Finding { name, life, detail } = finding;
        Self { name: (*name).into(), life: *life, detail: detail.clone() }
    }
}

/// Why a machine is over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ended {
    /// It was told to.
    Ordered,
    /// The guest turned it off.
    PowerOff,
    /// The guest asked for a reset that the policy does not allow.
    Reset(Cause),
    /// The guest cannot be run any further, in words.
    Stuck(String),
    /// A signal asked the process to end.
    Interrupted,
    /// The host failed, in words.
    Failed(String),
}
