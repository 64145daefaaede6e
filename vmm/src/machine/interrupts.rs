//! The signals that ask the process to end.

use std::io::{self, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::flag;

use super::MachineError;
use crate::exit;

/// Becomes readable when SIGINT, SIGTERM or SIGHUP asks the process to end. A second such signal ends it on the spot.
/// SIGHUP that is ignored stays so: `nohup` has asked for that.
#[derive(Debug)]
pub struct Interrupts(UnixStream);

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
        Ok(Self(reader))
    }

    /// Waits until a signal has come.
    pub fn wait(&mut self) {
        // Its other end stays open as long as the process lives, so this ends with a signal alone.
        while self.0.read(&mut [0; 16]).is_err() {}
    }

    /// Takes what has come.
    pub(super) fn take(&mut self) {
        // The byte says no more than that a signal came.
        let _ = self.0.read(&mut [0; 16]);
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
        self.0.as_raw_fd()
    }
}
