//! A jail from the caller's side: makes what the jailed process cannot make, and lets it in.

use std::ffi::CString;
use std::fs;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

use rustix::pipe::{PipeFlags, pipe_with};
use rustix::thread::{CapabilitySet, ThreadNameSpaceType};

use crate::cgroup::{Cgroup, CgroupError, CgroupPlan};
use crate::id::Id;
use crate::janitor::{Janitor, Ward};
use crate::limits::ResourceLimit;
use crate::network::Network;
use crate::root::{Mount, Root};
use crate::running::{End, HANDED_ON, Running};
use crate::steps::{self, Entrance, StepError};
use crate::sys::{self, Child, SignalFd, SignalMask};
use crate::user::User;

/// What confines a process, as plain data.
#[derive(Debug)]
pub struct Jail {
    /// Its name: that of its control group and its host.
    pub id: Id,
    /// Whom the process becomes: nobody, if nobody is named. Needs root.
    pub user: Option<User>,
    /// Its network.
    pub network: Network,
    /// Whether it sees no process but itself and those that it starts. Without root it always is so.
    pub new_pid_namespace: bool,
    /// Its root.
    pub root: Root,
    /// What of the host's files it sees.
    pub mounts: Vec<Mount>,
    /// Its control group.
    pub cgroup: CgroupPlan,
    /// Limits of the process.
    pub limits: Vec<ResourceLimit>,
    /// The process is to run another program. Otherwise it opens no file at all.
    pub runs_a_program: bool,
}

/// Why there is no jail. Everything that was made for it is gone then.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// The host refused something that the caller needs.
    #[error("jail: {action}")]
    Host {
        /// What was asked for.
        action: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// No control group, though one was asked for, or a setting that was refused.
    #[error("jail: control group")]
    Cgroup(#[source] CgroupError),
    /// Only root can do that.
    #[error("jail: {0} needs root")]
    NeedsRoot(&'static str),
    /// No user namespace for somebody who is not root.
    #[error(
        "jail: make a user namespace, without which only root can confine a process; allow it (sysctl \
         user.max_user_namespaces, kernel.unprivileged_userns_clone, kernel.apparmor_restrict_unprivileged_userns), run as \
         root, or do without a jail"
    )]
    UserNamespace(#[source] io::Error),
}

fn host(action: &'static str) -> impl FnOnce(io::Error) -> JailError {
    move |source| JailError::Host { action, source }
}

/// A jail that waits for its process.
#[derive(Debug)]
pub struct Prepared {
    jail: Jail,
    cgroup: Option<Cgroup>,
    rootless: bool,
    lacks: Vec<String>,
    /// Which signals the process lets come in the end.
    mask: SignalMask,
    /// Those that [`Prepared::run`] hands on.
    signals: Option<SignalFd>,
    // Last: dropped, it has the control group removed.
    ward: Ward,
}

/// What a process that has got into its jail is given.
#[derive(Debug)]
pub struct Inside {
    /// Where to report a forbidden call: for [`crate::seccomp::catch_violations`].
    pub report: OwnedFd,
    signals: SignalMask,
}

impl Inside {
    /// Lets the signals come that the caller hands on: when the process is ready for them.
    pub fn let_signals_come(&self) {
        self.signals.set();
    }

    /// Runs the program behind `program` in place of this process, with no environment and the standard descriptors alone.
    /// Returns why that failed, if it did.
    pub fn execute(self, program: BorrowedFd<'_>, arguments: &[CString]) -> io::Error {
        self.let_signals_come();
        sys::execute(program, arguments)
    }
}

impl Jail {
    /// Makes what has to be there before the process: a janitor of its own, the control group. From here on the caller does not
    /// die of SIGINT, SIGTERM, SIGHUP or SIGUSR1; [`Prepared::run`] hands on those that it does not ignore. The caller has one
    /// thread.
    ///
    /// # Errors
    /// [`JailError`].
    pub fn prepare(self) -> Result<Prepared, JailError> {
        let rootless = self.is_rootless()?;
        let signals = SignalFd::new(&HANDED_ON).map_err(host("wait for signals"))?;
        // A namespace of the network takes as long as all the rest, and beside this process it takes no time.
        let namespaces = if rootless { ThreadNameSpaceType::empty() } else { self.namespaces() };
        let janitor = Janitor::with_namespaces(namespaces).map_err(host("start the janitor"))?;
        let prepared = self.prepare_as(rootless, &Rc::new(janitor))?;
        Ok(Prepared { mask: signals.before, signals: Some(signals), ..prepared })
    }

    /// The same for one jail of many, which share a janitor: what this one is made of goes as soon as it is over. The caller
    /// sees to its signals itself, and is to use [`Prepared::start`].
    ///
    /// # Errors
    /// [`JailError`].
    pub fn prepare_with(self, janitor: &Rc<Janitor>) -> Result<Prepared, JailError> {
        let rootless = self.is_rootless()?;
        self.prepare_as(rootless, janitor)
    }

    fn prepare_as(self, rootless: bool, janitor: &Rc<Janitor>) -> Result<Prepared, JailError> {
        sys::let_children_be_waited_for();
        let ward = janitor.take_on();
        let mut lacks = Vec::new();
        let cgroup = match Cgroup::make(&self.cgroup, &self.id, &ward) {
            Ok(cgroup) => Some(cgroup),
            Err(error) if error.is_lack() && !self.cgroup.is_demanded() => {
                lacks.push(format!(
                    "no control group, so no limits of memory, processor time and processes: {}",
                    with_source(&error)
                ));
                None
            }
            Err(error) => return Err(JailError::Cgroup(error)),
        };
        if rootless && !rustix::process::getgroups().is_ok_and(|groups| groups.is_empty()) {
            lacks.push("supplementary groups stay, since only root can drop them".into());
        }
        // Those that the caller takes from a descriptor may come to the process.
        let (mask, signals) = (SignalMask::now_without(&HANDED_ON), None);
        Ok(Prepared { jail: self, cgroup, rootless, lacks, mask, signals, ward })
    }

    /// Whether the process is to be root in a user namespace instead of on the host.
    fn is_rootless(&self) -> Result<bool, JailError> {
        let rootless = !is_root().map_err(host("ask for capabilities"))?;
        match rootless && self.user.is_some() {
            true => Err(JailError::NeedsRoot("becoming another user")),
            false => Ok(rootless),
        }
    }

    /// Namespaces that it has besides those of mounts and processes.
    fn namespaces(&self) -> ThreadNameSpaceType {
        let others = ThreadNameSpaceType::INTER_PROCESS_COMMUNICATION
            | ThreadNameSpaceType::HOST_NAME_AND_NIS_DOMAIN_NAME;
        match self.network {
            Network::New => others | ThreadNameSpaceType::NETWORK,
            Network::Join(_) => others,
        }
    }
}

impl Prepared {
    /// What this host or this user could not give, in words; the jail is weaker without.
    pub fn lacks(&self) -> &[String] {
        &self.lacks
    }

    /// Whom the process becomes. `None`: it stays who the caller is.
    pub fn user(&self) -> Option<User> {
        (!self.rootless).then(|| self.jail.user.unwrap_or(User::NOBODY))
    }

    /// To be told of what has to be removed in the end.
    pub fn janitor(&self) -> &Janitor {
        &self.ward.janitor
    }

    /// Runs `inside` with what is `given` to it in a jailed copy of this process, and waits for its end; hands signals on to
    /// it until then. See [`Prepared::start`].
    ///
    /// # Errors
    /// [`JailError`], if there was no process.
    pub fn run<T>(
        mut self,
        given: T,
        descriptors: impl FnOnce(&T) -> Vec<BorrowedFd<'_>>,
        inside: impl FnOnce(T, Result<Inside, StepError>) -> u8,
    ) -> Result<End, JailError> {
        let (signals, runs_a_program) = (self.signals.take(), self.jail.runs_a_program);
        let running = self.start(given, descriptors, inside)?;
        running.wait(signals, runs_a_program).map_err(host("wait for the jailed process"))
    }

    /// Runs `inside` with what is `given` to it in a jailed copy of this process. Of the caller's
    /// descriptors the copy keeps the standard ones and `descriptors` of what is given; the caller drops its own. `inside` is
    /// told if a step failed; what it returns is the process's exit status. Nothing else that the caller owns is dropped
    /// in the copy. The caller has one thread.
    ///
    /// # Errors
    /// [`JailError`], if there was no process.
    pub fn start<T>(
        mut self,
        given: T,
        descriptors: impl FnOnce(&T) -> Vec<BorrowedFd<'_>>,
        inside: impl FnOnce(T, Result<Inside, StepError>) -> u8,
    ) -> Result<Running, JailError> {
        let pipe = |flags| {
            pipe_with(PipeFlags::CLOEXEC | flags).map_err(|e| host("make a pipe")(e.into()))
        };
        let (reports, report) = pipe(PipeFlags::NONBLOCK)?;
        let go = if self.rootless { Some(pipe(PipeFlags::empty())?) } else { None };
        let birthplace = self.cgroup.as_ref().and_then(Cgroup::birthplace);
        let flags = self.flags();
        let process = match sys::clone_process(flags, birthplace) {
            Ok(Some(process)) => process,
            Ok(None) => {
                let rootless = go.as_ref().map(|(go, _)| go.as_fd());
                let entered = self.enter(rootless, report, descriptors(&given));
                std::process::exit(inside(given, entered).into())
            }
            Err(error) if self.rootless => return Err(JailError::UserNamespace(error)),
            Err(error) => return Err(host("make a process in new namespaces")(error)),
        };
        self.ward.guard(process.pidfd.as_fd());
        drop((report, given));
        if let Some(signals) = self.signals.take() {
            signals.before.set();
        }
        self.cgroup.iter_mut().for_each(Cgroup::close_entries);
        let Self { cgroup, ward, .. } = self;
        let leads_namespace = flags & libc::CLONE_NEWPID as u64 != 0;
        let running =
            Running { process, leads_namespace, reports, cgroup, ended: false, _ward: ward };
        if let Some((_, go)) = go {
            // Should this fail, dropping kills it: it must not go on when the pipe closes. Nobody needs its status.
            map_user(&running.process)
                .and_then(|()| rustix::io::write(&go, &[0]).map_err(io::Error::from))
                .map_err(host("map the user into a user namespace"))?;
        }
        Ok(running)
    }

    /// Namespaces that the process is born in (clone(2)): those that no janitor has made for it.
    fn flags(&self) -> u64 {
        let mut flags = (self.jail.namespaces() - self.ward.janitor.namespaces()).bits();
        flags |= libc::CLONE_NEWNS as u32;
        if self.jail.new_pid_namespace || self.rootless {
            flags |= libc::CLONE_NEWPID as u32;
        }
        if self.rootless {
            flags |= libc::CLONE_NEWUSER as u32;
        }
        flags.into()
    }

    /// The copy's way into the jail.
    fn enter(
        self,
        rootless: Option<BorrowedFd<'_>>,
        report: OwnedFd,
        given: Vec<BorrowedFd<'_>>,
    ) -> Result<Inside, StepError> {
        // The janitor's orders end with the caller, not here; and descriptors are closed by the steps.
        let prepared = ManuallyDrop::new(self);
        let standard = [rustix::stdio::stdin(), rustix::stdio::stdout(), rustix::stdio::stderr()];
        steps::confine(&Entrance {
            jail: &prepared.jail,
            cgroup: prepared.cgroup.as_ref(),
            janitor: &prepared.ward.janitor,
            rootless,
            kept: &[&standard[..], &[report.as_fd()], &given].concat(),
        })?;
        Ok(Inside { report, signals: prepared.mask })
    }
}

/// True if this process may do all that a jail takes without a user namespace.
fn is_root() -> io::Result<bool> {
    let needed = CapabilitySet::SYS_ADMIN
        | CapabilitySet::SETUID
        | CapabilitySet::SETGID
        | CapabilitySet::SETPCAP;
    Ok(rustix::thread::capabilities(None)?.effective.contains(needed))
}

/// Makes this process's user and group the nobody of the process's user namespace (user_namespaces(7)).
fn map_user(process: &Child) -> io::Result<()> {
    let nobody = User::NOBODY;
    let proc = format!("/proc/{}", process.pid.as_raw_pid());
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    fs::write(format!("{proc}/setgroups"), "deny")?;
    fs::write(format!("{proc}/uid_map"), format!("{} {uid} 1", nobody.uid))?;
    fs::write(format!("{proc}/gid_map"), format!("{} {gid} 1", nobody.gid))
}

fn with_source(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}
