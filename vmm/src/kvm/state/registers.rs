//! What a vCPU's state at power-on and that of any other moment have in common: most registers, and the order in which they go
//! back.

use kvm_bindings::{
    kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use super::moment::Nested;
use super::msrs::{MSR_TSC_DEADLINE, entry, write_msrs};
use super::plain;
use crate::fault::{Fault, Faults};
use crate::kvm::KvmError;
use crate::kvm::tsc::TscOffset;

/// Registers as KVM gives them.
#[derive(Serialize, Deserialize)]
pub struct Registers {
    #[serde(with = "plain")]
    pub mp_state: kvm_mp_state,
    #[serde(with = "plain")]
    pub regs: kvm_regs,
    #[serde(with = "plain")]
    pub sregs: kvm_sregs,
    #[serde(with = "plain")]
    pub xsave: kvm_xsave,
    #[serde(with = "plain")]
    pub xcrs: kvm_xcrs,
    #[serde(with = "plain")]
    pub debug_regs: kvm_debugregs,
    /// All MSRs that have no step of their own.
    pub msrs: Vec<kvm_msr_entry>,
    /// When the local APIC's timer is due, in the guest's time; 0 is never.
    pub deadline: u64,
    #[serde(with = "plain")]
    pub lapic: kvm_lapic_state,
    #[serde(with = "plain")]
    pub events: kvm_vcpu_events,
}

/// What goes back between them.
pub struct Surroundings<'a> {
    pub tsc: TscOffset,
    /// The guest's own guests.
    pub nested: Option<&'a Nested>,
    /// Writes to registers of counters, in their order.
    pub pmu: &'a [kvm_msr_entry],
    /// Steps that are not done.
    pub left_out: &'a Faults,
    /// What takes the place of these registers, for steps that are done in part.
    pub instead: Option<(kvm_regs, kvm_sregs, kvm_lapic_state)>,
}

/// The same state, with x87 and SSE marked as in use, so that it is put back as it is. Of state that is not in use KVM takes
/// nothing, MXCSR neither, which processors without compacted state (before Skylake) load all the same (Intel SDM volume 1,
/// section 13.8): a guest would find the MXCSR of the life before.
pub(super) fn in_use(mut xsave: kvm_xsave) -> kvm_xsave {
    /// XSTATE_BV is in the header, behind 512 bytes.
    const XSTATE_BV: usize = 512 / 4;
    const X87_AND_SSE: u32 = 0b11;
    xsave.region[XSTATE_BV] |= X87_AND_SSE;
    xsave
}

impl Registers {
    /// Reads all but the MSRs, which take a list. The run state comes first, since KVM looks for pending INITs then and changes
    /// other state; events come last, since other requests may change them.
    pub fn get(vcpu: &VcpuFd) -> Result<Self, KvmError> {
        let request = KvmError::request;
        Ok(Self {
            mp_state: vcpu.get_mp_state().map_err(request("get the run state"))?,
            regs: vcpu.get_regs().map_err(request("get the registers"))?,
            sregs: vcpu.get_sregs().map_err(request("get the system registers"))?,
            xsave: in_use(vcpu.get_xsave().map_err(request("get the extended state"))?),
            xcrs: vcpu.get_xcrs().map_err(request("get XCR0"))?,
            debug_regs: vcpu.get_debug_regs().map_err(request("get the debug registers"))?,
            msrs: Vec::new(),
            deadline: 0,
            lapic: vcpu.get_lapic().map_err(request("get the local APIC"))?,
            events: vcpu.get_vcpu_events().map_err(request("get pending events"))?,
        })
    }

    /// Puts all of it back. The order is the content.
    pub fn put_back(&self, vcpu: &VcpuFd, surroundings: &Surroundings) -> Result<(), KvmError> {
        let request = KvmError::request;
        let does = |fault| !surroundings.left_out.has(fault);
        let (regs, sregs, lapic) =
            surroundings.instead.unwrap_or((self.regs, self.sregs, self.lapic));
        // System registers carry the APIC base: before the APIC, whose registers depend on its mode. Clearing EFER.SVME
        // leaves a nested guest of AMD's kind, and only with it set, or CR4.VMXE, there can be one.
        vcpu.set_sregs(&sregs).map_err(request("put back the system registers"))?;
        if let Some(nested) = surroundings.nested {
            nested.put_back(vcpu)?;
        }
        vcpu.set_lapic(&lapic).map_err(request("put back the local APIC"))?;
        if does(Fault::FpuKept) {
            // SAFETY: KVM reads no more than the structure holds, whatever is in it, since no dynamic feature (AMX) is enabled
            // for this process.
            unsafe { vcpu.set_xsave(&self.xsave) }
                .map_err(request("put back the extended state"))?;
            // A processor without XSAVE has none, and KVM then refuses to be given none.
            if self.xcrs.nr_xcrs > 0 {
                vcpu.set_xcrs(&self.xcrs).map_err(request("put back XCR0"))?;
            }
        }
        if does(Fault::DebugregsKept) {
            vcpu.set_debug_regs(&self.debug_regs)
                .map_err(request("put back the debug registers"))?;
        }
        if does(Fault::MsrsKept) {
            write_msrs(vcpu, &self.msrs)?;
        }
        // The deadline needs the APIC's timer mode and the time that it is about, so after both.
        surroundings.tsc.apply(vcpu)?;
        write_msrs(vcpu, &[entry(&(MSR_TSC_DEADLINE, self.deadline))])?;
        write_msrs(vcpu, surroundings.pmu)?;
        // General registers drop pending exceptions, events set or drop the rest: queued NMIs, interrupts, system management.
        vcpu.set_regs(&regs).map_err(request("put back the registers"))?;
        if does(Fault::NmiQueued) {
            vcpu.set_vcpu_events(&self.events).map_err(request("put back pending events"))?;
        }
        vcpu.set_mp_state(self.mp_state).map_err(request("put back the run state"))
    }
}
