//! NMIs that wait when a monitor resets its machine: no guest of the next life may get them.

use serde::{Deserialize, Serialize};

use super::{Judgement, Unseen};
use crate::kvm::Kvm;
use crate::kvm::bare::{BareMachine, Code, Outcome, supported_cpuid};

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Observed {
    /// What happens to a guest with an NMI that waits.
    waiting: Outcome,
    /// How many wait after they were cancelled, and what happens to that guest.
    left: u8,
    cancelled: Outcome,
}

pub(super) fn observe(kvm: &Kvm) -> Result<Observed, Unseen> {
    let cpuid = supported_cpuid(kvm)?;
    let mut machine = BareMachine::new(kvm, &cpuid)?;
    machine.queue_nmi()?;
    let waiting = machine.run(&Code::new())?;
    // Another machine: this one's vCPU is in its handler.
    let mut machine = BareMachine::new(kvm, &cpuid)?;
    // As many as can wait.
    machine.queue_nmi()?;
    machine.queue_nmi()?;
    machine.cancel_nmis()?;
    let left = machine.waiting_nmis()?;
    Ok(Observed { waiting, left, cancelled: machine.run(&Code::new())? })
}

pub(super) fn judge(observed: &Observed) -> Judgement {
    match (observed.waiting, observed.left, observed.cancelled) {
        (Outcome::Nmi, 0, Outcome::Done(_)) => {
            Judgement::fixed("no NMI is left of two that waited, and the guest gets none")
        }
        (Outcome::Nmi, _, Outcome::Nmi) => {
            Judgement::affected("the guest gets an NMI that was cancelled")
        }
        (Outcome::Nmi, left @ 1.., _) => {
            Judgement::affected(format!("{left} NMIs are left that were cancelled"))
        }
        (waiting, _, cancelled) => Judgement::cannot_tell(format!(
            "the guest does not take NMIs as it should: {waiting:?} with one, {cancelled:?} without"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::{Verdict, check};

    #[test]
    fn what_was_cancelled_does_not_come() {
        use Outcome::{Done, Fault, Nmi};
        let judged = |waiting, left, cancelled| judge(&Observed { waiting, left, cancelled });
        check(&judged(Nmi, 0, Done(0)), Verdict::Fixed, "gets none");
        check(&judged(Nmi, 0, Nmi), Verdict::Affected, "gets an NMI");
        check(&judged(Nmi, 2, Done(0)), Verdict::Affected, "2 NMIs are left");
        check(&judged(Done(0), 0, Done(0)), Verdict::CannotTell, "Done(0) with one");
        check(&judged(Nmi, 0, Fault), Verdict::CannotTell, "Fault without");
    }
}
