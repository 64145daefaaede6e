//! What a vCPU is: at power-on, captured once and put back whole by every reset; and at any moment, for snapshots
//! ([`VcpuState`]).
//!
//! The order in which it is put back matters and is explained at [`Registers::put_back`]; the list of what it covers is the
//! project's `facts`: registers, extended state, debug registers, events, local APIC, MSRs, PV registers, PMU.

mod moment;
mod msrs;
mod plain;
mod registers;

use kvm_bindings::{
    CpuId, KVM_CAP_X86_SMM, KVM_CAP_X86_TRIPLE_FAULT_EVENT, KVM_VCPUEVENT_VALID_NMI_PENDING,
    KVM_VCPUEVENT_VALID_SHADOW, KVM_VCPUEVENT_VALID_SIPI_VECTOR, KVM_VCPUEVENT_VALID_SMM,
    KVM_VCPUEVENT_VALID_TRIPLE_FAULT, Msrs, kvm_lapic_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_vcpu_events,
};
use kvm_ioctls::{Kvm, VcpuFd};

use super::KvmError;
use super::pmu::{self, PmuAbsence};
use super::tsc::TscOffset;
use crate::fault::{Fault, Faults};
pub use moment::{StateError, VcpuState};
pub use msrs::PV_MSRS;
use msrs::{MSR_FEATURE_CONTROL, MSR_MCG_CAP, entry, generic_msrs, read_msrs, write_msrs};
use registers::{Registers, Surroundings};

/// A vCPU as it is before its first instruction.
pub struct PowerOnState {
    registers: Registers,
    /// Takes a guest out of VMX operation.
    leave_vmx: Vec<kvm_msr_entry>,
    /// Has KVM forget where in RAM it writes.
    pv: Vec<kvm_msr_entry>,
    /// Stops the counters and clears them.
    pmu: Vec<kvm_msr_entry>,
    /// The registers of counters that there are.
    counters: Vec<u32>,
    /// What a restore leaves out.
    faults: Faults,
}

impl PowerOnState {
    /// Captures a vCPU that is completely set up and has not run. What is put back leaves out what `faults` say.
    ///
    /// # Errors
    /// [`KvmError::Request`] naming what KVM did not give.
    pub fn capture(
        kvm: &Kvm,
        vcpu: &VcpuFd,
        cpuid: &CpuId,
        pmu_absence: PmuAbsence,
        faults: &Faults,
    ) -> Result<Self, KvmError> {
        let listed = kvm.get_msr_index_list().map_err(KvmError::request("list the MSRs"))?;
        let listed = listed.as_slice();
        let mcg_cap = read_msrs(vcpu, &[MSR_MCG_CAP])?.first().map_or(0, |cap| cap.data);
        let msrs = read_msrs(vcpu, &generic_msrs(listed, mcg_cap))?;
        let has_feature_control = msrs.iter().any(|msr| msr.index == MSR_FEATURE_CONTROL);
        let offered = |(index, _): &&(u32, u64)| listed.contains(index);
        // The first life starts as every later one should: KVM before Linux 6.12 leaves the global enables at zero.
        let clears = pmu_writes(vcpu, cpuid, pmu_absence, &Faults::default())?;
        write_msrs(vcpu, &clears)?;
        let is_there = |index: &u32| clears.iter().any(|msr| msr.index == *index);
        Ok(Self {
            registers: Registers { msrs, events: no_events(kvm), ..Registers::get(vcpu)? },
            leave_vmx: has_feature_control
                .then(|| entry(&(MSR_FEATURE_CONTROL, 0)))
                .into_iter()
                .collect(),
            pv: PV_MSRS.iter().filter(offered).map(entry).collect(),
            pmu: pmu_writes(vcpu, cpuid, pmu_absence, faults)?,
            counters: pmu::state_registers(cpuid).into_iter().filter(is_there).collect(),
            faults: faults.clone(),
        })
    }

    /// Puts everything back; the time stamp counter starts by `tsc`, the same for all vCPUs of a machine. The vCPU does not
    /// run and has no exit to complete.
    ///
    /// # Errors
    /// [`KvmError`]; the vCPU is then half of either life and its machine must be dropped.
    pub fn restore(&self, vcpu: &VcpuFd, tsc: TscOffset) -> Result<(), KvmError> {
        let does = |fault| !self.faults.has(fault);
        // First of all, KVM forgets where in RAM it was to write clocks and flags.
        if does(Fault::PvClockLeft) {
            write_msrs(vcpu, &self.pv)?;
        }
        // KVM refuses to clear CR4.VMXE of a guest in VMX operation; a zero here takes it out, and its own guest with it.
        // The value at power-on comes with the other MSRs.
        write_msrs(vcpu, &self.leave_vmx)?;
        self.registers.put_back(
            vcpu,
            &Surroundings {
                tsc,
                nested: None,
                pmu: &self.pmu,
                left_out: &self.faults,
                instead: self.instead(vcpu)?,
            },
        )
    }

    /// What is put back in the place of registers of which faults leave some as they are.
    fn instead(
        &self,
        vcpu: &VcpuFd,
    ) -> Result<Option<(kvm_regs, kvm_sregs, kvm_lapic_state)>, KvmError> {
        let has = |fault| self.faults.has(fault);
        let Registers { regs, sregs, lapic, .. } = &self.registers;
        let partly = [Fault::LapicTimerLeft, Fault::LapicKept, Fault::RegistersKept];
        if !partly.into_iter().any(has) {
            return Ok(None);
        }
        // Before CR8, which comes with the system registers, changes the priority.
        let lapic = lapic_left(vcpu, *lapic, &self.faults)?;
        let (regs, mut sregs) = match has(Fault::RegistersKept) {
            true => registers_kept(vcpu, (*regs, *sregs))?,
            false => (*regs, *sregs),
        };
        if has(Fault::LapicKept) {
            let left = vcpu.get_sregs().map_err(KvmError::request("get the system registers"))?;
            sregs.apic_base = left.apic_base;
        }
        Ok(Some((regs, sregs, lapic)))
    }
}

/// Registers as they are but for what the entry point promises ([`Fault::RegistersKept`]): without that there would be no next
/// life to tell of it. It is where to start, with which flags, code and stack segment (but for the latter's selector), no paging and
/// so no long mode, and the lower half of RBX.
fn registers_kept(
    vcpu: &VcpuFd,
    (reset, mut sregs): (kvm_regs, kvm_sregs),
) -> Result<(kvm_regs, kvm_sregs), KvmError> {
    const CR0_PG: u64 = 1 << 31;
    const EFER_LMA: u64 = 1 << 10;
    const EBX: u64 = 0xffff_ffff;
    let left = vcpu.get_sregs().map_err(KvmError::request("get the system registers"))?;
    (sregs.cr0, sregs.cr4, sregs.efer) = (left.cr0 & !CR0_PG, left.cr4, left.efer & !EFER_LMA);
    (sregs.cr2, sregs.cr3) = (left.cr2, left.cr3);
    (sregs.gdt, sregs.idt, sregs.ldt, sregs.tr) = (left.gdt, left.idt, left.ldt, left.tr);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs) = (left.ds, left.es, left.fs, left.gs);
    sregs.ss.selector = left.ss.selector;
    let left = vcpu.get_regs().map_err(KvmError::request("get the registers"))?;
    let kvm_regs { rip, rflags, .. } = reset;
    let rbx = left.rbx & !EBX | reset.rbx & EBX;
    Ok((kvm_regs { rip, rflags, rbx, ..left }, sregs))
}

/// The local APIC `reset` except for the registers of its timer ([`Fault::LapicTimerLeft`]) or for all but those and its names
/// ([`Fault::LapicKept`]).
fn lapic_left(
    vcpu: &VcpuFd,
    mut reset: kvm_lapic_state,
    faults: &Faults,
) -> Result<kvm_lapic_state, KvmError> {
    /// LVT entry, initial count, divide configuration; 32 bits each.
    const TIMER: [usize; 3] = [0x320, 0x380, 0x3e0];
    /// Whose form depends on the mode: number, logical destination and its format.
    const NAMES: [usize; 3] = [0x20, 0xd0, 0xe0];
    let left = vcpu.get_lapic().map_err(KvmError::request("get the local APIC"))?;
    for register in (0..reset.regs.len()).step_by(0x10) {
        let fault = match register {
            name if NAMES.contains(&name) => continue,
            timer if TIMER.contains(&timer) => Fault::LapicTimerLeft,
            _ => Fault::LapicKept,
        };
        let bytes = register..register + 4;
        if faults.has(fault) {
            reset.regs[bytes.clone()].copy_from_slice(&left.regs[bytes]);
        }
    }
    Ok(reset)
}

/// Whether this KVM gives up `McStatusWrEn` of a guest's HWCR again. Before Linux 6.7 it takes a write of 0 for nothing, so no
/// reset but the end of the machine clears it. Tried on a vCPU that is made for that.
///
/// # Errors
/// [`KvmError::Request`].
pub fn clears_hwcr(kvm: &Kvm) -> Result<bool, KvmError> {
    const HWCR: u32 = 0xc001_0015;
    const MC_STATUS_WRITE_ENABLE: u64 = 1 << 18;
    let request = KvmError::request;
    let vm = kvm.create_vm().map_err(request("create a machine to try HWCR on"))?;
    let vcpu = vm.create_vcpu(0).map_err(request("create a vCPU to try HWCR on"))?;
    for value in [MC_STATUS_WRITE_ENABLE, 0] {
        let msrs = Msrs::from_entries(&[entry(&(HWCR, value))])
            .map_err(|_| KvmError::Capability("room for one MSR"))?;
        if vcpu.set_msrs(&msrs).map_err(request("write HWCR"))? == 0 {
            // What nobody can set nobody has to clear.
            return Ok(true);
        }
    }
    Ok(read_msrs(&vcpu, &[HWCR])?.first().is_none_or(|msr| msr.data == 0))
}

/// The writes that stop and clear what counters the guest may have started. Registers that KVM does not let even the host
/// read are not there for the guest either.
fn pmu_writes(
    vcpu: &VcpuFd,
    cpuid: &CpuId,
    absence: PmuAbsence,
    faults: &Faults,
) -> Result<Vec<kvm_msr_entry>, KvmError> {
    if !absence.guest_may_count() {
        return Ok(Vec::new());
    }
    let sequence = pmu::reset_sequence(cpuid, faults);
    let indices: Vec<u32> = sequence.iter().map(|(index, _)| *index).collect();
    let there = read_msrs(vcpu, &indices)?;
    let is_there = |(index, _): &&(u32, u64)| there.iter().any(|msr| msr.index == *index);
    Ok(sequence.iter().filter(is_there).map(entry).collect())
}

/// Nothing queued, nothing masked; the flags make KVM take the fields that it would otherwise leave alone.
fn no_events(kvm: &Kvm) -> kvm_vcpu_events {
    let has = |capability: u32| kvm.check_extension_raw(u64::from(capability)) > 0;
    let mut flags = KVM_VCPUEVENT_VALID_NMI_PENDING
        | KVM_VCPUEVENT_VALID_SIPI_VECTOR
        | KVM_VCPUEVENT_VALID_SHADOW;
    if has(KVM_CAP_X86_SMM) {
        flags |= KVM_VCPUEVENT_VALID_SMM;
    }
    // Legal because `Vm::new` enables the capability wherever it is offered.
    if has(KVM_CAP_X86_TRIPLE_FAULT_EVENT) {
        flags |= KVM_VCPUEVENT_VALID_TRIPLE_FAULT;
    }
    kvm_vcpu_events { flags, ..Default::default() }
}

#[cfg(test)]
mod tests;
