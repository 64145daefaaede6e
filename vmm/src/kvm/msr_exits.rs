//! Registers that a guest has from the monitor: accesses to them leave guest mode (Linux
//! `Documentation/virt/kvm/api.rst`, sections 4.97 and 7.21). KVM's own requests never do.

use std::ops::RangeInclusive;

use kvm_bindings::{KVM_CAP_X86_MSR_FILTER, KVM_CAP_X86_USER_SPACE_MSR, kvm_enable_cap};
use kvm_ioctls::{
    Kvm, MsrExitReason, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VmFd,
};

use super::KvmError;

/// The guest reads a register.
#[derive(Debug, PartialEq, Eq)]
pub struct MsrRead<'a> {
    pub(super) index: u32,
    pub(super) value: &'a mut u64,
    pub(super) error: &'a mut u8,
}

impl MsrRead<'_> {
    /// Which register.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// Gives the guest its value; without one it gets a general-protection fault.
    pub fn answer(self, value: Option<u64>) {
        *self.error = u8::from(value.is_none());
        *self.value = value.unwrap_or(0);
    }
}

/// The guest writes a register.
#[derive(Debug, PartialEq, Eq)]
pub struct MsrWrite<'a> {
    pub(super) index: u32,
    pub(super) value: u64,
    pub(super) error: &'a mut u8,
}

impl MsrWrite<'_> {
    /// Which register.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// What the guest writes.
    pub fn value(&self) -> u64 {
        self.value
    }

    /// Lets the guest go on; if the write was not accepted, with a general-protection fault.
    pub fn answer(self, accepted: bool) {
        *self.error = u8::from(!accepted);
    }
}

/// Has accesses to all registers of `ranges`, of any vCPU of this machine, come to the monitor.
///
/// # Errors
/// [`KvmError::Capability`] on a KVM that cannot, [`KvmError::Request`] if it refuses.
pub(super) fn divert(kvm: &Kvm, vm: &VmFd, ranges: &[RangeInclusive<u32>]) -> Result<(), KvmError> {
    require(|capability| kvm.check_extension_raw(u64::from(capability)) > 0)?;
    // In this order: a filter without the exits would mean a fault for the guest.
    let mut exits = kvm_enable_cap { cap: KVM_CAP_X86_USER_SPACE_MSR, ..Default::default() };
    exits.args[0] = u64::from(MsrExitReason::Filter.bits());
    vm.enable_cap(&exits).map_err(KvmError::request("have registers come to the monitor"))?;
    /// A bit for each register of a range; 0 diverts it. The longest range has far fewer.
    const DIVERT_ALL: [u8; 16] = [0; 16];
    let filters: Vec<_> = ranges
        .iter()
        .map(|range| MsrFilterRange {
            flags: MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE,
            base: *range.start(),
            msr_count: range.end() - range.start() + 1,
            bitmap: &DIVERT_ALL,
        })
        .collect();
    vm.set_msr_filter(MsrFilterDefaultAction::ALLOW, &filters)
        .map_err(KvmError::request("filter registers"))
}

fn require(has: impl Fn(u32) -> bool) -> Result<(), KvmError> {
    if has(KVM_CAP_X86_USER_SPACE_MSR) && has(KVM_CAP_X86_MSR_FILTER) {
        return Ok(());
    }
    Err(KvmError::Capability("KVM_CAP_X86_USER_SPACE_MSR, which --pmu emulated needs"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kvm_that_cannot_divert_registers_is_refused_by_name() {
        let check = |capabilities: &[u32], expected| {
            let found = require(|capability| capabilities.contains(&capability));
            assert_eq!(found.is_ok(), expected, "{capabilities:?}");
            if let Err(error) = found {
                let message = error.to_string();
                assert!(message.contains("KVM_CAP_X86_USER_SPACE_MSR"), "{message}");
                assert!(message.contains("--pmu emulated"), "{message}");
            }
        };
        check(&[188, 189], true);
        check(&[188], false);
        check(&[189], false);
        check(&[], false);
    }

    #[test]
    fn answers_say_value_or_fault() {
        let check = |answer, expected| {
            let (mut value, mut error) = (7, 7);
            MsrRead { index: 1, value: &mut value, error: &mut error }.answer(answer);
            assert_eq!((value, error), expected);
        };
        check(Some(42), (42, 0));
        check(None, (0, 1));
        for accepted in [true, false] {
            let mut error = 7;
            MsrWrite { index: 1, value: 2, error: &mut error }.answer(accepted);
            assert_eq!(error, u8::from(!accepted));
        }
    }
}
