//! `cleanslate api`: a machine steered over HTTP; with Firecracker's options, so that what starts a firecracker can start this.

use std::cell::RefCell;
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

use clap::Args;
use jailer::seccomp::{ThreadKind, restrict};
use jailer::{CgroupPlan, Id, Jail, Janitor, Network, ResourceLimit, Root, Running, SignalFd};

use super::{Error, jail};
use crate::api::config::VmConfig;
use crate::api::desk::{Desk, FIRECRACKER_VERSION};
use crate::api::instance::{Clients, Instance};
use crate::api::metrics::Metrics;
use crate::api::model::{self, Level, Logger, Refusal};
use crate::api::{http, socket};
use crate::exit;
use crate::lifecycle::ResidueCheck;
use crate::sandbox::Guidance;

/// Longest configuration file in bytes.
const MOST_OF_A_FILE: u64 = 1 << 20;

/// What the process that serves clients may hold, in bytes: its connections' buffers and a request of each.
const CLIENTS_MEMORY: u64 = 64 << 20;

/// Signals that ask this process to end.
const ENDING: [i32; 3] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP];

/// How long the agent has for each answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// Serve Firecracker's HTTP interface at a Unix socket, for one machine, and more beside it
///
/// Requests describe the machine, start it (PUT /actions, "InstanceStart") and steer it. The paths below /cleanslate are this
/// program's own: reset in place, NMIs, the agent's report and the verdict on it, the DMA audit, metrics for Prometheus. Without
/// a PUT /boot-source the machine boots the embedded guest agent. The file openapi.json of the source has every path.
///
/// By the name of "firecracker", as with a symbolic link, the program is this command.
#[derive(Debug, Args)]
#[command(
    disable_version_flag = true,
    after_help = "\
Exit status:
  0    the guest turned the machine off or asked for a reset
  2    wrong usage, or the host failed
  4    the guest died of a triple fault
  5    KVM cannot run the guest any further
  130  interrupted

Examples:
  cleanslate api --api-sock /tmp/api.sock
  curl --unix-socket /tmp/api.sock -X PUT http://localhost/actions -d '{\"action_type\": \"InstanceStart\"}'
  curl --unix-socket /tmp/api.sock http://localhost/cleanslate/verdict
  cleanslate api --no-api --config-file machine.json"
)]
pub(super) struct Arguments {
    /// The socket
    #[arg(long, value_name = "PATH", default_value = "/run/firecracker.socket")]
    api_sock: PathBuf,

    /// Start the machine that this file describes, in Firecracker's JSON, with our own part under "cleanslate"
    #[arg(long, value_name = "PATH")]
    config_file: Option<PathBuf>,

    /// Serve no clients
    #[arg(long, requires = "config_file")]
    no_api: bool,

    /// Write the log to this file or FIFO
    #[arg(long, value_name = "PATH")]
    log_path: Option<PathBuf>,

    /// How much is logged: Off, Error, Warn, Info, Debug or Trace [default: Info]
    #[arg(long, value_name = "LEVEL")]
    level: Option<Level>,

    /// Log what comes of this module alone
    #[arg(long, value_name = "NAME")]
    module: Option<String>,

    /// Say its level in each line of the log
    #[arg(long)]
    show_level: bool,

    /// Say in each line of the log which module it comes from
    #[arg(long)]
    show_log_origin: bool,

    /// Write metrics to this file or FIFO, when FlushMetrics asks for them and at the end
    #[arg(long, value_name = "PATH")]
    metrics_path: Option<PathBuf>,

    /// Longest body of a request, in bytes
    #[arg(long, value_name = "BYTES", default_value_t = 51_200, value_parser = clap::value_parser!(u32).range(1..=200_000))]
    http_api_max_payload_size: u32,

    /// Run without filters of system calls; the rest of the jail stays
    #[arg(long)]
    no_seccomp: bool,

    /// Print the version of Firecracker's interface, and this program's
    #[arg(long)]
    version: bool,

    /// Monotonic clock at this process's start, in microseconds: for the metrics, from a jailer
    #[arg(long, value_name = "US", hide = true)]
    start_time_us: Option<u64>,

    /// Processor time of this process at its start, in microseconds: for the metrics, from a jailer
    #[arg(long, value_name = "US", hide = true)]
    start_time_cpu_us: Option<u64>,

    /// Processor time of the jailer, in microseconds: for the metrics
    #[arg(long, value_name = "US", hide = true)]
    parent_cpu_time_us: Option<u64>,

    #[command(flatten)]
    lacking: Lacking,

    #[command(flatten)]
    jail: jail::Wishes,
}

/// Options of Firecracker's that are refused, each with the reason.
#[derive(Debug, Args)]
struct Lacking {
    #[arg(long, hide = true)]
    boot_timer: bool,
    #[arg(long, hide = true)]
    enable_pci: bool,
    #[arg(long, value_name = "PATH", hide = true)]
    seccomp_filter: Option<PathBuf>,
    #[arg(long, value_name = "PATH", hide = true)]
    metadata: Option<PathBuf>,
    #[arg(long, value_name = "BYTES", hide = true)]
    mmds_size_limit: Option<u64>,
    #[arg(long, hide = true)]
    snapshot_version: bool,
    #[arg(long, value_name = "PATH", hide = true)]
    describe_snapshot: Option<PathBuf>,
}

/// Options that this program does not have.
#[derive(Debug, thiserror::Error)]
enum UsageError {
    #[error("{0}: {1}")]
    Lacking(&'static str, &'static str),
    #[error("read the configuration file {path:?}: {reason}")]
    Config { path: PathBuf, reason: String },
    #[error("open the log {path:?}")]
    Log { path: PathBuf, source: std::io::Error },
    #[error("--metrics-path: {0}")]
    Metrics(Refusal),
}

impl Lacking {
    fn refuse(&self) -> Result<(), UsageError> {
        let given = [
            (self.boot_timer, "--boot-timer", "there is no boot timer device here; leave it out"),
            (self.enable_pci, "--enable-pci", "devices are virtio-mmio here; leave it out"),
            (
                self.seccomp_filter.is_some(),
                "--seccomp-filter",
                "the filters are part of the program; leave it out",
            ),
            (
                self.metadata.is_some() || self.mmds_size_limit.is_some(),
                "--metadata and --mmds-size-limit",
                "there is no metadata service here; leave them out, and send data over vsock",
            ),
            (
                self.snapshot_version || self.describe_snapshot.is_some(),
                "--snapshot-version and --describe-snapshot",
                "`cleanslate snapshot show` tells what a snapshot is",
            ),
        ];
        match given.into_iter().find(|(is_given, ..)| *is_given) {
            Some((_, option, reason)) => Err(UsageError::Lacking(option, reason)),
            None => Ok(()),
        }
    }
}

pub(super) fn main(arguments: Arguments, started: Instant) -> Result<u8, Error> {
    if arguments.version {
        println!(
            "Firecracker v{FIRECRACKER_VERSION}\n\nCleanslate {} speaks the interface of that version.",
            env!("CARGO_PKG_VERSION")
        );
        return Ok(exit::CLEAN);
    }
    arguments.lacking.refuse()?;
    let desk = arguments.desk(started)?;
    let janitor = Rc::new(Janitor::start()?);
    // Read instead of caught: copies of this process have no handlers to inherit.
    let signals = SignalFd::new(&ENDING)?;
    let (clients, _file) = match arguments.no_api {
        true => (None, None),
        false => {
            let (listener, file) = socket::bind(&arguments.api_sock, &janitor)?;
            (Some(arguments.serve(listener, &janitor)?), Some(file))
        }
    };
    let seen = RefCell::new(Vec::new());
    let notice = |text: &str| {
        if !seen.borrow().iter().any(|known| known == text) {
            eprintln!("cleanslate: {text}");
            seen.borrow_mut().push(text.to_owned());
        }
    };
    let guidance = Guidance { residue: ResidueCheck::Off, timeout: PATIENCE };
    let filters = !arguments.no_seccomp;
    let start = Box::new(|config, console| {
        arguments.jail.start(config, console, guidance, filters, &janitor, notice)
    });
    Instance::new(desk, clients, signals, start).run(arguments.config_file.is_some())
}

impl Arguments {
    /// The desk with all that the command line and the configuration file say.
    fn desk(&self, started: Instant) -> Result<Desk, Error> {
        let id = self.jail.id().map_or("anonymous-instance", Id::as_str);
        let mut metrics = Metrics::new(started);
        metrics.start_was(self.start_time_us, self.start_time_cpu_us, self.parent_cpu_time_us);
        let mut desk = Desk::new(id.into(), metrics);
        if let Some(path) = &self.config_file {
            desk.config = read_config(path)
                .map_err(|Refusal(reason)| UsageError::Config { path: path.clone(), reason })?;
        }
        let logger = Logger {
            log_path: self.log_path.clone(),
            level: self.level,
            show_level: self.show_level.then_some(true),
            show_log_origin: self.show_log_origin.then_some(true),
            module: self.module.clone(),
        };
        // What the file says is said later, as with Firecracker.
        let of_file = desk.config.logger.take();
        for logger in std::iter::once(logger).chain(of_file) {
            let path = logger.log_path.clone().unwrap_or_default();
            desk.log.set(logger.clone()).map_err(|source| UsageError::Log { path, source })?;
            if logger != Logger::default() {
                desk.config.logger =
                    Some(logger.over(desk.config.logger.take().unwrap_or_default()));
            }
        }
        let of_file = desk.config.metrics.take();
        let of_line = self.metrics_path.clone().map(|metrics_path| model::Metrics { metrics_path });
        for wanted in of_line.into_iter().chain(of_file) {
            desk.metrics.open(&wanted.metrics_path).map_err(UsageError::Metrics)?;
            desk.config.metrics = Some(wanted);
        }
        desk.log.line(
            Level::Info,
            module_path!(),
            &format!("Running Cleanslate {}", env!("CARGO_PKG_VERSION")),
        );
        Ok(desk)
    }

    /// Starts the process that serves clients, in a jail of its own.
    fn serve(
        &self,
        listener: std::os::fd::OwnedFd,
        janitor: &Rc<Janitor>,
    ) -> Result<(Clients, Running), Error> {
        let (ours, theirs) = UnixStream::pair()?;
        let jail = Jail {
            id: Id::of_this_process(),
            user: None,
            network: Network::New,
            new_pid_namespace: true,
            root: Root::Empty,
            mounts: Vec::new(),
            cgroup: CgroupPlan {
                memory_bytes: Some(CLIENTS_MEMORY),
                pids: Some(1),
                cpus: Some(1),
                ..CgroupPlan::default()
            },
            limits: vec![
                ResourceLimit::NO_CORE,
                ResourceLimit::descriptors(http::MOST_CONNECTIONS as u64 + 32),
            ],
            runs_a_program: false,
        };
        let max_payload = self.http_api_max_payload_size as usize;
        let filters = !self.no_seccomp;
        let process = jail.prepare_with(janitor)?.start(
            (listener, theirs),
            |(listener, theirs)| vec![listener.as_fd(), theirs.as_fd()],
            |(listener, theirs), entered| {
                let work = || -> Result<(), Error> {
                    let inside = entered?;
                    jailer::seccomp::catch_violations(inside.report)?;
                    http::serve(listener, theirs.into(), max_payload, || match filters {
                        true => restrict(ThreadKind::Http).map_err(std::io::Error::other),
                        false => Ok(()),
                    })?;
                    Ok(())
                };
                super::status(work().map(|()| exit::CLEAN))
            },
        )?;
        Ok((Clients::new(ours)?, process))
    }
}

/// What a configuration file says, and the CPU template that it names.
fn read_config(path: &Path) -> Result<VmConfig, Refusal> {
    VmConfig::from_file(&read_file(path)?, |path| read_file(path))
}

/// A regular file, up to a length: neither a FIFO nor a device keeps this waiting.
fn read_file(path: &Path) -> Result<Vec<u8>, Refusal> {
    let read = || -> std::io::Result<Vec<u8>> {
        let mut options = std::fs::OpenOptions::new();
        let file = options.read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path)?;
        if !file.metadata()?.is_file() {
            return Err(std::io::Error::other("not a regular file"));
        }
        let mut bytes = Vec::new();
        file.take(MOST_OF_A_FILE + 1).read_to_end(&mut bytes)?;
        match bytes.len() as u64 > MOST_OF_A_FILE {
            true => Err(std::io::Error::other(format!("longer than {MOST_OF_A_FILE} bytes"))),
            false => Ok(bytes),
        }
    };
    read().map_err(|error| Refusal::new(format!("{path:?}: {error}")))
}
