//! Hypervisors in guests: what KVM says of them to the host, and a vCPU that runs a guest of its own without ever having run.

use std::mem::offset_of;

use kvm_bindings::nested::{
    KvmNestedStateBuffer, kvm_nested_state__data, kvm_svm_nested_state_data,
};
use kvm_bindings::{
    CpuId, KVM_STATE_NESTED_FORMAT_SVM, KVM_STATE_NESTED_GUEST_MODE,
    KVM_STATE_NESTED_SVM_VMCB_SIZE, Msrs, kvm_msr_entry, kvm_nested_state,
};
use kvm_ioctls::Kvm;

use super::KvmError;
use super::bare::{Answer, BareMachine};
use super::cpuid::{AMD_EXTENDED_FEATURES, Leaf};

/// Which secondary controls of VMX a guest may set, in the upper half (Intel SDM volume 3, appendix A.3.3).
pub const VMX_SECONDARY_CONTROLS: u32 = 0x48b;
/// The highest index of any field of a VMCS, in bits 9 to 1 (appendix A.9).
pub const VMX_VMCS_ENUM: u32 = 0x48a;

/// Whether a guest with this CPUID can use AMD's virtualization.
pub fn has_svm(cpuid: &CpuId) -> bool {
    const SVM: u32 = 1 << 2;
    Leaf::get(cpuid, AMD_EXTENDED_FEATURES, 0).ecx & SVM != 0
}

/// A register that describes what KVM can give guests; `None` if KVM has none of that number.
///
/// # Errors
/// [`KvmError::Request`].
pub fn feature_msr(kvm: &Kvm, index: u32) -> Result<Option<u64>, KvmError> {
    let mut msrs = Msrs::from_entries(&[kvm_msr_entry { index, ..Default::default() }])
        .map_err(|_| KvmError::Capability("room for one MSR"))?;
    match kvm.get_msrs(&mut msrs) {
        Ok(count) => Ok((count == 1).then(|| msrs.as_slice()[0].data)),
        // It gives up at the first register that it does not have.
        Err(errno) if errno.errno() == libc::EINVAL => Ok(None),
        Err(errno) => Err(KvmError::request("get a feature register")(errno)),
    }
}

/// The registers that [`feature_msr`] may know.
///
/// # Errors
/// [`KvmError::Request`].
pub fn feature_msrs(kvm: &Kvm) -> Result<Vec<u32>, KvmError> {
    let list = kvm.get_msr_feature_index_list();
    list.map(|list| list.as_slice().to_vec())
        .map_err(KvmError::request("list the feature registers"))
}

/// Control and state areas of a VMCB: offsets of what is set below (AMD64 Architecture Programmer's Manual volume 2, appendix B).
mod vmcb {
    pub const INTERCEPTS_3: usize = 0x0c;
    pub const INTERCEPTS_4: usize = 0x10;
    pub const ASID: usize = 0x58;
    pub const EFER: usize = 0x4d0;
    pub const CR4: usize = 0x548;
    pub const CR3: usize = 0x550;
    pub const CR0: usize = 0x558;
    pub const RFLAGS: usize = 0x570;
}

const CR0_PE_ET_PG: u64 = 1 | 1 << 4 | 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME_LMA_SVME: u64 = 1 << 8 | 1 << 10 | 1 << 12;
const RFLAGS_RESERVED: u64 = 1 << 1;
const PAGE_TABLES: u64 = 0x5000;
const VMCB: u64 = 0x6000;

impl BareMachine {
    /// Makes the vCPU one that runs a guest of its own by SVM: both in long mode, nothing of that in RAM. It is not to run.
    ///
    /// # Errors
    /// [`KvmError::Request`] if KVM takes no such registers.
    pub fn enter_l2(&self) -> Result<Answer, KvmError> {
        const GIF_SET: u16 = 0x100;
        let vcpu = self.vcpu();
        let mut sregs = vcpu.get_sregs().map_err(KvmError::request("get the system registers"))?;
        (sregs.cr0, sregs.cr3, sregs.cr4) = (CR0_PE_ET_PG, PAGE_TABLES, CR4_PAE);
        sregs.efer = EFER_LME_LMA_SVME;
        (sregs.cs.l, sregs.cs.db) = (1, 0);
        vcpu.set_sregs(&sregs).map_err(KvmError::request("set the system registers"))?;
        let mut vmcb12 = [0; KVM_STATE_NESTED_SVM_VMCB_SIZE as usize];
        let mut set = |offset: usize, bytes: &[u8]| {
            vmcb12[offset..offset + bytes.len()].copy_from_slice(bytes);
        };
        // The least that a VMRUN needs: it is intercepted itself, and the address space has a number.
        set(vmcb::INTERCEPTS_3, &0_u32.to_le_bytes());
        set(vmcb::INTERCEPTS_4, &1_u32.to_le_bytes());
        set(vmcb::ASID, &1_u32.to_le_bytes());
        for (offset, value) in [
            (vmcb::EFER, EFER_LME_LMA_SVME),
            (vmcb::CR4, CR4_PAE),
            (vmcb::CR3, PAGE_TABLES),
            (vmcb::CR0, CR0_PE_ET_PG),
            (vmcb::RFLAGS, RFLAGS_RESERVED),
        ] {
            set(offset, &value.to_le_bytes());
        }
        let mut state = KvmNestedStateBuffer::empty();
        state.flags = KVM_STATE_NESTED_GUEST_MODE as u16 | GIF_SET;
        state.format = KVM_STATE_NESTED_FORMAT_SVM as u16;
        state.size = (offset_of!(kvm_nested_state, data) + vmcb12.len()) as u32;
        state.hdr.svm.vmcb_pa = VMCB;
        state.data = kvm_nested_state__data { svm: kvm_svm_nested_state_data { vmcb12 } };
        Ok(Answer::new(vcpu.set_nested_state(&state)))
    }

    /// Whether the vCPU runs a guest of its own.
    ///
    /// # Errors
    /// [`KvmError::Request`].
    pub fn is_in_l2(&self) -> Result<bool, KvmError> {
        let mut state = KvmNestedStateBuffer::empty();
        self.vcpu().nested_state(&mut state).map_err(KvmError::request("get the nested state"))?;
        Ok(u32::from(state.flags) & KVM_STATE_NESTED_GUEST_MODE != 0)
    }
}
