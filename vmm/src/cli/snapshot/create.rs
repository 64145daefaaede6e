//! `cleanslate snapshot create`: boots a machine, judges it, and keeps it.

use std::io::ErrorKind;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use agent_protocol::Cause;
use clap::Args;

use super::Directory;
use crate::cli::run::{Format, Written, judge};
use crate::cli::{Error, jail, machine};
use crate::device::virtio::audit::AuditMode;
use crate::exit;
use crate::kvm::pmu::PmuPolicy;
use crate::lifecycle::{Plan, ResidueCheck};
use crate::machine::{Config, Event, Handle, Interrupts, Resources, SnapshotKind, Stop, launch};
use crate::memory;
use crate::schedule::Schedule;
use crate::snapshot::{Drafts, Header, Summary, Targets};

/// Boot a machine, wait for its agent, judge it, and keep it as a snapshot
#[derive(Debug, Args)]
#[command(after_help = "\
Exit status:
  0    clean, and the snapshot is there
  1    findings; there is a snapshot only with --force
  2    wrong usage, or the host failed
  130  interrupted

Examples:
  cleanslate snapshot create agent.snapshot --mem 256
  cleanslate snapshot create counting.snapshot --pmu emulated --rng")]
pub(super) struct Arguments {
    /// Directory for the snapshot; made if it is not there
    directory: PathBuf,

    /// Keep the machine even if the verdict has findings
    #[arg(long)]
    force: bool,

    /// Put the new snapshot in the place of one that is there
    #[arg(long)]
    replace: bool,

    /// Have the agent look at all registers before anything else, so that lives to come can be compared with it
    #[arg(long)]
    look: bool,

    #[command(flatten)]
    machine: machine::Arguments,

    /// Look at every buffer that the guest posts on virtio queues
    #[arg(long, value_enum, value_name = "MODE", default_value_t)]
    dma_audit: AuditMode,

    /// How long to wait for each answer of the agent, in seconds [default: 10, with --guest linux 120]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    timeout: Option<u64>,

    /// Print one JSON object instead of the table
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    jail: jail::Arguments,
}

/// Why there will be no snapshot.
#[derive(Debug, thiserror::Error)]
enum CreateError {
    #[error(
        "snapshot create takes a machine with an agent: with --kernel add --guest linux, or leave out --kernel"
    )]
    NoAgent,
    #[error("{0:?} holds a snapshot: choose another directory, or add --replace")]
    Exists(PathBuf),
    #[error("make the directory {0:?}")]
    Directory(PathBuf, #[source] std::io::Error),
    #[error("the machine stopped before it could be kept: {0}")]
    Stopped(String),
    #[error("keep the machine as a snapshot")]
    Capture(#[source] crate::machine::CaptureError),
}

pub(super) fn main(arguments: &Arguments, started: Instant) -> Result<u8, Error> {
    if !arguments.machine.has_agent() {
        return Err(CreateError::NoAgent.into());
    }
    let config = arguments.machine.config(false)?;
    let (looks_first, dma_audit) = (arguments.look, arguments.dma_audit);
    let config = Config { looks_first, dma_audit, ..config };
    let directory = Directory(&arguments.directory);
    if !arguments.replace && directory.state().exists() {
        return Err(CreateError::Exists(arguments.directory.clone()).into());
    }
    let is_new = match std::fs::create_dir(&arguments.directory) {
        Ok(()) => true,
        Err(error) if error.kind() == ErrorKind::AlreadyExists => false,
        Err(error) => return Err(CreateError::Directory(arguments.directory.clone(), error).into()),
    };
    let result = keep(arguments, config, &directory, started);
    if is_new {
        // Only if it is empty: nothing came of it.
        let _ = std::fs::remove_dir(&arguments.directory);
    }
    let (status, header) = result?;
    if let (Some(header), false) = (header, arguments.json) {
        let Header { id, pages, ram_bytes, .. } = header;
        let kib = pages.stored() * (crate::snapshot::PAGE / 1024);
        let (directory, mib) = (&arguments.directory, ram_bytes >> 20);
        println!("snapshot {id} in {directory:?}: {kib} KiB of {mib} MiB of RAM");
    }
    Ok(status)
}

/// Runs the machine in its jail and gives the files their names if they are a snapshot.
fn keep(
    arguments: &Arguments,
    config: Config,
    directory: &Directory,
    started: Instant,
) -> Result<(u8, Option<Header>), Error> {
    let drafts = Drafts::create(&directory.state(), &directory.memory())?;
    let targets = drafts.targets()?;
    let status = arguments.jail.run_with(
        config,
        |resources| Ok(resources.with_targets(targets)),
        |text| eprintln!("cleanslate: {text}"),
        |config, resources, interrupts| lead(arguments, config, resources, interrupts, started),
    )?;
    let is_kept = status == exit::CLEAN || (status == exit::FINDINGS && arguments.force);
    let header = if is_kept { Some(drafts.commit()?) } else { None };
    Ok((status, header))
}

/// Runs the machine, in the process that is made for it.
fn lead(
    arguments: &Arguments,
    config: &Config,
    mut resources: Resources,
    interrupts: Interrupts,
    started: Instant,
) -> Result<u8, Error> {
    memory::warm_heap();
    let targets = resources.take_targets();
    let machine = launch(config, resources, interrupts)?;
    let guest = arguments.machine.guest;
    let plan = Plan {
        resets: 0,
        schedule: Schedule::InTurn(vec![Cause::Host]),
        nmis: 0,
        residue: ResidueCheck::Off,
        arms_pmu: config.pmu != PmuPolicy::Off,
        late_nmi: false,
        timeout: arguments.timeout.map_or(guest.patience(), Duration::from_secs),
    };
    let format = if arguments.json { Format::Json } else { Format::Table };
    judge(&machine, config, &plan, (started, format), |machine, is_clean| {
        match targets.filter(|_| is_clean || arguments.force) {
            Some(targets) => Ok(Some(Written::from(capture(machine, targets)?))),
            None => Ok(None),
        }
    })
}

/// Stops the machine's time and writes what it is.
fn capture(machine: &Handle, targets: Targets) -> Result<Summary, CreateError> {
    machine.pause();
    await_event(machine, |event| match event {
        Event::Paused => Ok(()),
        event => Err(event),
    })?;
    machine.snapshot(targets, SnapshotKind::Full);
    let written = await_event(machine, |event| match event {
        Event::Snapshot(written) => Ok(written),
        event => Err(event),
    })?;
    written.map_err(CreateError::Capture)
}

fn await_event<T>(
    machine: &Handle,
    mut pick: impl FnMut(Event) -> Result<T, Event>,
) -> Result<T, CreateError> {
    // A disk may be slow to finish what it is at.
    const FOREVER: Duration = Duration::from_secs(u32::MAX as u64);
    loop {
        match machine.next_event(FOREVER).map(&mut pick) {
            Some(Ok(value)) => return Ok(value),
            Some(Err(Event::Stopped(stop))) => return Err(CreateError::Stopped(words(&stop))),
            Some(Err(_)) | None => {}
        }
    }
}

fn words(stop: &Stop) -> String {
    match stop {
        Stop::PowerOff => "the guest turned it off".into(),
        Stop::Reset(cause) => format!("the guest asked for a reset ({cause})"),
        Stop::Stuck(stuck) => stuck.to_string(),
        Stop::Interrupted => "interrupted".into(),
        Stop::Requested => "it was told to".into(),
        Stop::Failed(error) => crate::lifecycle::chain(error),
    }
}
