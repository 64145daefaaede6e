//! `cleanslate snapshot restore`: a machine goes on, is judged, and can be reset as any other.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use agent_protocol::Cause;
use clap::Args;
use images::guest::LinuxGuest;

use super::{Directory, DirectoryError};
use crate::boot::Payload;
use crate::cli::run::{Format, judge, parse_common_cause};
use crate::cli::{Error, jail, machine};
use crate::device::block::DiskConfig;
use crate::device::virtio::audit::AuditMode;
use crate::device::vsock::GuestCid;
use crate::exit;
use crate::kvm::pmu::PmuPolicy;
use crate::lifecycle::{Plan, ResidueCheck};
use crate::machine::{Config, GuestKind, Interrupts, RamSource, Resources, Restore, launch};
use crate::memory;
use crate::schedule::Schedule;

/// Have a machine go on that was kept as a snapshot, and say whether it is clean
///
/// What the machine is made of says the snapshot; files that it used are given again.
#[derive(Debug, Args)]
#[command(after_help = "\
Exit status:
  0    clean
  1    findings
  2    wrong usage, or the host failed
  130  interrupted

Examples:
  cleanslate snapshot restore agent.snapshot
  cleanslate snapshot restore agent.snapshot --resets 3 --json")]
pub(super) struct Arguments {
    /// Directory of the snapshot
    directory: PathBuf,

    /// Directory of a snapshot that the one before it builds on; may be repeated, the base first
    #[arg(long, value_name = "DIRECTORY")]
    base: Vec<PathBuf>,

    /// Have RAM come from the page server behind this Unix socket, page by page, and not from the snapshot's memory file
    /// (Firecracker's userfaultfd protocol)
    #[arg(long, value_name = "PATH", conflicts_with = "base")]
    page_server: Option<PathBuf>,

    /// Reset the machine in place this many times afterwards
    #[arg(long, value_name = "N", default_value_t = 0)]
    resets: u32,

    /// How to reset it, in turn: host, i8042, cf9, acpi, triple
    #[arg(long, value_name = "CAUSES", value_delimiter = ',', default_value = "host,i8042,triple", value_parser = parse_common_cause)]
    reset_via: Vec<Cause>,

    /// The guest's address on vsock
    #[arg(long, value_name = "CID", default_value = "3", value_parser = parse_cid)]
    cid: GuestCid,

    /// The kernel of a Linux guest, which a reset boots [default: the newest that is installed]
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,

    /// The agent of the snapshot, if it is not the embedded one
    #[arg(long, value_name = "FILE", conflicts_with = "kernel")]
    agent: Option<PathBuf>,

    /// A disk of the machine, as it was then; once for each, in the same order
    #[arg(long, value_name = "PATH[,ro]")]
    disk: Vec<DiskConfig>,

    /// Unix socket for host clients of the guest's vsock ports
    #[arg(long, value_name = "PATH")]
    uds: Option<PathBuf>,

    /// Unix socket of type SOCK_SEQPACKET for clients of the guest's vsock sockets of that type
    #[arg(long, value_name = "PATH", requires = "uds")]
    uds_seqpacket: Option<PathBuf>,

    /// Look at every buffer that the guest posts on virtio queues from now on
    #[arg(long, value_enum, value_name = "MODE", default_value_t)]
    dma_audit: AuditMode,

    /// Keep the machine running after the verdict, until Ctrl-C; for clients of --uds
    #[arg(long, requires = "uds")]
    hold: bool,

    /// How long to wait for each answer of the agent, in seconds [default: 10, of a Linux 120]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    timeout: Option<u64>,

    /// Print one JSON object instead of the table
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    jail: jail::Arguments,
}

fn parse_cid(word: &str) -> Result<GuestCid, String> {
    let cid = word.parse().ok().and_then(GuestCid::new);
    cid.ok_or_else(|| "an address is a number from 3 to 4294967294".into())
}

/// What the snapshot is not.
#[derive(Debug, thiserror::Error)]
enum RestoreError {
    #[error("the snapshot is of a kernel without an agent, which nobody could judge")]
    NoAgent,
    #[error("the snapshot is of an agent from a file: give it again with --agent FILE")]
    AgentFile,
    #[error("{0} is not for this snapshot, which is of {1}")]
    NotOfIt(&'static str, GuestKind),
}

pub(super) fn main(arguments: &Arguments, started: Instant) -> Result<u8, Error> {
    let config = config(arguments)?;
    let notice = |text: &str| eprintln!("cleanslate: {text}");
    arguments.jail.run(config, notice, |config, resources, interrupts| {
        lead(arguments, config, resources, interrupts, started)
    })
}

fn config(arguments: &Arguments) -> Result<Config, Error> {
    restored(&arguments.directory, &arguments.base, |guest, config| {
        let payload = payload(arguments, guest)?;
        let mut config = config;
        if let (Some(restore), Some(path)) = (&mut config.restore, &arguments.page_server) {
            restore.ram = RamSource::Server(path.clone());
        }
        let config = Config {
            cid: arguments.cid,
            vsock_path: arguments.uds.clone(),
            vsock_messages_path: arguments.uds_seqpacket.clone(),
            disks: arguments.disk.clone(),
            dma_audit: arguments.dma_audit,
            ..config
        };
        Ok((payload, config))
    })
}

/// The machine of an agent's snapshot in `directory`, as one that has nothing but that.
pub(in crate::cli) fn clone_of(directory: &Path, agent: Option<&PathBuf>) -> Result<Config, Error> {
    restored(directory, &[], |guest, config| match (guest, agent) {
        (GuestKind::Agent(_), None) => Ok((Payload::Agent(None), config)),
        (GuestKind::AgentFile, Some(path)) => Ok((Payload::Agent(Some(path.clone())), config)),
        (GuestKind::AgentFile, None) => Err(RestoreError::AgentFile.into()),
        (GuestKind::Agent(_), Some(_)) => Err(RestoreError::NotOfIt("--agent", guest).into()),
        (GuestKind::Kernel | GuestKind::Linux, _) => Err(RestoreError::NoAgent.into()),
    })
}

/// The machine of a snapshot. `choose` says what a reset boots, and what the machine has besides.
fn restored(
    directory: &Path,
    base: &[PathBuf],
    choose: impl FnOnce(GuestKind, Config) -> Result<(Payload, Config), Error>,
) -> Result<Config, Error> {
    let directory = Directory(directory);
    let snapshot = directory.read()?;
    let below = base.iter().map(|base| {
        let base = Directory(base);
        Ok((base.header()?, base.memory()))
    });
    let mut layers = below.collect::<Result<Vec<_>, DirectoryError>>()?;
    layers.push((snapshot.header.clone(), directory.memory()));
    let description = snapshot.state.description().clone();
    let config = Config {
        restore: Some(Restore {
            header: snapshot.header,
            state: Arc::new(snapshot.state),
            ram: RamSource::Files(layers),
        }),
        ..Config::new(Payload::Agent(None), description.mem_mib)
    };
    let (payload, config) = choose(description.guest, config)?;
    Ok(description.configure(config, payload))
}

fn payload(arguments: &Arguments, guest: GuestKind) -> Result<Payload, Error> {
    let refuse = |option| Err(RestoreError::NotOfIt(option, guest).into());
    match guest {
        GuestKind::Kernel => Err(RestoreError::NoAgent.into()),
        GuestKind::Linux if arguments.agent.is_some() => refuse("--agent"),
        GuestKind::Linux => {
            Ok(Payload::Linux(LinuxGuest::new(arguments.kernel.as_deref(), false)?))
        }
        _ if arguments.kernel.is_some() => refuse("--kernel"),
        GuestKind::Agent(_) if arguments.agent.is_some() => refuse("--agent"),
        GuestKind::Agent(_) => Ok(Payload::Agent(None)),
        GuestKind::AgentFile if arguments.agent.is_none() => Err(RestoreError::AgentFile.into()),
        GuestKind::AgentFile => Ok(Payload::Agent(arguments.agent.clone())),
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
    let guest = match config.payload {
        Payload::Linux(_) => machine::Guest::Linux,
        _ => machine::Guest::Unikernel,
    };
    let machine = launch(config, resources, interrupts)?;
    let plan = Plan {
        resets: arguments.resets,
        schedule: Schedule::InTurn(arguments.reset_via.clone()),
        nmis: 0,
        residue: ResidueCheck::Off,
        arms_pmu: config.pmu != PmuPolicy::Off,
        late_nmi: false,
        timeout: arguments.timeout.map_or(guest.patience(), Duration::from_secs),
    };
    let format = if arguments.json { Format::Json } else { Format::Table };
    let status = judge(&machine, config, &plan, (started, format), |_, _| Ok(None))?;
    if arguments.hold && status != exit::INTERRUPTED {
        return crate::cli::run::guest::hold(&machine, arguments.dma_audit, status, false);
    }
    Ok(status)
}
