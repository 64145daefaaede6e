//! CPUID and feature registers of a vCPU that runs a guest of its own (L2). What KVM has computed for that guest depends on them,
//! so they must not change. Nothing runs: the state of a vCPU in the middle of that is set from outside, by SVM, which needs
//! the least of it.

use std::fs;

use serde::{Deserialize, Serialize};

use super::{Judgement, Unseen};
use crate::kvm::bare::{Answer, BareMachine, supported_cpuid};
use crate::kvm::{Kvm, capability, cpuid, nested};

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Observed {
    /// The state of a vCPU in L2, and whether it is there then.
    entered: Answer,
    in_l2: bool,
    /// A change of CPUID before, and in L2.
    cpuid_before: Answer,
    cpuid_in_l2: Answer,
    /// The same data once more, in L2.
    same_cpuid: Answer,
    /// A feature register, if there is one that can change.
    feature: Option<Feature>,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Feature {
    index: u32,
    change_in_l2: Answer,
    same_in_l2: Answer,
}

/// Feature registers that a monitor may set until the vCPU runs: `DE_CFG`, `ARCH_CAPABILITIES`, `PERF_CAPABILITIES`.
const FEATURES: [u32; 3] = [0xc001_1029, 0x10a, 0x345];

pub(super) fn observe(kvm: &Kvm) -> Result<Observed, Unseen> {
    let cpuid = supported_cpuid(kvm)?;
    if !nested::has_svm(&cpuid) {
        return Err(Unseen::here("guests have no SVM, by which it is tried"));
    }
    if !capability::has_nested_state(kvm) {
        return Err(Unseen::here("KVM lacks KVM_CAP_NESTED_STATE (Linux 4.20; for SVM 5.8)"));
    }
    if warnings_are_fatal() {
        return Err(Unseen::here(
            "kernel.panic_on_warn is set, and a KVM with this fault may warn",
        ));
    }
    let changed = cpuid::changed(&cpuid)?;
    let machine = BareMachine::new(kvm, &cpuid)?;
    let cpuid_before = machine.set_cpuid(&changed);
    machine.set_cpuid(&cpuid);
    let feature = feature_that_can_change(&machine, &nested::feature_msrs(kvm)?)?;
    let entered = machine.enter_l2()?;
    let in_l2 = machine.is_in_l2()?;
    // What KVM has made of the data.
    let same_cpuid = machine.set_cpuid(&machine.cpuid(cpuid.as_slice().len())?);
    let feature = match feature {
        None => None,
        Some((index, value)) => Some(Feature {
            index,
            same_in_l2: machine.write_msr(index, value)?,
            change_in_l2: machine.write_msr(index, 0)?,
        }),
    };
    let cpuid_in_l2 = machine.set_cpuid(&changed);
    Ok(Observed { entered, in_l2, cpuid_before, cpuid_in_l2, same_cpuid, feature })
}

/// A register and its value, which is not 0, that takes 0 as well and has its value again now.
fn feature_that_can_change(
    machine: &BareMachine,
    listed: &[u32],
) -> Result<Option<(u32, u64)>, Unseen> {
    for index in FEATURES.into_iter().filter(|index| listed.contains(index)) {
        let Some(value) = machine.read_msr(index)?.filter(|value| *value != 0) else { continue };
        if machine.write_msr(index, 0)?.is_accepted()
            && machine.write_msr(index, value)?.is_accepted()
        {
            return Ok(Some((index, value)));
        }
    }
    Ok(None)
}

/// A warning of the kernel's would end the host.
fn warnings_are_fatal() -> bool {
    let text = fs::read_to_string("/proc/sys/kernel/panic_on_warn").unwrap_or_default();
    !matches!(text.trim(), "" | "0")
}

pub(super) fn judge(observed: &Observed) -> Judgement {
    if !observed.entered.is_accepted() || !observed.in_l2 {
        let words = format!("KVM does not take the state of a vCPU in L2 ({:?})", observed.entered);
        return Judgement::cannot_tell(words);
    }
    if !observed.cpuid_before.is_accepted() {
        return Judgement::cannot_tell("KVM takes no change of CPUID at any time");
    }
    let mut faults = Vec::new();
    if observed.cpuid_in_l2.is_accepted() {
        faults.push("in L2 KVM takes a change of CPUID".into());
    }
    if let Some(Feature { index, change_in_l2: Answer::Accepted, .. }) = observed.feature {
        faults.push(format!("in L2 KVM takes a change of feature MSR {index:x}"));
    }
    if !observed.same_cpuid.is_accepted() {
        faults.push("in L2 KVM refuses even the CPUID that the vCPU has".into());
    }
    if let Some(Feature { index, same_in_l2: Answer::Refused(_), .. }) = observed.feature {
        faults.push(format!("in L2 KVM refuses even the value that feature MSR {index:x} has"));
    }
    match (faults.as_slice(), observed.feature) {
        ([], Some(Feature { index, .. })) => Judgement::fixed(format!(
            "in L2 KVM refuses changes of CPUID and of feature MSR {index:x}"
        )),
        ([], None) => Judgement::fixed(
            "in L2 KVM refuses a change of CPUID; there is no feature MSR that could change",
        ),
        (faults, _) => Judgement::affected(faults.join("; ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::{Verdict, check};

    const REFUSED: Answer = Answer::Refused(22);

    fn judged(change: impl Fn(&mut Observed, &mut Feature)) -> Judgement {
        let mut feature = Feature {
            index: 0xc001_1029,
            change_in_l2: Answer::Refused(0),
            same_in_l2: Answer::Accepted,
        };
        let mut observed = Observed {
            entered: Answer::Accepted,
            in_l2: true,
            cpuid_before: Answer::Accepted,
            cpuid_in_l2: REFUSED,
            same_cpuid: Answer::Accepted,
            feature: None,
        };
        change(&mut observed, &mut feature);
        observed.feature = Some(feature);
        judge(&observed)
    }

    #[test]
    fn changes_are_refused_and_nothing_else_is() {
        check(&judged(|_, _| {}), Verdict::Fixed, "of CPUID and of feature MSR c0011029");
        let found = judged(|o, _| o.cpuid_in_l2 = Answer::Accepted);
        check(&found, Verdict::Affected, "takes a change of CPUID");
        let found = judged(|_, f| f.change_in_l2 = Answer::Accepted);
        check(&found, Verdict::Affected, "takes a change of feature MSR c0011029");
        let found = judged(|o, _| o.same_cpuid = REFUSED);
        check(&found, Verdict::Affected, "refuses even the CPUID");
        let found = judged(|_, f| f.same_in_l2 = REFUSED);
        check(&found, Verdict::Affected, "refuses even the value");
    }

    #[test]
    fn what_was_not_in_l2_or_never_changes_shows_nothing() {
        check(&judged(|o, _| o.entered = REFUSED), Verdict::CannotTell, "does not take the state");
        check(&judged(|o, _| o.in_l2 = false), Verdict::CannotTell, "does not take the state");
        check(&judged(|o, _| o.cpuid_before = REFUSED), Verdict::CannotTell, "at any time");
    }
}
