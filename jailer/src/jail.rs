//! A jail from the caller's side: makes what the jailed process cannot make, lets it in, waits, and hands signals on.

use std::ffi::CString;
use std::fs;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Signal, WaitId, WaitIdOptions, WaitIdStatus};
use rustix::thread::{CapabilitySet, ThreadNameSpaceType};

use crate::cgroup::{Cgroup, CgroupError, CgroupPlan};
use crate::id::Id;
use crate::janitor::Janitor;
use crate::limits::ResourceLimit;
use crate::network::Network;
use crate::root::{Mount, Root};
use crate::seccomp::Violation;
use crate::steps::{self, Entrance, StepError};
use crate::sys::{self, Child, SignalFd, SignalMask};
use crate::user::User;

/// Signals that the caller hands on instead of dying of them.
const HANDED_ON: [i32; 5] =
    [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGTSTP, libc::SIGUSR1];

/// At which SIGINT, SIGTERM or SIGHUP a machine's process is killed. The first asks it to end, and the second makes it end at
/// once, if it is still its own master.
const PATIENCE: u32 = 3;

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

/// How a jailed process ended.
#[derive(Debug)]
pub enum End {
    /// By itself, with this status.
    Exited(u8),
    /// It made a system call that its filter forbids.
    Forbidden(Violation),
    /// The kernel killed it since its control group has no more memory.
    OutOfMemory,
    /// Somebody sent it this signal, or it crashed.
    Killed(i32),
}

/// A jail that waits for its process.
#[derive(Debug)]
pub struct Prepared {
    jail: Jail,
    cgroup: Option<Cgroup>,
    rootless: bool,
    lacks: Vec<String>,
    signals: SignalFd,
    // Last: it removes the control group.
    janitor: Janitor,
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
    /// Makes what has to be there before the process: the janitor, the control group. From here on the caller does not die
    /// of SIGINT, SIGTERM, SIGHUP or SIGUSR1; [`Prepared::run`] hands on those that it does not ignore. The caller has one thread.
    ///
    /// # Errors
    /// [`JailError`].
    pub fn prepare(self) -> Result<Prepared, JailError> {
        let rootless = !is_root().map_err(host("ask for capabilities"))?;
        if rootless && self.user.is_some() {
            return Err(JailError::NeedsRoot("becoming another user"));
        }
        sys::let_children_be_waited_for();
        let signals = SignalFd::new(&HANDED_ON).map_err(host("wait for signals"))?;
        let mut janitor = Janitor::start(self.namespaces_of_janitor(rootless))
            .map_err(host("start the janitor"))?;
        let mut lacks = Vec::new();
        let cgroup = match Cgroup::make(&self.cgroup, &self.id, &mut janitor) {
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
        Ok(Prepared { jail: self, cgroup, rootless, lacks, signals, janitor })
    }
}

impl Jail {
    /// Namespaces that the janitor makes. Without root only the process itself can, in its user namespace.
    fn namespaces_of_janitor(&self, rootless: bool) -> ThreadNameSpaceType {
        if rootless {
            return ThreadNameSpaceType::empty();
        }
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
    pub fn janitor(&mut self) -> &mut Janitor {
        &mut self.janitor
    }

    /// Runs `inside` with what is `given` to it in a jailed copy of this process, and waits for its end. Of the caller's
    /// descriptors the copy keeps the standard ones and `descriptors` of what is given; the caller drops its own. `inside` is
    /// told if a step failed; what it returns is the process's exit status. Nothing else that the caller owns is dropped
    /// in the copy.
    ///
    /// # Errors
    /// [`JailError`], if there was no process.
    pub fn run<T>(
        self,
        given: T,
        descriptors: impl FnOnce(&T) -> Vec<BorrowedFd<'_>>,
        inside: impl FnOnce(T, Result<Inside, StepError>) -> u8,
    ) -> Result<End, JailError> {
        let (reports, report) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)
            .map_err(|errno| host("make a pipe")(errno.into()))?;
        let (caller, ours) =
            pipe_with(PipeFlags::CLOEXEC).map_err(|errno| host("make a pipe")(errno.into()))?;
        let birthplace = self.cgroup.as_ref().and_then(Cgroup::birthplace);
        let process = match sys::clone_process(self.namespaces(), birthplace) {
            Ok(Some(process)) => process,
            Ok(None) => {
                let entered = self.enter(caller.as_fd(), report, descriptors(&given));
                std::process::exit(inside(given, entered).into())
            }
            Err(error) if self.rootless => return Err(JailError::UserNamespace(error)),
            Err(error) => return Err(host("make a process in new namespaces")(error)),
        };
        drop((caller, report, given));
        self.janitor.guard(process.pidfd.as_fd());
        if self.rootless {
            let started = map_user(&process)
                .and_then(|()| rustix::io::write(&ours, &[0]).map_err(io::Error::from));
            if let Err(error) = started {
                // It must not go on when the pipe closes. Nobody needs its status.
                let _ = rustix::process::pidfd_send_signal(&process.pidfd, Signal::KILL);
                return Err(host("map the user into a user namespace")(error));
            }
        }
        let status = self.wait(&process).map_err(host("wait for the jailed process"))?;
        Ok(match (status.exit_status(), Violation::read(&reports)) {
            (_, Some(violation)) => End::Forbidden(violation),
            (Some(status), None) => End::Exited(status as u8),
            (None, None) => match status.terminating_signal().unwrap_or_default() {
                libc::SIGKILL if self.is_out_of_memory() => End::OutOfMemory,
                signal => End::Killed(signal),
            },
        })
    }

    fn is_out_of_memory(&self) -> bool {
        self.cgroup.as_ref().is_some_and(Cgroup::ran_out_of_memory)
    }

    /// Namespaces that the process is born in (clone(2)).
    fn namespaces(&self) -> u64 {
        let mut flags = libc::CLONE_NEWNS;
        if self.jail.new_pid_namespace || self.rootless {
            flags |= libc::CLONE_NEWPID;
        }
        if self.rootless {
            flags |= libc::CLONE_NEWUSER | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
            if matches!(self.jail.network, Network::New) {
                flags |= libc::CLONE_NEWNET;
            }
        }
        flags as u64
    }

    /// The copy's way into the jail.
    fn enter(
        self,
        caller: BorrowedFd<'_>,
        report: OwnedFd,
        given: Vec<BorrowedFd<'_>>,
    ) -> Result<Inside, StepError> {
        // The janitor's orders end with the caller, not here; and descriptors are closed by the steps.
        let prepared = ManuallyDrop::new(self);
        let standard = [rustix::stdio::stdin(), rustix::stdio::stdout(), rustix::stdio::stderr()];
        steps::confine(&Entrance {
            jail: &prepared.jail,
            cgroup: prepared.cgroup.as_ref(),
            janitor: &prepared.janitor,
            rootless: prepared.rootless,
            caller,
            kept: &[&standard[..], &[report.as_fd()], &given].concat(),
        })?;
        Ok(Inside { report, signals: prepared.signals.before })
    }

    /// Waits for the process's end and hands signals on to it until then.
    fn wait(&self, process: &Child) -> io::Result<WaitIdStatus> {
        let leads_namespace = self.namespaces() & libc::CLONE_NEWPID as u64 != 0;
        let mut ends_wanted = 0;
        loop {
            let mut ready = [
                PollFd::new(&process.pidfd, PollFlags::IN),
                PollFd::new(&self.signals, PollFlags::IN),
            ];
            match poll(&mut ready, None) {
                Err(rustix::io::Errno::INTR) => continue,
                result => result?,
            };
            let (ended, signalled) =
                (!ready[0].revents().is_empty(), !ready[1].revents().is_empty());
            if ended {
                let id = WaitId::PidFd(process.pidfd.as_fd());
                if let Some(status) = rustix::process::waitid(id, WaitIdOptions::EXITED)? {
                    return Ok(status);
                }
            } else if signalled {
                let signal = self.signals.take()?;
                ends_wanted += u32::from(![libc::SIGTSTP, libc::SIGUSR1].contains(&signal));
                if ends_wanted >= PATIENCE && !self.jail.runs_a_program {
                    // It was told, and either hangs or is somebody else's by now.
                    let _ = rustix::process::pidfd_send_signal(&process.pidfd, Signal::KILL);
                } else {
                    hand_on(signal, process, leads_namespace);
                }
            }
        }
    }
}

/// Hands a signal on to a process. It may have ended meanwhile, which the next look will show.
fn hand_on(signal: i32, process: &Child, leads_namespace: bool) {
    let send = |signal| {
        let _ = rustix::process::pidfd_send_signal(&process.pidfd, signal);
    };
    match signal {
        // Both stop, and go on together: whoever stops a program at a terminal stops its machine.
        libc::SIGTSTP => {
            send(Signal::STOP);
            sys::stop_this_process();
            send(Signal::CONT);
        }
        // The kernel keeps it from the first process of a namespace, whom it would end (pid_namespaces(7)).
        _ if leads_namespace && takes_default_action(process, signal) => send(Signal::KILL),
        libc::SIGINT => send(Signal::INT),
        libc::SIGHUP => send(Signal::HUP),
        libc::SIGUSR1 => send(Signal::USR1),
        _ => send(Signal::TERM),
    }
}

/// True if a process neither blocks, ignores nor catches `signal` (proc(5)).
fn takes_default_action(process: &Child, signal: i32) -> bool {
    let read = |file| fs::read_to_string(format!("/proc/{}/{file}", process.pid.as_raw_pid()));
    let (Ok(status), Ok(call)) = (read("status"), read("syscall")) else { return false };
    let masks = status.lines().filter_map(|line| {
        let (name, mask) = line.split_once(":\t")?;
        let is_wanted = ["SigBlk", "SigIgn", "SigCgt"].contains(&name);
        is_wanted.then(|| u64::from_str_radix(mask, 16).unwrap_or(u64::MAX))
    });
    let taken = masks.fold(0, |all, mask| all | mask) & (1 << (signal - 1)) != 0;
    // Whoever waits for a signal in this call blocks it, though it does not show as blocked meanwhile.
    let waits = call.split(' ').next() == Some(&libc::SYS_rt_sigtimedwait.to_string());
    !taken && !waits
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
