//! A jail in the background: the process that the user started waits until the command really runs, and ends; a copy of it,
//! the supervisor, stays as the jail's caller.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use rustix::fs::{MemfdFlags, Mode, OFlags};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Signal, WaitId, WaitIdOptions};

use crate::sys::{self, Child};

/// What the jailed process says right before it becomes the command. Then the pipe's end, since the kernel closes it.
const EXECUTING: u8 = 0;
/// What it says if that failed.
const FAILED: u8 = 1;

/// Which of the two processes this is.
#[derive(Debug)]
pub enum Side {
    /// The one that the user started.
    Front(Front),
    /// Its copy, without terminal and standard descriptors.
    Supervisor(Readiness),
}

/// The supervisor from the front's side.
#[derive(Debug)]
pub struct Front {
    supervisor: Child,
    ready: OwnedFd,
    messages: File,
}

/// What the jailed process needs to tell the front how far it got.
#[derive(Debug)]
pub struct Readiness {
    pipe: OwnedFd,
    messages: OwnedFd,
}

/// Makes the supervisor. The process has one thread. What the supervisor writes to its standard error the front shows until
/// the command runs, and nobody afterwards.
///
/// # Errors
/// What the kernel says when it has no process or no descriptor left.
pub fn detach() -> io::Result<Side> {
    sys::let_children_be_waited_for();
    let (ready, pipe) = pipe_with(PipeFlags::CLOEXEC)?;
    // No pipe: it is read after its writers have ended or at any time before, and never full.
    let messages = rustix::fs::memfd_create("messages", MemfdFlags::CLOEXEC)?;
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    if let Some(supervisor) = sys::clone_process(0, None)? {
        return Ok(Side::Front(Front { supervisor, ready, messages: messages.into() }));
    }
    rustix::process::setsid()?;
    rustix::process::chdir("/")?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    rustix::stdio::dup2_stderr(&messages)?;
    Ok(Side::Supervisor(Readiness { pipe, messages }))
}

impl Front {
    /// Waits until the command runs. If it does not, waits until the supervisor has removed everything. Returns the
    /// supervisor's number, or nothing: then a message has been shown.
    ///
    /// # Errors
    /// read(2), waitid(2).
    pub fn wait(&self) -> io::Result<Option<i32>> {
        let mut said = Vec::new();
        let mut byte = [0];
        while rustix::io::retry_on_intr(|| rustix::io::read(&self.ready, &mut byte))? > 0 {
            said.push(byte[0]);
        }
        let runs = said == [EXECUTING];
        if !runs {
            self.wait_for_end()?;
        }
        if !self.show_messages()? && !runs {
            eprintln!("jailer: the supervisor was killed before it ran the command");
        }
        Ok(runs.then(|| self.supervisor.pid.as_raw_pid()))
    }

    /// Ends the supervisor and, by that, everything else.
    pub fn give_up(&self) {
        let _ = rustix::process::pidfd_send_signal(&self.supervisor.pidfd, Signal::KILL);
        let _ = self.wait_for_end();
    }

    fn wait_for_end(&self) -> io::Result<()> {
        let id = WaitId::PidFd(self.supervisor.pidfd.as_fd());
        rustix::io::retry_on_intr(|| rustix::process::waitid(id.clone(), WaitIdOptions::EXITED))?;
        Ok(())
    }

    /// False if there are none.
    fn show_messages(&self) -> io::Result<bool> {
        let mut text = vec![0; self.messages.metadata()?.len() as usize];
        // From the start, wherever the writers are.
        self.messages.read_exact_at(&mut text, 0)?;
        let _ = io::stderr().write_all(&text);
        Ok(!text.is_empty())
    }
}

impl Readiness {
    /// What has to stay open in the jail.
    pub fn descriptors(&self) -> [BorrowedFd<'_>; 2] {
        [self.pipe.as_fd(), self.messages.as_fd()]
    }

    /// Right before the command runs in this process: its standard error goes nowhere.
    ///
    /// # Errors
    /// Nobody waits any more, so nobody would learn of the command.
    pub fn executing(&self) -> io::Result<()> {
        rustix::stdio::dup2_stderr(rustix::stdio::stdin())?;
        Ok(rustix::io::write(&self.pipe, &[EXECUTING]).map(drop)?)
    }

    /// The command does not run; why can be written to standard error again.
    pub fn failed(&self) {
        let _ = rustix::stdio::dup2_stderr(&self.messages);
        let _ = rustix::io::write(&self.pipe, &[FAILED]);
    }
}
