//! CPUID for a guest: what KVM supports, minus what the policy hides or this KVM cannot keep, plus the topology.

use kvm_bindings::{CpuId, KVM_CAP_TSC_DEADLINE_TIMER, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Kvm, VcpuFd};

use super::KvmError;
use super::host::{KvmKind, Module};
use super::pmu::{self, PmuPolicy};

/// AMD's feature leaf.
pub const AMD_EXTENDED_FEATURES: u32 = 0x8000_0001;
/// Hypervisor leaf that tells TSC and bus frequency in kHz; KVM leaves it to the monitor.
pub(super) const TIMING: u32 = 0x4000_0010;
const HYPERVISOR: u32 = 0x4000_0000;

const FEATURES_ECX_CX16: u32 = 1 << 13;
const FEATURES_ECX_TSC_DEADLINE: u32 = 1 << 24;
const FEATURES_ECX_HYPERVISOR: u32 = 1 << 31;

/// The four words of a leaf.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Leaf {
    /// EAX.
    pub eax: u32,
    /// EBX.
    pub ebx: u32,
    /// ECX.
    pub ecx: u32,
    /// EDX.
    pub edx: u32,
}

impl Leaf {
    /// The leaf as a guest would read it, all zero if it is not there.
    pub fn get(cpuid: &CpuId, function: u32, index: u32) -> Self {
        let wanted = |entry: &&kvm_cpuid_entry2| entry.function == function && entry.index == index;
        cpuid.as_slice().iter().find(wanted).map_or_else(Self::default, |entry| Self {
            eax: entry.eax,
            ebx: entry.ebx,
            ecx: entry.ecx,
            edx: entry.edx,
        })
    }
}

/// True if the vendor is AMD or Hygon.
pub fn is_amd(cpuid: &CpuId) -> bool {
    const AUTH: u32 = 0x6874_7541;
    const HYGO: u32 = 0x6f67_7948;
    matches!(Leaf::get(cpuid, 0, 0).ebx, AUTH | HYGO)
}

/// What a KVM can give, and which kind it is.
pub type Supported = (CpuId, KvmKind);

/// What this KVM can give any guest under `policy`, before the differences between vCPUs, and which kind of KVM it is.
///
/// # Errors
/// [`KvmError::Request`] if KVM does not tell, [`KvmError::NotAmd`] if the processor has another PMU than the emulated one.
pub fn supported(kvm: &Kvm, module: Module, policy: PmuPolicy) -> Result<Supported, KvmError> {
    let mut cpuid = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(KvmError::request("get the supported CPUID"))?;
    let kind = module.kind(is_amd(&cpuid));
    let deadline_timer = kvm.check_extension_raw(u64::from(KVM_CAP_TSC_DEADLINE_TIMER)) > 0;
    for entry in cpuid.as_mut_slice() {
        if entry.function == 1 {
            entry.ecx |= FEATURES_ECX_HYPERVISOR;
            if deadline_timer {
                entry.ecx |= FEATURES_ECX_TSC_DEADLINE;
            }
            if kind == KvmKind::Software {
                // Offered, but its emulator has no cmpxchg16b for ring 0.
                entry.ecx &= !FEATURES_ECX_CX16;
            }
        }
    }
    match policy {
        PmuPolicy::Host => {}
        PmuPolicy::Off => pmu::hide(&mut cpuid),
        // A guest picks its driver by the vendor.
        PmuPolicy::Emulated if !is_amd(&cpuid) => return Err(KvmError::NotAmd),
        PmuPolicy::Emulated => pmu::hide(&mut cpuid),
    }
    Ok((cpuid, kind))
}

/// The frequency of the time stamp counter that a vCPU with this CPUID is told; 0 if it is told none.
pub fn tsc_khz(cpuid: &CpuId) -> u32 {
    Leaf::get(cpuid, TIMING, 0).eax
}

/// Removes the features of KVM's paravirtual registers: clocks, asynchronous page faults, stolen time, end of interrupt, polling
/// (Linux `Documentation/virt/kvm/x86/cpuid.rst`).
pub fn hide_pv_features(cpuid: &mut CpuId) {
    const FEATURES: u32 = 0x4000_0001;
    const WITH_REGISTERS: u32 = 1 << 0 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 12 | 1 << 14;
    for entry in cpuid.as_mut_slice().iter_mut().filter(|entry| entry.function == FEATURES) {
        entry.eax &= !WITH_REGISTERS;
    }
}

/// The same CPUID but for a letter in the processor's name, which nothing in KVM depends on.
///
/// # Errors
/// [`KvmError::Capability`] if the processor has no name.
pub fn changed(cpuid: &CpuId) -> Result<CpuId, KvmError> {
    const NAME: u32 = 0x8000_0002;
    let mut cpuid = cpuid.clone();
    let entry = cpuid.as_mut_slice().iter_mut().find(|entry| entry.function == NAME);
    entry.ok_or(KvmError::Capability("a name of the processor in CPUID"))?.eax ^= 1;
    Ok(cpuid)
}

/// `supported` as the vCPU `id` of `count` sees it: its APIC number, and cores of one thread each in one package.
///
/// # Errors
/// [`KvmError::Capability`] if KVM's own list leaves no room for the timing leaf.
pub fn for_vcpu(supported: &CpuId, vcpu: &VcpuFd, id: u8, count: u8) -> Result<CpuId, KvmError> {
    let mut cpuid = supported.clone();
    for entry in cpuid.as_mut_slice() {
        set_topology(entry, u32::from(id), u32::from(count));
    }
    if let Ok(tsc_khz) = vcpu.get_tsc_khz() {
        add_timing(&mut cpuid, tsc_khz)?;
    }
    Ok(cpuid)
}

fn set_topology(entry: &mut kvm_cpuid_entry2, id: u32, count: u32) {
    const FEATURES_EDX_HTT: u32 = 1 << 28;
    let id_bits = count.next_power_of_two().trailing_zeros();
    match entry.function {
        0x1 => {
            entry.ebx = (entry.ebx & 0xffff) | id << 24 | count << 16;
            entry.edx = match count {
                1 => entry.edx & !FEATURES_EDX_HTT,
                _ => entry.edx | FEATURES_EDX_HTT,
            };
        }
        // Extended topology (Intel SDM volume 2, CPUID leaf 0BH): level 0 threads, level 1 cores.
        0xb | 0x1f => {
            let (bits, at_level, level_type) = match entry.index {
                0 => (0, 1, 1),
                1 => (id_bits, count, 2),
                _ => (0, 0, 0),
            };
            entry.eax = bits;
            entry.ebx = at_level;
            entry.ecx = entry.index | level_type << 8;
            entry.edx = id;
        }
        // AMD: number of cores, width of the core number; extended APIC number, core, node.
        0x8000_0008 => entry.ecx = (entry.ecx & !0xf0ff) | (count - 1) | id_bits << 12,
        0x8000_001e => {
            entry.eax = id;
            entry.ebx = id;
            entry.ecx = 0;
        }
        _ => {}
    }
}

fn add_timing(cpuid: &mut CpuId, tsc_khz: u32) -> Result<(), KvmError> {
    /// The local APIC's timer counts nanoseconds in KVM.
    const APIC_BUS_KHZ: u32 = 1_000_000;
    let Some(hypervisor) = cpuid.as_mut_slice().iter_mut().find(|e| e.function == HYPERVISOR)
    else {
        return Ok(());
    };
    hypervisor.eax = hypervisor.eax.max(TIMING);
    cpuid
        .push(kvm_cpuid_entry2 {
            function: TIMING,
            eax: tsc_khz,
            ebx: APIC_BUS_KHZ,
            ..Default::default()
        })
        .map_err(|_| KvmError::Capability("room for one more CPUID leaf"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_vcpu_knows_its_number_and_its_siblings() {
        let check = |function, index, id, count, expected: Leaf| {
            let mut entry = kvm_cpuid_entry2 { function, index, ..Default::default() };
            set_topology(&mut entry, id, count);
            let found = Leaf { eax: entry.eax, ebx: entry.ebx, ecx: entry.ecx, edx: entry.edx };
            assert_eq!(found, expected, "leaf {function:#x} of vCPU {id}/{count}");
        };
        let leaf = |eax, ebx, ecx, edx| Leaf { eax, ebx, ecx, edx };
        check(0x1, 0, 0, 1, leaf(0, 0x0001_0000, 0, 0));
        check(0x1, 0, 3, 4, leaf(0, 0x0304_0000, 0, 1 << 28));
        check(0xb, 0, 3, 4, leaf(0, 1, 0x100, 3));
        check(0xb, 1, 3, 4, leaf(2, 4, 0x201, 3));
        check(0xb, 2, 3, 4, leaf(0, 0, 2, 3));
        check(0x8000_0008, 0, 2, 3, leaf(0, 0, 0x2002, 0));
        check(0x8000_001e, 0, 2, 3, leaf(2, 2, 0, 0));
    }
}
