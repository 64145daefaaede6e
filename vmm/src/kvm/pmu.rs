//! Performance counters: whether a guest has any, and in which order a reset writes them.

use kvm_bindings::{CpuId, KVM_CAP_PMU_CAPABILITY, KVM_PMU_CAP_DISABLE, kvm_enable_cap};
use kvm_ioctls::{Kvm, VmFd};
use serde::Serialize;

use super::KvmError;
use super::cpuid::{AMD_EXTENDED_FEATURES, Leaf, is_amd};
use super::host::Module;

/// `--pmu`: which performance counters a guest gets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum PmuPolicy {
    /// None: disabled in KVM where it can be, and absent from CPUID always.
    #[default]
    Off,
    /// KVM's virtual PMU.
    Host,
}

/// What made the PMU absent, or that it is not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum PmuAbsence {
    /// `KVM_CAP_PMU_CAPABILITY` with `KVM_PMU_CAP_DISABLE`, and CPUID.
    Capability,
    /// The module parameter `kvm.enable_pmu` is off, and CPUID.
    ModuleParameter,
    /// CPUID alone: the kernel is too old (before 5.18) to disable the PMU of one machine, so a guest that ignores CPUID
    /// may find AMD's legacy counters.
    CpuidOnly,
    /// The guest has KVM's virtual PMU.
    NotAbsent,
}

impl PmuAbsence {
    /// True unless KVM itself keeps the guest from counting, whatever CPUID says. A reset then has counters to stop.
    pub fn guest_may_count(self) -> bool {
        match self {
            Self::Capability | Self::ModuleParameter => false,
            Self::CpuidOnly | Self::NotAbsent => true,
        }
    }
}

/// `KVM_CAP_PMU_CAPABILITY` as `KVM_CHECK_EXTENSION` gives it.
pub fn disable_capability(kvm: &Kvm) -> i32 {
    kvm.check_extension_raw(u64::from(KVM_CAP_PMU_CAPABILITY))
}

/// Applies `policy` to a machine that has no vCPU yet (KVM refuses it later), and says what made the PMU absent.
///
/// # Errors
/// [`KvmError::NoPmu`] if a PMU is wanted and this KVM gives none, [`KvmError::Request`] if disabling it fails.
pub fn apply(
    kvm: &Kvm,
    vm: &VmFd,
    module: Module,
    policy: PmuPolicy,
) -> Result<PmuAbsence, KvmError> {
    let can_disable = disable_capability(kvm) & KVM_PMU_CAP_DISABLE as i32 != 0;
    match policy {
        PmuPolicy::Host if module.enable_pmu == Some(false) => Err(KvmError::NoPmu),
        PmuPolicy::Host => Ok(PmuAbsence::NotAbsent),
        PmuPolicy::Off if can_disable => {
            let mut cap = kvm_enable_cap { cap: KVM_CAP_PMU_CAPABILITY, ..Default::default() };
            cap.args[0] = u64::from(KVM_PMU_CAP_DISABLE);
            vm.enable_cap(&cap).map_err(KvmError::request("disable the PMU of the machine"))?;
            Ok(PmuAbsence::Capability)
        }
        // 0 is ambiguous: an old kernel, or a module without PMU. Only the parameter tells.
        PmuPolicy::Off if module.enable_pmu == Some(false) => Ok(PmuAbsence::ModuleParameter),
        PmuPolicy::Off => Ok(PmuAbsence::CpuidOnly),
    }
}

/// Removes every sign of a PMU from CPUID. KVM does not do it when its PMU is disabled.
pub fn hide(cpuid: &mut CpuId) {
    const FEATURES_ECX_DTES64: u32 = 1 << 2;
    const FEATURES_ECX_PDCM: u32 = 1 << 15;
    const FEATURES_EDX_DS: u32 = 1 << 21;
    const AMD_ECX_PERFCTR_CORE: u32 = 1 << 23;
    const AMD_ECX_PERFCTR_NB: u32 = 1 << 24;
    const AMD_ECX_PERFCTR_LLC: u32 = 1 << 28;
    const EDX_ARCH_LBR: u32 = 1 << 19;
    for entry in cpuid.as_mut_slice() {
        match (entry.function, entry.index) {
            (0x1, _) => {
                entry.ecx &= !(FEATURES_ECX_DTES64 | FEATURES_ECX_PDCM);
                entry.edx &= !FEATURES_EDX_DS;
            }
            (0x7, 0) => entry.edx &= !EDX_ARCH_LBR,
            // Architectural PMU, architectural LBR, PerfMonV2.
            (0xa | 0x1c | 0x8000_0022, _) => {
                (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
            }
            (AMD_EXTENDED_FEATURES, _) => {
                entry.ecx &= !(AMD_ECX_PERFCTR_CORE | AMD_ECX_PERFCTR_NB | AMD_ECX_PERFCTR_LLC);
            }
            _ => {}
        }
    }
}

/// Writes that bring every counter of a guest with this CPUID to its reset state, in an order in which no counter runs
/// between two of them: globals off, selectors, counters, status, and the globals' reset value last.
pub fn reset_sequence(cpuid: &CpuId) -> Vec<(u32, u64)> {
    if is_amd(cpuid) { amd_sequence(cpuid) } else { intel_sequence(cpuid) }
}

/// AMD64 Architecture Programmer's Manual volume 2, section 13.2.
fn amd_sequence(cpuid: &CpuId) -> Vec<(u32, u64)> {
    const K7_SELECTOR: u32 = 0xc001_0000;
    const K7_COUNTER: u32 = 0xc001_0004;
    const CORE_SELECTOR: u32 = 0xc001_0200;
    const GLOBAL_STATUS: u32 = 0xc000_0300;
    const GLOBAL_CONTROL: u32 = 0xc000_0301;
    const GLOBAL_STATUS_CLEAR: u32 = 0xc000_0302;

    let core = Leaf::get(cpuid, AMD_EXTENDED_FEATURES, 0).ecx & 1 << 23 != 0;
    let v2 = Leaf::get(cpuid, 0x8000_0022, 0);
    let has_v2 = v2.eax & 1 != 0;
    let count = match (has_v2, core) {
        (true, _) => v2.ebx & 0xf,
        (false, true) => 6,
        (false, false) => 4,
    };
    // The legacy registers are aliases of the first core ones: one set is enough, and the smaller always exists.
    let (selector, counter, step) = match core {
        true => (CORE_SELECTOR, CORE_SELECTOR + 1, 2),
        false => (K7_SELECTOR, K7_COUNTER, 1),
    };
    let mut writes = Vec::new();
    if has_v2 {
        writes.push((GLOBAL_CONTROL, 0));
    }
    writes.extend((0..count).map(|i| (selector + step * i, 0)));
    writes.extend((0..count).map(|i| (counter + step * i, 0)));
    if has_v2 {
        writes.extend([(GLOBAL_STATUS, 0), (GLOBAL_STATUS_CLEAR, 0)]);
        writes.push((GLOBAL_CONTROL, (1 << count) - 1));
    }
    writes
}

/// Intel SDM volume 3, chapter "Performance Monitoring".
fn intel_sequence(cpuid: &CpuId) -> Vec<(u32, u64)> {
    const COUNTER: u32 = 0xc1;
    const SELECTOR: u32 = 0x186;
    const FIXED_COUNTER: u32 = 0x309;
    const FIXED_CONTROL: u32 = 0x38d;
    const GLOBAL_STATUS: u32 = 0x38e;
    const GLOBAL_CONTROL: u32 = 0x38f;
    const GLOBAL_OVERFLOW_CONTROL: u32 = 0x390;
    const DEBUG_STORE: u32 = 1 << 21;

    let leaf = Leaf::get(cpuid, 0xa, 0);
    let (version, count) = (leaf.eax & 0xff, leaf.eax >> 8 & 0xff);
    if version == 0 {
        return Vec::new();
    }
    let fixed = if version >= 2 { leaf.edx & 0x1f } else { 0 };
    let mut writes = Vec::new();
    if version >= 2 {
        writes.extend([(GLOBAL_CONTROL, 0), (FIXED_CONTROL, 0)]);
    }
    writes.extend((0..count).map(|i| (SELECTOR + i, 0)));
    writes.extend((0..count).map(|i| (COUNTER + i, 0)));
    writes.extend((0..fixed).map(|i| (FIXED_COUNTER + i, 0)));
    if Leaf::get(cpuid, 1, 0).edx & DEBUG_STORE != 0 {
        // PEBS_ENABLE and DS_AREA.
        writes.extend([(0x3f1, 0), (0x600, 0)]);
    }
    if version >= 2 {
        writes.extend([(GLOBAL_STATUS, 0), (GLOBAL_OVERFLOW_CONTROL, 0)]);
        writes.push((GLOBAL_CONTROL, (1 << count) - 1));
    }
    writes
}

/// True for every register that [`reset_sequence`] may write, and for those that only show the same state once more: the
/// generic restore leaves them alone.
pub fn is_pmu_msr(index: u32) -> bool {
    matches!(index,
        0xc1..=0xc8 | 0x186..=0x18d | 0x309..=0x30c | 0x38d..=0x390 | 0x3f1 | 0x4c1..=0x4c8 | 0x600
        | 0xc000_0300..=0xc000_0303 | 0xc001_0000..=0xc001_0007 | 0xc001_0200..=0xc001_020b)
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_bindings::kvm_cpuid_entry2;

    fn leaf(function: u32, eax: u32, ebx: u32, ecx: u32, edx: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, eax, ebx, ecx, edx, ..Default::default() }
    }

    fn amd(leaves: &[kvm_cpuid_entry2]) -> CpuId {
        let vendor = leaf(0, 0x10, 0x6874_7541, 0x444d_4163, 0x6974_6e65);
        CpuId::from_entries(&[&[vendor], leaves].concat()).unwrap()
    }

    fn intel(leaves: &[kvm_cpuid_entry2]) -> CpuId {
        let vendor = leaf(0, 0x1f, 0x756e_6547, 0x6c65_746e, 0x4965_6e69);
        CpuId::from_entries(&[&[vendor], leaves].concat()).unwrap()
    }

    #[test]
    fn amd_legacy_counters_are_four() {
        let expected: Vec<_> = (0xc001_0000..=0xc001_0007).map(|msr| (msr, 0)).collect();
        assert_eq!(reset_sequence(&amd(&[])), expected);
    }

    #[test]
    fn amd_core_counters_are_six_and_selectors_go_first() {
        let writes = reset_sequence(&amd(&[leaf(AMD_EXTENDED_FEATURES, 0, 0, 1 << 23, 0)]));
        assert_eq!(writes.len(), 12);
        assert_eq!((writes[0], writes[5]), ((0xc001_0200, 0), (0xc001_020a, 0)));
        assert_eq!((writes[6], writes[11]), ((0xc001_0201, 0), (0xc001_020b, 0)));
    }

    #[test]
    fn globals_are_off_first_and_have_their_reset_value_last() {
        let cpuid =
            amd(&[leaf(AMD_EXTENDED_FEATURES, 0, 0, 1 << 23, 0), leaf(0x8000_0022, 1, 6, 0, 0)]);
        let writes = reset_sequence(&cpuid);
        assert_eq!(writes.first(), Some(&(0xc000_0301, 0)));
        assert_eq!(writes.last(), Some(&(0xc000_0301, 0x3f)));
        let cpuid = intel(&[leaf(0xa, 4 << 8 | 2, 0, 0, 3)]);
        let writes = reset_sequence(&cpuid);
        assert_eq!(writes.first(), Some(&(0x38f, 0)));
        assert_eq!(writes.last(), Some(&(0x38f, 0xf)));
        assert_eq!(writes.len(), 2 + 4 + 4 + 3 + 2 + 1);
    }

    /// Guests that together have every counter that KVM can give.
    fn all_kinds() -> [CpuId; 4] {
        let core = leaf(AMD_EXTENDED_FEATURES, 0, 0, 1 << 23, 0);
        [
            amd(&[]),
            amd(&[core]),
            amd(&[core, leaf(0x8000_0022, 1, 6, 0, 0)]),
            intel(&[leaf(1, 0, 0, 0, 1 << 21), leaf(0xa, 8 << 8 | 5, 0, 0, 4)]),
        ]
    }

    #[test]
    fn every_written_register_is_known_as_one() {
        for (msr, _) in all_kinds().iter().flat_map(reset_sequence) {
            assert!(is_pmu_msr(msr), "{msr:#x}");
        }
    }

    #[test]
    fn every_register_kept_from_the_generic_restore_is_written_or_shows_one_that_is() {
        /// The same counters as 0xc1 and on, by their full width (Intel SDM volume 3, "Full-Width Writes").
        const FULL_WIDTH: std::ops::RangeInclusive<u32> = 0x4c1..=0x4c8;
        /// Sets bits of the global status and reads as zero (AMD64 APM volume 2, 13.2.3).
        const GLOBAL_STATUS_SET: u32 = 0xc000_0303;
        let written: Vec<u32> =
            all_kinds().iter().flat_map(reset_sequence).map(|(msr, _)| msr).collect();
        let all = (0..0x2000).chain(0xc000_0000..0xc000_2000).chain(0xc001_0000..0xc001_2000);
        for msr in all.filter(|msr| is_pmu_msr(*msr)) {
            let shows_another = FULL_WIDTH.contains(&msr) || msr == GLOBAL_STATUS_SET;
            assert!(written.contains(&msr) || shows_another, "{msr:#x}: nobody resets it");
        }
    }

    #[test]
    fn counters_are_reset_unless_kvm_itself_has_none() {
        let check = |absence: PmuAbsence, expected| {
            assert_eq!(absence.guest_may_count(), expected, "{absence:?}");
        };
        check(PmuAbsence::Capability, false);
        check(PmuAbsence::ModuleParameter, false);
        check(PmuAbsence::CpuidOnly, true);
        check(PmuAbsence::NotAbsent, true);
    }

    #[test]
    fn a_hidden_pmu_leaves_no_trace_in_cpuid() {
        let mut cpuid = amd(&[
            leaf(1, 0, 0, 0xffff_ffff, 0xffff_ffff),
            leaf(0xa, 1, 1, 1, 1),
            leaf(AMD_EXTENDED_FEATURES, 0, 0, 0xffff_ffff, 0),
            leaf(0x8000_0022, 1, 6, 0, 0),
        ]);
        hide(&mut cpuid);
        assert_eq!(Leaf::get(&cpuid, 1, 0).ecx & 1 << 15, 0);
        assert_eq!(Leaf::get(&cpuid, 0xa, 0), Leaf::default());
        assert_eq!(Leaf::get(&cpuid, AMD_EXTENDED_FEATURES, 0).ecx & 1 << 23, 0);
        assert_eq!(Leaf::get(&cpuid, 0x8000_0022, 0), Leaf::default());
        assert_eq!(intel_sequence(&cpuid), []);
    }
}
