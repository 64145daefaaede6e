//! A running machine: its parts, its event loop, and the handle by which the rest of the program steers it.
//!
//! One thread runs the event loop and owns everything; each vCPU has a thread that runs guest code, has the devices answer
//! its accesses, and reports when it cannot go on. The handle sends commands and reads counters.

mod build;
mod config;
mod event_loop;
mod events;
mod interrupts;
mod pause;
mod pmu;
mod reset;
mod resources;
mod saved;
mod slots;
mod vcpu_thread;

use std::collections::VecDeque;
use std::fmt;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use agent_protocol::Cause;

pub use build::launch;
pub use config::{Config, ConfigError, MAX_MEM_MIB, MIN_MEM_MIB, MOST_DISKS, ResetPolicy};
pub use interrupts::Interrupts;
pub use resources::Resources;
pub use saved::{Description, GuestKind, MachineState, RamSource, Restore, RestoreError};

use crate::boot::BootError;
use crate::bus::{Bus, Shared, lock};
use crate::device::block::{Block, BlockStats, DiskError};
use crate::device::console::{Console, ConsoleTail};
use crate::device::ioapic::IoApic;
use crate::device::nmi_status::NmiStatus;
use crate::device::reset_ports::ResetControl;
use crate::device::rng::{Rng, RngStats};
use crate::device::virtio::VirtioDevice;
use crate::device::virtio::audit::DmaAudit;
use crate::device::virtio::bell::Bell;
use crate::device::virtio::mmio::Mmio;
use crate::device::vsock::{
    Acceptance, GuestPort, HostPort, Vsock, VsockConnector, VsockError, VsockStats,
};
use crate::fault::FaultError;
use crate::kvm::KvmError;
use crate::kvm::host::{HostInfo, KvmKind};
use crate::kvm::identity::HostIdentity;
use crate::kvm::pmu::PmuAbsence;
use crate::kvm::state::PowerOnState;
use crate::kvm::vm::Vm;
use crate::memory::paging::{PageServer, PagingError};
use crate::memory::{Backing, Memory, MemoryError};
use crate::snapshot::{FilesError, SnapshotError, SnapshotId, Summary, Targets};
use events::{EventReceiver, EventSender};
use vcpu_thread::VcpuThread;

/// Why a machine could not be built or go on: never the guest's doing.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// The configuration makes no sense.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The payload cannot be booted.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// Memory could not be had.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A page server could not be had.
    #[error(transparent)]
    Paging(#[from] PagingError),
    /// The faults on purpose cannot be seen on this machine.
    #[error(transparent)]
    Fault(#[from] FaultError),
    /// KVM refused something.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The vsock device could not be set up.
    #[error(transparent)]
    Vsock(#[from] VsockError),
    /// A snapshot is not one of a machine that could be here.
    #[error(transparent)]
    Restore(#[from] RestoreError),
    /// A snapshot could not be read.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// A file of a snapshot could not be opened.
    #[error(transparent)]
    Files(#[from] FilesError),
    /// A file cannot be a disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// A thread could not be confined.
    #[error(transparent)]
    Seccomp(#[from] jailer::seccomp::RestrictError),
    /// A thread, an eventfd or the event loop could not be had.
    #[error("{action}")]
    Host {
        /// What was asked of the host.
        action: &'static str,
        /// What it said.
        source: std::io::Error,
    },
}

impl MachineError {
    /// For `map_err`: says what was asked of the host.
    pub fn host(action: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Host { action, source }
    }
}

/// The machine's devices, as its buses and its event loop share them.
struct Devices {
    ports: Arc<Bus>,
    mmio: Arc<Bus>,
    ioapic: Arc<IoApic>,
    console: Shared<Console>,
    nmi_status: Shared<NmiStatus>,
    reset_control: Shared<ResetControl>,
    virtio: VirtioDevices,
    /// Whoever looks at the buffers of all of them.
    audit: Option<DmaAudit>,
}

/// The machine's virtio devices, each by its type and all alike.
#[derive(Clone)]
struct VirtioDevices {
    vsock: Shared<Mmio<Vsock>>,
    rng: Option<Shared<Mmio<Rng>>>,
    disks: Vec<Shared<Mmio<Block>>>,
    /// Those above in the order of their slots.
    all: Vec<AnyVirtioDevice>,
}

/// A virtio device, for what is the same with all of them.
type AnyVirtioDevice = Shared<Mmio<dyn VirtioDevice>>;

/// What the event loop owns. Fields are dropped in this order: vCPUs stop before KVM forgets the machine, and memory goes
/// last.
struct Machine {
    vcpus: Vec<(VcpuThread, PowerOnState)>,
    devices: Devices,
    vm: Vm,
    memory: Memory,
    /// RAM at power-on, until the first reset of a machine that began otherwise.
    boot: Option<Backing>,
    /// Who has RAM's pages until then, if that is another process.
    pages: Option<Arc<PageServer>>,
    /// The snapshot since which the written pages are noted, if they are.
    parent: Option<SnapshotId>,
    config: Config,
    life: u32,
    /// Why this life began.
    cause: Cause,
    /// The host, for those that a snapshot of the machine may be restored on.
    identity: HostIdentity,
    /// Since when nothing runs, because somebody wanted that.
    paused: Option<Instant>,
    /// Whether the guest of this life has said that it rests.
    rested: bool,
    inbox: Receiver<Message>,
    /// Messages that were looked at and left for later; they come before the inbox.
    kept: VecDeque<Message>,
    wake: Arc<Bell>,
    events: EventSender,
}

/// Everything that the event loop can be told.
enum Message {
    /// A vCPU stopped running guest code at this moment and is parked.
    VcpuStopped(Instant, VcpuStop),
    /// The owner of the [`Handle`] wants something.
    Command(Command),
}

/// Why a vCPU parked itself.
#[derive(Debug)]
enum VcpuStop {
    /// The guest asked for a reset.
    Reset(Cause),
    /// The guest turned the machine off.
    PowerOff,
    /// The guest does nothing more. It may run on.
    Rest,
    /// KVM cannot go on.
    Stuck(GuestStuck),
    /// The host failed.
    Failed(MachineError),
}

enum Command {
    Reset,
    NewLife(Cause, Instant),
    Nmi(NmiVia),
    ResetTransport,
    Pause,
    Resume,
    Snapshot(Targets, SnapshotKind),
    Stop,
}

/// How an NMI reaches a processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NmiVia {
    /// By the pin LINT1 of its local APIC, which the guest can mask.
    Pin,
    /// By a message, which it cannot.
    Message,
}

/// Why a guest cannot be run any further.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StuckReason {
    /// `KVM_EXIT_INTERNAL_ERROR` with this suberror; 1 is an instruction that KVM had to emulate and could not.
    InternalError(u32),
    /// The processor refused the guest's state, for this reason.
    FailEntry(u64),
    /// An exit that this monitor has no use for.
    Unexpected(String),
}

/// A guest that KVM cannot run any further.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestStuck {
    /// KVM's word for it.
    pub reason: StuckReason,
    /// Which vCPU.
    pub vcpu: u8,
    /// Its instruction pointer.
    pub rip: u64,
    /// The instruction bytes there; empty if the address leads nowhere.
    pub bytes: Vec<u8>,
}

impl fmt::Display for GuestStuck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.reason {
            StuckReason::InternalError(1) => write!(f, "KVM could not emulate an instruction")?,
            StuckReason::InternalError(suberror) => write!(f, "KVM internal error {suberror}")?,
            StuckReason::FailEntry(reason) => {
                write!(f, "the processor refused entry, reason {reason:#x}")?
            }
            StuckReason::Unexpected(exit) => write!(f, "unexpected exit {exit}")?,
        }
        write!(f, "; vCPU {} at rip {:#x}, bytes", self.vcpu, self.rip)?;
        match self.bytes.as_slice() {
            [] => f.write_str(" unreadable"),
            bytes => bytes.iter().try_for_each(|byte| write!(f, " {byte:02x}")),
        }
    }
}

/// What happened to a machine.
#[derive(Debug)]
pub enum Event {
    /// It was reset in place and runs again.
    Reset {
        /// Number of the life that began; the first is 1.
        life: u32,
        /// Why.
        cause: Cause,
        /// When the cause reached the monitor.
        at: Instant,
    },
    /// The agent has come to its last instructions, with marks in all registers. At most once in a life.
    Rested,
    /// It stands still as was wanted, until it is to go on.
    Paused,
    /// It goes on as was wanted.
    Resumed,
    /// A snapshot was wanted, and this became of it.
    Snapshot(Box<Result<Summary, CaptureError>>),
    /// An NMI was wanted, and this became of it.
    Nmi(NmiOutcome),
    /// It does not run any more. The last event.
    Stopped(Stop),
}

/// How much of RAM a snapshot is to have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SnapshotKind {
    /// All of it.
    Full,
    /// What was written since the last one, or since the one that the machine was restored from.
    Layer,
}

/// Why there is no snapshot of a machine, which is as it was.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// The machine runs.
    #[error("the machine has to be paused for a snapshot")]
    NotPaused,
    /// A layer, and nobody knows of what.
    #[error(
        "only a machine with --track-dirty-pages knows what was written since its last snapshot"
    )]
    NotTracked,
    /// A layer on nothing.
    #[error(
        "there is no snapshot of the machine yet that another one could build on: make a full one first"
    )]
    NoParent,
    /// KVM did not give something.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// It could not be written.
    #[error(transparent)]
    Write(#[from] SnapshotError),
}

/// What became of an NMI that was wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NmiOutcome {
    /// It was queued.
    Queued,
    /// The guest has masked the NMI pin of its local APIC (LINT1).
    Masked,
    /// The vCPU stopped before it could be queued: another event says why.
    VcpuStopped,
}

/// Why a machine stopped.
#[derive(Debug)]
pub enum Stop {
    /// The guest turned it off.
    PowerOff,
    /// The guest asked for a reset that the policy does not allow.
    Reset(Cause),
    /// The guest cannot be run further.
    Stuck(GuestStuck),
    /// SIGINT, SIGTERM or SIGHUP.
    Interrupted,
    /// The [`Handle`] asked for it.
    Requested,
    /// The host failed.
    Failed(MachineError),
}

/// What the guest did that no correct guest does, and what the devices did for it.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct GuestStats {
    /// Accesses to ports where there is no device. Kernels that look for old hardware make some.
    pub unclaimed_ports: u64,
    /// Accesses to addresses where there is neither RAM nor a device.
    pub unclaimed_addresses: u64,
    /// Writes to virtio registers that the specification forbids.
    pub refused_register_writes: u64,
    /// The vsock device's counters.
    pub vsock: VsockStats,
    /// The rng device's, if there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rng: Option<RngStats>,
    /// Those of each disk.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<BlockStats>,
}

impl GuestStats {
    /// Rules of virtio that the guest broke, in words; none for a correct guest.
    pub fn offences(&self) -> Vec<String> {
        let vsock = &self.vsock;
        let rng = self.rng.unwrap_or_default();
        let of_disks = |count: fn(&BlockStats) -> u64| self.disks.iter().map(count).sum::<u64>();
        let bad_chains = vsock.bad_chains + rng.bad_chains + of_disks(|disk| disk.bad_chains);
        let broken_rings =
            vsock.broken_rings + rng.broken_rings + of_disks(|disk| disk.broken_rings);
        [
            (self.refused_register_writes, "forbidden writes to device registers"),
            (bad_chains, "broken descriptor chains"),
            (broken_rings, "broken rings"),
            (vsock.bad_packets, "bad vsock packets"),
            (vsock.credit_violations, "vsock packets without credit"),
            (of_disks(|disk| disk.bad_requests), "bad disk requests"),
        ]
        .into_iter()
        .filter(|(count, _)| *count > 0)
        .map(|(count, what)| format!("{count} {what}"))
        .collect()
    }
}

/// Steers a machine from another thread. Dropping it stops the machine and waits for its end.
pub struct Handle {
    commands: Sender<Message>,
    wake: Arc<Bell>,
    events: EventReceiver,
    connector: VsockConnector,
    virtio: VirtioDevices,
    audit: Option<DmaAudit>,
    ports: Arc<Bus>,
    mmio: Arc<Bus>,
    console: ConsoleTail,
    host: Host,
    first_life: (u32, Cause),
    is_restored: bool,
    thread: Option<JoinHandle<()>>,
}

/// What the host is.
struct Host {
    info: HostInfo,
    kind: KvmKind,
    pmu_absence: PmuAbsence,
    clears_hwcr: bool,
}

impl Handle {
    /// Resets the machine in place. [`Event::Reset`] follows.
    pub fn reset(&self) {
        self.send(Command::Reset);
    }

    /// Counts a life that the guest has begun by itself, at this moment, without a reset of the machine. [`Event::Reset`] follows.
    pub fn note_new_life(&self, cause: Cause, at: Instant) {
        self.send(Command::NewLife(cause, at));
    }

    /// Queues an NMI on the first vCPU. [`Event::Nmi`] follows.
    pub fn inject_nmi(&self, via: NmiVia) {
        self.send(Command::Nmi(via));
    }

    /// Ends all vsock connections and has the device tell the guest that its transport was reset; see
    /// [`Vsock::reset_transport`].
    pub fn reset_transport(&self) {
        self.send(Command::ResetTransport);
    }

    /// Has nothing of the machine run any more: no vCPU and no device. Who talks to it waits. [`Event::Paused`] follows, also if it
    /// was paused already.
    pub fn pause(&self) {
        self.send(Command::Pause);
    }

    /// Has it go on. [`Event::Resumed`] follows, also if it was not paused.
    pub fn resume(&self) {
        self.send(Command::Resume);
    }

    /// Writes what the machine is to two files. It has to be paused, and stays so. [`Event::Snapshot`] follows.
    pub fn snapshot(&self, targets: Targets, kind: SnapshotKind) {
        self.send(Command::Snapshot(targets, kind));
    }

    /// Stops the machine. [`Event::Stopped`] follows.
    pub fn stop(&self) {
        self.send(Command::Stop);
    }

    fn send(&self, command: Command) {
        // If the event loop has ended, its last event says why, and there is nobody left to command.
        if self.commands.send(Message::Command(command)).is_ok() {
            self.wake.ring();
        }
    }

    /// The next event, or `None` after `timeout`.
    pub fn next_event(&self, timeout: Duration) -> Option<Event> {
        self.events.next(timeout)
    }

    /// Becomes readable with an event, and stays so until [`Handle::take_events`]. For whoever waits for other things as well; only
    /// if the configuration asks for it ([`Config::rings`]).
    pub fn events_ready(&self) -> Option<BorrowedFd<'_>> {
        self.events.ready()
    }

    /// All events that have come.
    pub fn take_events(&self) -> Vec<Event> {
        self.events.take()
    }

    /// Opens a vsock connection to a port of the guest.
    ///
    /// # Errors
    /// What the host says when it has no descriptor left.
    pub fn connect(&self, port: GuestPort) -> std::io::Result<UnixStream> {
        self.connector.connect(port)
    }

    /// Takes the guest's next vsock connection to a port of the host.
    ///
    /// # Errors
    /// As for [`Handle::connect`].
    pub fn expect(&self, port: HostPort, acceptance: Acceptance) -> std::io::Result<UnixStream> {
        self.connector.expect(port, acceptance)
    }

    /// The number of the life in which the machine was launched, and why that began: 1, unless it was restored.
    pub fn first_life(&self) -> (u32, Cause) {
        self.first_life
    }

    /// Whether it was restored.
    pub fn is_restored(&self) -> bool {
        self.is_restored
    }

    /// What the guest printed last.
    pub fn console(&self) -> &ConsoleTail {
        &self.console
    }

    /// What the guest did wrong so far.
    pub fn guest_stats(&self) -> GuestStats {
        let VirtioDevices { vsock, rng, disks, all } = &self.virtio;
        GuestStats {
            unclaimed_ports: self.ports.unclaimed(),
            unclaimed_addresses: self.mmio.unclaimed(),
            refused_register_writes: all.iter().map(|any| lock(any).refused_writes()).sum(),
            vsock: lock(vsock).device.stats(),
            rng: rng.as_ref().map(|rng| lock(rng).device.stats()),
            disks: disks.iter().map(|disk| lock(disk).device.stats()).collect(),
        }
    }

    /// The audit of its buffers, if there is one.
    pub fn dma_audit(&self) -> Option<&DmaAudit> {
        self.audit.as_ref()
    }

    /// What this host is.
    pub fn host_info(&self) -> &HostInfo {
        &self.host.info
    }

    /// What runs the guest.
    pub fn kvm_kind(&self) -> KvmKind {
        self.host.kind
    }

    /// Whether a reset clears HWCR here; only asked for machines that are looked at for residue.
    pub fn clears_hwcr(&self) -> bool {
        self.host.clears_hwcr
    }

    /// What made the guest's PMU absent.
    pub fn pmu_absence(&self) -> PmuAbsence {
        self.host.pmu_absence
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.stop();
        if let Some(thread) = self.thread.take() {
            // A panic of the event loop has already printed itself.
            let _ = thread.join();
        }
    }
}
