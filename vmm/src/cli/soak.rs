//! `cleanslate soak`: many machines, many resets at random moments, a verdict on all of them.

mod output;

use std::hash::{BuildHasher, RandomState};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::{Duration, Instant};

use agent_protocol::Cause;
use clap::{Args, Parser, ValueEnum};
use jailer::Id;

use super::run::{self, parse_common_cause};
use super::{Error, allow_descriptors, parse_duration, reports};
use crate::device::virtio::audit::AuditMode;
use crate::fault::Fault;
use crate::kvm::pmu::PmuPolicy;
use crate::machine::Interrupts;
use crate::schedule::Moment;
use crate::soak::bundle::Bundles;
use crate::soak::campaign;
use crate::soak::plan::{Jails, Plan, Who};
use output::Output;

/// Reset many machines at random moments, and collect what is found
///
/// Each machine runs in a jailed process of its own, with causes, moments and delays drawn from the seed. Every reset is
/// judged as `cleanslate run` does; a machine's process that is killed, hangs or runs out of memory is a finding too. Of a life
/// with a finding a bundle is kept: both reports, the console, what was done and when, and the command that runs it again.
#[derive(Debug, Args)]
#[command(after_help = "\
Exit status:
  0    clean
  1    findings
  2    wrong usage, or the host failed
  130  interrupted

Examples:
  cleanslate soak --vms 4 --resets 1000
  cleanslate soak --vms 2 --duration 1h --keep-going --html soak.html
  cleanslate soak --resets 100 --pmu emulated --inject pmu-not-reset")]
pub(super) struct Arguments {
    /// How many machines
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    vms: u32,

    /// Reset each machine this many times [default: 1000, or no limit with --duration]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    resets: Option<u32>,

    /// Stop after this time, such as 90s, 30m or 1h
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    duration: Option<Duration>,

    /// Where everything random comes from; the same seed gives each machine the same resets [default: another each time]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,

    /// Number of the first machine, of which its seed depends: for soaks on many hosts with one seed
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1 << 30))]
    first_vm: u32,

    /// Causes to choose from: host, i8042, cf9, acpi, triple
    #[arg(long, value_name = "CAUSES", value_delimiter = ',', default_value = "host,i8042,cf9,acpi,triple",
          value_parser = parse_common_cause)]
    causes: Vec<Cause>,

    /// Moments to choose from: quiet, mid-transfer, mid-connect, nmi-pending, two-causes, mid-boot [default: all]
    #[arg(long, value_name = "MOMENTS", value_delimiter = ',', value_parser = Moment::from_str)]
    moments: Vec<Moment>,

    /// Go on after a finding
    #[arg(long)]
    keep_going: bool,

    /// Leave out the residue check
    #[arg(long)]
    no_poison: bool,

    /// Performance counters of the guests
    #[arg(long, value_enum, default_value_t)]
    pmu: PmuPolicy,

    /// Emulated counters: 1 is AMD's legacy or core set, 2 is PerfMonV2 with global registers [default: 2]
    #[arg(long, value_name = "VERSION")]
    pmu_version: Option<u8>,

    /// How many emulated counters: 4 or 6, with --pmu-version 2 also 5 [default: 6]
    #[arg(long, value_name = "N")]
    pmu_counters: Option<u8>,

    /// Leave out this step of each reset, to see that the verdict finds it; may be repeated
    #[arg(long, value_enum, value_name = "FAULT")]
    inject: Vec<Fault>,

    /// Look at every buffer that the guests post on virtio queues
    #[arg(long, value_enum, value_name = "MODE", default_value_t)]
    dma_audit: AuditMode,

    /// RAM of each machine in MiB
    #[arg(long, value_name = "MIB", default_value_t = 128)]
    mem: u64,

    /// Number of vCPUs of each machine
    #[arg(long, value_name = "N", default_value_t = 1)]
    vcpus: u32,

    /// How long to wait for each answer of an agent, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    timeout: u64,

    /// Print a JSON object for each life in a line of its own, and one with the verdict at the end
    #[arg(long)]
    json: bool,

    /// Directory for bundles; made if something is found [default: cleanslate-soak-SEED]
    #[arg(long, value_name = "DIR")]
    bundle: Option<PathBuf>,

    #[command(flatten)]
    reports: reports::Arguments,

    #[command(flatten)]
    jail: JailArguments,
}

/// Options of `run` for all jails at once.
#[derive(Debug, Args)]
#[group(skip)]
#[command(next_help_heading = "Jail")]
struct JailArguments {
    /// Begin the jails' names with this; the machine's number follows [default: made of the processes' numbers]
    #[arg(long, value_name = "ID")]
    id: Option<Id>,

    /// User of the jailed processes: a name, a number, or +NUMBER, from which each machine has one of its own [default: nobody]
    #[arg(long, value_name = "USER")]
    uid: Option<String>,

    /// Group of the jailed processes, in the same way [default: the user's]
    #[arg(long, value_name = "GROUP", requires = "uid")]
    gid: Option<String>,

    /// Join this network namespace instead of new, empty ones
    #[arg(long, value_name = "PATH")]
    netns: Option<String>,

    /// Write VALUE to FILE of each jail's control group, such as cpuset.cpus=0; may be repeated
    #[arg(long, value_name = "FILE=VALUE")]
    cgroup: Vec<String>,

    /// Make the control groups in this one, a path below each hierarchy's top [default: the one that this process is in]
    #[arg(long, value_name = "PATH")]
    parent_cgroup: Option<String>,

    /// Limit a resource of each machine's process: no-file=NUMBER or fsize=BYTES; may be repeated
    #[arg(long, value_name = "NAME=VALUE")]
    resource_limit: Vec<String>,

    /// Run the machines in processes with all rights of this one: no namespaces, limits or system call filters
    #[arg(long)]
    no_jail: bool,
}

impl JailArguments {
    fn jails(&self) -> Jails {
        let mut arguments = Vec::new();
        let mut add = |option: &str, value: &String| {
            arguments.extend([option.into(), value.clone()]);
        };
        self.netns.iter().for_each(|path| add("--netns", path));
        self.cgroup.iter().for_each(|setting| add("--cgroup", setting));
        self.parent_cgroup.iter().for_each(|path| add("--parent-cgroup", path));
        self.resource_limit.iter().for_each(|limit| add("--resource-limit", limit));
        if self.no_jail {
            arguments.push("--no-jail".into());
        }
        let who = |word: &Option<String>| word.as_deref().map(Who::new);
        Jails {
            id: self.id.as_ref().map(Id::to_string),
            user: who(&self.uid),
            group: who(&self.gid),
            arguments,
        }
    }
}

/// A soak that cannot be.
#[derive(Debug, thiserror::Error)]
enum SoakError {
    #[error(
        "--vms {vms} with --poison fill {needed_mib} MiB of RAM, and this host has {available_mib} MiB to spare: fewer machines, \
         less --mem, or --no-poison"
    )]
    Memory { vms: u32, needed_mib: u64, available_mib: u64 },
    #[error("--{option} {start} leaves no numbers for --vms {vms}")]
    Users { option: &'static str, start: String, vms: u32 },
    #[error("--vms {vms} from --first-vm {first} are beyond the highest number, {MOST_VM}")]
    Numbers { vms: u32, first: u32 },
}

/// The highest number of a machine.
const MOST_VM: u32 = 1 << 30;

/// How much of its RAM a poisoned machine fills, at most.
const POISONED_MIB: u64 = 1024;

/// Parses the arguments of a machine's process as that will, to see that they make sense.
#[derive(Debug, Parser)]
#[command(no_binary_name = true)]
struct Run {
    #[command(flatten)]
    arguments: run::Arguments,
}

/// The longest that a machine's process says nothing for: in each life it waits for a few answers, and each may take its time.
const ANSWERS_PER_LIFE: u32 = 10;

impl Arguments {
    fn plan(&self) -> Result<Plan, Error> {
        let resets = match (self.resets, self.duration) {
            (None, None) => Some(1000),
            (resets, _) => resets,
        };
        let plan = Plan {
            vms: self.vms,
            first_vm: self.first_vm,
            resets,
            duration: self.duration,
            keep_going: self.keep_going,
            // Short enough to be read out.
            seed: self.seed.unwrap_or_else(|| RandomState::new().hash_one(0) >> 32),
            silence: Duration::from_secs(self.timeout) * ANSWERS_PER_LIFE,
            arguments: self.arguments_of_run(),
            jails: self.jail.jails(),
        };
        let last = plan.first_vm + (plan.vms - 1);
        if last > MOST_VM {
            return Err(SoakError::Numbers { vms: plan.vms, first: plan.first_vm }.into());
        }
        let Jails { user, group, .. } = &plan.jails;
        for (option, who, start) in [("uid", user, &self.jail.uid), ("gid", group, &self.jail.gid)]
        {
            if who.as_ref().is_some_and(|who| !who.has_enough_for(plan.vms)) {
                let start = start.clone().unwrap_or_default();
                return Err(SoakError::Users { option, start, vms: plan.vms }.into());
            }
        }
        for vm in [plan.first_vm, last] {
            let sample = plan.replay(vm, 0, 1);
            let parsed = Run::try_parse_from(&sample[1..]).map_err(super::in_one_line)?;
            parsed.arguments.config()?;
        }
        // A host that does not say is believed to have enough.
        self.check_memory(available_mib().unwrap_or(u64::MAX))?;
        Ok(plan)
    }

    /// Whether all machines fit into a host with so much to spare: if not, it would kill processes, and maybe others than ours.
    fn check_memory(&self, available_mib: u64) -> Result<(), SoakError> {
        let needed_mib = u64::from(self.vms) * self.mem.min(POISONED_MIB);
        match !self.no_poison && needed_mib > available_mib {
            true => Err(SoakError::Memory { vms: self.vms, needed_mib, available_mib }),
            false => Ok(()),
        }
    }

    fn arguments_of_run(&self) -> Vec<String> {
        let names = |names: Vec<&str>| names.join(",");
        let causes = names(self.causes.iter().map(|cause| cause.name()).collect());
        let mut words = vec!["--reset-via".to_string(), causes];
        let mut add = |option: &str, value: &str| {
            words.push(option.into());
            if !value.is_empty() {
                words.push(value.into());
            }
        };
        if !self.moments.is_empty() {
            add("--moments", &names(self.moments.iter().map(|m| m.name()).collect()));
        }
        if !self.no_poison {
            add("--poison", "");
        }
        // No value is hidden from the command line.
        if self.pmu != PmuPolicy::default() {
            let value = self.pmu.to_possible_value();
            value.iter().for_each(|value| add("--pmu", value.get_name()));
        }
        if self.dma_audit != AuditMode::default() {
            let value = self.dma_audit.to_possible_value();
            value.iter().for_each(|value| add("--dma-audit", value.get_name()));
        }
        for (option, value) in
            [("--pmu-version", self.pmu_version), ("--pmu-counters", self.pmu_counters)]
        {
            value.iter().for_each(|value| add(option, &value.to_string()));
        }
        self.inject.iter().for_each(|fault| add("--inject", fault.name()));
        add("--mem", &self.mem.to_string());
        add("--vcpus", &self.vcpus.to_string());
        add("--timeout", &self.timeout.to_string());
        words
    }
}

/// Memory that the host can give away, in MiB; none if it does not say.
fn available_mib() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let kib = |name| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().next()?.parse::<u64>().ok()
    };
    Some((kib("MemAvailable:")? + kib("SwapFree:").unwrap_or(0)) / 1024)
}

pub(super) fn main(arguments: &Arguments) -> Result<u8, Error> {
    let plan = arguments.plan()?;
    let bundles = Bundles::new(arguments.bundle.as_deref(), plan.seed)?;
    let files = arguments.reports.open()?;
    let interrupts = Interrupts::catch_as_started()?;
    allow_descriptors();
    let mut output = Output::new(&plan, arguments.json, bundles);
    let began = Instant::now();
    let ended = campaign::run(&plan, interrupts, &mut |news| output.hear(news));
    output.finish(ended.map_err(Into::into), began.elapsed(), files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Parser)]
    struct Soak {
        #[command(flatten)]
        arguments: Arguments,
    }

    #[test]
    fn machines_that_would_fill_the_host_are_refused() {
        let check = |options: &[&str], available_mib, is_good| {
            let words = [&["soak"], options].concat();
            let arguments = Soak::try_parse_from(words).unwrap().arguments;
            assert_eq!(arguments.check_memory(available_mib).is_ok(), is_good, "{options:?}");
        };
        check(&["--vms", "4"], 512, true);
        check(&["--vms", "4"], 511, false);
        check(&["--vms", "4", "--mem", "256"], 512, false);
        check(&["--vms", "4", "--no-poison"], 511, true);
        // Poison stops there.
        check(&["--vms", "2", "--mem", "8192"], 2048, true);
    }
}
