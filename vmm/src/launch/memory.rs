//! How much memory processes take, and how often they wake up, by the kernel's word (proc(5)).

use std::fs;

use rustix::process::Pid;

/// Memory of a process in KiB: its own pages, and its share of those that it has together with others (`Pss`). The kernel's own memory for it
/// is not in that. `None` if this user may not ask.
pub fn proportional_kib(pid: Pid) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{}/smaps_rollup", pid.as_raw_pid())).ok()?;
    field(&text, "Pss:")
}

/// Memory that the host can give away, in KiB.
pub fn available_kib() -> Option<u64> {
    field(&fs::read_to_string("/proc/meminfo").ok()?, "MemAvailable:")
}

/// How often the threads of a process have gone to sleep by themselves, which is how often they have woken up.
pub fn wake_ups(pid: Pid) -> Option<u64> {
    let threads = fs::read_dir(format!("/proc/{}/task", pid.as_raw_pid())).ok()?;
    let counts = threads.map(|thread| {
        let text = fs::read_to_string(thread.ok()?.path().join("status")).ok()?;
        field(&text, "voluntary_ctxt_switches:")
    });
    counts.sum()
}

/// The number in the line that begins with `name`.
fn field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_memory_and_wakes_up() {
        let own = rustix::process::getpid();
        assert!(proportional_kib(own).unwrap() > 100);
        assert!(available_kib().unwrap() > 1000);
        let before = wake_ups(own).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(2));
        assert!(wake_ups(own).unwrap() > before);
        assert_eq!(field("a: 1\nPss:    77 kB\n", "Pss:"), Some(77));
        assert_eq!(field("Pss: x", "Pss:"), None);
    }
}
