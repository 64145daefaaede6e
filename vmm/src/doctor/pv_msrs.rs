//! Paravirtual registers of a machine whose CPUID shows no such features, where KVM binds one to the other: a monitor that puts
//! back every register of KVM's list writes 0 to them, and must be able to. Guests must not reach them.

use serde::{Deserialize, Serialize};

use super::{Judgement, Unseen};
use crate::kvm::bare::{Answer, BareMachine, Code, Outcome, supported_cpuid};
use crate::kvm::host::Module;
use crate::kvm::state::PV_MSRS;
use crate::kvm::{Kvm, capability, cpuid};

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Observed {
    /// Module parameter `kvm.ignore_msrs`: accesses to unknown registers look successful.
    ignore_msrs: Option<bool>,
    /// What became of the registers that KVM lists.
    registers: Vec<Register>,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Register {
    index: u32,
    write_0: Answer,
    read: Answer,
    /// Of a value that turns the feature on.
    write_1: Answer,
    /// A guest's read.
    guest: Outcome,
}

pub(super) fn observe(kvm: &Kvm, module: Module) -> Result<Observed, Unseen> {
    if !capability::can_enforce_pv_features(kvm) {
        return Err(Unseen::here("KVM lacks KVM_CAP_ENFORCE_PV_FEATURE_CPUID (Linux 5.10)"));
    }
    let mut cpuid = supported_cpuid(kvm)?;
    cpuid::hide_pv_features(&mut cpuid);
    let listed = capability::listed_msrs(kvm)?;
    let mut machine = BareMachine::enforcing_pv_features(kvm, &cpuid)?;
    let mut registers = Vec::new();
    for index in PV_MSRS.map(|(index, _)| index).into_iter().filter(|i| listed.contains(i)) {
        let write_0 = machine.write_msr(index, 0)?;
        let read = match machine.read_msr(index)? {
            Some(_) => Answer::Accepted,
            None => Answer::Refused(0),
        };
        let write_1 = machine.write_msr(index, 1)?;
        let guest = machine.run(&Code::new().read_msr(index))?;
        registers.push(Register { index, write_0, read, write_1, guest });
    }
    Ok(Observed { ignore_msrs: module.ignore_msrs, registers })
}

pub(super) fn judge(observed: &Observed) -> Judgement {
    let registers = &observed.registers;
    if observed.ignore_msrs == Some(true) {
        return Judgement::cannot_tell(
            "kvm.ignore_msrs is on: accesses to unknown registers look successful",
        );
    }
    if registers.is_empty() {
        return Judgement::cannot_tell("KVM lists no paravirtual registers");
    }
    let of = |which: fn(&&Register) -> bool| -> Vec<String> {
        registers.iter().filter(which).map(|register| format!("{:x}", register.index)).collect()
    };
    let reached = of(|register| register.guest != Outcome::Fault);
    if !reached.is_empty() {
        let words = format!("guests read registers that CPUID hides: {}", reached.join(", "));
        return Judgement::affected(words);
    }
    let open = of(|register| register.write_1.is_accepted());
    if !open.is_empty() {
        let words = format!("a monitor may turn on what CPUID hides: MSRs {}", open.join(", "));
        return Judgement::affected(words);
    }
    let refused = of(|register| !register.write_0.is_accepted() || !register.read.is_accepted());
    match refused.len() {
        0 => Judgement::fixed(format!(
            "all {} that KVM lists can be read and set to 0",
            registers.len()
        )),
        count => Judgement::affected(format!(
            "{count} of {} that KVM lists cannot be read or set to 0: MSRs {}",
            registers.len(),
            refused.join(", ")
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::{Verdict, check};

    const GOOD: Register = Register {
        index: 0x12,
        write_0: Answer::Accepted,
        read: Answer::Accepted,
        write_1: Answer::Refused(0),
        guest: Outcome::Fault,
    };

    fn judged(change: impl Fn(&mut Observed)) -> Judgement {
        let registers = vec![GOOD, Register { index: 0x4b56_4d01, ..GOOD }];
        let mut observed = Observed { ignore_msrs: Some(false), registers };
        change(&mut observed);
        judge(&observed)
    }

    #[test]
    fn every_register_has_to_be_readable_and_to_take_0() {
        check(&judged(|_| {}), Verdict::Fixed, "all 2");
        let found = judged(|o| o.registers[1].write_0 = Answer::Refused(0));
        check(
            &found,
            Verdict::Affected,
            "1 of 2 that KVM lists cannot be read or set to 0: MSRs 4b564d01",
        );
        let found = judged(|o| o.registers[0].read = Answer::Refused(0));
        check(&found, Verdict::Affected, "MSRs 12");
    }

    #[test]
    fn a_feature_that_is_hidden_stays_off() {
        let found = judged(|o| o.registers[0].write_1 = Answer::Accepted);
        check(&found, Verdict::Affected, "a monitor may turn on");
        let found = judged(|o| o.registers[0].guest = Outcome::Done(0));
        check(&found, Verdict::Affected, "guests read registers that CPUID hides: 12");
    }

    #[test]
    fn where_everything_looks_successful_nothing_shows() {
        check(&judged(|o| o.ignore_msrs = Some(true)), Verdict::CannotTell, "kvm.ignore_msrs");
        check(&judged(|o| o.registers.clear()), Verdict::CannotTell, "lists no");
        // Older kernels do not say; then the registers do.
        check(&judged(|o| o.ignore_msrs = None), Verdict::Fixed, "all 2");
    }
}
