//! `cleanslate run`: one machine, some lives, a verdict; or any other guest with its console on stdout.

mod guest;
mod output;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use agent_protocol::Cause;
use clap::Args;

use super::{Error, exit, jail};
use crate::boot::Payload;
use crate::device::console::ConsoleOutput;
use crate::kvm::pmu::PmuPolicy;
use crate::lifecycle::{self, LifecycleError, Plan};
use crate::machine::{self, Config, Interrupts, ResetPolicy, Resources};
use crate::memory;
use crate::verify::{Expectations, Judge};
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

Examples:
  cleanslate run --resets 3
  cleanslate run --resets 1000 --reset-via host --json
  cleanslate run --nmi 1
  cleanslate run --kernel vmlinux --initrd initrd.img --cmdline 'console=ttyS0' --mem 512")]
pub(super) struct Arguments {
    /// Reset the machine in place this many times
    #[arg(long, value_name = "N", default_value_t = 0)]
    resets: u32,

    /// How to reset it, in turn: host, i8042, cf9, acpi, triple
    #[arg(long, value_name = "CAUSES", value_delimiter = ',', default_value = "host,i8042,triple",
          value_parser = parse_cause, conflicts_with = "kernel")]
    reset_via: Vec<Cause>,

    /// Inject this many NMIs into the first life; they must come out as a finding
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u32).range(..=1000),
          conflicts_with = "kernel")]
    nmi: u32,

    /// Performance counters of the guest
    #[arg(long, value_enum, default_value_t)]
    pmu: PmuPolicy,

    /// RAM in MiB
    #[arg(long, value_name = "MIB", default_value_t = 128)]
    mem: u64,

    /// Number of vCPUs
    #[arg(long, value_name = "N", default_value_t = 1)]
    vcpus: u32,

    /// Boot this kernel: an ELF with or without a PVH note, or a bzImage
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,

    /// Initial RAM disk for the kernel
    #[arg(long, value_name = "FILE", requires = "kernel")]
    initrd: Option<PathBuf>,

    /// Put this in front of the guest's command line
    #[arg(long, value_name = "TEXT", default_value = "")]
    cmdline: String,

    /// Unix socket for host clients of the guest's vsock ports, in Firecracker's convention: connect, write
    /// "CONNECT <port>\n", read "OK <port>\n"; the guest's connections to host port N go to PATH_N
    #[arg(long, value_name = "PATH")]
    uds: Option<PathBuf>,

    /// Keep the machine running after the verdict, until Ctrl-C; for clients of --uds
    #[arg(long, requires = "uds", conflicts_with = "kernel")]
    hold: bool,

    /// How long to wait for each answer of the agent, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=86_400),
          conflicts_with = "kernel")]
    timeout: u64,

    /// Print one JSON object instead of the table
    #[arg(long, conflicts_with = "kernel")]
    json: bool,

    #[command(flatten)]
    jail: jail::Arguments,
}

#[derive(Debug, thiserror::Error)]
#[error("print the result")]
struct PrintError(#[source] std::io::Error);

fn parse_cause(word: &str) -> Result<Cause, String> {
    match word.parse() {
        Ok(Cause::PowerOn) | Err(_) => Err("known are host, i8042, cf9, acpi, triple".into()),
        Ok(cause) => Ok(cause),
    }
}

impl Arguments {
    fn config(&self) -> Config {
        let (payload, reset_policy, console) = match &self.kernel {
            Some(kernel) => (
                Payload::Kernel { kernel: kernel.clone(), initrd: self.initrd.clone() },
                ResetPolicy::Limited(self.resets),
                ConsoleOutput::Stdout,
            ),
            None => (Payload::Agent, ResetPolicy::InPlace, ConsoleOutput::Kept),
        };
        Config {
            payload,
            command_line: self.cmdline.clone(),
            mem_mib: self.mem,
            vcpus: self.vcpus,
            pmu: self.pmu,
            reset_policy,
            console,
            vsock_path: self.uds.clone(),
            // The jail knows.
            seccomp: false,
        }
    }
}

pub(super) fn main(arguments: Arguments, started: Instant) -> Result<u8, Error> {
    arguments.jail.run(arguments.config(), |config, resources, interrupts| {
        lead(&arguments, config, resources, interrupts, started)
    })
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
    if arguments.kernel.is_some() {
        return guest::follow(&machine);
    }
    let plan = Plan {
        resets: arguments.resets,
        causes: arguments.reset_via.clone(),
        nmis: arguments.nmi,
        timeout: Duration::from_secs(arguments.timeout),
    };
    let expectations = Expectations { pmu: arguments.pmu, kvm: machine.kvm_kind() };
    let mut judge = Judge::new(expectations);
    let mut output = Output::new(arguments.json, plan.resets);
    let led = lifecycle::lead(&machine, &plan, started, |life| {
        judge.hear(life);
        output.life(life);
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
    output.finish(&Summary::new(&machine, expectations, judge.findings())).map_err(PrintError)?;
    if arguments.hold {
        return guest::hold(&machine, status);
    }
    Ok(status)
}
