//! Performance counters: a machine whose PMU is disabled has none, and a reset of ours leaves none running. Both can be seen where
//! KVM has counters for guests.

use serde::{Deserialize, Serialize};

use super::{Judgement, Unseen};
use crate::kvm::Kvm;
use crate::kvm::bare::{BareMachine, Code, Counter, Outcome, supported_cpuid};
use crate::kvm::cpuid::is_amd;
use crate::kvm::host::Module;
use crate::kvm::pmu;

/// An event select that counts cycles, with its interrupt, enabled; by AMD's number and by Intel's.
const AMD_SELECT: (u32, u32) = (0xc001_0000, 0x53_0076);
const INTEL_SELECT: (u32, u32) = (0x186, 0x53_003c);
/// Of an event select: the counter runs.
const ENABLED: u32 = 1 << 22;

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Observed {
    /// Module parameter `kvm.enable_pmu`.
    enable_pmu: Option<bool>,
    /// `KVM_CAP_PMU_CAPABILITY`.
    can_disable: bool,
    /// What a guest reads back that has enabled a counter.
    plain: Outcome,
    /// The same in a machine whose PMU is disabled.
    disabled: Option<Outcome>,
    /// Registers after a reset.
    after_reset: Vec<Counter>,
}

pub(super) fn observe(kvm: &Kvm, module: Module) -> Result<Observed, Unseen> {
    let cpuid = supported_cpuid(kvm)?;
    let (index, value) = if is_amd(&cpuid) { AMD_SELECT } else { INTEL_SELECT };
    let count = Code::new().write_msr(index, value).read_msr(index);
    let mut machine = BareMachine::new(kvm, &cpuid)?;
    let plain = machine.run(&count)?;
    let after_reset = BareMachine::new(kvm, &cpuid)?.counters_after_reset(kvm, &cpuid)?;
    let can_disable = pmu::can_disable(kvm);
    let disabled = match can_disable {
        true => Some(BareMachine::without_pmu(kvm, &cpuid)?.run(&count)?),
        false => None,
    };
    Ok(Observed { enable_pmu: module.enable_pmu, can_disable, plain, disabled, after_reset })
}

pub(super) fn judge(observed: &Observed) -> Judgement {
    let counts =
        |outcome: Outcome| matches!(outcome, Outcome::Done(select) if select & ENABLED != 0);
    match (counts(observed.plain), observed.enable_pmu) {
        (true, _) => {}
        (false, Some(false)) => {
            return Judgement::cannot_tell("no guest has counters of KVM's: kvm.enable_pmu is off");
        }
        (false, _) => return Judgement::cannot_tell("KVM has no performance counters for guests"),
    }
    let mut faults = Vec::new();
    if observed.enable_pmu == Some(false) {
        faults.push("a guest can count though kvm.enable_pmu is off".into());
    }
    match observed.disabled {
        None => {
            faults
                .push("the PMU of one machine cannot be disabled (KVM_CAP_PMU_CAPABILITY)".into());
        }
        Some(disabled) if counts(disabled) => {
            faults.push("a machine whose PMU is disabled can count".into());
        }
        Some(_) => {}
    }
    let left = observed.after_reset.iter().filter(|counter| counter.left != counter.wanted);
    faults.extend(left.map(|c| format!("after a reset MSR {:x} is {:x}", c.index, c.left)));
    let dirty = observed.after_reset.iter().filter(|counter| counter.dirty != counter.wanted);
    match faults.as_slice() {
        [] => Judgement::fixed(format!(
            "a machine whose PMU is disabled has no counters, and a reset clears all {} registers that were not",
            dirty.count()
        )),
        faults => Judgement::affected(faults.join("; ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::{Verdict, check};

    fn judged(change: impl Fn(&mut Observed)) -> Judgement {
        let counter = Counter { index: 0xc001_0000, dirty: 0x53_0076, left: 0, wanted: 0 };
        let control = Counter { index: 0xc000_0301, dirty: 1, left: 0x3f, wanted: 0x3f };
        let mut observed = Observed {
            enable_pmu: Some(true),
            can_disable: true,
            plain: Outcome::Done(0x53_0076),
            disabled: Some(Outcome::Done(0)),
            after_reset: vec![counter, control],
        };
        change(&mut observed);
        judge(&observed)
    }

    #[test]
    fn a_disabled_pmu_counts_nothing() {
        check(&judged(|_| {}), Verdict::Fixed, "clears all 2");
        check(&judged(|o| o.disabled = Some(Outcome::Fault)), Verdict::Fixed, "no counters");
        let found = judged(|o| o.disabled = Some(Outcome::Done(0x53_0076)));
        check(&found, Verdict::Affected, "whose PMU is disabled can count");
        check(&judged(|o| o.disabled = None), Verdict::Affected, "cannot be disabled");
        check(&judged(|o| o.enable_pmu = Some(false)), Verdict::Affected, "kvm.enable_pmu is off");
    }

    #[test]
    fn a_reset_clears_counters() {
        let found = judged(|o| o.after_reset[0].left = 0x53_0076);
        check(&found, Verdict::Affected, "after a reset MSR c0010000 is 530076");
        let found = judged(|o| o.after_reset[1].left = 0);
        check(&found, Verdict::Affected, "after a reset MSR c0000301 is 0");
    }

    #[test]
    fn without_counters_nothing_shows() {
        for nothing in [Outcome::Fault, Outcome::Done(0), Outcome::Done(0x13_0076)] {
            check(&judged(|o| o.plain = nothing), Verdict::CannotTell, "no performance counters");
            let off = judged(|o| (o.plain, o.enable_pmu) = (nothing, Some(false)));
            check(&off, Verdict::CannotTell, "kvm.enable_pmu is off");
        }
    }
}
