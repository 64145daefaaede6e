//! What comes of a probe: its verdict, and how it is told.

mod html;
mod json;
mod table;

use std::path::PathBuf;

use agent_protocol::Hello;

use super::checks::{Check, Outcome};
use super::{Connections, News, RoundTrips, Throughput};
use crate::device::virtio::audit::{AuditMode, AuditSummary};
use crate::device::vsock::VsockStats;
use crate::exit;
use crate::kvm::host::HostInfo;
use crate::soak::line::{Found, Held};

pub use html::html;
pub use json::json;
pub use table::table;

/// Whose machine it is.
#[derive(Clone, Debug)]
pub enum Target {
    /// One of our own.
    Own,
    /// Behind this socket.
    Socket(PathBuf),
}

/// How a probe came to its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// Everything was tried.
    Complete,
    /// A signal came.
    Interrupted,
    /// The machine or the host failed it, and how.
    Failed(String),
}

/// Everything that is known.
#[derive(Debug)]
pub struct Report {
    /// Whose machine.
    pub target: Target,
    /// Its agent's greeting.
    pub agent: Option<Hello>,
    /// What runs our own machine.
    pub host: Option<HostInfo>,
    /// Figures.
    pub round_trips: Vec<RoundTrips>,
    /// Figures.
    pub throughput: Vec<Throughput>,
    /// Figures.
    pub connections: Vec<Connections>,
    /// What was checked, and what could not be.
    pub checks: Vec<Check>,
    /// What the audit of our own machine saw.
    pub dma_audit: Option<AuditSummary>,
    /// What its device counted.
    pub device: Option<VsockStats>,
    /// How it ended.
    pub ending: Ending,
}

impl Report {
    /// Nothing is known yet.
    pub fn new(target: Target) -> Self {
        Self {
            target,
            agent: None,
            host: None,
            round_trips: Vec::new(),
            throughput: Vec::new(),
            connections: Vec::new(),
            checks: Vec::new(),
            dma_audit: None,
            device: None,
            ending: Ending::Complete,
        }
    }

    /// Keeps what was measured.
    pub fn hear(&mut self, news: News) {
        match news {
            News::Stage(_) => {}
            News::Agent(hello) => self.agent = Some(hello),
            News::RoundTrips(figure) => self.round_trips.push(figure),
            News::Throughput(figure) => self.throughput.push(figure),
            News::Connections(figure) => self.connections.push(figure),
            News::Check(check) => self.checks.push(check),
        }
    }

    /// What our own machine says in the end: findings of its first life, and what it has seen of its guest. None if it could not say
    /// any more.
    pub fn hear_machine(&mut self, findings: &[Found], held: Option<Held>) {
        let Some(Held { dma_audit, offences, vsock }) = held else {
            return self.uncheck("the machine ended before it could say");
        };
        let texts = findings.iter().map(|found| format!("{}: {}", found.name, found.detail));
        self.add("first-life", FIRST_LIFE, texts.collect());
        self.add("guest-offences", OFFENCES, offences);
        let musts = dma_audit.iter().flat_map(|audit| &audit.violations);
        let musts = musts.filter(|violation| AuditMode::Report.forbids(violation.level));
        self.add("dma-audit", DMA_AUDIT, musts.map(ToString::to_string).collect());
        (self.dma_audit, self.device) = (dma_audit, Some(vsock));
    }

    /// What only a machine of our own shows was not seen, for this reason.
    pub fn uncheck(&mut self, reason: &str) {
        for (name, about) in
            [("first-life", FIRST_LIFE), ("guest-offences", OFFENCES), ("dma-audit", DMA_AUDIT)]
        {
            let outcome = Outcome::Unchecked(reason.into());
            self.checks.push(Check { name: name.into(), about, outcome });
        }
    }

    fn add(&mut self, name: &str, about: &'static str, wrong: Vec<String>) {
        let outcome = match wrong.as_slice() {
            [] => Outcome::Pass,
            wrong => Outcome::Fail(wrong.join("; ")),
        };
        self.checks.push(Check { name: name.into(), about, outcome });
    }

    /// How many checks came to this.
    fn count(&self, is: fn(&Outcome) -> bool) -> usize {
        self.checks.iter().filter(|check| is(&check.outcome)).count()
    }

    fn failed(&self) -> usize {
        self.count(|outcome| matches!(outcome, Outcome::Fail(_)))
    }

    fn unchecked(&self) -> usize {
        self.count(|outcome| matches!(outcome, Outcome::Unchecked(_)))
    }

    /// In a word; none for JSON if it is no verdict.
    fn verdict(&self) -> (&'static str, Option<&'static str>) {
        match (&self.ending, self.failed()) {
            (Ending::Interrupted, _) => ("interrupted", None),
            (Ending::Failed(_), _) => ("not brought to its end", None),
            (Ending::Complete, 0) => ("pass", Some("pass")),
            (Ending::Complete, _) => ("fail", Some("fail")),
        }
    }

    /// The verdict with its numbers.
    fn sums(&self) -> String {
        let total = self.checks.len();
        let passed = self.count(|outcome| *outcome == Outcome::Pass);
        let mut text = format!("{}: {passed} of {total} checks passed", self.verdict().0);
        for (count, words) in [(self.failed(), "failed"), (self.unchecked(), "cannot be told here")]
        {
            if count > 0 {
                text.push_str(&format!(", {count} {words}"));
            }
        }
        text
    }

    /// Where it was measured, in words.
    fn place(&self) -> String {
        let whose = match &self.target {
            Target::Own => "a machine of its own".into(),
            Target::Socket(path) => format!("{path:?}"),
        };
        match &self.host {
            Some(host) => format!("{whose}; Linux {}, {}", host.kernel, host.kvm.name()),
            None => whose,
        }
    }

    /// The process's exit status.
    pub fn status(&self) -> u8 {
        match (&self.ending, self.failed()) {
            (Ending::Interrupted, _) => exit::INTERRUPTED,
            (Ending::Failed(_), _) => exit::USAGE_OR_HOST,
            (Ending::Complete, 0) => exit::CLEAN,
            (Ending::Complete, _) => exit::FINDINGS,
        }
    }
}

const FIRST_LIFE: &str = "the machine's agent reported a clean first life";
const OFFENCES: &str = "the machine saw its guest break no rule of a device or of the bus";
const DMA_AUDIT: &str = "no buffer that the guest posted was one that no driver may post";

/// Bytes a second, in GiB.
fn gib(rate: f64) -> f64 {
    rate / f64::from(1 << 30)
}

/// A time of so many nanoseconds, in microseconds.
fn us(ns: Option<u64>) -> f64 {
    ns.unwrap_or(0) as f64 / 1000.0
}

/// Shares of a thousand whose times are shown, with their names.
const PER_MILLE: [(u64, &str); 4] = [(500, "p50"), (900, "p90"), (990, "p99"), (999, "p99.9")];
