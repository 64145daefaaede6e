//! The DMA audit: walks every chain that a guest posts on every queue of every device, whether or not the device has taken it
//! yet, and says what is wrong with the buffers.
//!
//! `rules` is what the specification says of each queue, `queue` follows chains, `spans` knows which memory is in use,
//! `lines` what happens in cache lines meanwhile, `log` keeps what was found. The audit changes nothing: what a device makes
//! of a bad chain is its own affair. Chains are looked at when a queue is notified, and when its device takes one; until it
//! gives a chain back, the device has its memory. A guest that changes a descriptor in between shows each of the two another
//! chain, and hurts itself alone: everything is copied once, then checked, and bounded by the sizes of queues.
//!
//! A driver that overlaps buffers is told of it; the second of them is not watched any further.

pub mod log;

mod auditor;
mod books;
mod lines;
mod queue;
mod rules;
mod spans;

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;
use virtio_queue::Queue;

use self::auditor::Auditor;
use self::log::{Level, Violation};
use crate::memory::GuestRam;
use crate::words::plural;

/// What the audit is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum AuditMode {
    /// Nobody looks
    #[default]
    Off,
    /// What no driver may do is a finding; what else is worth knowing is told
    Report,
    /// What ours does not do either is a finding too: it shares no cache line with a device
    Strict,
}

impl AuditMode {
    /// Violations of this level are findings.
    pub fn forbids(self, level: Level) -> bool {
        match self {
            Self::Off => false,
            Self::Report => level == Level::Must,
            Self::Strict => level != Level::Observed,
        }
    }
}

/// The audit of one machine. Its clones are the same one.
#[derive(Clone, Debug)]
pub struct DmaAudit(Arc<Mutex<Auditor>>);

/// The part of the audit that a transport speaks to.
#[derive(Clone, Debug)]
pub struct DeviceAudit {
    audit: DmaAudit,
    device: usize,
}

/// The part of the audit that a ring speaks to.
#[derive(Clone, Debug)]
pub struct QueueAudit {
    audit: DmaAudit,
    device: usize,
    queue: u16,
}

/// What was audited, and what was found in all lives.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditSummary {
    /// Chains that were looked at.
    pub chains: u64,
    /// Buffers in them.
    pub buffers: u64,
    /// Buffers that were not watched, since too many were in flight.
    pub unwatched: u64,
    /// Violations that no driver may make.
    pub must: u64,
    /// Violations that our agent's driver does not make.
    pub ours: u64,
    /// What else was seen.
    pub observed: u64,
    /// Each kind of violation on each queue once.
    pub violations: Vec<Violation>,
}

impl AuditSummary {
    /// What is told, but is no finding.
    pub fn not_findings(&self, mode: AuditMode) -> impl Iterator<Item = &Violation> {
        self.violations.iter().filter(move |violation| !mode.forbids(violation.level))
    }
}

impl fmt::Display for AuditSummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { chains, buffers, unwatched, must, ours, observed, violations } = self;
        let chains = plural(*chains as usize, "chain", "chains");
        let buffers = plural(*buffers as usize, "buffer", "buffers");
        write!(f, "DMA audit: {chains} with {buffers}")?;
        match violations.as_slice() {
            [] => f.write_str(", nothing wrong")?,
            _ => write!(f, "; violations: {must} must, {ours} ours, {observed} observed")?,
        }
        match unwatched {
            0 => Ok(()),
            _ => write!(f, "; {unwatched} not watched, since too many were in flight"),
        }
    }
}

impl DmaAudit {
    /// An audit of a machine with this RAM.
    pub fn new(ram: GuestRam) -> Self {
        Self(Arc::new(Mutex::new(Auditor::new(ram))))
    }

    /// Adds a device of this type.
    pub fn add_device(&self, device_type: u32) -> DeviceAudit {
        DeviceAudit { audit: self.clone(), device: self.lock().add_device(device_type) }
    }

    /// The machine was reset: what comes belongs to the next life.
    pub fn begin_life(&self) {
        self.lock().books.log.begin_life();
    }

    /// What was found in lives that are over, once.
    pub fn take_ended(&self) -> Vec<Violation> {
        self.lock().books.log.take_ended()
    }

    /// What was found up to now, in this life too, once. Looks at the lines that devices have at the moment.
    pub fn take_all(&self) -> Vec<Violation> {
        let mut auditor = self.lock();
        auditor.check_lines();
        auditor.books.log.begin_life();
        auditor.books.log.take_ended()
    }

    /// What was found in all lives up to now.
    pub fn summary(&self) -> AuditSummary {
        let mut auditor = self.lock();
        auditor.check_lines();
        auditor.books.summary()
    }

    fn lock(&self) -> MutexGuard<'_, Auditor> {
        // As with devices: a panic has ended the process.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl DeviceAudit {
    /// The driver has set the device up with these features and queues.
    pub fn begin(&self, features: u64, queues: &[Queue]) {
        let indirect = features & 1 << VIRTIO_RING_F_INDIRECT_DESC != 0;
        let mut auditor = self.audit.lock();
        auditor.begin(self.device, indirect, queues);
        auditor.look_at_all(self.device);
    }

    /// Looks at what was posted on any queue.
    pub fn look(&self) {
        self.audit.lock().look_at_all(self.device);
    }

    /// The device has let go of its driver.
    pub fn end(&self) {
        self.audit.lock().end(self.device);
    }

    /// The part of one queue.
    pub fn queue(&self, queue: u16) -> QueueAudit {
        QueueAudit { audit: self.audit.clone(), device: self.device, queue }
    }
}

impl QueueAudit {
    /// Looks at what was posted.
    pub fn look(&self) {
        self.audit.lock().look(self.device, self.queue);
    }

    /// The device has finished with the chain that begins at `head`, and is about to say so.
    pub fn release(&self, head: u16) {
        self.audit.lock().release(self.device, self.queue, head);
    }
}

#[cfg(test)]
mod tests;
