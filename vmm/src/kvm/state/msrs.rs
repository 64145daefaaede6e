//! Which model-specific registers there are to keep, and how they are read and written.

use std::ops::RangeInclusive;

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use crate::kvm::KvmError;
use crate::kvm::pmu;

/// Set back by its offset; see `tsc`.
pub const MSR_TSC: u32 = 0x10;
pub const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// Zero leaves VMX operation; see [`PowerOnState::restore`].
pub const MSR_FEATURE_CONTROL: u32 = 0x3a;
/// How many machine check banks there are, and of what kind.
pub const MSR_MCG_CAP: u32 = 0x179;
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
pub fn is_clock(index: u32) -> bool {
    const HV_VP_RUNTIME: u32 = 0x4000_0010;
    const HV_TIME_REF_COUNT: u32 = 0x4000_0020;
    matches!(index, MSR_TSC | HV_VP_RUNTIME | HV_TIME_REF_COUNT)
}

/// Everything that is put back as it was read: what KVM lists and what it does not, without what has a step of its own.
pub fn generic_msrs(listed: &[u32], mcg_cap: u64) -> Vec<u32> {
    let is_generic = |index: &u32| {
        !is_clock(*index)
            && *index != MSR_TSC_DEADLINE
            && !pmu::is_pmu_msr(*index)
            && !PV_MSRS.iter().any(|(pv, _)| pv == index)
    };
    let unlisted = unlisted_msrs(mcg_cap).filter(|index| !listed.contains(index));
    listed.iter().copied().chain(unlisted).filter(is_generic).collect()
}

pub fn entry(&(index, data): &(u32, u64)) -> kvm_msr_entry {
    kvm_msr_entry { index, data, ..Default::default() }
}

/// Reads what can be read of `indices`. KVM stops at the first register that it refuses; that one is left out.
pub fn read_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, KvmError> {
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
pub fn write_msrs(vcpu: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<(), KvmError> {
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
