//! What is known of launches, in a bounded amount of memory.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::histogram::Histogram;
use crate::soak::printable;

/// Something that went wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// What failed: a stable name.
    pub name: String,
    /// What was seen.
    pub detail: String,
}

impl Failure {
    /// Of this name. What comes from a sandbox is made harmless for a terminal.
    pub fn new(name: &str, detail: String) -> Self {
        Self { name: printable(name), detail: printable(&detail) }
    }
}

/// How often something went wrong, and the first time.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Count {
    /// How often.
    pub count: u64,
    /// What was seen the first time.
    pub first: String,
}

/// Names that are kept; a sandbox that was taken over could make up others.
const MOST_NAMES: usize = 64;

/// Everything that is kept.
#[derive(Clone, Debug, Default)]
pub struct Figures {
    /// Jobs that were done.
    pub done: u64,
    /// Launches that came to nothing.
    pub failed: u64,
    /// Processes that were made.
    pub processes: u64,
    /// Lives that were begun in place.
    pub recycled: u64,
    /// What failed.
    pub failures: BTreeMap<String, Count>,
    /// What machines that were reset in place, or booted, were found to have.
    pub findings: BTreeMap<String, Count>,
    /// Start to hello, in microseconds.
    pub hello: Histogram,
    /// Start to done.
    pub done_us: Histogram,
    /// From a reset in place to the agent's hello, by the sandbox's own clock.
    pub reset_hello: Histogram,
    /// Memory of some sandboxes whose job was done, in KiB.
    pub memory_kib: Histogram,
    /// How long all took.
    pub took: Duration,
}

impl Figures {
    /// A launch came to nothing.
    pub fn fail(&mut self, failure: Failure) {
        self.failed += 1;
        self.note(failure);
    }

    /// Something went wrong beside the launches.
    pub fn note(&mut self, failure: Failure) {
        count(&mut self.failures, failure);
    }

    /// A verdict has a finding.
    pub fn find(&mut self, finding: Failure) {
        count(&mut self.findings, finding);
    }

    /// How many things are wrong.
    pub fn wrongs(&self) -> u64 {
        let all = self.failures.values().chain(self.findings.values());
        all.map(|count| count.count).sum()
    }

    /// Jobs done in a second.
    pub fn per_second(&self) -> f64 {
        self.done as f64 / self.took.as_secs_f64().max(0.001)
    }
}

fn count(counts: &mut BTreeMap<String, Count>, Failure { name, detail }: Failure) {
    if counts.len() < MOST_NAMES || counts.contains_key(&name) {
        counts.entry(name).or_insert(Count { count: 0, first: detail }).count += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_counted_by_name_and_the_first_is_told() {
        let mut figures = Figures::default();
        figures.fail(Failure::new("killed", "one".into()));
        figures.fail(Failure::new("killed", "two".into()));
        figures.find(Failure::new("ram-kept", "x\x1b[2J".into()));
        assert_eq!((figures.failed, figures.wrongs()), (2, 3));
        assert_eq!(figures.failures["killed"], Count { count: 2, first: "one".into() });
        assert_eq!(figures.findings["ram-kept"].first, "x\u{fffd}[2J");
        // However many names somebody makes up.
        (0..1000).for_each(|n| figures.note(Failure::new(&n.to_string(), String::new())));
        assert_eq!(figures.failures.len(), MOST_NAMES);
    }
}
