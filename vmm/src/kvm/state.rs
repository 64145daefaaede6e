//! What a vCPU is at power-on, captured once and put back whole by every reset.
//!
//! The order of the restore matters and is explained at [`PowerOnState::restore`]; the list of what it covers is the
//! project's `facts`: registers, extended state, debug registers, events, local APIC, MSRs, PV registers, PMU.

use std::ops::RangeInclusive;

use kvm_bindings::{
    CpuId, KVM_CAP_X86_SMM, KVM_CAP_X86_TRIPLE_FAULT_EVENT, KVM_VCPUEVENT_VALID_NMI_PENDING,
    KVM_VCPUEVENT_VALID_SHADOW, KVM_VCPUEVENT_VALID_SIPI_VECTOR, KVM_VCPUEVENT_VALID_SMM,
    KVM_VCPUEVENT_VALID_TRIPLE_FAULT, Msrs, kvm_debugregs, kvm_lapic_state, kvm_mp_state,
    kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Kvm, VcpuFd};

use super::KvmError;
use super::pmu::{self, PmuAbsence};
use super::tsc::TscOffset;
use crate::fault::{Fault, Faults};

/// Set back by its offset; see `tsc`.
const MSR_TSC: u32 = 0x10;
const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// Zero leaves VMX operation; see [`PowerOnState::restore`].
const MSR_FEATURE_CONTROL: u32 = 0x3a;
/// How many machine check banks there are, and of what kind.
const MSR_MCG_CAP: u32 = 0x179;
/// The last branch and the last exception, read-only to guests. Some versions of KVM list them and yet take no write, so
/// what cannot be put back there is no error: four addresses, which no reset of a processor promises to clear.
const LAST_BRANCH_MSRS: RangeInclusive<u32> = 0x1db..=0x1de;
/// Registers by which a guest tells KVM to write into its RAM, with the value that stops it (Linux
/// `Documentation/virt/kvm/x86/msr.rst`): wall clock, system time (old and new numbers), async page faults, steal time,
/// PV EOI, and their companions. `POLL_CONTROL` starts at 1.
pub const PV_MSRS: [(u32, u64); 10] = [
    (0x12, 0),
    (0x11, 0),
    (0x4b56_4d01, 0),
    (0x4b56_4d00, 0),
    (0x4b56_4d02, 0),
    (0x4b56_4d03, 0),
    (0x4b56_4d04, 0),
    (0x4b56_4d05, 1),
    (0x4b56_4d06, 0),
    (0x4b56_4d07, 0),
];

/// MSRs that a guest may write and that KVM's own list leaves out, always or on some hosts: memory type ranges, machine
/// check banks (Intel SDM volume 3, section "Machine-Check MSRs"), and a few. Those that not every host has come last: after
/// one that KVM refuses, the rest is asked for once more.
fn unlisted_msrs(mcg_cap: u64) -> impl Iterator<Item = u32> {
    const DEFAULT_TYPE: u32 = 0x2ff;
    const DEBUG_CONTROL: u32 = 0x1d9;
    const TSC_AUX: u32 = 0xc000_0103;
    /// AMD's "OS visible workarounds", which KVM lets a guest write.
    const OSVW_LENGTH: u32 = 0xc001_0140;
    const OSVW_STATUS: u32 = 0xc001_0141;
    const MCG_CAP_CMCI: u64 = 1 << 10;
    /// Control, status, address and miscellaneous of each bank.
    const BANK_0: u32 = 0x400;
    const BANK_0_CTL2: u32 = 0x280;
    /// KVM's limit, and the architecture's room for `CTL2`.
    const MOST_BANKS: u32 = 32;
    let banks = (mcg_cap as u32 & 0xff).min(MOST_BANKS);
    let ctl2s = if mcg_cap & MCG_CAP_CMCI != 0 { banks } else { 0 };
    [DEFAULT_TYPE]
        .into_iter()
        .chain(0x200..=0x20f)
        .chain([0x250, 0x258, 0x259])
        .chain(0x268..=0x26f)
        .chain(BANK_0..BANK_0 + 4 * banks)
        .chain(BANK_0_CTL2..BANK_0_CTL2 + ctl2s)
        .chain([DEBUG_CONTROL, TSC_AUX, OSVW_LENGTH, OSVW_STATUS])
}

/// Counters that run by themselves: time stamps, and Hyper-V's run time and reference time. No value of theirs can be put
/// back by writing it.
fn is_clock(index: u32) -> bool {
    const HV_VP_RUNTIME: u32 = 0x4000_0010;
    const HV_TIME_REF_COUNT: u32 = 0x4000_0020;
    matches!(index, MSR_TSC | HV_VP_RUNTIME | HV_TIME_REF_COUNT)
}

/// Everything that is put back as it was read: what KVM lists and what it does not, without what has a step of its own.
fn generic_msrs(listed: &[u32], mcg_cap: u64) -> Vec<u32> {
    let is_generic = |index: &u32| {
        !is_clock(*index)
            && *index != MSR_TSC_DEADLINE
            && !pmu::is_pmu_msr(*index)
            && !PV_MSRS.iter().any(|(pv, _)| pv == index)
    };
    let unlisted = unlisted_msrs(mcg_cap).filter(|index| !listed.contains(index));
    listed.iter().copied().chain(unlisted).filter(is_generic).collect()
}

/// A vCPU as it is before its first instruction.
pub struct PowerOnState {
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: Box<kvm_xsave>,
    xcrs: kvm_xcrs,
    debug_regs: kvm_debugregs,
    lapic: kvm_lapic_state,
    mp_state: kvm_mp_state,
    events: kvm_vcpu_events,
    pv: Vec<kvm_msr_entry>,
    leave_vmx: Vec<kvm_msr_entry>,
    msrs: Vec<kvm_msr_entry>,
    deadline: Vec<kvm_msr_entry>,
    pmu: Vec<kvm_msr_entry>,
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
        write_msrs(vcpu, &pmu_writes(vcpu, cpuid, pmu_absence, &Faults::default())?)?;
        Ok(Self {
            regs: vcpu.get_regs().map_err(KvmError::request("get the registers"))?,
            sregs: vcpu.get_sregs().map_err(KvmError::request("get the system registers"))?,
            xsave: Box::new(vcpu.get_xsave().map_err(KvmError::request("get the extended state"))?),
            xcrs: vcpu.get_xcrs().map_err(KvmError::request("get XCR0"))?,
            debug_regs: vcpu
                .get_debug_regs()
                .map_err(KvmError::request("get the debug registers"))?,
            lapic: vcpu.get_lapic().map_err(KvmError::request("get the local APIC"))?,
            mp_state: vcpu.get_mp_state().map_err(KvmError::request("get the run state"))?,
            events: no_events(kvm),
            pv: PV_MSRS.iter().filter(offered).map(entry).collect(),
            leave_vmx: has_feature_control
                .then(|| entry(&(MSR_FEATURE_CONTROL, 0)))
                .into_iter()
                .collect(),
            msrs,
            deadline: vec![entry(&(MSR_TSC_DEADLINE, 0))],
            pmu: pmu_writes(vcpu, cpuid, pmu_absence, faults)?,
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
        // System registers carry the APIC base: before the APIC, whose registers depend on its mode. Clearing EFER.SVME
        // leaves a nested guest of AMD's kind.
        // Before CR8, which comes with the system registers, changes the priority.
        let lapic = match does(Fault::LapicTimerLeft) && does(Fault::LapicKept) {
            true => self.lapic,
            false => lapic_left(vcpu, self.lapic, &self.faults)?,
        };
        let (regs, mut sregs) = match self.faults.has(Fault::RegistersKept) {
            true => registers_kept(vcpu, (self.regs, self.sregs))?,
            false => (self.regs, self.sregs),
        };
        if self.faults.has(Fault::LapicKept) {
            let left = vcpu.get_sregs().map_err(KvmError::request("get the system registers"))?;
            sregs.apic_base = left.apic_base;
        }
        vcpu.set_sregs(&sregs).map_err(KvmError::request("put back the system registers"))?;
        vcpu.set_lapic(&lapic).map_err(KvmError::request("put back the local APIC"))?;
        if does(Fault::FpuKept) {
            // SAFETY: the buffer came from `get_xsave` of a vCPU with the same CPUID, and no dynamic feature (AMX) is
            // enabled for this process, so the state is no longer than the structure.
            unsafe { vcpu.set_xsave(&self.xsave) }
                .map_err(KvmError::request("put back the extended state"))?;
            // A processor without XSAVE has none, and KVM then refuses to be given none.
            if self.xcrs.nr_xcrs > 0 {
                vcpu.set_xcrs(&self.xcrs).map_err(KvmError::request("put back XCR0"))?;
            }
        }
        if does(Fault::DebugregsKept) {
            vcpu.set_debug_regs(&self.debug_regs)
                .map_err(KvmError::request("put back the debug registers"))?;
        }
        if does(Fault::MsrsKept) {
            write_msrs(vcpu, &self.msrs)?;
        }
        // The deadline needs the APIC's timer mode, so after the APIC.
        tsc.apply(vcpu)?;
        write_msrs(vcpu, &self.deadline)?;
        write_msrs(vcpu, &self.pmu)?;
        // General registers drop pending exceptions, events drop the rest: queued NMIs, interrupts, system management.
        vcpu.set_regs(&regs).map_err(KvmError::request("put back the registers"))?;
        if does(Fault::NmiQueued) {
            vcpu.set_vcpu_events(&self.events)
                .map_err(KvmError::request("cancel queued events"))?;
        }
        vcpu.set_mp_state(self.mp_state).map_err(KvmError::request("put back the run state"))
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

fn entry(&(index, data): &(u32, u64)) -> kvm_msr_entry {
    kvm_msr_entry { index, data, ..Default::default() }
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

/// Reads what can be read of `indices`. KVM stops at the first register that it refuses; that one is left out.
fn read_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, KvmError> {
    let mut values = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let wanted: Vec<_> = rest.iter().map(|index| entry(&(*index, 0))).collect();
        let mut msrs = Msrs::from_entries(&wanted)
            .map_err(|_| KvmError::Capability("room for all MSRs in one request"))?;
        let count = vcpu.get_msrs(&mut msrs).map_err(KvmError::request("get the MSRs"))?;
        values.extend_from_slice(&msrs.as_slice()[..count]);
        rest = rest.get(count + 1..).unwrap_or_default();
    }
    Ok(values)
}

/// Writes all `entries`. A register that KVM does not let anybody write is no error while it still has the value wanted,
/// or is one of [`LAST_BRANCH_MSRS`].
fn write_msrs(vcpu: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<(), KvmError> {
    let mut rest = entries;
    while !rest.is_empty() {
        let msrs = Msrs::from_entries(rest)
            .map_err(|_| KvmError::Capability("room for all MSRs in one request"))?;
        let count = vcpu.set_msrs(&msrs).map_err(KvmError::request("put back the MSRs"))?;
        if let Some(refused) = rest.get(count)
            && !LAST_BRANCH_MSRS.contains(&refused.index)
        {
            let now = read_msrs(vcpu, &[refused.index])?;
            if now.first().is_none_or(|now| now.data != refused.data) {
                return Err(KvmError::Msr { index: refused.index, value: refused.data });
            }
        }
        rest = rest.get(count + 1..).unwrap_or_default();
    }
    Ok(())
}

#[cfg(test)]
mod tests;
