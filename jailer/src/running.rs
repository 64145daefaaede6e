//! A jailed process that runs: waited for, judged by its end, killed.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, WaitIdStatus};

use crate::cgroup::Cgroup;
use crate::janitor::Ward;
use crate::seccomp::Violation;
use crate::sys::{self, Child, SignalFd};

/// Signals that the caller hands on instead of dying of them.
pub(crate) const HANDED_ON: [i32; 5] =
    [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGTSTP, libc::SIGUSR1];

/// At which SIGINT, SIGTERM or SIGHUP a machine's process is killed. The first asks it to end, and the second makes it end at
/// once, if it is still its own master.
const PATIENCE: u32 = 3;

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

/// A jailed process. Dropping it kills it, waits for its end, and has removed what its jail was made of.
#[derive(Debug)]
pub struct Running {
    pub(crate) process: Child,
    /// It is the first of its process namespace.
    pub(crate) leads_namespace: bool,
    pub(crate) reports: OwnedFd,
    pub(crate) cgroup: Option<Cgroup>,
    /// It was waited for.
    pub(crate) ended: bool,
    // Last: dropped, it has the control group removed.
    pub(crate) _ward: Ward,
}

impl Running {
    /// Can be read when the process has ended (pidfd_open(2)).
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.process.pidfd.as_fd()
    }

    /// Its number as the caller sees it. It is another's after the end was heard of.
    pub fn pid(&self) -> Pid {
        self.process.pid
    }

    /// Ends it, whatever it does. Its end comes later, even then.
    pub fn kill(&self) {
        // It may have ended already.
        let _ = rustix::process::pidfd_send_signal(&self.process.pidfd, Signal::KILL);
    }

    /// How it ended, if it has. To be asked until the answer comes, and not again.
    ///
    /// # Errors
    /// waitid(2).
    pub fn try_end(&mut self) -> io::Result<Option<End>> {
        let status = self.wait_with(WaitIdOptions::EXITED | WaitIdOptions::NOHANG)?;
        Ok(status.map(|status| self.judge(&status)))
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// waitid(2).
    pub fn end(mut self) -> io::Result<End> {
        let status = self.wait_with(WaitIdOptions::EXITED)?;
        // Without NOHANG there always is one.
        status.map(|status| self.judge(&status)).ok_or_else(|| io::ErrorKind::WouldBlock.into())
    }

    fn wait_with(&mut self, options: WaitIdOptions) -> io::Result<Option<WaitIdStatus>> {
        let id = || WaitId::PidFd(self.process.pidfd.as_fd());
        let status = rustix::io::retry_on_intr(|| rustix::process::waitid(id(), options))?;
        self.ended |= status.is_some();
        Ok(status)
    }

    fn judge(&self, status: &WaitIdStatus) -> End {
        match (status.exit_status(), Violation::read(&self.reports)) {
            (_, Some(violation)) => End::Forbidden(violation),
            (Some(status), None) => End::Exited(status as u8),
            (None, None) => match status.terminating_signal().unwrap_or_default() {
                libc::SIGKILL if self.is_out_of_memory() => End::OutOfMemory,
                signal => End::Killed(signal),
            },
        }
    }

    fn is_out_of_memory(&self) -> bool {
        self.cgroup.as_ref().is_some_and(Cgroup::ran_out_of_memory)
    }

    /// Waits for its end and hands signals on to it until then.
    pub(crate) fn wait(
        mut self,
        signals: Option<SignalFd>,
        runs_a_program: bool,
    ) -> io::Result<End> {
        let Some(signals) = signals else { return self.end() };
        let mut ends_wanted = 0;
        loop {
            let mut ready = [
                PollFd::new(&self.process.pidfd, PollFlags::IN),
                PollFd::new(&signals, PollFlags::IN),
            ];
            rustix::io::retry_on_intr(|| poll(&mut ready, None))?;
            let (ended, signalled) =
                (!ready[0].revents().is_empty(), !ready[1].revents().is_empty());
            if ended {
                if let Some(end) = self.try_end()? {
                    return Ok(end);
                }
            } else if signalled {
                let signal = signals.take()?;
                ends_wanted += u32::from(![libc::SIGTSTP, libc::SIGUSR1].contains(&signal));
                if ends_wanted >= PATIENCE && !runs_a_program {
                    // It was told, and either hangs or is somebody else's by now.
                    self.kill();
                } else {
                    hand_on(signal, &self.process, self.leads_namespace);
                }
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.ended {
            self.kill();
            let _ = self.wait_with(WaitIdOptions::EXITED);
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
