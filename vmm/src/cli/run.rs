//! `cleanslate run`: one machine, some lives, a verdict; or any other guest with its console on stdout.

pub(super) mod guest;
mod lines;
mod output;

use std::path::PathBuf;
use std::str::FromStr;
use std::time::{Duration, Instant};

use agent_protocol::Cause;
use clap::Args;
use rustix::process::{Signal, getppid, set_parent_process_death_signal};

use super::machine::{self, Guest};
use super::{Error, jail};
use crate::device::virtio::audit::AuditMode;
use crate::exit;
use crate::fault::{Fault, Faults};
use crate::kvm::pmu::PmuPolicy;
use crate::lifecycle::{self, LifecycleError, Plan, ResidueCheck};
use crate::machine::{Config, Handle, Interrupts, ResetPolicy, Resources, launch};
use crate::memory;
use crate::schedule::{Moment, Schedule};
use crate::soak::line::Evidence;
use crate::verify::{Expectations, Judge};
pub(super) use output::{Format, Written};
use output::{Output, Summary};

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

    #[command(flatten)]
    machine: machine::Arguments,

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

    /// Give all state another value than it has after a reset before each one, and look at it first thing afterwards
    #[arg(long)]
    poison: bool,

    /// Leave out this step of each reset, to see that the verdict finds it; may be repeated
    #[arg(long, value_enum, value_name = "FAULT")]
    inject: Vec<Fault>,

    /// Unix socket for host clients of the guest's vsock ports, in Firecracker's convention: connect, write
    /// "CONNECT <port>\n", read "OK <port>\n"; the guest's connections to host port N go to PATH_N
    #[arg(long, value_name = "PATH")]
    uds: Option<PathBuf>,

    /// Unix socket of type SOCK_SEQPACKET for clients of the guest's vsock sockets of that type: the same convention, each line
    /// a message of its own, and so is all that follows
    #[arg(long, value_name = "PATH", requires = "uds")]
    uds_seqpacket: Option<PathBuf>,

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

/// Options that contradict each other in ways that clap cannot tell.
#[derive(Debug, thiserror::Error)]
enum UsageError {
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
        let config = self.machine.config(self.reset_via.contains(&Cause::Kexec))?;
        Ok(Config {
            pmu_seed: self.machine.pmu_seed.or(self.seed).unwrap_or(0),
            looks_first: self.poison,
            faults: self.faults()?,
            reset_policy: match self.machine.has_agent() {
                true => ResetPolicy::InPlace,
                false => ResetPolicy::Limited(self.resets),
            },
            vsock_path: self.uds.clone(),
            vsock_messages_path: self.uds_seqpacket.clone(),
            dma_audit: self.dma_audit,
            ..config
        })
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
        match (given, self.machine.guest) {
            (Some((option, _)), _) if !self.machine.has_agent() => Err(UsageError::NoAgent(option)),
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

    fn faults(&self) -> Result<Faults, Error> {
        let faults = Faults::new(self.inject.clone(), self.machine.pmu, self.poison)?;
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
    let machine = launch(config, resources, interrupts)?;
    if !arguments.machine.has_agent() {
        return guest::follow(&machine, arguments.dma_audit);
    }
    let guest = arguments.machine.guest;
    let plan = Plan {
        resets: arguments.resets,
        schedule: arguments.schedule(),
        nmis: arguments.nmi,
        residue: if arguments.poison { ResidueCheck::Poison } else { ResidueCheck::Off },
        arms_pmu: config.pmu != PmuPolicy::Off,
        late_nmi: config.faults.has(Fault::NmiAfterReset),
        timeout: arguments.timeout.map_or(guest.patience(), Duration::from_secs),
    };
    let format = match (arguments.json, arguments.json_lines) {
        (true, _) => Format::Json,
        (_, true) => Format::Lines,
        _ => Format::Table,
    };
    let status = judge(&machine, config, &plan, (started, format), |_, _| Ok(None))?;
    if arguments.hold && status != exit::INTERRUPTED {
        return guest::hold(&machine, arguments.dma_audit, status, arguments.json_lines);
    }
    Ok(status)
}

/// Leads a machine with an agent through `plan`, judges it, and prints all of that. `finally` does what is left to do before the
/// result is told, knowing whether the machine is clean.
pub(super) fn judge(
    machine: &Handle,
    config: &Config,
    plan: &Plan,
    (started, format): (Instant, Format),
    finally: impl FnOnce(&Handle, bool) -> Result<Option<Written>, Error>,
) -> Result<u8, Error> {
    let expectations = Expectations {
        pmu: config.pmu,
        kvm: machine.kvm_kind(),
        dma_audit: config.dma_audit,
        restored: machine.is_restored(),
        clears_hwcr: machine.clears_hwcr(),
    };
    let mut judge = Judge::new(expectations);
    let mut output = Output::new(format, plan.resets);
    output.begin(&Summary::new(machine, config, expectations, &[]));
    let led = lifecycle::lead(machine, plan, started, |life, trace| {
        let (findings, before) = judge.hear(life);
        let console = || machine.console().last_lines(CONSOLE_LINES);
        output.life(life, findings, || Evidence::new(before, life, console(), trace));
    });
    let is_clean = judge.findings().is_empty();
    let done = match led {
        Ok(()) => finally(machine, is_clean),
        Err(LifecycleError::Interrupted) => {
            output.abandon();
            eprintln!("cleanslate: interrupted");
            return Ok(exit::INTERRUPTED);
        }
        Err(error) => Err(error.into()),
    };
    let snapshot = done.inspect_err(|_| output.abandon())?;
    let mut summary = Summary::new(machine, config, expectations, judge.findings());
    summary.snapshot = snapshot;
    output.finish(&summary).map_err(PrintError)?;
    Ok(if is_clean { exit::CLEAN } else { exit::FINDINGS })
}
