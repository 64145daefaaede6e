//! The `cleanslate` program: turns errors into one line and an exit status, and knows when the process began.

use std::io::Write;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

fn main() -> ExitCode {
    let started = process_start();
    vmm::memory::prepare_heap();
    vmm::cli::main(started).unwrap_or_else(|error| {
        let _ = writeln!(std::io::stderr(), "cleanslate: {}", vmm::lifecycle::chain(&*error));
        vmm::cli::exit::USAGE_OR_HOST.into()
    })
}

/// When the process began: as long ago as the processor time that it has used, which the dynamic linker and the kernel's part
/// of `exec` spend before `main`. (The start time in /proc has a resolution of 10 ms.)
fn process_start() -> Instant {
    let now = Instant::now();
    let used = clock_gettime(ClockId::ProcessCPUTime);
    now - Duration::new(used.tv_sec as u64, used.tv_nsec as u32)
}
