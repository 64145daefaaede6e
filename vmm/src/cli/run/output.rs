//! What `run` prints: a row for each life, or a summary of many, and the verdict; or all of it as one JSON object.
//!
//! Lives are printed or counted as they end, so that a long run needs no more memory than a short one.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};

use agent_protocol::PmuStatus;
use serde::Serialize;

use super::lines;
use crate::device::pmu::Shape;
use crate::device::virtio::audit::{AuditMode, AuditSummary};
use crate::fault::{Fault, Faults};
use crate::kvm::host::HostInfo;
use crate::kvm::pmu::{PmuAbsence, PmuPolicy};
use crate::machine::{Config, GuestStats, Handle};
use crate::snapshot;
use crate::soak::line::{Evidence, Line, Machine};
use crate::verify::{Expectations, Finding, Life, Outcome};
use crate::words::{milliseconds, plural};

/// Above this many resets the table has a row for each cause instead of each life.
const MOST_ROWS: u32 = 24;

/// What `run --json` prints besides the lives.
#[derive(Debug, Serialize)]
pub(super) struct Summary<'a> {
    verdict: &'static str,
    findings: &'a [Finding],
    host: &'a HostInfo,
    pmu: Pmu,
    /// Steps that the resets left out on purpose.
    #[serde(skip_serializing_if = "Faults::is_empty")]
    injected: &'a Faults,
    guest: GuestStats,
    /// What the DMA audit saw in all lives, if there was one.
    #[serde(skip_serializing_if = "Option::is_none")]
    dma_audit: Option<Audit>,
    /// Findings that this host cannot show, with the reason.
    unchecked: Vec<(&'static str, &'static str)>,
    /// The snapshot that was written in the end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<Written>,
}

/// A snapshot that was written.
#[derive(Debug, Serialize)]
pub(in crate::cli) struct Written {
    id: String,
    /// Length of the state file.
    state_bytes: u64,
    /// How much of RAM is in the memory file.
    memory_bytes: u64,
}

impl From<snapshot::Summary> for Written {
    fn from(summary: snapshot::Summary) -> Self {
        let snapshot::Summary { header, state_bytes, memory_bytes } = summary;
        Self { id: header.id.to_string(), state_bytes, memory_bytes }
    }
}

#[derive(Debug, Serialize)]
struct Audit {
    mode: AuditMode,
    #[serde(flatten)]
    summary: AuditSummary,
}

#[derive(Debug, Serialize)]
struct Pmu {
    policy: PmuPolicy,
    /// What made it absent.
    absence: PmuAbsence,
    /// The emulated counters.
    #[serde(skip_serializing_if = "Option::is_none")]
    shape: Option<Shape>,
}

impl Pmu {
    fn words(&self) -> String {
        let words = match self.absence {
            PmuAbsence::Capability => "PMU off by KVM_CAP_PMU_CAPABILITY and CPUID",
            PmuAbsence::ModuleParameter => "PMU off by kvm.enable_pmu=N and CPUID",
            PmuAbsence::CpuidOnly => "PMU off by CPUID alone (this kernel cannot disable it)",
            PmuAbsence::NotAbsent => "PMU as KVM gives it",
            PmuAbsence::Emulated => "PMU emulated",
        };
        match self.shape {
            Some(shape) => format!("{words}, {shape}"),
            None => words.into(),
        }
    }
}

impl<'a> Summary<'a> {
    pub fn new(
        machine: &'a Handle,
        config: &'a Config,
        expectations: Expectations,
        findings: &'a [Finding],
    ) -> Self {
        let shape = (config.pmu == PmuPolicy::Emulated).then_some(config.pmu_shape);
        Self {
            verdict: if findings.is_empty() { "clean" } else { "findings" },
            findings,
            host: machine.host_info(),
            pmu: Pmu { policy: expectations.pmu, absence: machine.pmu_absence(), shape },
            injected: &config.faults,
            guest: machine.guest_stats(),
            dma_audit: machine
                .dma_audit()
                .map(|audit| Audit { mode: expectations.dma_audit, summary: audit.summary() }),
            unchecked: expectations.unchecked(),
            snapshot: None,
        }
    }
}

/// What is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::cli) enum Format {
    /// For people.
    Table,
    /// One object.
    Json,
    /// An object in each line.
    Lines,
}

/// Prints while the machine lives and at the end.
pub(super) struct Output {
    format: Format,
    resets: u32,
    /// Where progress goes, if anybody watches.
    progress: bool,
    lives: u32,
    causes: BTreeMap<&'static str, Tally>,
    /// Of the residue check: how many items came back clean, and how many could not be told, in the last life.
    residue: Option<(usize, usize)>,
    /// The first failure to print. Told at the end, since the machine lives on without readers.
    failure: Option<io::Error>,
}

/// The lives of one cause.
#[derive(Default)]
struct Tally {
    pmu: BTreeSet<&'static str>,
    nmis: u64,
    hello_us: Vec<u64>,
}

impl Output {
    pub fn new(format: Format, resets: u32) -> Self {
        // A soak that reads lines shows the progress itself.
        let progress = resets > MOST_ROWS && format != Format::Lines && io::stderr().is_terminal();
        Self {
            format,
            resets,
            progress,
            lives: 0,
            causes: BTreeMap::new(),
            residue: None,
            failure: None,
        }
    }

    /// The machine runs. Of the summary only that counts which is known by now.
    pub fn begin(&mut self, summary: &Summary) {
        if self.format == Format::Lines {
            self.line(&Line::Machine(Machine {
                host: summary.host.clone(),
                pmu: summary.pmu.words(),
                unchecked: summary.unchecked.iter().map(|(name, _)| (*name).into()).collect(),
            }));
        }
    }

    /// A life is over.
    pub fn life(&mut self, life: &Life, findings: &[Finding], evidence: impl FnOnce() -> Evidence) {
        self.lives += 1;
        if !life.residue.is_empty() {
            let count =
                |is: fn(&Outcome) -> bool| life.residue.iter().filter(|r| is(&r.outcome)).count();
            let reset = count(|outcome| *outcome == Outcome::Reset);
            let unknown = count(|outcome| matches!(outcome, Outcome::NotPoisonable(_)));
            self.residue = Some((reset, unknown));
        }
        if self.progress {
            let total = u64::from(self.resets) + 1;
            let _ = write!(io::stderr(), "\rlife {} of {total}", life.life);
        }
        match self.format {
            Format::Lines => self.line(&lines::life(life, findings, evidence)),
            Format::Json => self.json_life(life),
            Format::Table if self.resets > MOST_ROWS => self.count(life),
            Format::Table => self.row(life),
        }
    }

    fn line(&mut self, line: &Line) {
        self.print(&lines::text(line));
    }

    fn json_life(&mut self, life: &Life) {
        let before = if self.lives == 1 { "{\"lives\":[" } else { "," };
        // The types have string keys and no maps, so serializing cannot fail.
        self.print(&format!("{before}{}", serde_json::to_string(life).unwrap_or_default()));
    }

    fn count(&mut self, life: &Life) {
        let tally = self.causes.entry(life.cause.name()).or_default();
        tally.pmu.insert(pmu_word(life));
        tally.nmis += u64::from(life.report.as_ref().map_or(0, |report| report.nmi.total));
        tally.hello_us.extend(life.hello_us);
    }

    fn row(&mut self, life: &Life) {
        let header = match self.lives {
            1 => "life  cause     pmu           nmis  hello\n",
            _ => "",
        };
        let nmis = life.report.as_ref().map_or("-".into(), |report| report.nmi.total.to_string());
        let hello = life.hello_us.map_or("-".into(), milliseconds);
        let (number, cause, pmu) = (life.life, life.cause.name(), pmu_word(life));
        self.print(&format!("{header}{number:>4}  {cause:<8}  {pmu:<12}  {nmis:>4}  {hello}\n"));
    }

    /// There will be no verdict.
    pub fn abandon(&mut self) {
        self.clear_progress();
        if self.format == Format::Lines {
            self.line(&Line::Verdict { verdict: None });
        }
        if self.format == Format::Json {
            let lives = if self.lives == 0 { "{\"lives\":[" } else { "" };
            self.print(&format!("{lives}],\"verdict\":null}}\n"));
        }
    }

    /// The verdict.
    ///
    /// # Errors
    /// Something of all this could not be printed.
    pub fn finish(mut self, summary: &Summary) -> io::Result<()> {
        self.clear_progress();
        if self.format == Format::Lines {
            self.line(&Line::Verdict { verdict: Some(summary.verdict.into()) });
            return self.failure.map_or(Ok(()), Err);
        }
        if self.format == Format::Json {
            // The summary is an object of its own; its fields join those of the object that the lives began.
            let rest = serde_json::to_string(summary)?;
            self.print(&format!("],{}\n", &rest[1..]));
            return self.failure.map_or(Ok(()), Err);
        }
        let mut text = self.table_by_cause();
        for Finding { name, life, detail } in summary.findings {
            let _ = writeln!(text, "finding in life {life}: {name}: {detail}");
        }
        let HostInfo { kernel, kvm, .. } = summary.host;
        let _ = writeln!(text, "host: Linux {kernel}, {}; {}", kvm.name(), summary.pmu.words());
        if let Some((reset, unknown)) = self.residue {
            let _ = writeln!(
                text,
                "residue check of the last life: {} clean, {unknown} not poisonable here",
                plural(reset, "item", "items")
            );
        }
        if let Some(audit) = &summary.dma_audit {
            let _ = writeln!(text, "{}", audit.summary);
            for violation in audit.summary.not_findings(audit.mode) {
                let _ = writeln!(text, "seen by the DMA audit: {violation}");
            }
        }
        if !summary.injected.is_empty() {
            let names: Vec<_> = summary.injected.iter().map(Fault::name).collect();
            let _ = writeln!(text, "injected: the resets left out {}", names.join(", "));
        }
        let lives = plural(self.lives as usize, "life", "lives");
        let _ = match summary.findings.len() {
            0 => writeln!(text, "clean: {lives}, no findings"),
            count => writeln!(text, "not clean: {lives}, {}", plural(count, "finding", "findings")),
        };
        self.print(&text);
        self.failure.map_or(Ok(()), Err)
    }

    /// Writes to stdout. A reader that went away, as `head` does, is no error of ours.
    fn print(&mut self, text: &str) {
        let mut stdout = io::stdout().lock();
        let written = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
        if let Err(error) = written
            && error.kind() != io::ErrorKind::BrokenPipe
        {
            self.failure.get_or_insert(error);
        }
    }

    /// A row for each cause: how many lives, which PMU states, how many NMIs, and the distribution of the times to hello.
    fn table_by_cause(&self) -> String {
        let mut text = String::new();
        if !self.causes.is_empty() {
            text.push_str("cause     lives  pmu           nmis  hello p50  p99        max\n");
        }
        for (cause, Tally { pmu, nmis, hello_us }) in &self.causes {
            let mut times = hello_us.clone();
            times.sort_unstable();
            let at = |percent: usize| {
                let index = (times.len() * percent / 100).min(times.len().saturating_sub(1));
                times.get(index).map_or("-".into(), |us| milliseconds(*us))
            };
            let pmu: Vec<_> = pmu.iter().copied().collect();
            let _ = writeln!(
                text,
                "{cause:<8}  {:>5}  {:<12}  {nmis:>4}  {:<9}  {:<9}  {}",
                times.len(),
                pmu.join("/"),
                at(50),
                at(99),
                at(100),
            );
        }
        text
    }

    fn clear_progress(&self) {
        if self.progress {
            let _ = write!(io::stderr(), "\r\x1b[K");
        }
    }
}

pub(super) fn pmu_word(life: &Life) -> &'static str {
    match life.report.as_ref().map(|report| &report.pmu.status) {
        None => "-",
        Some(PmuStatus::Absent) => "absent",
        Some(PmuStatus::Present { .. }) => "present",
        Some(PmuStatus::BrokenBios { .. }) => "broken-bios",
        Some(PmuStatus::Broken) => "broken",
        Some(PmuStatus::PresentDead) => "present-dead",
    }
}
