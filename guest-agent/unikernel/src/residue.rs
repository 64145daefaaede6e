//! The residue check's registers: which of them there are, what they are poisoned with, and whether they took it.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use agent_protocol::{Poisoning, StateReading};

use crate::pmu::{MsrOperation, Msrs};

/// A value that nobody else writes, and a canonical address.
const MARK: u64 = 0x1eaf_0000;

/// A register that a reset restores.
struct Register {
    name: &'static str,
    index: u32,
    poison: u64,
}

const fn register(name: &'static str, index: u32, poison: u64) -> Register {
    Register { name, index, poison }
}

/// Registers that the agent itself does not use, with values that leave it unharmed: addresses of nothing, memory types
/// that are WB anyway, interrupts that are masked (AMD APM volume 2, appendix A; Intel SDM volume 4; for the local APIC in
/// x2APIC mode Intel SDM volume 3, table "Local APIC Register Address Map Supported by x2APIC").
const REGISTERS: [Register; 46] = [
    register("msr.sysenter_cs", 0x174, 0x1ea8),
    register("msr.sysenter_esp", 0x175, MARK),
    register("msr.sysenter_eip", 0x176, MARK),
    register("msr.debugctl", 0x1d9, 0x2),
    register("msr.spec_ctrl", 0x48, 0x1),
    register("msr.pat", 0x277, 0x0606_0606_0606_0606),
    register("msr.mtrr_default_type", 0x2ff, 0xc06),
    register("msr.mtrr_base0", 0x200, 0x1ea0_0006),
    register("msr.mtrr_mask0", 0x201, 0xfff0_0800),
    register("msr.mtrr_fix64k", 0x250, 0x0606_0606_0606_0606),
    register("msr.star", 0xc000_0081, MARK << 32),
    register("msr.lstar", 0xc000_0082, MARK),
    register("msr.cstar", 0xc000_0083, MARK),
    register("msr.syscall_mask", 0xc000_0084, 0x1eaf),
    register("msr.kernel_gs_base", 0xc000_0102, MARK),
    register("msr.tsc_aux", 0xc000_0103, 0x1eaf),
    // Some microseconds, by which the agent's own clock moves as well.
    register("msr.tsc_adjust", 0x3b, 0x1000),
    register("msr.mtrr_base7", 0x20e, 0x1eb0_0006),
    register("msr.mtrr_mask7", 0x20f, 0xfff0_0800),
    register("msr.mtrr_fix16k", 0x258, 0x0606_0606_0606_0606),
    register("msr.mtrr_fix4k", 0x268, 0x0606_0606_0606_0606),
    register("msr.mcg_status", 0x17a, 0x4),
    register("msr.mc0_ctl", 0x400, u64::MAX),
    register("msr.umwait_control", 0xe1, 0x1eac),
    register("msr.hwcr", 0xc001_0015, 1 << 18),
    register("msr.vm_hsave_pa", 0xc001_0117, MARK),
    register("seg.fs_base", 0xc000_0100, MARK),
    register("seg.gs_base", 0xc000_0101, MARK),
    register("lapic.tpr", 0x808, 0x20),
    register("lapic.lvt_thermal", 0x833, 0x100f1),
    register("lapic.lvt_lint0", 0x835, 0x100f2),
    register("lapic.lvt_lint1", 0x836, 0x10400),
    register("lapic.lvt_error", 0x837, 0x100f3),
    // Periodic, and masked; the count is a second away from its end at least.
    register("lapic.timer_lvt", 0x832, 0x300f4),
    register("lapic.timer_divide", 0x83e, 0x9),
    register("lapic.timer_count", 0x838, 0xffff_ff00),
    register("pv.poll_control", 0x4b56_4d05, 0),
    // Bit 0 has KVM write there. The addresses are filled in.
    register("pv.wall_clock", 0x4b56_4d00, 0),
    register("pv.system_time", 0x4b56_4d01, 1),
    // Without delivery by interrupt it is stored and does nothing.
    register("pv.async_pf", 0x4b56_4d02, 1),
    register("pv.steal_time", 0x4b56_4d03, 1),
    register("pv.eoi", 0x4b56_4d04, 1),
    register("pv.async_pf_interrupt", 0x4b56_4d06, 0xf5),
    // With the priority above it stays requested: vector 33, sent to itself.
    register("lapic.icr", X2APIC_ICR, 0x4_4021),
    // Only looked at: these show the request, and the vector in service that `keep_in_service` sends.
    register(REQUESTED, X2APIC_IRR_1, 1 << 1),
    register(IN_SERVICE, X2APIC_ISR_1, 1 << 16),
];

const X2APIC_EOI: u32 = 0x80b;
const X2APIC_ISR_1: u32 = 0x811;
const X2APIC_ICR: u32 = 0x830;
const X2APIC_IRR_1: u32 = 0x821;
const REQUESTED: &str = "lapic.irr1";
const IN_SERVICE: &str = "lapic.isr1";

/// Has vector 48 be in service from now on. Returns whether it is.
pub fn keep_in_service(msrs: &mut impl Msrs) -> bool {
    /// Fixed, to itself; its priority is above that of [`REGISTERS`].
    const VECTOR_48: u64 = 0x4_4030;
    let mut send = [MsrOperation::write(X2APIC_ICR, VECTOR_48)];
    msrs.run(&mut send);
    let mut look = [MsrOperation::read(X2APIC_ISR_1)];
    msrs.run(&mut look);
    look[0].result().is_some_and(|bits| bits & 1 << 16 != 0)
}

/// Tries that, and undoes it: until the last moment the agent wants to be interrupted, and ends interrupts of its own.
fn try_in_service(msrs: &mut impl Msrs) -> Result<u64, String> {
    let kept = keep_in_service(msrs);
    if kept {
        msrs.run(&mut [MsrOperation::write(X2APIC_EOI, 0)]);
    }
    // What is requested is shown by its own item, with the command that requests it.
    match kept {
        true => Ok(1 << 16),
        false => Err("vector 48 does not stay in service on this local APIC".into()),
    }
}

impl Register {
    /// With an address of 64 bytes for each of the structures that KVM writes.
    fn poison(&self, scratch: u64) -> u64 {
        match self.index {
            0x4b56_4d00..=0x4b56_4d04 => scratch + u64::from(self.index & 0xf) * 64 + self.poison,
            _ => self.poison,
        }
    }
}

/// Bytes that the structures take which KVM writes, aligned to 64.
pub const SCRATCH_BYTES: usize = 5 * 64;

/// Reads any register.
pub fn read_one(index: u32, msrs: &mut impl Msrs) -> Option<u64> {
    let mut operation = [MsrOperation::read(index)];
    msrs.run(&mut operation);
    operation[0].result()
}

/// Reads every register.
pub fn read(msrs: &mut impl Msrs) -> Vec<StateReading> {
    let mut reads: Vec<_> = REGISTERS.iter().map(|r| MsrOperation::read(r.index)).collect();
    msrs.run(&mut reads);
    let reading = |(register, read): (&Register, &MsrOperation)| StateReading {
        item: register.name.into(),
        value: read.result(),
    };
    REGISTERS.iter().zip(&reads).map(reading).collect()
}

/// Poisons every register; `scratch` is the address of [`SCRATCH_BYTES`] that nobody uses, in this life or the next.
pub fn poison(scratch: u64, msrs: &mut impl Msrs) -> Vec<Poisoning> {
    let value = |register: &Register| register.poison(scratch);
    let in_service = try_in_service(msrs);
    let operation = |r: &Register| match r.name {
        REQUESTED | IN_SERVICE => MsrOperation::read(r.index),
        _ => MsrOperation::write(r.index, value(r)),
    };
    let mut writes: Vec<_> = REGISTERS.iter().map(operation).collect();
    msrs.run(&mut writes);
    let held = read(msrs);
    let result =
        |(register, (write, held)): (&Register, (&MsrOperation, StateReading))| Poisoning {
            item: register.name.into(),
            result: match held.value {
                _ if register.name == IN_SERVICE => in_service.clone(),
                _ if write.faulted != 0 => Err(String::from("the write faults")),
                // Other vectors of the same word belong to the machine.
                Some(held) if register.name == REQUESTED && held & value(register) != 0 => Ok(held),
                Some(held) if held == value(register) => Ok(held),
                Some(held) => {
                    Err(format!("it holds {held:#x} after a write of {:#x}", value(register)))
                }
                None => Err(String::from("the read faults")),
            },
        };
    REGISTERS.iter().zip(writes.iter().zip(held)).map(result).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    /// Registers that take everything, except one that faults and one that holds nothing.
    #[derive(Default)]
    struct FakeMsrs(BTreeMap<u32, u64>);

    const FAULTS: u32 = 0x48;
    const HOLDS_NOTHING: u32 = 0x1d9;

    impl Msrs for FakeMsrs {
        fn run(&mut self, operations: &mut [MsrOperation]) {
            for operation in operations {
                match (operation.index, operation.write) {
                    (FAULTS, _) => operation.faulted = 1,
                    (X2APIC_ICR, 1) => {
                        // Requested below the priority, else in service at once.
                        let vector = operation.value & 0xff;
                        let word = if vector < 48 { X2APIC_IRR_1 } else { X2APIC_ISR_1 };
                        *self.0.entry(word).or_default() |= 1 << (vector % 32);
                        self.0.insert(X2APIC_ICR, operation.value);
                    }
                    (X2APIC_EOI, 1) => {
                        self.0.remove(&X2APIC_ISR_1);
                    }
                    (index, 0) => operation.value = self.0.get(&index).copied().unwrap_or(0),
                    (HOLDS_NOTHING, _) => {}
                    (index, _) => {
                        self.0.insert(index, operation.value);
                    }
                }
            }
        }

        fn spin(&mut self) {}
    }

    #[test]
    fn every_register_is_poisoned_or_it_is_said_why_not() {
        let mut msrs = FakeMsrs::default();
        let poisoned = poison(0x20_0000, &mut msrs);
        assert_eq!(poisoned.len(), REGISTERS.len());
        for (register, Poisoning { item, result }) in REGISTERS.iter().zip(&poisoned) {
            assert_eq!(register.name, item);
            match register.index {
                FAULTS => assert_eq!(result.as_ref().unwrap_err(), "the write faults"),
                X2APIC_ISR_1 => {
                    assert_eq!(result, &Ok(1 << 16));
                    assert!(!msrs.0.contains_key(&X2APIC_ISR_1), "ended until the last moment");
                }
                HOLDS_NOTHING => assert!(result.as_ref().unwrap_err().contains("it holds 0x0")),
                index => assert_eq!(result.as_ref().unwrap(), &msrs.0[&index]),
            }
        }
    }

    #[test]
    fn what_was_poisoned_is_read_back_under_the_same_name() {
        let mut msrs = FakeMsrs::default();
        let poisoned = poison(0x20_0000, &mut msrs);
        let readings = read(&mut msrs);
        for (reading, poisoning) in readings.iter().zip(&poisoned) {
            assert_eq!(reading.item, poisoning.item);
            if reading.item == IN_SERVICE {
                assert_eq!(reading.value, Some(0));
                assert!(keep_in_service(&mut msrs));
            } else if let Ok(value) = poisoning.result {
                assert_eq!(reading.value, Some(value), "{}", reading.item);
            }
        }
    }

    #[test]
    fn structures_that_kvm_writes_do_not_overlap_and_are_aligned() {
        let mut addresses: Vec<u64> = REGISTERS
            .iter()
            .filter(|r| (0x4b56_4d00..=0x4b56_4d04).contains(&r.index))
            .map(|r| r.poison(0x20_0000) & !1)
            .collect();
        addresses.sort_unstable();
        assert_eq!(addresses, [0x20_0000, 0x20_0040, 0x20_0080, 0x20_00c0, 0x20_0100]);
        assert!(addresses[4] + 64 <= 0x20_0000 + SCRATCH_BYTES as u64);
    }
}
