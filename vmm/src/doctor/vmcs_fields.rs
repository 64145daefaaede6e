//! Nested VMX on a processor without TSC scaling: before the fix KVM let guests use the field for it, `TSC_MULTIPLIER`, whose
//! index is the highest of all, and `VMX_VMCS_ENUM` said so. Where the processor has it, that cannot be seen.
//!
//! What KVM says of itself is asked first. Where its guests have VMX, one of them then reads every field that there could be.

use std::time::Duration;

use agent_protocol::{Probe, Probed, VmcsFields};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::behaviour::json;
use super::{Judgement, Unseen, vmrun};
use crate::kvm::Kvm;
use crate::kvm::nested::{VMX_SECONDARY_CONTROLS, VMX_VMCS_ENUM, feature_msr};
use crate::machine::Handle;

/// What KVM says, without a guest.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Features {
    /// Feature MSR 0x48b; none if guests have no VMX.
    secondary_controls: Option<u64>,
    /// Feature MSR 0x48a.
    vmcs_enum: Option<u64>,
}

impl Features {
    /// Of this host.
    ///
    /// # Errors
    /// [`Unseen`].
    pub fn read(kvm: &Kvm) -> Result<Self, Unseen> {
        Ok(Self {
            secondary_controls: feature_msr(kvm, VMX_SECONDARY_CONTROLS)?,
            vmcs_enum: feature_msr(kvm, VMX_VMCS_ENUM)?,
        })
    }

    /// Whether a guest can look as well.
    pub fn has_vmx(&self) -> bool {
        self.secondary_controls.is_some() && self.vmcs_enum.is_some()
    }

    /// These alone, as what was observed.
    pub fn alone(self) -> Value {
        json(&Observed { features: self, guest: None })
    }

    /// With what the agent of `machine` sees; `timeout` bounds each of its answers.
    ///
    /// # Errors
    /// [`Unseen`].
    pub fn with_guest(self, machine: &Handle, timeout: Duration) -> Result<Value, Unseen> {
        let guest = match vmrun::probe(machine, timeout, Probe::VmcsFields)? {
            Ok(Probed::VmcsFields(fields)) => Ok(fields),
            Ok(other) => Err(format!("the agent answered something else: {other:?}")),
            Err(why) => Err(why),
        };
        Ok(json(&Observed { features: self, guest: Some(guest) }))
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Observed {
    #[serde(flatten)]
    features: Features,
    /// What a guest saw, or why it saw nothing.
    guest: Option<Result<VmcsFields, String>>,
}

pub(super) fn judge(observed: &Observed) -> Judgement {
    /// "Use TSC scaling" is control 25, and the upper half has what is allowed.
    const MAY_SCALE: u64 = 1 << (32 + 25);
    /// Of `TSC_MULTIPLIER`, 0x2032.
    const TSC_MULTIPLIER: u64 = 0x19;
    /// "VMREAD/VMWRITE from/to unsupported VMCS component" (Intel SDM volume 3, section 31.4).
    const UNSUPPORTED: u64 = 12;
    let Features { secondary_controls: Some(controls), vmcs_enum: Some(vmcs_enum) } =
        observed.features
    else {
        return Judgement::cannot_tell("guests have no VMX: KVM has no feature MSRs 48a and 48b");
    };
    let index = |vmcs_enum: u64| vmcs_enum >> 1 & 0x1ff;
    let scanned = match &observed.guest {
        None => "; no guest has looked".into(),
        Some(Err(why)) => format!("; a guest could not look: {why}"),
        Some(Ok(VmcsFields { readable, highest, vmcs_enum, .. })) => {
            let (highest, named) = (index(u64::from(*highest)), index(*vmcs_enum));
            let words = format!(
                "; a guest can read {readable} fields, the highest {highest:#x}, and its VMX_VMCS_ENUM names {named:#x}"
            );
            if highest != named {
                return Judgement::affected(format!("they do not agree{words}"));
            }
            words
        }
    };
    if controls & MAY_SCALE != 0 {
        return Judgement::cannot_tell(format!(
            "the processor has TSC scaling, and so the field that gives the fault away{scanned}"
        ));
    }
    let highest = index(vmcs_enum);
    let words = format!(
        "there is no TSC scaling, and the highest field of VMX_VMCS_ENUM is {highest:#x}{scanned}"
    );
    match (&observed.guest, highest) {
        (Some(Ok(VmcsFields { tsc_multiplier: true, .. })), _) => {
            Judgement::affected(format!("{words}, TSC_MULTIPLIER among them"))
        }
        (Some(Ok(VmcsFields { error, .. })), _) if *error != UNSUPPORTED => Judgement::affected(
            format!("{words}; TSC_MULTIPLIER fails with error {error} instead of {UNSUPPORTED}"),
        ),
        (_, 0..TSC_MULTIPLIER) => Judgement::fixed(words),
        (_, TSC_MULTIPLIER) => Judgement::affected(format!("{words}, TSC_MULTIPLIER")),
        _ => Judgement::cannot_tell(format!("{words}, which is not known here")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::{Verdict, check};

    const SCALING: u64 = 1 << 57;
    const WITHOUT: Option<u64> = Some(0x00fb_a7f7_0000_0000 & !SCALING);

    fn judged(
        secondary_controls: Option<u64>,
        vmcs_enum: Option<u64>,
        guest: Option<Result<VmcsFields, String>>,
    ) -> Judgement {
        judge(&Observed { features: Features { secondary_controls, vmcs_enum }, guest })
    }

    #[test]
    fn the_highest_field_gives_it_away_where_the_processor_lacks_it() {
        let judged = |controls, vmcs_enum| judged(controls, vmcs_enum, None);
        check(&judged(None, None), Verdict::CannotTell, "no VMX");
        check(&judged(WITHOUT, None), Verdict::CannotTell, "no VMX");
        check(&judged(Some(SCALING), Some(0x19 << 1)), Verdict::CannotTell, "TSC scaling");
        check(&judged(WITHOUT, Some(0x19 << 1)), Verdict::Affected, "0x19");
        check(&judged(WITHOUT, Some(0x17 << 1)), Verdict::Fixed, "0x17");
        check(&judged(WITHOUT, Some(0x1a << 1)), Verdict::CannotTell, "0x1a");
        // Bits outside of the index mean nothing.
        check(&judged(WITHOUT, Some(0x17 << 1 | 1 | 1 << 10)), Verdict::Fixed, "0x17");
    }

    #[test]
    fn what_a_guest_reads_decides() {
        let fields = VmcsFields {
            vmcs_enum: 0x17 << 1,
            readable: 140,
            highest: 0x482e,
            tsc_multiplier: false,
            error: 12,
        };
        let low = Some(0x17 << 1);
        check(&judged(WITHOUT, low, Some(Ok(fields))), Verdict::Fixed, "140 fields");
        let wrong_error = VmcsFields { error: 0, ..fields };
        check(&judged(WITHOUT, low, Some(Ok(wrong_error))), Verdict::Affected, "instead of 12");
        let scales = VmcsFields { tsc_multiplier: true, highest: 0x2032, ..fields };
        let agreed = VmcsFields { vmcs_enum: 0x19 << 1, ..scales };
        check(&judged(WITHOUT, Some(0x32), Some(Ok(agreed))), Verdict::Affected, "among them");
        check(&judged(Some(SCALING), Some(0x32), Some(Ok(agreed))), Verdict::CannotTell, "0x19");
        // Whatever the processor has, the register is to name the highest.
        check(&judged(Some(SCALING), Some(0x32), Some(Ok(scales))), Verdict::Affected, "not agree");
        let unseen = Some(Err("vmxon fails".into()));
        check(&judged(WITHOUT, low, unseen), Verdict::Fixed, "could not look: vmxon fails");
    }
}
