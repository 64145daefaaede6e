//! The flags that say what a machine is made of, for the commands that make one.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use images::guest::LinuxGuest;

use super::Error;
use crate::boot::Payload;
use crate::device::block::DiskConfig;
use crate::device::console::ConsoleOutput;
use crate::device::pmu::Shape;
use crate::kvm::pmu::PmuPolicy;
use crate::machine::Config;

#[derive(Debug, Args)]
// clap would name a group for the struct, which has the same name as the one that it is part of.
#[group(skip)]
pub(super) struct Arguments {
    /// What runs in the machine
    #[arg(long, value_enum, value_name = "GUEST", default_value_t, conflicts_with = "agent")]
    pub guest: Guest,

    /// Performance counters of the guest
    #[arg(long, value_enum, default_value_t)]
    pub pmu: PmuPolicy,

    /// Emulated counters: 1 is AMD's legacy or core set, 2 is PerfMonV2 with global registers [default: 2]
    #[arg(long, value_name = "VERSION")]
    pmu_version: Option<u8>,

    /// How many emulated counters: 4 or 6, with --pmu-version 2 also 5 [default: 6]
    #[arg(long, value_name = "N")]
    pmu_counters: Option<u8>,

    /// How often events happen on emulated counters, cycles apart: the same for the same number [default: 0]
    #[arg(long, value_name = "N")]
    pub pmu_seed: Option<u64>,

    /// RAM in MiB [default: 128, with --guest linux 256]
    #[arg(long, value_name = "MIB")]
    mem: Option<u64>,

    /// Number of vCPUs
    #[arg(long, value_name = "N", default_value_t = 1)]
    vcpus: u32,

    /// Boot this kernel: an ELF with or without a PVH note, or a bzImage. With --guest linux its modules have to be installed
    /// [there the default is the newest that is installed]
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,

    /// Boot this agent instead of the embedded one: an ELF with a PVH note that ends below 12 MiB and speaks the same protocol
    #[arg(long, value_name = "FILE", conflicts_with = "kernel")]
    agent: Option<PathBuf>,

    /// Initial RAM disk for the kernel
    #[arg(long, value_name = "FILE", requires = "kernel", conflicts_with = "guest")]
    initrd: Option<PathBuf>,

    /// Add this to the end of the guest's command line
    #[arg(long, value_name = "TEXT", default_value = "")]
    cmdline: String,

    /// A disk: a regular file or a block device with the disk's bytes; with ",ro" the guest cannot write it; may be repeated
    #[arg(long, value_name = "PATH[,ro]")]
    disk: Vec<DiskConfig>,

    /// A source of random bytes (virtio-rng)
    #[arg(long)]
    rng: bool,

    /// Offer VIRTIO_F_ACCESS_PLATFORM on every virtio device: drivers then use their system's DMA interface, Linux's older ones too
    #[arg(long)]
    dma_platform: bool,
}

/// What runs in the machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(super) enum Guest {
    /// The embedded agent, or with --kernel that kernel and no agent
    #[default]
    Unikernel,
    /// An installed Linux, or the one of --kernel, with the agent as its first process
    Linux,
}

impl Guest {
    /// How long to wait for each answer of its agent, in the absence of a wish.
    pub fn patience(self) -> Duration {
        Duration::from_secs(match self {
            Self::Unikernel => 10,
            Self::Linux => 120,
        })
    }
}

/// A description of what is not there.
#[derive(Debug, thiserror::Error)]
#[error("{0} describes the emulated counters: add --pmu emulated")]
struct NotEmulated(&'static str);

impl Arguments {
    /// The machine, with nothing that is not about itself. `kexec` says whether its Linux is to load itself anew.
    pub fn config(&self, kexec: bool) -> Result<Config, Error> {
        let (payload, console) = match (&self.kernel, self.guest) {
            (kernel, Guest::Linux) => {
                let guest = LinuxGuest::new(kernel.as_deref(), kexec)?;
                (Payload::Linux(guest), ConsoleOutput::Kept)
            }
            (Some(kernel), Guest::Unikernel) => (
                Payload::Kernel { kernel: kernel.clone(), initrd: self.initrd.clone() },
                ConsoleOutput::Stdout,
            ),
            (None, Guest::Unikernel) => (Payload::Agent(self.agent.clone()), ConsoleOutput::Kept),
        };
        let mem_mib = self.mem.unwrap_or(match self.guest {
            Guest::Unikernel => 128,
            Guest::Linux => 256,
        });
        Ok(Config {
            command_line: self.cmdline.clone(),
            vcpus: self.vcpus,
            pmu: self.pmu,
            pmu_shape: self.pmu_shape()?,
            pmu_seed: self.pmu_seed.unwrap_or(0),
            console,
            rng: self.rng,
            disks: self.disk.clone(),
            dma_platform: self.dma_platform,
            ..Config::new(payload, mem_mib)
        })
    }

    /// Whether an agent runs in the machine.
    pub fn has_agent(&self) -> bool {
        self.kernel.is_none() || self.guest == Guest::Linux
    }

    fn pmu_shape(&self) -> Result<Shape, Error> {
        let described = [
            ("--pmu-version", self.pmu_version.is_some()),
            ("--pmu-counters", self.pmu_counters.is_some()),
            ("--pmu-seed", self.pmu_seed.is_some()),
        ];
        if let Some((option, _)) = described.iter().find(|(_, is_given)| *is_given)
            && self.pmu != PmuPolicy::Emulated
        {
            return Err(NotEmulated(option).into());
        }
        Ok(Shape::new(self.pmu_version.unwrap_or(2), self.pmu_counters.unwrap_or(6))?)
    }
}
