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
const REGISTERS: [Register; 44] = [
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
    // NMIs, as at power-on, but active low.
    register("lapic.lvt_lint1", 0x836, 0x2400),
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
];

const X2APIC_EOI: u32 = 0x80b;
const X2APIC_ISR_3: u32 = 0x813;
const X2APIC_IRR_1: u32 = 0x821;
const X2APIC_ICR: u32 = 0x830;

/// Shows the request of the last of [`REGISTERS`], among others.
const REQUESTED: &str = "lapic.irr1";
const REQUEST: u64 = 1 << 1;

/// To be read as early as an interrupt could be ended.
pub const IN_SERVICE: &str = "lapic.isr3";
/// What it shows of [`keep_in_service`].
const SERVICE: u64 = 1 << 1;
/// Vector 97, fixed, to itself; its priority is above that of [`REGISTERS`] and of devices.
const SERVED_VECTOR: u64 = 0x4_4061;

/// Has a vector be in service from now on: nothing of less priority interrupts the agent any more.
pub fn keep_in_service(msrs: &mut impl Msrs) {
    msrs.run(&mut [MsrOperation::write(X2APIC_ICR, SERVED_VECTOR)]);
}

/// Ends it, and a device's interrupt that was in service before.
pub fn end_service(msrs: &mut impl Msrs) {
    msrs.run(&mut [MsrOperation::write(X2APIC_EOI, 0), MsrOperation::write(X2APIC_EOI, 0)]);
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

/// Reads any registers.
pub fn read_some<const COUNT: usize>(
    indices: [u32; COUNT],
    msrs: &mut impl Msrs,
) -> [Option<u64>; COUNT] {
    let mut reads = indices.map(MsrOperation::read);
    msrs.read(&mut reads);
    reads.map(|read| read.result())
}

/// Reads every register.
pub fn read(msrs: &mut impl Msrs) -> Vec<StateReading> {
    let indices = REGISTERS.iter().map(|register| register.index).chain([X2APIC_IRR_1]);
    let mut reads: Vec<_> = indices.map(MsrOperation::read).collect();
    msrs.read(&mut reads);
    let names = REGISTERS.iter().map(|register| register.name).chain([REQUESTED]);
    let reading = |(name, read): (&str, &MsrOperation)| StateReading {
        item: name.into(),
        value: read.result(),
    };
    names.zip(&reads).map(reading).collect()
}

/// Poisons every register; `scratch` is the address of [`SCRATCH_BYTES`] that nobody uses, in this life or the next. Also tells
/// what becomes of [`IN_SERVICE`] at the end of this life.
pub fn poison(scratch: u64, msrs: &mut impl Msrs) -> (Vec<Poisoning>, Result<u64, String>) {
    // What `keep_in_service` does is tried and undone: until the last moment the agent wants to be interrupted. If that vector
    // does not stay in service, the end is another interrupt's, which only comes sooner again.
    let mut writes = alloc::vec![MsrOperation::write(X2APIC_ICR, SERVED_VECTOR)];
    writes.extend(REGISTERS.iter().map(|r| MsrOperation::write(r.index, r.poison(scratch))));
    msrs.write_and_read(&mut writes);
    let mut shown = [
        MsrOperation::read(X2APIC_IRR_1),
        MsrOperation::read(X2APIC_ISR_3),
        MsrOperation::write(X2APIC_EOI, 0),
    ];
    msrs.run(&mut shown);
    let result = |(register, held): (&Register, &MsrOperation)| Poisoning {
        item: register.name.into(),
        last: false,
        result: match (held.result(), register.poison(scratch)) {
            (None, _) => Err(String::from("the access faults")),
            (Some(held), poison) if held == poison => Ok(held),
            (Some(held), poison) => Err(format!("it holds {held:#x} after a write of {poison:#x}")),
        },
    };
    let mut poisonings: Vec<_> = REGISTERS.iter().zip(&writes[1..]).map(result).collect();
    // Other vectors of the same word belong to the machine.
    let with = |shown: &MsrOperation, bit| shown.result().filter(|bits| bits & bit != 0);
    poisonings.push(Poisoning {
        item: REQUESTED.into(),
        last: false,
        result: with(&shown[0], REQUEST).ok_or_else(|| "vector 33 does not stay requested".into()),
    });
    let in_service = with(&shown[1], SERVICE).map(|_| SERVICE);
    (
        poisonings,
        in_service.ok_or_else(|| "vector 97 does not stay in service on this local APIC".into()),
    )
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
                        let word = if vector < 48 { X2APIC_IRR_1 } else { X2APIC_ISR_3 };
                        *self.0.entry(word).or_default() |= 1 << (vector % 32);
                        self.0.insert(X2APIC_ICR, operation.value);
                    }
                    (X2APIC_EOI, 1) => {
                        self.0.remove(&X2APIC_ISR_3);
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
        let (poisoned, in_service) = poison(0x20_0000, &mut msrs);
        assert_eq!(in_service, Ok(SERVICE));
        assert!(!msrs.0.contains_key(&X2APIC_ISR_3), "ended until the last moment");
        let (requested, poisoned) = poisoned.split_last().unwrap();
        assert_eq!((requested.item.as_str(), &requested.result), (REQUESTED, &Ok(REQUEST)));
        assert_eq!(poisoned.len(), REGISTERS.len());
        for (register, Poisoning { item, result, .. }) in REGISTERS.iter().zip(poisoned) {
            assert_eq!(register.name, item);
            match register.index {
                FAULTS => assert_eq!(result.as_ref().unwrap_err(), "the access faults"),
                HOLDS_NOTHING => assert!(result.as_ref().unwrap_err().contains("it holds 0x0")),
                index => assert_eq!(result.as_ref().unwrap(), &msrs.0[&index]),
            }
        }
    }

    #[test]
    fn what_was_poisoned_is_read_back_under_the_same_name() {
        let mut msrs = FakeMsrs::default();
        let (poisoned, _) = poison(0x20_0000, &mut msrs);
        let readings = read(&mut msrs);
        assert_eq!(readings.len(), poisoned.len());
        for (reading, poisoning) in readings.iter().zip(&poisoned) {
            assert_eq!(reading.item, poisoning.item);
            if let Ok(value) = poisoning.result {
                assert_eq!(reading.value, Some(value), "{}", reading.item);
            }
        }
        keep_in_service(&mut msrs);
        assert_eq!(read_some([X2APIC_ISR_3], &mut msrs), [Some(SERVICE)]);
        end_service(&mut msrs);
        assert_eq!(read_some([X2APIC_ISR_3], &mut msrs), [Some(0)]);
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
