//! `cleanslate run`: one machine, some lives, a verdict; or any other guest with its console on stdout.

mod guest;
mod lines;
mod output;

use std::path::PathBuf;
use std::str::FromStr;
use std::time::{Duration, Instant};

use agent_protocol::Cause;
use clap::{Args, ValueEnum};
use images::guest::LinuxGuest;
use rustix::process::{Signal, getppid, set_parent_process_death_signal};

use super::{Error, jail};
use crate::boot::Payload;
use crate::device::block::DiskConfig;
use crate::device::console::ConsoleOutput;
use crate::device::pmu::Shape;
use crate::device::virtio::audit::AuditMode;
use crate::exit;
use crate::fault::{Fault, Faults};
use crate::kvm::pmu::PmuPolicy;
use crate::lifecycle::{self, LifecycleError, Plan, ResidueCheck};
use crate::machine::{self, Config, Interrupts, ResetPolicy, Resources};
use crate::memory;
use crate::schedule::{Moment, Schedule};
use crate::soak::line::Evidence;
use crate::verify::{Expectations, Judge};
use output::{Format, Output, Summary};

/// Boot a machine, reset it in place, and say whether it came back clean
///
/// Without --kernel the machine boots the embedded guest agent, which reports after every life what it found of itself: the
/// state of its performance counters, its NMIs, exceptions and DMA buffers. With --kernel it boots that file instead, with
/// the first serial port on stdout.
#[derive(Debug, Args)]
#[command(after_help = "\
Exit status:
  0    clean; with --kernel: the guest turned the machine off
  1    findings
  2    wrong usage, or the host failed
  3    with --kernel: the guest asked for a reset beyond --resets
  4    with --kernel: triple fault beyond --resets
  5    with --kernel: KVM cannot run the guest any further
  130  interrupted

SIGUSR1 ends all vsock connections and tells the guest so (VIRTIO_VSOCK_EVENT_TRANSPORT_RESET).

Examples:
  cleanslate run --resets 3
  cleanslate run --resets 1000 --reset-via host --json
  cleanslate run --nmi 1
  cleanslate run --resets 1 --pmu emulated --inject pmu-not-reset
  cleanslate run --guest linux --resets 5 --reset-via host,i8042,cf9,acpi,triple
  cleanslate run --kernel vmlinux --initrd initrd.img --cmdline 'console=ttyS0' --mem 512")]
pub(super) struct Arguments {
    /// Reset the machine in place this many times
    #[arg(long, value_name = "N", default_value_t = 0)]
    resets: u32,

    /// What runs in the machine
    #[arg(long, value_enum, value_name = "GUEST", default_value_t, conflicts_with = "agent")]
    guest: Guest,

    /// How to reset it, in turn: host, i8042, cf9, acpi, triple; with --guest linux also sysrq, panic, kexec [default:
    /// host,i8042,triple]
    #[arg(long, value_name = "CAUSES", value_delimiter = ',', value_parser = parse_cause)]
    reset_via: Vec<Cause>,

    /// Draw each reset from --reset-via and --moments at random instead; the same seed gives the same resets
    #[arg(long, value_name = "N")]
    seed: Option<u64>,

    /// In the middle of what: quiet, mid-transfer, mid-connect, nmi-pending, two-causes, mid-boot [default: all]
    #[arg(long, value_name = "MOMENTS", value_delimiter = ',', value_parser = Moment::from_str, requires = "seed")]
    moments: Vec<Moment>,

    /// Inject this many NMIs into the first life; they must come out as a finding
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u32).range(..=1000))]
    nmi: u32,

    /// Performance counters of the guest
    #[arg(long, value_enum, default_value_t)]
    pmu: PmuPolicy,

    /// Emulated counters: 1 is AMD's legacy or core set, 2 is PerfMonV2 with global registers [default: 2]
    #[arg(long, value_name = "VERSION")]
    pmu_version: Option<u8>,

    /// How many emulated counters: 4 or 6, with --pmu-version 2 also 5 [default: 6]
    #[arg(long, value_name = "N")]
    pmu_counters: Option<u8>,

    /// How often events happen on emulated counters, cycles apart: the same for the same number [default: 0]
    #[arg(long, value_name = "N")]
    pmu_seed: Option<u64>,

    /// Give all state another value than it has after a reset before each one, and look at it first thing afterwards
    #[arg(long)]
    poison: bool,

    /// Leave out this step of each reset, to see that the verdict finds it; may be repeated
    #[arg(long, value_enum, value_name = "FAULT")]
    inject: Vec<Fault>,

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

    /// Unix socket for host clients of the guest's vsock ports, in Firecracker's convention: connect, write
    /// "CONNECT <port>\n", read "OK <port>\n"; the guest's connections to host port N go to PATH_N
    #[arg(long, value_name = "PATH")]
    uds: Option<PathBuf>,

    /// Unix socket of type SOCK_SEQPACKET for clients of the guest's vsock sockets of that type: the same convention, each line
    /// a message of its own, and so is all that follows
    #[arg(long, value_name = "PATH", requires = "uds")]
    uds_seqpacket: Option<PathBuf>,

    /// A disk: a regular file or a block device with the disk's bytes; with ",ro" the guest cannot write it; may be repeated
    #[arg(long, value_name = "PATH[,ro]")]
    disk: Vec<DiskConfig>,

    /// A source of random bytes (virtio-rng)
    #[arg(long)]
    rng: bool,

    /// Offer VIRTIO_F_ACCESS_PLATFORM on every virtio device: drivers then use their system's DMA interface, Linux's older ones too
    #[arg(long)]
    dma_platform: bool,
    /// Notes which pages of RAM are written, for snapshots that hold only those. Each page is slower when it is first written
    #[arg(long)]
    track_dirty_pages: bool,

    /// Look at every buffer that the guest posts on virtio queues
    #[arg(long, value_enum, value_name = "MODE", default_value_t)]
    dma_audit: AuditMode,

    /// Keep the machine running after the verdict, until Ctrl-C; for clients of --uds
    #[arg(long, requires = "uds")]
    hold: bool,

    /// How long to wait for each answer of the agent, in seconds [default: 10, with --guest linux 120]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    timeout: Option<u64>,

    /// Print one JSON object instead of the table
    #[arg(long)]
    json: bool,

    /// Print a JSON object for each life in a line of its own, the verdict in the last one; with evidence only where something
    /// was found
    #[arg(long, conflicts_with = "json")]
    json_lines: bool,

    /// Die with the process of this number, which has to be the parent
    #[arg(long, value_name = "PID", hide = true)]
    child_of: Option<u32>,

    #[command(flatten)]
    jail: jail::Arguments,
}

/// What runs in the machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum Guest {
    /// The embedded agent, or with --kernel that kernel and no agent
    #[default]
    Unikernel,
    /// An installed Linux, or the one of --kernel, with the agent as its first process
    Linux,
}

/// Options that contradict each other in ways that clap cannot tell.
#[derive(Debug, thiserror::Error)]
enum UsageError {
    #[error("{0} describes the emulated counters: add --pmu emulated")]
    NotEmulated(&'static str),
    #[error("{0} shows after a reset: add --resets N")]
    NoReset(&'static str),
    #[error("{0} takes an agent: with --kernel add --guest linux, or leave out --kernel")]
    NoAgent(&'static str),
    #[error("sysrq, panic and kexec are Linux's own: add --guest linux")]
    NeedsLinux,
    #[error("{0} is not for --guest linux: {1}")]
    NotForLinux(&'static str, &'static str),
    #[error("--uds and --uds-seqpacket name the same socket, {0:?}")]
    SameSocket(PathBuf),
    #[error("--child-of {0} is not the number of the parent process")]
    NotTheParent(u32),
}

/// How much of the console goes with a finding.
const CONSOLE_LINES: usize = 100;

#[derive(Debug, thiserror::Error)]
#[error("print the result")]
pub(super) struct PrintError(#[source] pub(super) std::io::Error);

/// A cause that any guest can be reset by.
pub(super) fn parse_common_cause(word: &str) -> Result<Cause, String> {
    let cause = parse_cause(word).ok().filter(|cause| !is_of_linux(*cause));
    cause.ok_or_else(|| "known are host, i8042, cf9, acpi, triple".into())
}

fn parse_cause(word: &str) -> Result<Cause, String> {
    match word.parse() {
        Ok(Cause::PowerOn) | Err(_) => {
            Err("known are host, i8042, cf9, acpi, triple; for Linux also sysrq, panic, kexec"
                .into())
        }
        Ok(cause) => Ok(cause),
    }
}

fn is_of_linux(cause: Cause) -> bool {
    matches!(cause, Cause::Sysrq | Cause::Panic | Cause::Kexec)
}

impl Arguments {
    pub fn config(&self) -> Result<Config, Error> {
        self.check_guest()?;
        if let Some(path) = &self.uds
            && self.uds_seqpacket.as_ref() == Some(path)
        {
            return Err(UsageError::SameSocket(path.clone()).into());
        }
        let (payload, reset_policy, console) = match (&self.kernel, self.guest) {
            (kernel, Guest::Linux) => (
                Payload::Linux(LinuxGuest::new(
                    kernel.as_deref(),
                    self.reset_via.contains(&Cause::Kexec),
                )?),
                ResetPolicy::InPlace,
                ConsoleOutput::Kept,
            ),
            (Some(kernel), Guest::Unikernel) => (
                Payload::Kernel { kernel: kernel.clone(), initrd: self.initrd.clone() },
                ResetPolicy::Limited(self.resets),
                ConsoleOutput::Stdout,
            ),
            (None, Guest::Unikernel) => {
                (Payload::Agent(self.agent.clone()), ResetPolicy::InPlace, ConsoleOutput::Kept)
            }
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
            pmu_seed: self.pmu_seed.or(self.seed).unwrap_or(0),
            looks_first: self.poison,
            faults: self.faults()?,
            reset_policy,
            console,
            vsock_path: self.uds.clone(),
            vsock_messages_path: self.uds_seqpacket.clone(),
            rng: self.rng,
            disks: self.disk.clone(),
            track_dirty_pages: self.track_dirty_pages,
            dma_platform: self.dma_platform,
            dma_audit: self.dma_audit,
            ..Config::new(payload, mem_mib)
        })
    }

    /// Whether an agent runs in the machine.
    fn has_agent(&self) -> bool {
        self.kernel.is_none() || self.guest == Guest::Linux
    }

    fn check_guest(&self) -> Result<(), UsageError> {
        let of_agents = [
            ("--reset-via", !self.reset_via.is_empty()),
            ("--seed", self.seed.is_some()),
            ("--nmi", self.nmi > 0),
            ("--poison", self.poison),
            ("--inject", !self.inject.is_empty()),
            ("--hold", self.hold),
            ("--timeout", self.timeout.is_some()),
            ("--json", self.json),
            ("--json-lines", self.json_lines),
        ];
        let given = of_agents.iter().find(|(_, is_given)| *is_given);
        match (given, self.guest) {
            (Some((option, _)), _) if !self.has_agent() => Err(UsageError::NoAgent(option)),
            (_, Guest::Linux) if self.seed.is_some() && self.reset_via.contains(&Cause::Kexec) => {
                Err(UsageError::NotForLinux("kexec with --seed", "it comes in turn alone"))
            }
            (_, Guest::Unikernel) if self.reset_via.iter().any(|cause| is_of_linux(*cause)) => {
                Err(UsageError::NeedsLinux)
            }
            (_, Guest::Linux) if self.poison => Err(UsageError::NotForLinux(
                "--poison",
                "its registers are not the agent's to poison",
            )),
            _ => Ok(()),
        }
    }

    fn schedule(&self) -> Schedule {
        let causes = match self.reset_via.as_slice() {
            [] => vec![Cause::Host, Cause::I8042, Cause::Triple],
            causes => causes.to_vec(),
        };
        match self.seed {
            None => Schedule::InTurn(causes),
            Some(seed) => {
                let moments = match self.moments.as_slice() {
                    [] => Moment::ALL.to_vec(),
                    moments => moments.to_vec(),
                };
                Schedule::Random { causes, moments, seed }
            }
        }
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
            return Err(UsageError::NotEmulated(option).into());
        }
        Ok(Shape::new(self.pmu_version.unwrap_or(2), self.pmu_counters.unwrap_or(6))?)
    }

    fn faults(&self) -> Result<Faults, Error> {
        let faults = Faults::new(self.inject.clone(), self.pmu, self.poison)?;
        for (option, is_given) in [("--inject", !faults.is_empty()), ("--poison", self.poison)] {
            if is_given && self.resets == 0 {
                return Err(UsageError::NoReset(option).into());
            }
        }
        Ok(faults)
    }
}

pub(super) fn main(arguments: Arguments, started: Instant) -> Result<u8, Error> {
    if let Some(parent) = arguments.child_of {
        die_with(parent)?;
    }
    let notice = |text: &str| match arguments.json_lines {
        true => lines::notice(text),
        false => eprintln!("cleanslate: {text}"),
    };
    let result =
        arguments.jail.run(arguments.config()?, notice, |config, resources, interrupts| {
            lead(&arguments, config, resources, interrupts, started)
        });
    if arguments.json_lines
        && let Err(error) = &result
    {
        lines::end(&**error);
    }
    result
}

/// Has this process killed when its parent ends. The machine's process dies with this one, and the janitor cleans up.
pub(super) fn die_with(parent: u32) -> Result<(), Error> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    // It may have ended before.
    match getppid() {
        Some(pid) if u32::try_from(pid.as_raw_pid()) == Ok(parent) => Ok(()),
        _ => Err(UsageError::NotTheParent(parent).into()),
    }
}

/// Runs the machine to its end, in the process that is made for it.
fn lead(
    arguments: &Arguments,
    config: &Config,
    resources: Resources,
    interrupts: Interrupts,
    started: Instant,
) -> Result<u8, Error> {
    memory::warm_heap();
    let machine = machine::launch(config, resources, interrupts)?;
    if !arguments.has_agent() {
        return guest::follow(&machine, arguments.dma_audit);
    }
    let plan = Plan {
        resets: arguments.resets,
        schedule: arguments.schedule(),
        nmis: arguments.nmi,
        residue: if arguments.poison { ResidueCheck::Poison } else { ResidueCheck::Off },
        arms_pmu: arguments.pmu != PmuPolicy::Off,
        late_nmi: config.faults.has(Fault::NmiAfterReset),
        timeout: Duration::from_secs(arguments.timeout.unwrap_or(match arguments.guest {
            Guest::Unikernel => 10,
            Guest::Linux => 120,
        })),
    };
    let expectations = Expectations {
        pmu: arguments.pmu,
        kvm: machine.kvm_kind(),
        dma_audit: arguments.dma_audit,
        clears_hwcr: machine.clears_hwcr(),
    };
    let mut judge = Judge::new(expectations);
    let format = match (arguments.json, arguments.json_lines) {
        (true, _) => Format::Json,
        (_, true) => Format::Lines,
        _ => Format::Table,
    };
    let mut output = Output::new(format, plan.resets);
    output.begin(&Summary::new(&machine, config, expectations, &[]));
    let led = lifecycle::lead(&machine, &plan, started, |life, trace| {
        let (findings, before) = judge.hear(life);
        let console = || machine.console().last_lines(CONSOLE_LINES);
        output.life(life, findings, || Evidence::new(before, life, console(), trace));
    });
    match led {
        Ok(()) => {}
        Err(error) => {
            output.abandon();
            return match error {
                LifecycleError::Interrupted => {
                    eprintln!("cleanslate: interrupted");
                    Ok(exit::INTERRUPTED)
                }
                error => Err(error.into()),
            };
        }
    }
    let status = if judge.findings().is_empty() { exit::CLEAN } else { exit::FINDINGS };
    output
        .finish(&Summary::new(&machine, config, expectations, judge.findings()))
        .map_err(PrintError)?;
    if arguments.hold {
        return guest::hold(&machine, arguments.dma_audit, status, arguments.json_lines);
    }
    Ok(status)
}
