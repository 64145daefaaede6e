//! The jail of a command that runs machines: flags to a [`Jail`], and the work in a process that is in it.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use clap::Args;
use jailer::cgroup::Setting;
use jailer::{CgroupPlan, End, Id, Jail, Janitor, Mount, Network, ResourceLimit, Root, User};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::{Error, status};
use crate::api::instance;
use crate::device::block::WORKERS;
use crate::device::vsock::SocketFile;
use crate::exit;
use crate::lifecycle::chain;
use crate::machine::{Config, Interrupts, MachineError, Resources};
use crate::sandbox::{self, Guidance, Sandbox};

/// Where the jail shows the directory of the vsock socket.
const SOCKETS: &str = "/sockets";

/// What a machine's process may hold besides guest RAM, in MiB: its program, its heap, its threads' stacks, the kernel's
/// memory for KVM's tables and for sockets. Far above what it needs, so that only a runaway meets it.
const MEMORY_BEYOND_RAM_MIB: u64 = 256;

/// Threads besides those of vCPUs and disks: main, event loop, and what KVM starts for a machine.
const THREADS_BEYOND_VCPUS: u64 = 8;

/// Descriptors: 4,000 vsock connections, and what the machine itself holds.
const DESCRIPTORS: u64 = 8192;

#[derive(Debug, Args)]
#[command(next_help_heading = "Jail")]
// clap would name a group for the struct, which has the same name as the one that it is part of.
#[group(skip)]
pub(super) struct Arguments {
    /// Run the machine in this process, with all its rights: no namespaces, limits or system call filters
    #[arg(long, conflicts_with_all = ["id", "uid", "netns", "cgroup", "parent_cgroup", "resource_limit"])]
    no_jail: bool,

    #[command(flatten)]
    wishes: Wishes,
}

/// What the user wants of a jail.
#[derive(Debug, Default, Args)]
#[command(next_help_heading = "Jail")]
#[group(skip)]
pub(super) struct Wishes {
    /// Name of the jail: its control group and its host name [default: made of this process's number]
    #[arg(long, value_name = "ID")]
    id: Option<Id>,

    /// User of the jailed process: a name, a number, or +NUMBER for one without a name [default: nobody]
    #[arg(long, value_name = "USER")]
    uid: Option<String>,

    /// Group of the jailed process [default: the user's]
    #[arg(long, value_name = "GROUP", requires = "uid")]
    gid: Option<String>,

    /// Join this network namespace instead of a new, empty one
    #[arg(long, value_name = "PATH")]
    netns: Option<PathBuf>,

    /// Write VALUE to FILE of the jail's control group, such as cpuset.cpus=0; may be repeated
    #[arg(long, value_name = "FILE=VALUE")]
    cgroup: Vec<Setting>,

    /// Make the control group in this one, a path below each hierarchy's top [default: the one that this process is in]
    #[arg(long, value_name = "PATH")]
    parent_cgroup: Option<PathBuf>,

    /// Limit a resource: no-file=NUMBER or fsize=BYTES; may be repeated
    #[arg(long, value_name = "NAME=VALUE")]
    resource_limit: Vec<ResourceLimit>,
}

/// Why a jailed process did not get to its end.
#[derive(Debug, thiserror::Error)]
pub(super) enum EndError {
    #[error("the machine's process made a system call that its filter forbids, and was ended: {0}")]
    Forbidden(jailer::seccomp::Violation),
    #[error(
        "the machine's process was killed: it used more memory than its control group may; allow it more with --cgroup \
         memory.max=BYTES (memory.limit_in_bytes on hosts with version 1)"
    )]
    OutOfMemory,
    #[error("the machine's process was killed by signal {0}")]
    Killed(i32),
}

impl Arguments {
    /// The jail without any wishes, or none.
    pub fn plain(no_jail: bool) -> Self {
        Self { no_jail, wishes: Wishes::default() }
    }

    /// Opens what `config` names and does `work` with it: in a process of its own that is confined, or, with `--no-jail`,
    /// here. Returns what `work` does, as the exit status. `notice` says what the user should know before.
    pub fn run(
        &self,
        config: Config,
        notice: impl Fn(&str),
        work: impl FnOnce(&Config, Resources, Interrupts) -> Result<u8, Error>,
    ) -> Result<u8, Error> {
        self.run_with(config, Ok, notice, work)
    }

    /// The same with what else `add` gives to what was opened.
    pub fn run_with(
        &self,
        config: Config,
        add: impl FnOnce(Resources) -> Result<Resources, Error>,
        notice: impl Fn(&str),
        work: impl FnOnce(&Config, Resources, Interrupts) -> Result<u8, Error>,
    ) -> Result<u8, Error> {
        if self.no_jail {
            notice("--no-jail: the machine runs in this process, with all its rights");
            allow_descriptors()?;
            // Before there is a socket's file that a signal could leave behind.
            let interrupts = Interrupts::catch_as_started()?.and_transport_resets()?;
            let (resources, _socket_files) = Resources::open(&config)?;
            return work(&config, add(resources)?, interrupts);
        }
        let config = Config { seccomp: true, ..config };
        let id = self.wishes.id.clone().unwrap_or_else(Id::of_this_process);
        let prepared = self.wishes.jail(&config, id)?.prepare()?;
        let (resources, _socket_files) = open(&config, prepared.janitor())?;
        let resources = add(resources)?;
        for lack in prepared.lacks() {
            notice(&format!("the jail is weaker than it should be: {lack}"));
        }
        let end = prepared.run(resources, Resources::descriptors, |resources, entered| {
            let work = || -> Result<u8, Error> {
                let inside = entered?;
                let interrupts = Interrupts::catch()?.and_transport_resets()?;
                inside.let_signals_come();
                jailer::seccomp::catch_violations(inside.report)
                    .map_err(MachineError::host("catch forbidden system calls"))?;
                work(&config, resources.with_sockets_in(Path::new(SOCKETS)), interrupts)
            };
            status(work())
        })?;
        match end {
            End::Exited(status) => Ok(status),
            End::Forbidden(violation) => Err(EndError::Forbidden(violation).into()),
            End::OutOfMemory => Err(EndError::OutOfMemory.into()),
            End::Killed(signal) => Err(EndError::Killed(signal).into()),
        }
    }
}

impl Wishes {
    /// Opens what `config` names and has a process that is confined wait for orders to boot it. `console` takes the
    /// place of standard output there. `filters`: with filters of system calls.
    pub fn start(
        &self,
        config: Config,
        console: Option<File>,
        guidance: Guidance,
        filters: bool,
        janitor: &Rc<Janitor>,
        notice: impl Fn(&str),
    ) -> Result<instance::Machine, Error> {
        let config = Config { seccomp: filters, ..config };
        let id = self.id.clone().unwrap_or_else(Id::of_this_process);
        let prepared = self.jail(&config, id)?.prepare_with(janitor)?;
        let (resources, files) = open(&config, janitor)?;
        for lack in prepared.lacks() {
            notice(&format!("the jail is weaker than it should be: {lack}"));
        }
        let (sandbox, socket) = Sandbox::new()?;
        let process = prepared.start(
            (resources, socket, console),
            |(resources, socket, console)| {
                let mut descriptors = resources.descriptors();
                descriptors.push(socket.as_fd());
                descriptors.extend(console.iter().map(AsFd::as_fd));
                descriptors
            },
            |(resources, socket, console), entered| {
                let catch = || -> Result<Interrupts, Error> {
                    let inside = entered?;
                    if let Some(console) = console {
                        rustix::stdio::dup2_stdout(&console)?;
                    }
                    let interrupts = Interrupts::catch()?.and_transport_resets()?;
                    inside.let_signals_come();
                    jailer::seccomp::catch_violations(inside.report)
                        .map_err(MachineError::host("catch forbidden system calls"))?;
                    Ok(interrupts)
                };
                match catch() {
                    Ok(interrupts) => {
                        crate::memory::warm_heap();
                        let resources = resources.with_sockets_in(Path::new(SOCKETS));
                        // Whoever gives the orders is told why.
                        let served =
                            sandbox::serve(socket, &config, guidance, resources, interrupts);
                        u8::from(served.is_err())
                    }
                    Err(error) => {
                        sandbox::refuse(socket, chain(&*error));
                        exit::USAGE_OR_HOST
                    }
                }
            },
        )?;
        Ok(instance::Machine { sandbox, process, files })
    }

    /// The jail's name, if one is wanted.
    pub fn id(&self) -> Option<&Id> {
        self.id.as_ref()
    }

    /// The jail of the machine of `config`.
    pub fn jail(&self, config: &Config, id: Id) -> Result<Jail, Error> {
        let user = match &self.uid {
            Some(user) => Some(User::find(user, self.gid.as_deref())?),
            None => None,
        };
        let network = match &self.netns {
            Some(path) => Network::open(path)?,
            None => Network::New,
        };
        let mounts = config.vsock_path.iter().map(|path| Mount {
            source: directory_of(path).into(),
            target: SOCKETS.into(),
            read_only: true,
        });
        let vcpus = u64::from(config.vcpus);
        let disk_threads = (config.disks.len() * WORKERS) as u64;
        let limits = [ResourceLimit::NO_CORE, ResourceLimit::descriptors(DESCRIPTORS)];
        Ok(Jail {
            id,
            user,
            network,
            new_pid_namespace: true,
            root: Root::Empty,
            mounts: mounts.collect(),
            cgroup: CgroupPlan {
                memory_bytes: Some((config.mem_mib.saturating_add(MEMORY_BEYOND_RAM_MIB)) << 20),
                pids: Some(vcpus + disk_threads + THREADS_BEYOND_VCPUS),
                cpus: Some(vcpus + 1),
                settings: self.cgroup.clone(),
                parent: self.parent_cgroup.clone(),
            },
            limits: [&limits[..], &self.resource_limit].concat(),
            runs_a_program: false,
        })
    }
}

/// Lets this process have as many descriptors as one in a jail, or as many as it may.
fn allow_descriptors() -> rustix::io::Result<()> {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let wanted = maximum.map_or(DESCRIPTORS, |maximum| maximum.min(DESCRIPTORS));
    match current {
        Some(current) if current < wanted => {
            setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), maximum })
        }
        _ => Ok(()),
    }
}

/// Opens what `config` names. The janitor removes the sockets' files, whoever is killed.
fn open(config: &Config, janitor: &Janitor) -> Result<(Resources, Vec<SocketFile>), MachineError> {
    let paths = [&config.vsock_path, &config.vsock_messages_path].into_iter().flatten();
    paths.clone().for_each(|path| janitor.remove_socket(path));
    let opened = Resources::open(config);
    match &opened {
        Ok((_, files)) => {
            files.iter().for_each(|file| janitor.identify_socket(file.path(), file.identity()));
        }
        // What is at the paths is somebody else's, and what was made is gone again.
        Err(_) => paths.for_each(|path| janitor.forget(path)),
    }
    opened
}

fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}
