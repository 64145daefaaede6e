//! The result of launches, and how it is told.

mod html;

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::Serialize;

use super::Plan;
use super::figures::{Count, Figures};
use super::idle::IdleFigures;
use crate::exit;
use crate::histogram::Histogram;
use crate::words::{milliseconds, plural};

pub use html::html;

/// What there is to tell.
#[derive(Debug)]
pub struct Report<'a> {
    /// What was to be done.
    pub plan: &'a Plan,
    /// RAM of each machine.
    pub mem_mib: u64,
    /// What came of it.
    pub figures: Figures,
    /// What was measured of sandboxes that wait, if that was wanted.
    pub idle: Option<IdleFigures>,
    /// A signal ended it before.
    pub interrupted: bool,
}

/// Percentiles, as JSON has them.
#[derive(Debug, Serialize)]
struct Percentiles {
    p50: Option<u64>,
    p90: Option<u64>,
    p99: Option<u64>,
    max: Option<u64>,
}

impl From<&Histogram> for Percentiles {
    fn from(times: &Histogram) -> Self {
        let at = |per_mille| times.per_mille(per_mille);
        Self { p50: at(500), p90: at(900), p99: at(990), max: times.max() }
    }
}

/// `--json`.
#[derive(Debug, Serialize)]
struct Record<'a> {
    verdict: &'a str,
    from: &'a str,
    job: &'a str,
    count: u64,
    concurrency: usize,
    warm: usize,
    mem_mib: u64,
    done: u64,
    failed: u64,
    processes: u64,
    recycled: u64,
    seconds: f64,
    per_second: f64,
    start_to_hello_us: Percentiles,
    start_to_done_us: Percentiles,
    reset_to_hello_us: Percentiles,
    memory_kib: Percentiles,
    failures: &'a BTreeMap<String, Count>,
    findings: &'a BTreeMap<String, Count>,
    #[serde(skip_serializing_if = "Option::is_none")]
    idle: Option<IdleFigures>,
}

impl Report<'_> {
    /// The process's exit status.
    pub fn status(&self) -> u8 {
        match (self.interrupted && !self.idle.is_some_and(|idle| idle.held), self.figures.wrongs())
        {
            (true, _) => exit::INTERRUPTED,
            (false, 0) => exit::CLEAN,
            (false, _) => exit::FINDINGS,
        }
    }

    /// What it comes to, in words.
    pub fn verdict(&self) -> &'static str {
        match self.status() {
            exit::CLEAN => "clean",
            exit::INTERRUPTED => "interrupted",
            _ => "not clean",
        }
    }

    /// As a JSON object.
    pub fn json(&self) -> String {
        let Self { plan, figures, .. } = self;
        let record = Record {
            verdict: self.verdict(),
            from: plan.origin.name(),
            job: &plan.job,
            count: plan.count,
            concurrency: plan.concurrency,
            warm: plan.warm,
            mem_mib: self.mem_mib,
            done: figures.done,
            failed: figures.failed,
            processes: figures.processes,
            recycled: figures.recycled,
            seconds: figures.took.as_secs_f64(),
            per_second: figures.per_second(),
            start_to_hello_us: (&figures.hello).into(),
            start_to_done_us: (&figures.done_us).into(),
            reset_to_hello_us: (&figures.reset_hello).into(),
            memory_kib: (&figures.memory_kib).into(),
            failures: &figures.failures,
            findings: &figures.findings,
            idle: self.idle,
        };
        // The types have string keys and finite numbers, so serializing cannot fail.
        serde_json::to_string(&record).unwrap_or_default()
    }

    /// Rows of times: what, and the times.
    fn times(&self) -> Vec<(&'static str, &Histogram)> {
        let Figures { hello, done_us, reset_hello, .. } = &self.figures;
        let all = [
            ("start to hello", hello),
            ("start to done", done_us),
            ("reset to hello, by its own clock", reset_hello),
        ];
        all.into_iter().filter(|(_, times)| times.total() > 0).collect()
    }

    /// Memory, in words.
    fn memory(&self) -> Vec<String> {
        let mut lines = Vec::new();
        if let Some(kib) = self.figures.memory_kib.per_mille(500) {
            let count = self.figures.memory_kib.total() as usize;
            lines.push(format!(
                "memory of a sandbox after its job: {kib} KiB (Pss; median of {count})"
            ));
        }
        if let Some(idle) = &self.idle {
            let each = |kib: Option<u64>| match kib {
                Some(kib) => format!("{} MiB, {} KiB each", kib >> 10, kib / idle.count.max(1)),
                None => "not known to this user".into(),
            };
            lines.push(format!("idle: {} of {} MiB", idle.count, self.mem_mib));
            lines.push(format!("memory that the host has less: {}", each(idle.host_kib)));
            let pss = each(idle.proportional_kib);
            lines.push(format!("memory of their processes (Pss): {pss}"));
            let wake_ups = match idle.wake_ups_per_second {
                Some(number) => format!("{number:.1} per second, of all together"),
                None => "not known to this user".into(),
            };
            lines.push(format!("wake-ups: {wake_ups}"));
        }
        lines
    }

    /// What went wrong, in words.
    fn wrongs(&self) -> Vec<String> {
        let line = |kind: &str, (name, Count { count, first }): (&String, &Count)| {
            format!("{kind} {name}: {count} times, first: {first}")
        };
        let findings = self.figures.findings.iter().map(|one| line("finding", one));
        findings.chain(self.figures.failures.iter().map(|one| line("failure", one))).collect()
    }

    fn sums(&self) -> String {
        let Figures { done, failed, processes, recycled, .. } = &self.figures;
        let mut text = match self.idle {
            Some(_) => plural(*processes as usize, "sandbox", "sandboxes"),
            None => format!(
                "{} done, {} in {}",
                plural(*done as usize, "launch", "launches"),
                if *failed == 0 { "none failed,".into() } else { format!("{failed} failed,") },
                plural(*processes as usize, "process", "processes"),
            ),
        };
        if *recycled > 0 {
            let _ = write!(text, ", {recycled} recycled");
        }
        text
    }

    /// The table.
    pub fn table(&self) -> String {
        let mut text = String::new();
        let show = |us: Option<u64>| us.map_or("-".into(), milliseconds);
        let _ = writeln!(
            text,
            "{:<34} {:>7} {:>10} {:>10} {:>10} {:>10}",
            "", "count", "p50", "p90", "p99", "max"
        );
        for (name, times) in self.times() {
            let Percentiles { p50, p90, p99, max } = times.into();
            let [p50, p90, p99, max] = [p50, p90, p99, max].map(show);
            let count = times.total();
            let _ = writeln!(text, "{name:<34} {count:>7} {p50:>10} {p90:>10} {p99:>10} {max:>10}");
        }
        for line in self.memory().into_iter().chain(self.wrongs()) {
            let _ = writeln!(text, "{line}");
        }
        let (verdict, sums) = (self.verdict(), self.sums());
        let _ = match self.idle {
            Some(_) => writeln!(text, "{verdict}: {sums}"),
            None => {
                let rate = self.figures.per_second();
                writeln!(text, "{verdict}: {sums}; {rate:.0} launches per second")
            }
        };
        text
    }
}

#[cfg(test)]
mod tests;
