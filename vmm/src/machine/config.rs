//! What a machine is made of, and which wishes cannot be fulfilled.

use std::path::PathBuf;

use agent_protocol::Cause;

use super::Restore;
use crate::boot::{self, BootError, Payload};
use crate::device::block::DiskConfig;
use crate::device::console::ConsoleOutput;
use crate::device::pmu::Shape;
use crate::device::reset_ports::{ACPI_POWER_OFF, ACPI_RESET_VALUE};
use crate::device::virtio::audit::AuditMode;
use crate::device::vsock::GuestCid;
use crate::fault::{Fault, FaultError, Faults};
use crate::kvm::Kvm;
use crate::kvm::host::KvmKind;
use crate::kvm::pmu::PmuPolicy;
use crate::kvm::template::CpuTemplate;
use crate::kvm::vm::max_vcpus;
use crate::layout::{self, VirtioSlot};

/// Smallest RAM, in MiB: boot data and a kernel need some.
pub const MIN_MEM_MIB: u64 = 4;
/// Largest RAM, in MiB (512 GiB).
pub const MAX_MEM_MIB: u64 = 512 * 1024;

/// What a Linux guest is told: to say little, since each letter on the console costs it an exit; to reset when it panics; and
/// not to look for a keyboard behind a controller that has none.
const LINUX_WORDS: &str = "console=ttyS0 quiet panic=-1 initcall_blacklist=i8042_init";

/// The most disks: one slot is for vsock, one for rng.
pub const MOST_DISKS: usize = layout::VIRTIO_SLOTS - 2;

/// What to do when the guest asks for a reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResetPolicy {
    /// Reset in place, however often.
    InPlace,
    /// Reset in place this many times, then stop.
    Limited(u32),
}

/// What a machine is made of.
#[derive(Clone, Debug)]
pub struct Config {
    /// What it boots.
    pub payload: Payload,
    /// The user's part of the kernel command line.
    pub command_line: String,
    /// RAM in MiB.
    pub mem_mib: u64,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// What of CPUID and of the MSRs its guests find changed.
    pub cpu_template: CpuTemplate,
    /// Performance counters.
    pub pmu: PmuPolicy,
    /// What they are if they are emulated.
    pub pmu_shape: Shape,
    /// How often their events happen; see [`crate::device::pmu::Pmu::new`].
    pub pmu_seed: u64,
    /// Whether its agent looks at all registers before anything else, for the residue check.
    pub looks_first: bool,
    /// What its resets leave out.
    pub faults: Faults,
    /// What to do when the guest asks for a reset.
    pub reset_policy: ResetPolicy,
    /// Where the console goes.
    pub console: ConsoleOutput,
    /// The guest's address on vsock.
    pub cid: GuestCid,
    /// Unix socket for host clients of the guest's vsock ports.
    pub vsock_path: Option<PathBuf>,
    /// Another one, of type `SOCK_SEQPACKET`, for clients that send messages. Only beside the first.
    pub vsock_messages_path: Option<PathBuf>,
    /// A virtio-rng device.
    pub rng: bool,
    /// Virtio-blk devices.
    pub disks: Vec<DiskConfig>,
    /// Notes which pages of RAM are written, for snapshots that hold only those.
    pub track_dirty_pages: bool,
    /// Every virtio device offers `VIRTIO_F_ACCESS_PLATFORM`.
    pub dma_platform: bool,
    /// What is looked for in the buffers that its guest posts.
    pub dma_audit: AuditMode,
    /// A snapshot that it begins from, instead of its payload.
    pub restore: Option<Restore>,
    /// It begins paused.
    pub starts_paused: bool,
    /// What whoever describes it wants to find in its snapshots again.
    pub note: String,
    /// A descriptor tells of its events: [`super::Handle::events_ready`].
    pub rings: bool,
    /// Every thread makes no system calls but those of its kind once the guest runs: for a process of its own.
    pub seccomp: bool,
}

/// A wish that cannot be fulfilled.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Too little or too much RAM.
    #[error("--mem {0} MiB is not between {MIN_MEM_MIB} and {MAX_MEM_MIB} MiB")]
    Memory(u64),
    /// Too many disks.
    #[error("--disk is given {0} times; a machine has {MOST_DISKS} disks at most")]
    Disks(usize),
    /// A Linux where only our own agent can run.
    #[error(
        "this KVM has no hardware virtualization, and its emulator lacks instructions that Linux uses: use `cleanslate lab -- \
         run --guest linux`, or another host"
    )]
    SoftwareKvm,
    /// No or too many vCPUs.
    #[error(
        "--vcpus {wanted} is not between 1 and {max}, the most that this KVM gives one machine"
    )]
    Vcpus {
        /// The wish.
        wanted: u32,
        /// The limit.
        max: u8,
    },
}

impl Config {
    /// A machine of one vCPU and `mem_mib` MiB that boots `payload`, with nothing that has to be asked for and no performance
    /// counters. A guest that asks for a reset gets it, in place.
    pub fn new(payload: Payload, mem_mib: u64) -> Self {
        Self {
            payload,
            command_line: String::new(),
            mem_mib,
            vcpus: 1,
            cpu_template: CpuTemplate::default(),
            pmu: PmuPolicy::Off,
            pmu_shape: Shape::FULL,
            pmu_seed: 0,
            looks_first: false,
            faults: Faults::default(),
            reset_policy: ResetPolicy::InPlace,
            console: ConsoleOutput::Kept,
            cid: GuestCid::FIRST,
            vsock_path: None,
            vsock_messages_path: None,
            rng: false,
            disks: Vec::new(),
            track_dirty_pages: false,
            dma_platform: false,
            dma_audit: AuditMode::Off,
            restore: None,
            starts_paused: false,
            note: String::new(),
            rings: false,
            seccomp: false,
        }
    }

    /// The places of its virtio devices, in the order in which they are built.
    pub(super) fn virtio_slots(&self) -> impl Iterator<Item = VirtioSlot> {
        const VSOCK: usize = 1;
        layout::virtio_slots().take(VSOCK + usize::from(self.rng) + self.disks.len())
    }

    /// The number of vCPUs, checked like everything else that only this host can tell.
    pub(super) fn checked_vcpus(&self, kvm: &Kvm) -> Result<u8, ConfigError> {
        if !(MIN_MEM_MIB..=MAX_MEM_MIB).contains(&self.mem_mib) {
            return Err(ConfigError::Memory(self.mem_mib));
        }
        let max = max_vcpus(kvm);
        match u8::try_from(self.vcpus) {
            Ok(count) if (1..=max).contains(&count) => Ok(count),
            _ => Err(ConfigError::Vcpus { wanted: self.vcpus, max }),
        }
    }

    /// The command line of life `life`: devices in Linux's syntax; for the agent also the ports by which it resets the
    /// machine and turns it off, and which life it is; the user's words last, as Linux wants what follows `--`.
    pub(super) fn command_line(&self, life: u32, cause: Cause) -> String {
        let mut words = Vec::new();
        if self.looks_first {
            // At the very beginning, where the first instructions can find it.
            words.push("look=first".into());
        }
        for VirtioSlot { base, pin } in self.virtio_slots() {
            words.push(format!("virtio_mmio.device=4K@{base:#x}:{pin}"));
        }
        if let Payload::Linux(_) = self.payload {
            words.push(LINUX_WORDS.into());
        }
        if self.payload.is_unikernel() {
            words.push(format!("agent.generation={:#x}", layout::GENERATION));
        }
        if self.payload.has_agent() {
            let (reset, power_off) = (layout::ACPI_PORT, layout::ACPI_PORT + 1);
            words.push(format!("agent.acpi_reset={reset:#x}:{ACPI_RESET_VALUE:#x}"));
            words.push(format!("agent.acpi_poweroff={power_off:#x}:{ACPI_POWER_OFF:#x}"));
            words.push(format!("agent.life={life} agent.cause={cause}"));
        }
        if !self.command_line.is_empty() {
            words.push(self.command_line.clone());
        }
        words.join(" ")
    }

    /// Refuses a Linux that could not boot.
    pub(super) fn check_kvm(&self, kind: KvmKind) -> Result<(), ConfigError> {
        match (&self.payload, kind) {
            (Payload::Linux(_), KvmKind::Software) => Err(ConfigError::SoftwareKvm),
            _ => Ok(()),
        }
    }

    /// Refuses more disks than there are slots for.
    pub(super) fn check_disks(&self) -> Result<(), ConfigError> {
        match self.disks.len() {
            0..=MOST_DISKS => Ok(()),
            count => Err(ConfigError::Disks(count)),
        }
    }

    /// Refuses to leave RAM as it is where there is none besides the agent's.
    pub(super) fn check_faults(&self) -> Result<(), FaultError> {
        match self.faults.has(Fault::RamKept) && self.mem_mib << 20 <= layout::AGENT_END {
            true => Err(FaultError::Lacking(Fault::RamKept, "more RAM than --mem 12")),
            false => Ok(()),
        }
    }

    /// Checks that the command line fits in every life that may come.
    pub(super) fn check_command_line(&self) -> Result<(), BootError> {
        boot::check_command_line(&self.command_line(u32::MAX, Cause::PowerOn))
    }
}
