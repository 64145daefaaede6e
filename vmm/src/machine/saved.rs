//! What a machine is at a moment: plain data, taken of one that is paused and given to another.
//!
//! A description says what the machine is made of, and a restored one has that from there and nowhere else. Then each part has its
//! own word for its state. RAM is the snapshot's business.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use agent_protocol::Cause;
use serde::{Deserialize, Serialize};
use twox_hash::XxHash3_128;

use super::{Config, Machine, MachineError};
use crate::boot::Payload;
use crate::bus::lock;
use crate::device::console::{Overfull, SavedConsole};
use crate::device::ioapic;
use crate::device::nmi_status::NmiStatus;
use crate::device::pmu::{SavedPmu, Shape};
use crate::device::reset_ports::ResetControl;
use crate::device::virtio::{self, SavedMmio};
use crate::kvm::KvmError;
use crate::kvm::pmu::PmuPolicy;
use crate::kvm::state::{StateError, VcpuState};
use crate::snapshot::Header;

/// What a machine boots, without the files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GuestKind {
    /// The embedded agent, with a checksum of it (half of its XXH3-128).
    Agent(u64),
    /// An agent from a file.
    AgentFile,
    /// A kernel of the user's.
    Kernel,
    /// A Linux with the agent as its first process.
    Linux,
}

impl GuestKind {
    fn of(payload: &Payload) -> Self {
        match payload {
            Payload::Agent(None) => Self::Agent(XxHash3_128::oneshot(images::AGENT) as u64),
            Payload::Agent(Some(_)) => Self::AgentFile,
            Payload::Kernel { .. } => Self::Kernel,
            Payload::Linux(_) => Self::Linux,
        }
    }
}

impl fmt::Display for GuestKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Agent(_) => "the embedded agent",
            Self::AgentFile => "an agent from a file",
            Self::Kernel => "a kernel",
            Self::Linux => "a Linux with the agent",
        })
    }
}

/// What a machine is made of, as far as its guest can tell.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Description {
    /// What it boots at a reset.
    pub guest: GuestKind,
    /// The user's part of the kernel command line.
    pub command_line: String,
    /// RAM in MiB.
    pub mem_mib: u64,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Performance counters.
    pub pmu: PmuPolicy,
    /// What they are if they are emulated.
    pub pmu_shape: Shape,
    /// How often their events happen.
    pub pmu_seed: u64,
    /// Whether its agent looks at all registers before anything else.
    pub looks_first: bool,
    /// A virtio-rng device.
    pub rng: bool,
    /// How many disks.
    pub disks: u32,
    /// Every virtio device offers `VIRTIO_F_ACCESS_PLATFORM`.
    pub dma_platform: bool,
}

impl Description {
    fn of(config: &Config) -> Self {
        Self {
            guest: GuestKind::of(&config.payload),
            command_line: config.command_line.clone(),
            mem_mib: config.mem_mib,
            vcpus: config.vcpus,
            pmu: config.pmu,
            pmu_shape: config.pmu_shape,
            pmu_seed: config.pmu_seed,
            looks_first: config.looks_first,
            rng: config.rng,
            disks: config.disks.len() as u32,
            dma_platform: config.dma_platform,
        }
    }

    /// The configuration of a machine like this that boots `payload`. Devices' files and what is the host's business are as in
    /// `config`.
    #[must_use]
    pub fn configure(&self, config: Config, payload: Payload) -> Config {
        Config {
            payload,
            command_line: self.command_line.clone(),
            mem_mib: self.mem_mib,
            vcpus: self.vcpus,
            pmu: self.pmu,
            pmu_shape: self.pmu_shape,
            pmu_seed: self.pmu_seed,
            looks_first: self.looks_first,
            rng: self.rng,
            dma_platform: self.dma_platform,
            ..config
        }
    }
}

/// All state of a machine but its RAM.
#[derive(Serialize, Deserialize)]
pub struct MachineState {
    description: Description,
    life: u32,
    cause: Cause,
    rested: bool,
    /// KVM's clock, in nanoseconds.
    clock_ns: u64,
    vcpus: Vec<SavedVcpu>,
    virtio: Vec<SavedMmio>,
    ioapic: ioapic::Registers,
    console: SavedConsole,
    nmi_status: NmiStatus,
    reset_control: ResetControl,
    note: String,
}

#[derive(Serialize, Deserialize)]
struct SavedVcpu {
    state: VcpuState,
    /// Counters of the monitor's, if it has them from there.
    pmu: Option<SavedPmu>,
}

impl fmt::Debug for MachineState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MachineState")
            .field("description", &self.description)
            .finish_non_exhaustive()
    }
}

impl MachineState {
    /// What the machine is made of.
    pub fn description(&self) -> &Description {
        &self.description
    }

    /// What its configuration notes of itself ([`Config::note`]).
    pub fn note(&self) -> &str {
        &self.note
    }

    /// The number of the life that it was in, and why that had begun.
    pub fn life(&self) -> (u32, Cause) {
        (self.life, self.cause)
    }

    /// Its virtio devices, in a word each, in the order of their places.
    pub fn devices(&self) -> impl Iterator<Item = &'static str> {
        self.virtio.iter().map(SavedMmio::name)
    }
}

/// What a machine is restored from.
#[derive(Clone, Debug)]
pub struct Restore {
    /// What the snapshot says of itself.
    pub header: Header,
    /// The machine's state.
    pub state: Arc<MachineState>,
    /// Where RAM comes from.
    pub ram: RamSource,
}

/// Where the RAM of a restored machine comes from.
#[derive(Clone, Debug)]
pub enum RamSource {
    /// Memory files, base first, each with what its state file says of it.
    Files(Vec<(Header, PathBuf)>),
    /// A page server's socket: it has the pages, and gives each when it is touched first.
    Server(PathBuf),
}

/// Why a machine cannot be restored from a snapshot.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// RAM of another size than the description says.
    #[error("the snapshot has {found} bytes of RAM, but is of a machine with {mem_mib} MiB")]
    Memory {
        /// What it has.
        found: u64,
        /// What it should have.
        mem_mib: u64,
    },
    /// Another agent.
    #[error(
        "the snapshot is of a machine with {there}, and {here} was given, or another version of it: a reset would lead \
         elsewhere"
    )]
    Guest {
        /// Of the snapshot.
        there: GuestKind,
        /// What was given.
        here: GuestKind,
    },
    /// Too few disks or too many.
    #[error("the snapshot is of a machine with {there}: give them again with --disk, in the same order ({here} given)", there = crate::words::plural(*.there as usize, "disk", "disks"))]
    Disks {
        /// Of the snapshot.
        there: u32,
        /// Given.
        here: usize,
    },
    /// Parts that do not fit the description.
    #[error("the snapshot's state is of {there} {what}, and its description of {here}")]
    Count {
        /// Which.
        what: &'static str,
        /// Of the state.
        there: usize,
        /// Of the description.
        here: usize,
    },
    /// The processor's state.
    #[error("restore vCPU {id} of the snapshot")]
    Vcpu {
        /// Its number.
        id: usize,
        /// Why not.
        source: StateError,
    },
    /// A device's state.
    #[error("restore the {name} at slot {slot} of the snapshot")]
    Device {
        /// What it is.
        name: &'static str,
        /// Its place.
        slot: usize,
        /// Why not.
        source: virtio::RestoreError,
    },
    /// The serial port's state.
    #[error("restore the snapshot's machine")]
    Console(#[from] Overfull),
}

impl Restore {
    /// Refuses what this machine cannot become; `ram_bytes` are there.
    pub(super) fn check(&self, config: &Config, ram_bytes: u64) -> Result<(), RestoreError> {
        let description = &self.state.description;
        if description.mem_mib.checked_mul(1 << 20) != Some(ram_bytes) {
            return Err(RestoreError::Memory { found: ram_bytes, mem_mib: description.mem_mib });
        }
        let (there, here) = (description.guest, GuestKind::of(&config.payload));
        if there != here {
            return Err(RestoreError::Guest { there, here });
        }
        if description.disks as usize != config.disks.len() {
            return Err(RestoreError::Disks { there: description.disks, here: config.disks.len() });
        }
        Ok(())
    }
}

impl Machine {
    /// What it is now. It is paused. What devices were about to answer is answered before.
    pub(super) fn capture(&self) -> Result<MachineState, KvmError> {
        // Before the vCPUs: an answer may interrupt one.
        let virtio = self.devices.virtio.all.iter().map(|device| lock(device).save()).collect();
        let zero = self.vcpus[0].0.vcpu().zero_tsc()?;
        let save = |(thread, power_on): &(super::VcpuThread, _)| {
            Ok(SavedVcpu {
                state: thread.vcpu().capture(power_on, zero)?,
                pmu: thread.pmu().map(super::pmu::VcpuPmu::save),
            })
        };
        Ok(MachineState {
            description: Description::of(&self.config),
            life: self.life,
            cause: self.cause,
            rested: self.rested,
            clock_ns: self.vm.clock_ns()?,
            vcpus: self.vcpus.iter().map(save).collect::<Result<_, KvmError>>()?,
            virtio,
            ioapic: self.devices.ioapic.save(),
            console: lock(&self.devices.console).save(),
            nmi_status: lock(&self.devices.nmi_status).clone(),
            reset_control: lock(&self.devices.reset_control).clone(),
            note: self.config.note.clone(),
        })
    }

    /// Makes the machine, which has just been built around the snapshot's RAM, what the other one was. The order matters: vCPUs
    /// before what may interrupt them, the I/O APIC before the devices that signal it, and none of it runs before all is done.
    pub(super) fn restore(&mut self, state: &MachineState) -> Result<(), MachineError> {
        let same = |what, there: usize, here: usize| match there == here {
            true => Ok(()),
            false => Err(RestoreError::Count { what, there, here }),
        };
        same("vCPUs", state.vcpus.len(), self.vcpus.len())?;
        same("virtio devices", state.virtio.len(), self.devices.virtio.all.len())?;
        (self.life, self.cause, self.rested) = (state.life, state.cause, state.rested);
        self.vm.set_clock_ns(state.clock_ns)?;
        let zero = self.vcpus[0].0.vcpu().zero_tsc()?;
        for (id, ((thread, power_on), saved)) in self.vcpus.iter().zip(&state.vcpus).enumerate() {
            let vcpu = thread.vcpu();
            vcpu.restore(&saved.state, power_on, zero)
                .map_err(|source| RestoreError::Vcpu { id, source })?;
            vcpu.note_pause();
            match (thread.pmu(), &saved.pmu) {
                (Some(pmu), Some(saved)) => pmu.restore(saved)?,
                (None, None) => {}
                (pmu, saved) => same(
                    "emulated counters",
                    usize::from(saved.is_some()),
                    usize::from(pmu.is_some()),
                )?,
            }
        }
        self.devices.ioapic.restore(&state.ioapic);
        lock(&self.devices.nmi_status).restore(&state.nmi_status);
        lock(&self.devices.reset_control).restore(&state.reset_control);
        lock(&self.devices.console).restore(&state.console).map_err(RestoreError::from)?;
        for (slot, (device, saved)) in self.devices.virtio.all.iter().zip(&state.virtio).enumerate()
        {
            lock(device).restore(saved).map_err(|source| RestoreError::Device {
                name: saved.name(),
                slot,
                source,
            })?;
        }
        Ok(())
    }
}
