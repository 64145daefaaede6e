//! Nested VMX on a processor without TSC scaling: before the fix KVM let guests use the field for it, `TSC_MULTIPLIER`, whose
//! index is the highest of all, and `VMX_VMCS_ENUM` said so. Where the processor has it, nothing can be seen. Nothing runs.
//!
//! A guest could scan all fields as well; that is left out, since nothing here could show that such a scan is right.

use serde::{Deserialize, Serialize};

use super::{Judgement, Unseen};
use crate::kvm::Kvm;
use crate::kvm::nested::{VMX_SECONDARY_CONTROLS, VMX_VMCS_ENUM, feature_msr};

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Observed {
    /// Feature MSR 0x48b; none if guests have no VMX.
    secondary_controls: Option<u64>,
    /// Feature MSR 0x48a.
    vmcs_enum: Option<u64>,
}

pub(super) fn observe(kvm: &Kvm) -> Result<Observed, Unseen> {
    Ok(Observed {
        secondary_controls: feature_msr(kvm, VMX_SECONDARY_CONTROLS)?,
        vmcs_enum: feature_msr(kvm, VMX_VMCS_ENUM)?,
    })
}

pub(super) fn judge(observed: &Observed) -> Judgement {
    /// "Use TSC scaling" is control 25, and the upper half has what is allowed.
    const MAY_SCALE: u64 = 1 << (32 + 25);
    /// Of `TSC_MULTIPLIER`, 0x2032.
    const TSC_MULTIPLIER: u64 = 0x19;
    let (Some(controls), Some(vmcs_enum)) = (observed.secondary_controls, observed.vmcs_enum)
    else {
        return Judgement::cannot_tell("guests have no VMX: KVM has no feature MSRs 48a and 48b");
    };
    if controls & MAY_SCALE != 0 {
        return Judgement::cannot_tell(
            "the processor has TSC scaling, and so the field that gives the fault away",
        );
    }
    let highest = vmcs_enum >> 1 & 0x1ff;
    let words =
        format!("there is no TSC scaling, and the highest field of VMX_VMCS_ENUM is {highest:#x}");
    match highest {
        0..TSC_MULTIPLIER => Judgement::fixed(words),
        TSC_MULTIPLIER => Judgement::affected(format!("{words}, TSC_MULTIPLIER")),
        _ => Judgement::cannot_tell(format!("{words}, which is not known here")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::{Verdict, check};

    #[test]
    fn the_highest_field_gives_it_away_where_the_processor_lacks_it() {
        let judged =
            |secondary_controls, vmcs_enum| judge(&Observed { secondary_controls, vmcs_enum });
        const SCALING: u64 = 1 << 57;
        let without = Some(0x00fb_a7f7_0000_0000 & !SCALING);
        check(&judged(None, None), Verdict::CannotTell, "no VMX");
        check(&judged(without, None), Verdict::CannotTell, "no VMX");
        check(&judged(Some(SCALING), Some(0x19 << 1)), Verdict::CannotTell, "TSC scaling");
        check(&judged(without, Some(0x19 << 1)), Verdict::Affected, "0x19");
        check(&judged(without, Some(0x17 << 1)), Verdict::Fixed, "0x17");
        check(&judged(without, Some(0x1a << 1)), Verdict::CannotTell, "0x1a");
        // Bits outside of the index mean nothing.
        check(&judged(without, Some(0x17 << 1 | 1 | 1 << 10)), Verdict::Fixed, "0x17");
    }
}
