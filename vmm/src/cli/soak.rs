//! `cleanslate soak`: many machines, many resets at random moments, a verdict on all of them.

mod output;

use std::fs::File;
use std::hash::{BuildHasher, RandomState};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, Instant};

use agent_protocol::Cause;
use clap::{Args, Parser, ValueEnum};

use super::run::{self, parse_cause};
use super::{Error, exit};
use crate::device::virtio::audit::AuditMode;
use crate::fault::Fault;
use crate::kvm::pmu::PmuPolicy;
use crate::machine::Interrupts;
use crate::schedule::Moment;
use crate::soak::bundle::Bundles;
use crate::soak::campaign::{self, Plan};
use output::{Files, Output};

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
          value_parser = parse_cause)]
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

    /// Write a report for test runners in JUnit's format
    #[arg(long, value_name = "FILE")]
    junit: Option<PathBuf>,

    /// Write a page with plots for a browser
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,

    /// Write VALUE to FILE of each jail's control group, such as cpuset.cpus=0; may be repeated
    #[arg(long, value_name = "FILE=VALUE", help_heading = "Jail")]
    cgroup: Vec<String>,

    /// Make the control groups in this one, a path below each hierarchy's top [default: the one that this process is in]
    #[arg(long, value_name = "PATH", help_heading = "Jail")]
    parent_cgroup: Option<String>,

    /// Run the machines in processes with all rights of this one: no namespaces, limits or system call filters
    #[arg(long, help_heading = "Jail")]
    no_jail: bool,
}

#[derive(Debug, thiserror::Error)]
#[error("write {path:?}")]
struct FileError {
    path: PathBuf,
    source: std::io::Error,
}

fn parse_duration(word: &str) -> Result<Duration, String> {
    let split = word.find(|c: char| !c.is_ascii_digit()).unwrap_or(word.len());
    let (number, unit) = word.split_at(split);
    let seconds = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 60 * 60,
        "d" => 24 * 60 * 60,
        _ => 0,
    };
    // A century; more is a slip of the hand.
    const MOST: u64 = 100 * 365 * 24 * 60 * 60;
    match number.parse::<u64>().ok().and_then(|number| number.checked_mul(seconds)) {
        Some(seconds @ 1..=MOST) => Ok(Duration::from_secs(seconds)),
        _ => Err("a time is a number with s, m, h or d".into()),
    }
}

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
        };
        let sample = plan.replay(plan.first_vm, 0, 1);
        let parsed = Run::try_parse_from(&sample[1..]).map_err(super::in_one_line)?;
        parsed.arguments.config()?;
        Ok(plan)
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
        self.cgroup.iter().for_each(|setting| add("--cgroup", setting));
        self.parent_cgroup.iter().for_each(|path| add("--parent-cgroup", path));
        if self.no_jail {
            add("--no-jail", "");
        }
        words
    }
}

pub(super) fn main(arguments: &Arguments) -> Result<u8, Error> {
    let plan = arguments.plan()?;
    let bundles = Bundles::new(arguments.bundle.as_deref(), plan.seed)?;
    // Tried now, so that they do not fail after hours.
    let files = Files { junit: create(&arguments.junit)?, html: create(&arguments.html)? };
    let interrupts = Interrupts::catch()?;
    let mut output = Output::new(&plan, arguments.json, bundles);
    let began = Instant::now();
    let ended = campaign::run(&plan, interrupts, &mut |news| output.hear(news));
    let took = began.elapsed();
    let ending = match ended {
        Ok(ending) => ending,
        Err(error) => {
            output.abandon();
            return Err(error.into());
        }
    };
    let clean = output.finish(ending, took, files)?;
    Ok(match ending {
        campaign::Ending::Interrupted => exit::INTERRUPTED,
        _ if clean => exit::CLEAN,
        _ => exit::FINDINGS,
    })
}

fn create(path: &Option<PathBuf>) -> Result<Option<(PathBuf, File)>, FileError> {
    let create = |path: &Path| match File::create(path) {
        Ok(file) => Ok((path.to_path_buf(), file)),
        Err(source) => Err(FileError { path: path.into(), source }),
    };
    path.as_deref().map(create).transpose()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_units() {
        let check = |word, seconds: Option<u64>| {
            assert_eq!(parse_duration(word).ok(), seconds.map(Duration::from_secs), "{word}");
        };
        check("90s", Some(90));
        check("30m", Some(1800));
        check("1h", Some(3600));
        check("2d", Some(172_800));
        for word in
            ["", "1", "h", "0s", "-1s", "1.5h", "1w", "1hh", "99999999999999999999s", "9999999999h"]
        {
            check(word, None);
        }
    }
}
