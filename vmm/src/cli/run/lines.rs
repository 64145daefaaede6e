//! `run --json-lines`: a line for the machine, one for each life, and one for the verdict, as `soak` reads them.

use std::io::Write;

use super::output::pmu_word;
use crate::cli::jail::EndError;
use crate::device::virtio::audit::AuditSummary;
use crate::lifecycle::chain;
use crate::machine::Handle;
use crate::soak::line::{End, Evidence, Found, Held, Life as LifeLine, Line};
use crate::verify::{Finding, Life};

/// The line of a life; `evidence` is wanted only if something was found.
pub(super) fn life(life: &Life, findings: &[Finding], evidence: impl FnOnce() -> Evidence) -> Line {
    let found =
        |finding: &Finding| Found { name: finding.name.into(), detail: finding.detail.clone() };
    Line::Life(LifeLine {
        life: life.life,
        cause: Some(life.cause),
        moment: life.moment,
        hello_us: life.hello_us,
        pmu: Some(pmu_word(life).into()),
        nmis: life.report.as_ref().map(|report| report.nmi.total),
        findings: findings.iter().map(found).collect(),
        evidence: (!findings.is_empty()).then(|| Box::new(evidence())),
    })
}

/// A line with its end.
pub(super) fn text(line: &Line) -> String {
    // The types have string keys and no maps, so serializing cannot fail.
    format!("{}\n", serde_json::to_string(line).unwrap_or_default())
}

/// Says how the machine's process ended, if it did not do so by itself.
pub(super) fn end(error: &(dyn std::error::Error + 'static)) {
    let how = match error.downcast_ref() {
        Some(EndError::Forbidden(_)) => End::ForbiddenCall,
        Some(EndError::OutOfMemory) => End::OutOfMemory,
        Some(EndError::Killed(_)) => End::Killed,
        None => End::Failed,
    };
    say(&Line::End { how, detail: chain(error) });
}

/// Says what a machine that was held has seen of its guest.
pub(super) fn held(machine: &Handle, dma_audit: Option<AuditSummary>) {
    let stats = machine.guest_stats();
    let (offences, vsock) = (stats.offences(), stats.vsock);
    say(&Line::Held(Box::new(Held { dma_audit, offences, vsock })));
}

/// Says what the user should know before the machine runs.
pub(super) fn notice(what: &str) {
    say(&Line::Notice { text: what.into() });
}

/// Writes a line at once.
fn say(line: &Line) {
    // Whoever does not listen any more has seen the end.
    let _ = std::io::stdout().lock().write_all(text(line).as_bytes());
}
