//! The `cleanslate` program: knows when the process began.
//!
//! With glibc it is the C library's `main`: the standard library's own would look for the main thread's stack in /proc and
//! prepare to report its overflow, for the main thread and for each other one, a twentieth of the whole launch. (With musl the
//! standard library has the command line from its own `main` alone.)

#![cfg_attr(target_env = "gnu", no_main)]

use std::io::IsTerminal;
use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use rustix::time::{ClockId, clock_gettime};

/// Called by the C library, which the standard library has its arguments from as well.
// SAFETY: the program has no other `main`, and this is the signature that the C library expects.
#[cfg(target_env = "gnu")]
#[unsafe(no_mangle)]
extern "C" fn main(_count: i32, _arguments: *const *const u8) -> i32 {
    run()
}

#[cfg(not(target_env = "gnu"))]
fn main() {
    run();
}

fn run() -> ! {
    let started = process_start();
    vmm::memory::prepare_process();
    let Ok(null) = prepare_descriptors() else {
        // There is nowhere to say so.
        std::process::exit(vmm::exit::USAGE_OR_HOST.into());
    };
    let status = vmm::cli::status(vmm::cli::main(started, null));
    // Not a return: this writes what is left in the standard library's buffers.
    std::process::exit(status.into())
}

/// Leads the standard descriptors that are closed nowhere, as the standard library's own `main` does: what is opened next would
/// have such a number otherwise, and be written to, and kept in a jail. A terminal is open for writing alone: who takes over a
/// machine's process is not to read what the user types. Gives what leads nowhere, for standard input too where nobody reads it.
fn prepare_descriptors() -> rustix::io::Result<Option<OwnedFd>> {
    const STDERR: i32 = 2;
    let open = || rustix::fs::open("/dev/null", OFlags::RDWR, Mode::empty());
    let standard = [rustix::stdio::stdin(), rustix::stdio::stdout(), rustix::stdio::stderr()];
    let mut null = match open() {
        // A host without it is all right as long as nothing is closed.
        Err(_) if standard.into_iter().all(|fd| rustix::io::fcntl_getfd(fd).is_ok()) => {
            return Ok(None);
        }
        result => result?,
    };
    // Each has the lowest number that is free.
    while null.as_raw_fd() <= STDERR {
        let _ = null.into_raw_fd();
        null = open()?;
    }
    // It may be somebody else's (su(1)), who alone may open it; then it stays as it is.
    let terminal = |number: i32| {
        let flags = OFlags::WRONLY | OFlags::NOCTTY | OFlags::CLOEXEC;
        rustix::fs::open(format!("/proc/self/fd/{number}"), flags, Mode::empty())
    };
    if std::io::stdout().is_terminal()
        && let Ok(terminal) = terminal(1)
    {
        rustix::stdio::dup2_stdout(&terminal)?;
    }
    if std::io::stderr().is_terminal()
        && let Ok(terminal) = terminal(STDERR)
    {
        rustix::stdio::dup2_stderr(&terminal)?;
    }
    Ok(Some(null))
}

/// When the process began: as long ago as the processor time that it has used, which the C library and the kernel's part
/// of `exec` spend before `main`. (The start time in /proc has a resolution of 10 ms.)
fn process_start() -> Instant {
    let now = Instant::now();
    let used = clock_gettime(ClockId::ProcessCPUTime);
    now - Duration::new(used.tv_sec as u64, used.tv_nsec as u32)
}
