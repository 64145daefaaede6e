//! Filters of system calls: which calls each kind of thread may make, and what becomes of a process that makes another.
//!
//! The rules stand in `rules.toml`, each with its reason, and are compiled when this crate is. A call that no rule allows
//! raises SIGSYS in the thread that made it; the handler reports the call through a pipe and ends the process. A thread that
//! blocks the signal, or a process without the handler, is killed by the kernel at once.

#[cfg(test)]
mod compile;
#[allow(unsafe_code)]
mod sys;
#[cfg(test)]
mod tests;

use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use seccompiler::sock_filter;

/// A line for each system call of x86-64, its number and its name (arch/x86/entry/syscalls/syscall_64.tbl of Linux 6.16).
const CALLS: &str = include_str!("seccomp/calls.txt");

/// `AUDIT_ARCH_X86_64` (linux/audit.h).
const ARCHITECTURE: u32 = 0xc000_003e;
/// `si_code` of a SIGSYS that a filter raised (asm-generic/siginfo.h).
const SYS_SECCOMP: i32 = 1;
/// Set in the number of an x32 call (asm/unistd.h).
const X32_BIT: i32 = 0x4000_0000;

include!(concat!(env!("OUT_DIR"), "/filters.rs"));

/// What a thread does, and thereby which calls it needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ThreadKind {
    /// Leads a machine that is set up and prints what comes of it.
    Main,
    /// Runs the event loop: devices, resets.
    EventLoop,
    /// Runs guest code.
    Vcpu,
    /// Waits for a disk.
    Disk,
    /// Talks HTTP with clients; in a process of its own.
    Http,
    /// Waits for the end of what serves RAM's pages.
    Pages,
}

impl ThreadKind {
    /// All of them, in the order of the filters.
    pub const ALL: [Self; 6] =
        [Self::Main, Self::EventLoop, Self::Vcpu, Self::Disk, Self::Http, Self::Pages];
}

impl fmt::Display for ThreadKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Main => "the main thread",
            Self::EventLoop => "the event loop's thread",
            Self::Vcpu => "a vCPU's thread",
            Self::Disk => "a disk's thread",
            Self::Http => "the API's HTTP thread",
            Self::Pages => "the page server's thread",
        })
    }
}

/// A call that a kind of thread may make.
#[derive(Debug)]
pub struct Rule {
    /// Who.
    pub thread: ThreadKind,
    /// Name of the call.
    pub call: &'static str,
    /// What some of its arguments have to be; the others are free.
    pub arguments: &'static [Argument],
    /// Why the thread needs it.
    pub why: &'static str,
    /// Why no test makes the call, if none does.
    pub rare: Option<&'static str>,
    /// Only builds with debug assertions have it.
    pub assertions: bool,
}

/// What an argument of a call has to be.
#[derive(Debug)]
pub struct Argument {
    /// Which: 0 to 5.
    pub index: u8,
    /// Its lower 32 bits; the upper ones have no meaning for any call that is restricted.
    pub value: u32,
    /// The value by name.
    pub text: &'static str,
}

/// A filter was not installed.
#[derive(Debug, thiserror::Error)]
#[error("restrict the system calls of {thread}")]
pub struct RestrictError {
    thread: ThreadKind,
    source: seccompiler::Error,
}

/// Lets the calling thread make the calls of its kind and no others, from now on and for ever. Threads that it makes later
/// inherit that.
///
/// # Errors
/// seccomp(2).
pub fn restrict(thread: ThreadKind) -> Result<(), RestrictError> {
    seccompiler::apply_filter(PROGRAMS[thread as usize])
        .map_err(|source| RestrictError { thread, source })
}

/// Has forbidden calls reported to `report` before they end the process; for [`Violation::read`] at the other end. Comes
/// before [`restrict`], once in a process.
///
/// # Errors
/// sigaction(2).
pub fn catch_violations(report: OwnedFd) -> io::Result<()> {
    sys::handle_sigsys(report)
}

/// What the handler sends.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Report {
    /// The data of the filter: 1 for the first of [`ThreadKind::ALL`].
    thread: i32,
    code: i32,
    call: i32,
    architecture: u32,
    arguments: [u64; 3],
}

/// A call that a filter forbids.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Violation(Report);

impl Violation {
    /// What a process has reported; `None` if it has not.
    pub fn read(reports: impl AsFd) -> Option<Self> {
        let mut bytes = [0; size_of::<Report>()];
        let len = rustix::io::read(reports, &mut bytes).ok()?;
        let report = Self::parse(&bytes[..len])?;
        // Anybody may send a process the signal.
        (report.0.code == SYS_SECCOMP).then_some(report)
    }

    fn parse(bytes: &[u8]) -> Option<Self> {
        let word = |at| Some(i32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?));
        let long = |at| Some(u64::from_ne_bytes(*bytes.get(at..)?.first_chunk()?));
        Some(Self(Report {
            thread: word(0)?,
            code: word(4)?,
            call: word(8)?,
            architecture: word(12)? as u32,
            arguments: [long(16)?, long(24)?, long(32)?],
        }))
    }

    /// The thread that made the call.
    pub fn thread(&self) -> Option<ThreadKind> {
        let place = usize::try_from(self.0.thread).ok()?.checked_sub(1)?;
        ThreadKind::ALL.get(place).copied()
    }
}

impl fmt::Display for Violation {
    /// Such as `socket(0x2, 0x1, 0x0) on the event loop's thread`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Report { call, architecture, arguments: [first, second, third], .. } = self.0;
        if architecture != ARCHITECTURE {
            write!(f, "call {call} of another architecture ({architecture:#x})")?;
        } else {
            let x32 = if call & X32_BIT == 0 { "" } else { "x32 " };
            match name(call & !X32_BIT) {
                Some(name) => write!(f, "{x32}{name}")?,
                None => write!(f, "{x32}call {call}")?,
            }
            write!(f, "({first:#x}, {second:#x}, {third:#x})")?;
        }
        match self.thread() {
            Some(thread) => write!(f, " on {thread}"),
            None => Ok(()),
        }
    }
}

/// The name of a call of x86-64.
fn name(number: i32) -> Option<&'static str> {
    let number = number.to_string();
    CALLS.lines().filter_map(|line| line.split_once(' ')).find(|(n, _)| *n == number).map(|l| l.1)
}
