//! CPUID of a vCPU that has run: the guest may have seen it, so it must not change. A monitor that resets its machine may set the
//! same data once more.

use serde::{Deserialize, Serialize};

use super::{Judgement, Unseen};
use crate::kvm::bare::{Answer, BareMachine, Code, supported_cpuid};
use crate::kvm::{Kvm, cpuid};

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Observed {
    /// A change before the vCPU has run, and afterwards.
    before: Answer,
    after: Answer,
    /// The same data, afterwards.
    same: Answer,
}

pub(super) fn observe(kvm: &Kvm) -> Result<Observed, Unseen> {
    let cpuid = supported_cpuid(kvm)?;
    let changed = cpuid::changed(&cpuid)?;
    let mut machine = BareMachine::new(kvm, &cpuid)?;
    let before = machine.set_cpuid(&changed);
    machine.set_cpuid(&cpuid);
    machine.run(&Code::new())?;
    // What KVM has made of the data: some of it depends on registers, or on the processor.
    let same = machine.set_cpuid(&machine.cpuid(cpuid.as_slice().len())?);
    Ok(Observed { before, same, after: machine.set_cpuid(&changed) })
}

pub(super) fn judge(observed: &Observed) -> Judgement {
    match (observed.before, observed.after, observed.same) {
        (Answer::Refused(_), ..) => {
            Judgement::cannot_tell("KVM takes no change of CPUID at any time")
        }
        (_, Answer::Accepted, _) => {
            Judgement::affected("KVM takes a change of the CPUID of a vCPU that has run")
        }
        (_, _, Answer::Refused(_)) => {
            Judgement::affected("KVM refuses even the CPUID that a vCPU has, once it has run")
        }
        _ => Judgement::fixed("KVM refuses a change and takes the same data"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::{Verdict, check};

    #[test]
    fn a_change_is_refused_and_the_same_is_not() {
        use Answer::{Accepted, Refused};
        let judged = |before, after, same| judge(&Observed { before, after, same });
        check(&judged(Accepted, Refused(22), Accepted), Verdict::Fixed, "takes the same");
        check(&judged(Accepted, Accepted, Accepted), Verdict::Affected, "takes a change");
        check(&judged(Accepted, Refused(22), Refused(22)), Verdict::Affected, "refuses even");
        check(&judged(Refused(22), Refused(22), Accepted), Verdict::CannotTell, "at any time");
    }
}
