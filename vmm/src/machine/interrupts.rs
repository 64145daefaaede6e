//! The signals by which others steer the process: those that ask it to end, and one that resets vsock's transport.

use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1};
use signal_hook::flag;

use super::MachineError;
use crate::exit;

/// What a signal wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Interrupt {
    /// SIGINT, SIGTERM or SIGHUP: the process is to end.
    End,
    /// SIGUSR1: vsock connections are to end, and the guest is to be told.
    ResetTransport,
}

/// Becomes readable when SIGINT, SIGTERM or SIGHUP asks the process to end. A second such signal ends it on the spot.
/// SIGHUP that is ignored stays so: `nohup` has asked for that.
#[derive(Debug)]
pub struct Interrupts {
    reader: UnixStream,
    end: Arc<AtomicBool>,
    reset_transport: Arc<AtomicBool>,
    /// Its other end, which each signal that is caught has a copy of.
    writer: UnixStream,
}

impl Interrupts {
    /// Catches the signals from now on. Whoever makes something that must not stay behind does this first.
    ///
    /// # Errors
    /// [`MachineError::Host`].
    pub fn catch() -> Result<Self, MachineError> {
        Self::register().map_err(MachineError::host("catch SIGINT, SIGTERM and SIGHUP"))
    }

    fn register() -> io::Result<Self> {
        let (reader, writer) = UnixStream::pair()?;
        let asked_before = Arc::new(AtomicBool::new(false));
        let hangup = (!is_ignored(SIGHUP)).then_some(SIGHUP);
        for signal in [SIGINT, SIGTERM].into_iter().chain(hangup) {
            flag::register_conditional_shutdown(
                signal,
                exit::INTERRUPTED.into(),
                asked_before.clone(),
            )?;
            flag::register(signal, asked_before.clone())?;
            signal_hook::low_level::pipe::register(signal, writer.try_clone()?)?;
        }
        Ok(Self { reader, end: asked_before, reset_transport: Arc::default(), writer })
    }

    /// Catches SIGUSR1 as well, for a process that runs a machine.
    ///
    /// # Errors
    /// [`MachineError::Host`].
    pub fn and_transport_resets(self) -> Result<Self, MachineError> {
        let register = || -> io::Result<()> {
            flag::register(SIGUSR1, self.reset_transport.clone())?;
            signal_hook::low_level::pipe::register(SIGUSR1, self.writer.try_clone()?)?;
            Ok(())
        };
        register().map_err(MachineError::host("catch SIGUSR1"))?;
        Ok(self)
    }

    /// Waits until a signal has come.
    pub fn wait(&mut self) {
        // Its other end stays open as long as the process lives, so this ends with a signal alone.
        while self.reader.read(&mut [0; 16]).is_err() {}
    }

    /// Takes what has come. An end comes before all else.
    pub(super) fn take(&mut self) -> Interrupt {
        // The bytes say no more than that signals came.
        let _ = self.reader.read(&mut [0; 16]);
        let reset_transport = self.reset_transport.swap(false, Ordering::SeqCst);
        if reset_transport && !self.end.load(Ordering::SeqCst) {
            Interrupt::ResetTransport
        } else {
            Interrupt::End
        }
    }
}

/// Whether this process was started with `signal` ignored. In a jail nobody can tell, and nobody hangs up there.
fn is_ignored(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    mask >> (signal - 1) & 1 == 1
}

impl AsRawFd for Interrupts {
    fn as_raw_fd(&self) -> RawFd {
        self.reader.as_raw_fd()
    }
}

impl AsFd for Interrupts {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.reader.as_fd()
    }
}
