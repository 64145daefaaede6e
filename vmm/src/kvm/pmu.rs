//! Performance counters: whether a guest has any, and in which order a reset writes them.

use kvm_bindings::{
    CpuId, KVM_CAP_PMU_CAPABILITY, KVM_PMU_CAP_DISABLE, kvm_cpuid_entry2, kvm_enable_cap,
};
use kvm_ioctls::{Kvm, VmFd};
use serde::{Deserialize, Serialize};

use super::KvmError;
use super::cpuid::{AMD_EXTENDED_FEATURES, Leaf, is_amd};
use super::host::Module;
use crate::fault::{Fault, FaultError, Faults};

/// AMD's leaf about PerfMonV2.
const AMD_PMU: u32 = 0x8000_0022;
const AMD_ECX_PERFCTR_CORE: u32 = 1 << 23;

/// `--pmu`: which performance counters a guest gets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum PmuPolicy {
    /// None: disabled in KVM where it can be, and absent from CPUID always.
    #[default]
    Off,
    /// KVM's virtual PMU.
    Host,
    /// The monitor's model of AMD's PMU, on hosts with and without one. `rdpmc` does not reach it: a kernel that samples with
    /// `perf` or its NMI watchdog faults.
    Emulated,
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
    /// The guest has the monitor's own, and no access to a register of KVM's.
    Emulated,
}

impl PmuAbsence {
    /// True unless KVM itself keeps the guest from counting, whatever CPUID says. A reset then has counters to stop.
    pub fn guest_may_count(self) -> bool {
        match self {
            Self::Capability | Self::ModuleParameter | Self::Emulated => false,
            Self::CpuidOnly | Self::NotAbsent => true,
        }
    }
}

/// `KVM_CAP_PMU_CAPABILITY` as `KVM_CHECK_EXTENSION` gives it.
pub fn disable_capability(kvm: &Kvm) -> i32 {
    kvm.check_extension_raw(u64::from(KVM_CAP_PMU_CAPABILITY))
}

/// Whether the PMU of one machine can be disabled.
pub fn can_disable(kvm: &Kvm) -> bool {
    disable_capability(kvm) & KVM_PMU_CAP_DISABLE as i32 != 0
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
    let can_disable = can_disable(kvm);
    match policy {
        PmuPolicy::Host if module.enable_pmu == Some(false) => Err(KvmError::NoPmu),
        PmuPolicy::Host => Ok(PmuAbsence::NotAbsent),
        PmuPolicy::Emulated => {
            // Registers that reached KVM's PMU as well would be counted twice.
            if can_disable {
                disable(vm)?;
            }
            Ok(PmuAbsence::Emulated)
        }
        PmuPolicy::Off if can_disable => {
            disable(vm)?;
            Ok(PmuAbsence::Capability)
        }
        // 0 is ambiguous: an old kernel, or a module without PMU. Only the parameter tells.
        PmuPolicy::Off if module.enable_pmu == Some(false) => Ok(PmuAbsence::ModuleParameter),
        PmuPolicy::Off => Ok(PmuAbsence::CpuidOnly),
    }
}

pub(super) fn disable(vm: &VmFd) -> Result<(), KvmError> {
    let mut cap = kvm_enable_cap { cap: KVM_CAP_PMU_CAPABILITY, ..Default::default() };
    cap.args[0] = u64::from(KVM_PMU_CAP_DISABLE);
    vm.enable_cap(&cap).map_err(KvmError::request("disable the PMU of the machine"))
}

/// Removes every sign of a PMU from CPUID. KVM does not do it when its PMU is disabled.
pub fn hide(cpuid: &mut CpuId) {
    const FEATURES_ECX_DTES64: u32 = 1 << 2;
    const FEATURES_ECX_PDCM: u32 = 1 << 15;
    const FEATURES_EDX_DS: u32 = 1 << 21;
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
            (0xa | 0x1c | AMD_PMU, _) => {
                (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
            }
            (AMD_EXTENDED_FEATURES, _) => {
                entry.ecx &= !(AMD_ECX_PERFCTR_CORE | AMD_ECX_PERFCTR_NB | AMD_ECX_PERFCTR_LLC);
            }
            _ => {}
        }
    }
}

/// Shows a PMU of AMD's in a CPUID without one: core counters or only legacy ones, and as many counters of PerfMonV2.
///
/// # Errors
/// [`KvmError::Capability`] if KVM's own list leaves no room.
pub fn show_amd(cpuid: &mut CpuId, core: bool, v2_counters: Option<u8>) -> Result<(), KvmError> {
    const EXTENDED_RANGE: u32 = 0x8000_0000;
    const PERF_MON_V2: u32 = 1 << 0;
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            AMD_EXTENDED_FEATURES if core => entry.ecx |= AMD_ECX_PERFCTR_CORE,
            EXTENDED_RANGE if v2_counters.is_some() => entry.eax = entry.eax.max(AMD_PMU),
            _ => {}
        }
    }
    let Some(counters) = v2_counters else { return Ok(()) };
    let leaf = kvm_cpuid_entry2 {
        function: AMD_PMU,
        eax: PERF_MON_V2,
        ebx: counters.into(),
        ..Default::default()
    };
    match cpuid.as_mut_slice().iter_mut().find(|entry| entry.function == AMD_PMU) {
        Some(entry) => *entry = leaf,
        None => {
            cpuid.push(leaf).map_err(|_| KvmError::Capability("room for one more CPUID leaf"))?;
        }
    }
    Ok(())
}

/// Writes that bring every counter of a guest with this CPUID to its reset state, in an order in which no counter runs
/// between two of them. `faults` say which of them are left out.
pub fn reset_sequence(cpuid: &CpuId, faults: &Faults) -> Vec<(u32, u64)> {
    let registers = Registers::of(cpuid, faults);
    let global_control = registers.global_control.map(|(_, at_reset)| at_reset);
    registers.sequence(|index| match registers.global_control {
        Some((control, _)) if control == index => global_control,
        _ => Some(0),
    })
}

/// The registers that together are the counters' state in a guest with this CPUID.
pub fn state_registers(cpuid: &CpuId) -> Vec<u32> {
    let Registers { global_control, controls, counters, status } =
        Registers::of(cpuid, &Faults::default());
    let globals =
        status.map(|(status, _)| status).into_iter().chain(global_control.map(|(c, _)| c));
    controls.into_iter().chain(counters).chain(globals).collect()
}

/// Writes that give the counters of a guest with this CPUID these `values`, by register number, in an order in which none of them
/// runs before all have theirs. Registers without a value are left alone.
pub fn restore_sequence(cpuid: &CpuId, values: &[(u32, u64)]) -> Vec<(u32, u64)> {
    let value = |index| values.iter().find(|(of, _)| *of == index).map(|(_, value)| *value);
    Registers::of(cpuid, &Faults::default()).sequence(value)
}

/// Refuses faults of which a guest with this CPUID could show nothing.
///
/// # Errors
/// [`FaultError::Lacking`].
pub fn check_faults(cpuid: &CpuId, faults: &Faults) -> Result<(), FaultError> {
    let without = |left_out| {
        let left_out = Faults::new(vec![left_out], PmuPolicy::Host, true)?;
        Ok(reset_sequence(cpuid, &left_out).len()
            == reset_sequence(cpuid, &Faults::default()).len())
    };
    let lacks = |fault| if faults.has(fault) { without(fault) } else { Ok(false) };
    if lacks(Fault::PmuK7Only)? {
        return Err(FaultError::Lacking(
            Fault::PmuK7Only,
            "AMD's fifth counter: --pmu-counters 5 or 6",
        ));
    }
    if lacks(Fault::GlobalsLeft)? {
        return Err(FaultError::Lacking(Fault::GlobalsLeft, "global registers: --pmu-version 2"));
    }
    Ok(())
}

/// The registers of a guest's counters, by what they are to each other.
#[derive(Default)]
struct Registers {
    /// Lets counters run at all, and its value after a reset.
    global_control: Option<(u32, u64)>,
    /// Let a counter run, and say what it counts.
    controls: Vec<u32>,
    counters: Vec<u32>,
    /// Says which have overflowed, and beside it the register that takes such words back.
    status: Option<(u32, u32)>,
}

impl Registers {
    fn of(cpuid: &CpuId, faults: &Faults) -> Self {
        if is_amd(cpuid) { Self::amd(cpuid, faults) } else { Self::intel(cpuid, faults) }
    }

    /// Everything off, globals first; then counters, then what they count, then which have overflowed; globals last.
    fn sequence(&self, value: impl Fn(u32) -> Option<u64>) -> Vec<(u32, u64)> {
        let is_there = |index: &u32| value(*index).is_some();
        let known = |index: u32| Some((index, value(index)?));
        let control = self.global_control.map(|(control, _)| control);
        let off = control.into_iter().chain(self.controls.iter().copied());
        let mut writes: Vec<_> = off.filter(is_there).map(|index| (index, 0)).collect();
        writes.extend(self.counters.iter().copied().filter_map(known));
        // Those that stay off have been written.
        writes.extend(
            self.controls.iter().copied().filter_map(known).filter(|(_, value)| *value != 0),
        );
        if let Some((status, clear)) = self.status
            && let Some(write) = known(status)
        {
            writes.extend([write, (clear, 0)]);
        }
        writes.extend(control.and_then(known));
        writes
    }

    /// AMD64 Architecture Programmer's Manual volume 2, section 13.2.
    fn amd(cpuid: &CpuId, faults: &Faults) -> Self {
        const K7_SELECTOR: u32 = 0xc001_0000;
        const K7_COUNTER: u32 = 0xc001_0004;
        const K7_COUNT: u32 = 4;
        const CORE_SELECTOR: u32 = 0xc001_0200;
        const GLOBAL_STATUS: u32 = 0xc000_0300;
        const GLOBAL_CONTROL: u32 = 0xc000_0301;
        const GLOBAL_STATUS_CLEAR: u32 = 0xc000_0302;

        let core = Leaf::get(cpuid, AMD_EXTENDED_FEATURES, 0).ecx & AMD_ECX_PERFCTR_CORE != 0;
        let v2 = Leaf::get(cpuid, AMD_PMU, 0);
        let has_v2 = v2.eax & 1 != 0;
        let count = match (has_v2, core) {
            (true, _) => v2.ebx & 0xf,
            (false, true) => 6,
            (false, false) => K7_COUNT,
        };
        // The legacy registers are aliases of the first core ones: one set is enough, and the smaller always exists.
        let (selector, counter, step, cleared) = match core && !faults.has(Fault::PmuK7Only) {
            true => (CORE_SELECTOR, CORE_SELECTOR + 1, 2, count),
            false => (K7_SELECTOR, K7_COUNTER, 1, count.min(K7_COUNT)),
        };
        let cleared = if faults.has(Fault::PmuNotReset) { 0 } else { cleared };
        let globals = has_v2 && !faults.has(Fault::GlobalsLeft);
        Self {
            global_control: globals.then_some((GLOBAL_CONTROL, (1 << count) - 1)),
            controls: (0..cleared).map(|i| selector + step * i).collect(),
            counters: (0..cleared).map(|i| counter + step * i).collect(),
            status: globals.then_some((GLOBAL_STATUS, GLOBAL_STATUS_CLEAR)),
        }
    }

    /// Intel SDM volume 3, chapter "Performance Monitoring".
    fn intel(cpuid: &CpuId, faults: &Faults) -> Self {
        const COUNTER: u32 = 0xc1;
        const SELECTOR: u32 = 0x186;
        const FIXED_COUNTER: u32 = 0x309;
        const FIXED_CONTROL: u32 = 0x38d;
        const GLOBAL_STATUS: u32 = 0x38e;
        const GLOBAL_CONTROL: u32 = 0x38f;
        const GLOBAL_OVERFLOW_CONTROL: u32 = 0x390;
        const PEBS_ENABLE: u32 = 0x3f1;
        const DS_AREA: u32 = 0x600;
        const DEBUG_STORE: u32 = 1 << 21;

        let leaf = Leaf::get(cpuid, 0xa, 0);
        let (version, count) = (leaf.eax & 0xff, leaf.eax >> 8 & 0xff);
        if version == 0 {
            return Self::default();
        }
        let fixed = if version >= 2 { leaf.edx & 0x1f } else { 0 };
        let globals = version >= 2 && !faults.has(Fault::GlobalsLeft);
        let (mut controls, mut counters) = (Vec::new(), Vec::new());
        if !faults.has(Fault::PmuNotReset) {
            controls.extend((version >= 2).then_some(FIXED_CONTROL));
            controls.extend((0..count).map(|i| SELECTOR + i));
            counters.extend((0..count).map(|i| COUNTER + i));
            counters.extend((0..fixed).map(|i| FIXED_COUNTER + i));
            if Leaf::get(cpuid, 1, 0).edx & DEBUG_STORE != 0 {
                controls.push(PEBS_ENABLE);
                counters.push(DS_AREA);
            }
        }
        Self {
            global_control: globals.then_some((GLOBAL_CONTROL, (1 << count) - 1)),
            controls,
            counters,
            status: globals.then_some((GLOBAL_STATUS, GLOBAL_OVERFLOW_CONTROL)),
        }
    }
}

/// True for every register that [`reset_sequence`] may write, and for those that only show the same state once more: the
/// generic restore leaves them alone.
pub fn is_pmu_msr(index: u32) -> bool {
    matches!(index,
        0xc1..=0xc8 | 0x186..=0x18d | 0x309..=0x30c | 0x38d..=0x390 | 0x3f1 | 0x4c1..=0x4c8 | 0x600
        | 0xc000_0300..=0xc000_0303 | 0xc001_0000..=0xc001_0007 | 0xc001_0200..=0xc001_020b)
}

#[cfg(test)]
mod tests;
