//! Processes as the kernel lists them.

use std::fs;

use rustix::process::{Pid, Signal, kill_process};

/// A process by its number and its start: the number alone may be somebody else's later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Process {
    pub pid: u32,
    start: u64,
}

/// What `/proc/PID/stat` says (proc(5)).
struct Stat {
    state: String,
    parent: u32,
    start: u64,
}

fn stat(pid: u32) -> Option<Stat> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name before it is in parentheses, and may have any characters.
    let mut fields = text[text.rfind(')')? + 1..].split_whitespace();
    let (state, parent) = (fields.next()?.into(), fields.next()?.parse().ok()?);
    Some(Stat { state, parent, start: fields.nth(17)?.parse().ok()? })
}

impl Process {
    /// The process with this number now, if there is one.
    pub fn new(pid: u32) -> Option<Self> {
        stat(pid).map(|stat| Self { pid, start: stat.start })
    }

    /// Whether it runs, or could.
    pub fn is_there(&self) -> bool {
        // One that has ended and that nobody has waited for is gone.
        stat(self.pid).is_some_and(|s| s.start == self.start && !["Z", "X"].contains(&&*s.state))
    }

    /// Those that it has started.
    pub fn children(&self) -> Vec<Self> {
        let pids = fs::read_dir("/proc").unwrap().filter_map(|entry| {
            entry.unwrap().file_name().to_str().and_then(|name| name.parse::<u32>().ok())
        });
        let children = pids.filter_map(|pid| {
            let Stat { parent, start, .. } = stat(pid)?;
            (parent == self.pid).then_some(Self { pid, start })
        });
        children.collect()
    }

    /// Its children, theirs, and so on.
    pub fn descendants(&self) -> Vec<Self> {
        let mut all = self.children();
        let mut next = 0;
        while next < all.len() {
            all.extend(all[next].children());
            next += 1;
        }
        all
    }

    /// Sends it a signal.
    #[track_caller]
    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.pid as i32).expect("a number");
        kill_process(pid, signal).unwrap_or_else(|error| panic!("signal {self:?}: {error}"));
    }
}
