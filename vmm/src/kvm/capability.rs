//! What of KVM's interface this program uses, and what it costs where that is missing.

use kvm_bindings::{
    KVM_CAP_BINARY_STATS_FD, KVM_CAP_COALESCED_MMIO, KVM_CAP_ENFORCE_PV_FEATURE_CPUID,
    KVM_CAP_GET_TSC_KHZ, KVM_CAP_IMMEDIATE_EXIT, KVM_CAP_IOEVENTFD, KVM_CAP_IRQFD,
    KVM_CAP_NESTED_STATE, KVM_CAP_PMU_CAPABILITY, KVM_CAP_SPLIT_IRQCHIP,
    KVM_CAP_TSC_DEADLINE_TIMER, KVM_CAP_VCPU_ATTRIBUTES, KVM_CAP_X86_MSR_FILTER,
    KVM_CAP_X86_TRIPLE_FAULT_EVENT, KVM_CAP_X86_USER_SPACE_MSR,
};
use kvm_ioctls::Kvm;
use serde::Serialize;

use super::KvmError;

/// A capability (Linux `Documentation/virt/kvm/api.rst`) as this KVM has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Capability {
    /// Its name in Linux, without `KVM_CAP_`.
    pub name: &'static str,
    /// Its number.
    pub number: u32,
    /// What `KVM_CHECK_EXTENSION` gives; 0 where it is missing.
    pub value: i32,
    /// What is lost without it.
    #[serde(rename = "without")]
    pub cost: &'static str,
}

/// Two parts of the interface: without the first no machine can be built or reset.
const NO_MACHINE: &str = "no machine can be built";
const NO_RESET: &str = "no machine can be built, as none could be reset";
const NO_EMULATED_PMU: &str = "no --pmu emulated";

const USED: [(u32, &str, &str); 15] = [
    (KVM_CAP_SPLIT_IRQCHIP, "SPLIT_IRQCHIP", NO_MACHINE),
    (KVM_CAP_IRQFD, "IRQFD", NO_MACHINE),
    (KVM_CAP_IOEVENTFD, "IOEVENTFD", NO_MACHINE),
    (KVM_CAP_IMMEDIATE_EXIT, "IMMEDIATE_EXIT", NO_RESET),
    (KVM_CAP_VCPU_ATTRIBUTES, "VCPU_ATTRIBUTES", NO_RESET),
    (
        KVM_CAP_X86_TRIPLE_FAULT_EVENT,
        "X86_TRIPLE_FAULT_EVENT",
        "a reset cannot cancel a triple fault that is on its way, and the next life dies of it",
    ),
    (
        KVM_CAP_PMU_CAPABILITY,
        "PMU_CAPABILITY",
        "--pmu off cannot turn off one machine's counters: they are hidden, or off for all (kvm.enable_pmu)",
    ),
    (KVM_CAP_X86_USER_SPACE_MSR, "X86_USER_SPACE_MSR", NO_EMULATED_PMU),
    (KVM_CAP_X86_MSR_FILTER, "X86_MSR_FILTER", NO_EMULATED_PMU),
    (KVM_CAP_BINARY_STATS_FD, "BINARY_STATS_FD", NO_EMULATED_PMU),
    (
        KVM_CAP_COALESCED_MMIO,
        "COALESCED_MMIO",
        "each write to a device's registers leaves guest mode, and launches take longer",
    ),
    (KVM_CAP_TSC_DEADLINE_TIMER, "TSC_DEADLINE_TIMER", "guests have timers that cost more exits"),
    (KVM_CAP_GET_TSC_KHZ, "GET_TSC_KHZ", "guests have to measure how fast their clock is"),
    (
        KVM_CAP_ENFORCE_PV_FEATURE_CPUID,
        "ENFORCE_PV_FEATURE_CPUID",
        "guests reach paravirtual registers that their CPUID hides",
    ),
    (KVM_CAP_NESTED_STATE, "NESTED_STATE", "nobody sees what guests of guests do"),
];

/// Whether no machine can be built without the capability of this number.
pub fn is_needed(number: u32) -> bool {
    let needed = |(known, _, cost): &(u32, &str, &str)| {
        *known == number && [NO_MACHINE, NO_RESET].contains(cost)
    };
    USED.iter().any(needed)
}

/// Asks for all that this program uses.
pub fn used(kvm: &Kvm) -> Vec<Capability> {
    let ask = |&(number, name, cost): &(u32, &'static str, &'static str)| Capability {
        name,
        number,
        value: kvm.check_extension_raw(u64::from(number)),
        cost,
    };
    USED.iter().map(ask).collect()
}

/// The MSRs that KVM wants a monitor to save and put back.
///
/// # Errors
/// [`KvmError::Request`].
pub fn listed_msrs(kvm: &Kvm) -> Result<Vec<u32>, KvmError> {
    let listed = kvm.get_msr_index_list().map_err(KvmError::request("list the MSRs"))?;
    Ok(listed.as_slice().to_vec())
}

/// Whether KVM binds paravirtual features to CPUID where that is asked of it.
pub fn can_enforce_pv_features(kvm: &Kvm) -> bool {
    has(kvm, KVM_CAP_ENFORCE_PV_FEATURE_CPUID)
}

/// Whether the state of a vCPU that runs a guest of its own can be got and set.
pub fn has_nested_state(kvm: &Kvm) -> bool {
    has(kvm, KVM_CAP_NESTED_STATE)
}

fn has(kvm: &Kvm, number: u32) -> bool {
    kvm.check_extension_raw(u64::from(number)) > 0
}
