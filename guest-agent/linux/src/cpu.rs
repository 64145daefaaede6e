//! Instructions that std has no safe names for.

use std::arch::x86_64::{__cpuid_count, _rdtsc};

use agent_protocol::PmuCpuid;

/// The time stamp counter.
pub fn tsc() -> u64 {
    // SAFETY: every x86-64 processor has it, and nothing in this process forbids it to itself.
    unsafe { _rdtsc() }
}

/// The words that describe the performance counters; zero for leaves beyond the last.
pub fn pmu_cpuid() -> PmuCpuid {
    let leaf = |leaf: u32| {
        let highest = __cpuid_count(leaf & 0x8000_0000, 0).eax;
        match leaf <= highest {
            true => {
                let words = __cpuid_count(leaf, 0);
                [words.eax, words.ebx, words.ecx, words.edx]
            }
            false => [0; 4],
        }
    };
    let [_, ebx, ecx, edx] = leaf(0);
    let mut vendor = [0; 12];
    for (bytes, word) in vendor.chunks_exact_mut(4).zip([ebx, edx, ecx]) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    PmuCpuid {
        vendor,
        signature: leaf(1)[0],
        leaf_1_ecx: leaf(1)[2],
        leaf_0a: leaf(0x0a),
        leaf_80000001_ecx: leaf(0x8000_0001)[2],
        leaf_80000022: leaf(0x8000_0022),
    }
}
