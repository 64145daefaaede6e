//! `cleanslate launch`: many jailed sandboxes, each of which does a job.

mod inside;

use std::io::{self, Read, Write};
use std::ops::ControlFlow;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use agent_protocol::MAX_JOB_BYTES;
use clap::{Args, ValueEnum};
use jailer::SignalFd;

use super::reports::ReportFile;
use super::run::PrintError;
use super::snapshot::clone_of;
use super::{Error, allow_descriptors, jail, parse_duration};
use crate::boot::Payload;
use crate::fault::{Fault, Faults};
use crate::kvm::pmu::PmuPolicy;
use crate::launch::coordinator::{Coordinator, News};
use crate::launch::idle::IdlePlan;
use crate::launch::report::{Report, html};
use crate::launch::{Origin, Plan};
use crate::lifecycle::ResidueCheck;
use crate::machine::Config;
use crate::progress::{Nouns, Progress};
use crate::sandbox::Guidance;
use inside::Starter;

/// Launch many jailed sandboxes, each of which does a job of the agent's
///
/// A job is bytes in and bytes out. The time of a launch begins before the sandbox's process is made, with --from recycle when
/// the machine is told to reset, and with --warm when the job is handed to a sandbox that waits for it; "hello" is when the
/// verdict on the new life is there, after the agent's hello and its report, and "done" when the job's output is. The time that
/// a sandbox takes to end is in the rate alone.
#[derive(Debug, Args)]
#[command(after_help = "\
Jobs of the embedded agent:
  echo    gives back what it is given
  sha256  the digest of what it is given, 32 bytes
  spin    keeps the processor busy for as many milliseconds as it is given in decimal

Exit status:
  0    all jobs were done, and every machine was clean
  1    failures or findings
  2    wrong usage, or the host failed
  130  interrupted

Examples:
  cleanslate launch --count 1000 --concurrency 8
  cleanslate launch --count 10000 --from recycle --html launches.html
  cleanslate launch --count 1000 --from snapshot --snapshot agent.snapshot
  cleanslate launch --count 200 --warm 8 --job sha256 --input data.bin --output digests
  cleanslate launch --idle 500 --hold")]
pub(super) struct Arguments {
    /// How many jobs
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..=1_000_000_000))]
    count: u64,

    /// How many sandboxes are busy at once
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=4096))]
    concurrency: u32,

    /// Where a sandbox comes from: made for one job, restored for one, or reset in place after each if it proves that nothing is
    /// left
    #[arg(long, value_enum, value_name = "WHERE", default_value_t)]
    from: From,

    /// Directory of the snapshot of --from snapshot, as "cleanslate snapshot create" makes it
    #[arg(long, value_name = "DIR", required_if_eq("from", "snapshot"))]
    snapshot: Option<PathBuf>,

    /// Keep this many more sandboxes that have said hello and wait for a job
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=4096))]
    warm: u32,

    /// What each sandbox does
    #[arg(long, value_name = "NAME", default_value = "echo")]
    job: String,

    /// What each job is given; - is standard input [default: nothing, and for spin 0]
    #[arg(long, value_name = "FILE")]
    input: Option<PathBuf>,

    /// Write what each job comes to into this directory, as files 0, 1, 2, …; made if it is not there
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,

    /// Give all state of a machine another value before it is recycled, and look at it first thing afterwards
    #[arg(long)]
    poison: bool,

    /// Leave out this step of each reset, to see that the machine is thrown away; may be repeated
    #[arg(long, value_enum, value_name = "FAULT", hide = true)]
    inject: Vec<Fault>,

    /// Instead of jobs: have this many sandboxes wait for one that never comes, and measure their memory and wake-ups
    #[arg(long, value_name = "N", conflicts_with_all = ["count", "warm", "job", "input", "output", "poison", "inject"],
          value_parser = clap::value_parser!(u64).range(1..=16_384))]
    idle: Option<u64>,

    /// How long the wake-ups of idle sandboxes are counted
    #[arg(long, value_name = "TIME", default_value = "2s", requires = "idle", value_parser = parse_duration)]
    span: Duration,

    /// Keep the idle sandboxes until Ctrl-C
    #[arg(long, requires = "idle")]
    hold: bool,

    /// RAM of each machine in MiB [default: 128, or that of the snapshot]
    #[arg(long, value_name = "MIB", conflicts_with = "snapshot")]
    mem: Option<u64>,

    /// Boot this agent instead of the embedded one
    #[arg(long, value_name = "FILE")]
    agent: Option<PathBuf>,

    /// How long a sandbox may take for its hello, and for its job, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    timeout: u64,

    /// Print the result as a JSON object
    #[arg(long)]
    json: bool,

    /// Write a page with plots for a browser
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,

    #[command(flatten)]
    jail: jail::Wishes,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum From {
    /// Each is made for one job, and ends after it
    #[default]
    Cold,
    /// Restored from --snapshot for one job, and ends after it
    Snapshot,
    /// Reset in place after each job
    Recycle,
}

/// Launches that cannot be.
#[derive(Debug, thiserror::Error)]
enum UsageError {
    #[error("--input has more than {MAX_JOB_BYTES} bytes, the most that a job is given")]
    TooLong,
    #[error("read --input {0:?}")]
    Input(PathBuf, #[source] io::Error),
    #[error("write --output {0:?}")]
    Output(PathBuf, #[source] io::Error),
    #[error("--{0} makes no sense without --from recycle, since nothing is reset")]
    NoReset(&'static str),
    #[error("--snapshot makes no sense without --from snapshot")]
    NoRestore,
}

impl Arguments {
    /// Whether standard input is what jobs are given.
    pub fn reads_stdin(&self) -> bool {
        self.input.as_deref() == Some(Path::new("-"))
    }

    fn plan(&self) -> Result<Plan, Error> {
        for (option, is_given) in [("poison", self.poison), ("inject", !self.inject.is_empty())] {
            if is_given && self.from != From::Recycle {
                return Err(UsageError::NoReset(option).into());
            }
        }
        if self.snapshot.is_some() && self.from != From::Snapshot {
            return Err(UsageError::NoRestore.into());
        }
        Ok(Plan {
            count: self.idle.unwrap_or(self.count),
            concurrency: self.concurrency as usize,
            origin: match self.from {
                From::Cold => Origin::Cold,
                From::Snapshot => Origin::Snapshot,
                From::Recycle => Origin::Recycle,
            },
            warm: self.warm as usize,
            job: self.job.clone(),
            input: self.read_input()?,
            timeout: Duration::from_secs(self.timeout),
        })
    }

    fn read_input(&self) -> Result<Vec<u8>, UsageError> {
        let Some(path) = &self.input else {
            return Ok(if self.job == "spin" { b"0".into() } else { Vec::new() });
        };
        let mut bytes = Vec::new();
        // One more than may be: enough to see that there are too many.
        let most = MAX_JOB_BYTES as u64 + 1;
        let read = match self.reads_stdin() {
            true => io::stdin().lock().take(most).read_to_end(&mut bytes),
            false => std::fs::File::open(path).and_then(|f| f.take(most).read_to_end(&mut bytes)),
        };
        read.map_err(|error| UsageError::Input(path.clone(), error))?;
        if bytes.len() > MAX_JOB_BYTES { Err(UsageError::TooLong) } else { Ok(bytes) }
    }

    fn config(&self) -> Result<Config, Error> {
        if let (From::Snapshot, Some(directory)) = (self.from, &self.snapshot) {
            let config = clone_of(directory, self.agent.as_ref())?;
            return Ok(Config { seccomp: true, ..config });
        }
        let recycles = self.from == From::Recycle;
        Ok(Config {
            looks_first: recycles,
            faults: Faults::new(self.inject.clone(), PmuPolicy::Off, self.poison)?,
            seccomp: true,
            ..Config::new(Payload::Agent(self.agent.clone()), self.mem.unwrap_or(128))
        })
    }

    fn guidance(&self) -> Guidance {
        let residue = match (self.from, self.poison) {
            (From::Cold | From::Snapshot, _) => ResidueCheck::Off,
            (From::Recycle, false) => ResidueCheck::Compare,
            (From::Recycle, true) => ResidueCheck::Poison,
        };
        // The coordinator is to be the first to lose patience: it names what took too long.
        Guidance { residue, timeout: Duration::from_secs(self.timeout) * 2 }
    }
}

/// Where outputs go.
struct Outputs(Option<PathBuf>);

impl Outputs {
    fn open(path: Option<&Path>) -> Result<Self, UsageError> {
        if let Some(path) = path
            && let Err(error) = std::fs::create_dir(path)
            && !(error.kind() == io::ErrorKind::AlreadyExists && path.is_dir())
        {
            return Err(UsageError::Output(path.into(), error));
        }
        Ok(Self(path.map(Into::into)))
    }

    fn write(&self, launch: u64, output: &[u8]) -> Result<(), UsageError> {
        let Some(dir) = &self.0 else { return Ok(()) };
        let path = dir.join(launch.to_string());
        std::fs::write(&path, output).map_err(|error| UsageError::Output(path, error))
    }
}

/// `null` is what takes the place of standard input once that was read.
pub(super) fn main(arguments: &Arguments, null: Option<OwnedFd>) -> Result<u8, Error> {
    let plan = arguments.plan()?;
    if let (true, Some(null)) = (arguments.reads_stdin(), null) {
        rustix::stdio::dup2_stdin(&null)?;
    }
    let config = arguments.config()?;
    let outputs = Outputs::open(arguments.output.as_deref())?;
    let page = arguments.html.as_deref().map(ReportFile::open).transpose()?;
    allow_descriptors();
    let signals = SignalFd::new(&[libc::SIGINT, libc::SIGTERM, libc::SIGHUP])?;
    let mem_mib = config.mem_mib;
    let mut starter = Starter::new(&arguments.jail, config, arguments.guidance(), plan.count)?;
    let nouns = Nouns { done: "launches", wrong: "failure", wrongs: "failures" };
    let mut progress = Progress::new(nouns, Some(plan.count), None);
    let mut lost = None;
    let mut listener = |news: News| {
        match news {
            News::Output(launch, output) => lost = outputs.write(launch, output).err(),
            News::Tick(figures) => progress.show(|| match arguments.idle {
                Some(_) => (figures.hello.total(), figures.wrongs()),
                None => (figures.done, figures.wrongs()),
            }),
        }
        if lost.is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let mut start = |number| starter.start(number);
    let coordinator = Coordinator::new(&plan, &mut start, &signals, &mut listener)?;
    let ended = match arguments.idle {
        Some(count) => coordinator
            .idle(IdlePlan { count, span: arguments.span, hold: arguments.hold })
            .map(|(figures, idle, interrupted)| (figures, Some(idle), interrupted)),
        None => coordinator.launch().map(|(figures, interrupted)| (figures, None, interrupted)),
    };
    progress.clear();
    // Everything of every sandbox is gone before anything is said.
    drop(starter);
    if let Some(error) = lost {
        return Err(error.into());
    }
    let (figures, idle, interrupted) = ended?;
    let report = Report { plan: &plan, mem_mib, figures, idle, interrupted };
    let text = if arguments.json { report.json() + "\n" } else { report.table() };
    let written = page.map_or(Ok(()), |page| page.write(&html(&report)));
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).map_err(PrintError)?;
    written?;
    Ok(report.status())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Launch {
        #[command(flatten)]
        arguments: Arguments,
    }

    fn parse(words: &[&str]) -> Result<Arguments, clap::Error> {
        let words = [&["launch"], words].concat();
        Launch::try_parse_from(words).map(|launch| launch.arguments)
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let check = |words: &[&str], expected: &str| {
            let error = match parse(words) {
                Err(error) => error.to_string(),
                Ok(arguments) => {
                    let plan = arguments.plan().map(drop);
                    plan.and_then(|()| arguments.config().map(drop)).unwrap_err().to_string()
                }
            };
            assert!(error.contains(expected), "{words:?}: {error}");
        };
        check(&["--count", "0"], "--count");
        check(&["--concurrency", "0"], "--concurrency");
        check(&["--from", "nowhere"], "--from");
        check(&["--idle", "5", "--job", "echo"], "--idle");
        check(&["--from", "snapshot"], "--snapshot");
        check(&["--snapshot", "/nowhere"], "--from snapshot");
        check(&["--from", "snapshot", "--snapshot", "/no/such/snapshot"], "/no/such/snapshot");
        check(&["--hold"], "--idle");
        check(&["--poison"], "--from recycle");
        check(&["--inject", "vsock-kept"], "--from recycle");
        check(&["--from", "recycle", "--inject", "ram-kept"], "--poison");
        check(&["--input", "/no/such/file"], "/no/such/file");
    }

    #[test]
    fn an_input_may_be_as_long_as_a_job_takes_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("input");
        let arguments = parse(&["--input", path.to_str().unwrap()]).unwrap();
        std::fs::write(&path, vec![1; MAX_JOB_BYTES]).unwrap();
        assert_eq!(arguments.read_input().unwrap().len(), MAX_JOB_BYTES);
        std::fs::write(&path, vec![1; MAX_JOB_BYTES + 1]).unwrap();
        assert!(matches!(arguments.read_input(), Err(UsageError::TooLong)));
    }

    #[test]
    fn a_recycled_machine_has_to_prove_itself() {
        let check = |words: &[&str], residue, looks_first| {
            let arguments = parse(words).unwrap();
            assert_eq!(arguments.guidance().residue, residue, "{words:?}");
            assert_eq!(arguments.config().unwrap().looks_first, looks_first, "{words:?}");
        };
        check(&[], ResidueCheck::Off, false);
        check(&["--from", "recycle"], ResidueCheck::Compare, true);
        check(&["--from", "recycle", "--poison"], ResidueCheck::Poison, true);
    }
}
