//! The verdict: what the policy, a life's report and the one before it say about the reset between them.

mod dmesg;
mod pmu;
mod residue;

use agent_protocol::{Cause, CheckTicks, NmiRecord, Report};
use serde::Serialize;

use crate::device::virtio::audit::AuditMode;
use crate::device::virtio::audit::log::Violation;
use crate::kvm::host::KvmKind;
use crate::kvm::pmu::PmuPolicy;
use crate::schedule::Moment;
use crate::words::plural;

pub use pmu::ticks_to_overflow;
pub use residue::{Outcome, Residue, compare, differences, excuse};

/// One life of a machine, as host and agent saw it.
#[derive(Clone, Debug, Serialize)]
pub struct Life {
    /// Number; the first is 1.
    pub life: u32,
    /// Why it began.
    pub cause: Cause,
    /// In the middle of what the reset came that began it; none if it was the power-on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub moment: Option<Moment>,
    /// Microseconds to the agent's hello: from the start of the process in life 1, from the reset's cause later. None if the
    /// agent never said hello.
    pub hello_us: Option<u64>,
    /// What the agent reported; none if it could not be had.
    pub report: Option<Report>,
    /// What became of the state that was poisoned before the reset, if it was.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub residue: Vec<Residue>,
    /// How long the agent was busy with the residue check's look at everything, if it was asked for one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub look_ticks: Option<CheckTicks>,
    /// How long with poisoning everything before the reset, if there was one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub poison_ticks: Option<CheckTicks>,
    /// What the DMA audit found, if there was one.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub dma_audit: Vec<Violation>,
    /// Why there is no report.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failure: Option<Failure>,
}

/// Why a life has no report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Failure {
    /// Which finding it is.
    pub kind: FailureKind,
    /// In words, with the last lines of the console if there are any.
    pub detail: String,
}

/// The ways in which a life can fail to report.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailureKind {
    /// No hello in time.
    NoHello,
    /// A hello, but no report.
    NoReport,
    /// A reset that nobody asked for, or by another cause than was asked for.
    UnexpectedReset,
    /// The guest was asked to reset and did not.
    NoReset,
    /// The guest died or turned itself off.
    GuestStopped,
}

impl FailureKind {
    /// The name of its finding.
    pub fn name(self) -> &'static str {
        match self {
            Self::NoHello => "no-hello",
            Self::NoReport => "no-report",
            Self::UnexpectedReset => "unexpected-reset",
            Self::NoReset => "no-reset",
            Self::GuestStopped => "guest-stopped",
        }
    }
}

/// Something that a clean machine does not show. Names are stable: users match them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Stable name.
    pub name: &'static str,
    /// The life that showed it.
    pub life: u32,
    /// What was seen.
    pub detail: String,
}

/// What a machine was meant to be: the yardstick of the verdict.
#[derive(Clone, Copy, Debug)]
pub struct Expectations {
    /// Performance counters.
    pub pmu: PmuPolicy,
    /// What runs the guest. A software KVM lets guests read the host's time stamp counter, so a reset cannot set it back.
    pub kvm: KvmKind,
    /// Which of the DMA audit's violations are findings.
    pub dma_audit: AuditMode,
    /// Its first life had begun before, in a machine that it was restored from.
    pub restored: bool,
    /// Whether its KVM lets anybody clear HWCR ([`crate::kvm::state::clears_hwcr`]).
    pub clears_hwcr: bool,
}

/// Why an item of the residue check proves nothing on some hosts.
pub const UNCLEARED_HWCR: &str = "this KVM, like those before Linux 6.7, lets nobody clear the guest's HWCR (msr.hwcr): a reset leaves it";

impl Expectations {
    /// What cannot be checked on this host, as (name of the finding, reason).
    pub fn unchecked(self) -> Vec<(&'static str, &'static str)> {
        let tsc = ("tsc-not-reset", "a software KVM shows guests the host's time stamp counter");
        let hwcr = ("msrs-kept", UNCLEARED_HWCR);
        let all = [(self.kvm == KvmKind::Software, tsc), (!self.clears_hwcr, hwcr)];
        all.into_iter().filter_map(|(is_so, what)| is_so.then_some(what)).collect()
    }
}

/// Judges the lives of one machine, in order. Keeps the last report alone, so a machine may live for ever.
#[derive(Clone, Debug)]
pub struct Judge {
    expectations: Expectations,
    before: Option<Report>,
    findings: Vec<Finding>,
}

impl Judge {
    /// A judge of a machine that was meant to be so.
    pub fn new(expectations: Expectations) -> Self {
        Self { expectations, before: None, findings: Vec::new() }
    }

    /// Hears the next life. Returns what was found in it, and the report of the life before.
    pub fn hear(&mut self, life: &Life) -> (&[Finding], Option<Report>) {
        let known = self.findings.len();
        let found = judge(self.expectations, self.before.as_ref(), life);
        self.findings.extend(found);
        let before = std::mem::replace(&mut self.before, life.report.clone());
        (&self.findings[known..], before)
    }

    /// All findings so far. None mean that the machine came back clean every time.
    pub fn findings(&self) -> &[Finding] {
        &self.findings
    }
}

/// The name of the DMA audit's findings.
pub const DMA_AUDIT: &str = "dma-audit";

/// The verdict on one life: a pure function of the expectations, the report before the reset and what came after it.
fn judge(expectations: Expectations, before: Option<&Report>, life: &Life) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut add = |name, detail| findings.push(Finding { name, life: life.life, detail });
    if let Some(failure) = &life.failure {
        add(failure.kind.name(), failure.detail.clone());
    }
    residue::check(&life.residue, &mut add);
    for violation in &life.dma_audit {
        if expectations.dma_audit.forbids(violation.level) {
            add(DMA_AUDIT, violation.to_string());
        }
    }
    if let Some(report) = &life.report {
        check_identity(life, report, &mut add);
        // After a kexec there was no reset of it, and a restore begins no life.
        let is_anew = life.cause != Cause::Kexec && !(expectations.restored && before.is_none());
        if expectations.kvm != KvmKind::Software && is_anew {
            check_tsc(life, report, &mut add);
        }
        pmu::check(expectations.pmu, life.life, report, &mut add);
        check_nmis(life, report, &mut add);
        check_faults(report, &mut add);
        if let Some(before) = before {
            check_change(before, report, &mut add);
        }
    }
    findings
}

/// Collects findings of one life.
type Add<'a> = dyn FnMut(&'static str, String) + 'a;

/// The guest must know which life it is in: anything else means that RAM or the clock was not reset.
fn check_identity(life: &Life, report: &Report, add: &mut Add) {
    if (report.life, report.cause) != (life.life, Some(life.cause.seen_by_machine())) {
        let cause = report.cause.map_or("none", Cause::name);
        add(
            "life-mismatch",
            format!(
                "the agent is in life {} with cause {cause}, the host in {} with {}",
                report.life,
                life.life,
                life.cause.seen_by_machine()
            ),
        );
    }
}

/// The counter was set to zero after the cause of the reset, and runs with the host's time: when the agent was ready it cannot
/// have shown more than the host has waited for the greeting, however busy either was.
fn check_tsc(life: &Life, report: &Report, add: &mut Add) {
    /// Far more than the frequency can be wrong by.
    const SLACK_MS: u64 = 1000;
    let (ready, khz) = (report.timings.tsc_ready, u64::from(report.timings.tsc_khz));
    // Without a frequency the counter cannot be read as a time.
    let (Some(ready_ms), Some(hello_us)) = (ready.checked_div(khz), life.hello_us) else { return };
    if ready_ms > hello_us / 1000 + SLACK_MS {
        add(
            "tsc-not-reset",
            format!(
                "the time stamp counter stood at {ready} when the agent was ready, {ready_ms} ms, though the life was {} ms old",
                hello_us / 1000
            ),
        );
    }
}

fn check_nmis(life: &Life, report: &Report, add: &mut Add) {
    let nmi = &report.nmi;
    let reasons: Vec<String> = nmi.records.iter().map(|r| format!("{:02x}", r.reason)).collect();
    let reasons = reasons.join(" ");
    for (count, name) in
        [(nmi.unknown, "unknown-nmi"), (nmi.serr, "serr-nmi"), (nmi.iochk, "iochk-nmi")]
    {
        if count > 0 {
            add(name, format!("{count} of {} NMIs, reasons {reasons}", nmi.total));
        }
    }
    for finding in dmesg::findings(&report.dmesg) {
        // What the counters say already is not said twice.
        let counted = match finding.name {
            "unknown-nmi" => nmi.unknown > 0,
            "serr-nmi" => nmi.serr > 0,
            "iochk-nmi" => nmi.iochk > 0,
            "pmu-corrupted" => pmu::is_corrupted(report),
            _ => false,
        };
        if !counted {
            add(finding.name, finding.line);
        }
    }
    // The first life has none before it.
    if life.life > 1 {
        check_nmis_of_the_earlier_life(report, add);
    }
}

/// NMIs that nobody claims, after a reset: whose are they? Those before the agent's driver was ready had been waiting; of the
/// others each counter that was left running explains one, and whatever remains came from elsewhere.
fn check_nmis_of_the_earlier_life(report: &Report, add: &mut Add) {
    let nmi = &report.nmi;
    let waited = |record: &&NmiRecord| record.tsc < report.timings.tsc_ready;
    let queued = nmi.records.iter().filter(waited).count() as u32;
    if let Some(first) = nmi.records.iter().find(waited) {
        let detail = format!(
            "{} when the machine came back, the first at {:#x}",
            plural(queued as usize, "NMI was waiting", "NMIs were waiting"),
            first.rip
        );
        add("nmi-queued", detail);
    }
    let late = nmi.unknown.saturating_sub(queued).saturating_sub(pmu::overflows(report));
    if late > 0 {
        let came = plural(late as usize, "NMI", "NMIs");
        add("nmi-after-reset", format!("{came} came after the reset, from no counter"));
    }
}

fn check_faults(report: &Report, add: &mut Add) {
    for fault in &report.exceptions {
        add(
            "guest-exception",
            format!(
                "vector {} {} times, last at {:#x} with error code {:#x}",
                fault.vector, fault.count, fault.rip, fault.error_code
            ),
        );
    }
    if report.vsock.stale_packets > 0 {
        let packets = &report.vsock;
        let first = packets.first.first().map_or("", String::as_str);
        let count = packets.stale_packets;
        add(
            "vsock-kept",
            format!("{count} packets for connections that this life never had, first: {first}"),
        );
    }
    if report.dma.violation_count > 0 {
        let first = report.dma.violations.first().map_or("", String::as_str);
        add(
            "dma-violation",
            format!("{} in the guest's tracker, first: {first}", report.dma.violation_count),
        );
    }
}

/// A reset must not change what the machine is.
fn check_change(before: &Report, after: &Report, add: &mut Add) {
    if before.pmu.cpuid != after.pmu.cpuid {
        add("cpuid-changed", format!("{:x?} became {:x?}", before.pmu.cpuid, after.pmu.cpuid));
    }
    let registers =
        |report: &Report| report.pmu.msrs.iter().map(|msr| msr.index).collect::<Vec<_>>();
    if registers(before) != registers(after) {
        add("pmu-changed", "the reset changed which PMU registers exist".into());
    }
    /// Machine check, bad page, oops, warning, soft lockup (Documentation/admin-guide/tainted-kernels.rst). What taints a
    /// kernel in every life is not the reset's doing.
    const TROUBLE: u64 = 1 << 4 | 1 << 5 | 1 << 7 | 1 << 9 | 1 << 14;
    if let (Some(before), Some(after)) = (&before.linux, &after.linux)
        && after.taint & !before.taint & TROUBLE != 0
    {
        let (was, is) = (before.taint, after.taint);
        add(
            "kernel-tainted",
            format!("the kernel's taint is {is}, and was {was} in the life before"),
        );
    }
}

#[cfg(test)]
mod tests;
