use std::collections::BTreeMap;

use super::*;

/// A machine whose registers are a map: absent ones fault.
#[derive(Default)]
struct FakeMsrs {
    registers: BTreeMap<u32, u64>,
    swallows_writes: bool,
    counts: bool,
    writes: Vec<u32>,
}

impl FakeMsrs {
    fn with(indices: impl IntoIterator<Item = u32>) -> Self {
        Self { registers: indices.into_iter().map(|index| (index, 0)).collect(), ..Self::default() }
    }
}

impl Msrs for FakeMsrs {
    fn run(&mut self, operations: &mut [MsrOperation]) {
        for operation in operations {
            let Some(register) = self.registers.get_mut(&operation.index) else {
                operation.faulted = 1;
                continue;
            };
            if operation.write == 0 {
                operation.value = *register;
            } else {
                self.writes.push(operation.index);
                if !self.swallows_writes {
                    *register = operation.value;
                }
            }
        }
    }

    fn spin(&mut self) {
        let enabled: Vec<_> = self
            .registers
            .iter()
            .filter(|(_, value)| **value & ENABLE != 0)
            .map(|(i, _)| *i)
            .collect();
        for select in enabled.into_iter().filter(|_| self.counts) {
            let counter = if select < 0x1000 { select - 0x186 + 0xc1 } else { select + 1 };
            *self.registers.entry(counter).or_default() += 1000;
        }
    }
}

const ZEN: u32 = 0x00a1_0f11;
const K7_MSRS: core::ops::Range<u32> = 0xc001_0000..0xc001_0008;
const CORE_MSRS: core::ops::Range<u32> = 0xc001_0200..0xc001_020c;

fn amd(core: bool, v2_counters: u32) -> PmuCpuid {
    PmuCpuid {
        vendor: *b"AuthenticAMD",
        signature: ZEN,
        leaf_1_ecx: HYPERVISOR,
        leaf_80000001_ecx: u32::from(core) << 23,
        leaf_80000022: [u32::from(v2_counters > 0), v2_counters, 0, 0],
        ..PmuCpuid::default()
    }
}

fn intel(leaf_0a: [u32; 4]) -> PmuCpuid {
    PmuCpuid {
        vendor: *b"GenuineIntel",
        signature: 0x0005_0657,
        leaf_1_ecx: HYPERVISOR,
        leaf_0a,
        ..PmuCpuid::default()
    }
}

fn check_first_line(cpuid: PmuCpuid, msrs: &mut FakeMsrs, status: &PmuStatus, line: &str) {
    let (report, lines) = check(cpuid, msrs);
    assert_eq!(&report.status, status);
    assert_eq!(lines[0].1, line);
}

const VIRTUAL: &str =
    "Performance Events: PMU not available due to virtualization, using software events only.";

#[test]
fn k7_counters_that_swallow_writes_are_absent() {
    let mut msrs = FakeMsrs { swallows_writes: true, ..FakeMsrs::with(K7_MSRS) };
    check_first_line(amd(false, 0), &mut msrs, &PmuStatus::Absent, VIRTUAL);
    assert_eq!(msrs.writes, [0xc001_0007, 0xc001_0007], "tries the highest free counter alone");
}

#[test]
fn core_counters_that_fault_are_absent_and_nothing_is_written() {
    let mut msrs = FakeMsrs::default();
    check_first_line(amd(true, 0), &mut msrs, &PmuStatus::Absent, VIRTUAL);
    assert!(msrs.writes.is_empty(), "{:x?}", msrs.writes);
}

#[test]
fn a_failure_without_a_hypervisor_is_broken_hardware() {
    let mut msrs = FakeMsrs { swallows_writes: true, ..FakeMsrs::with(K7_MSRS) };
    let cpuid = PmuCpuid { leaf_1_ecx: 0, ..amd(false, 0) };
    let (report, lines) = check(cpuid, &mut msrs);
    assert_eq!(report.status, PmuStatus::Broken);
    assert_eq!(
        lines[0].1,
        "Performance Events: Broken PMU hardware detected, using software events only."
    );
    assert_eq!(lines[1], (Level::Error, "Failed to access perfctr msr (MSR c0010007 is 0)".into()));
}

#[test]
fn working_counters_are_present_and_left_as_found() {
    let mut msrs = FakeMsrs { counts: true, ..FakeMsrs::with(CORE_MSRS) };
    msrs.registers.insert(0xc001_0201, 7);
    let before = msrs.registers.clone();
    let driver = "Fam17h+ core perfctr, AMD".to_owned();
    let line = "Performance Events: Fam17h+ core perfctr, AMD PMU driver.";
    check_first_line(amd(true, 0), &mut msrs, &PmuStatus::Present { driver }, line);
    assert_eq!(msrs.registers, before);
}

#[test]
fn counters_that_hold_values_but_do_not_count_are_dead() {
    let mut msrs = FakeMsrs::with(CORE_MSRS);
    assert_eq!(check(amd(true, 0), &mut msrs).0.status, PmuStatus::PresentDead);
}

#[test]
fn a_counter_left_running_is_a_broken_bios() {
    let mut msrs = FakeMsrs { counts: true, ..FakeMsrs::with(CORE_MSRS) };
    msrs.registers.insert(0xc001_0200, 0x53_0076);
    let (report, lines) = check(amd(true, 0), &mut msrs);
    assert_eq!(report.status, PmuStatus::BrokenBios { msr: 0xc001_0200, value: 0x53_0076 });
    assert_eq!(
        lines[0].1,
        "Performance Events: Fam17h+ core perfctr, Broken BIOS detected, complain to your hardware vendor."
    );
    let text = "[Firmware Bug]: the BIOS has corrupted hw-PMU resources (MSR c0010200 is 530076)";
    assert_eq!(lines[1], (Level::Error, text.into()));
    assert_eq!(lines[2].1, "AMD PMU driver.");
}

#[test]
fn all_counters_running_leaves_none_to_test() {
    let mut msrs = FakeMsrs::with(K7_MSRS);
    msrs.registers.extend((0..4).map(|number| (0xc001_0000 + number, ENABLE)));
    check_first_line(amd(false, 0), &mut msrs, &PmuStatus::Absent, VIRTUAL);
}

#[test]
fn registers_are_reported_as_found_before_the_first_write() {
    let mut msrs =
        FakeMsrs { counts: true, ..FakeMsrs::with(CORE_MSRS.chain(0xc000_0300..0xc000_0302)) };
    msrs.registers.insert(0xc000_0301, 0x3f);
    let (report, _) = check(amd(true, 6), &mut msrs);
    assert_eq!(report.msrs.len(), 2 + 12);
    assert_eq!(report.msrs[0], MsrReading { index: 0xc000_0301, value: Some(0x3f) });
    assert_eq!(report.msrs[13], MsrReading { index: 0xc001_020b, value: Some(0) });
    assert_eq!(msrs.registers[&0xc000_0301], 0x3f);
}

#[test]
fn arming_leaves_one_counter_running_and_no_register_clean() {
    let globals = [0xc000_0300, 0xc000_0301, 0xc000_0303];
    let mut msrs = FakeMsrs::with(CORE_MSRS.chain(globals));
    msrs.registers.insert(0xc000_0301, 0x3f);
    assert!(arm(&amd(true, 6), 1000, &mut msrs));
    assert_eq!(msrs.registers[&0xc001_0200], 0x53_0076, "as Linux's watchdog would write it");
    assert_eq!(msrs.registers[&0xc001_0201], (1 << 48) - 1000);
    assert_eq!((msrs.registers[&0xc000_0301], msrs.registers[&0xc000_0303]), (1, 0x20));
    for number in 1..6 {
        assert_eq!(msrs.registers[&(0xc001_0200 + 2 * number)], 0x13_0076, "{number} is not idle");
        assert_ne!(msrs.registers[&(0xc001_0201 + 2 * number)], 0, "{number} is clean");
    }
    assert_eq!(msrs.writes.last(), Some(&0xc001_0200), "nothing runs before all is written");
}

#[test]
fn what_cannot_be_armed_is_said() {
    assert!(!arm(&amd(true, 6), 1000, &mut FakeMsrs::with(CORE_MSRS)), "the globals fault");
    assert!(!arm(&intel([0; 4]), 1000, &mut FakeMsrs::default()));
    let mut intel_msrs = FakeMsrs::with((0x186..0x18a).chain(0xc1..0xc5).chain([0x38f]));
    assert!(arm(&intel([0x0730_0402, 0, 0, 3]), 1000, &mut intel_msrs));
    assert_eq!(intel_msrs.registers[&0x186], 0x53_003c);
    let mut k7 = FakeMsrs::with(K7_MSRS);
    assert!(arm(&amd(false, 0), 1000, &mut k7));
    assert_eq!(k7.registers[&0xc001_0000], 0x53_0076);
}

#[test]
fn intel_without_an_architectural_pmu_has_no_driver() {
    let line = "Performance Events: unsupported CPU family 6 model 85 no PMU driver, software events only.";
    check_first_line(intel([0; 4]), &mut FakeMsrs::default(), &PmuStatus::Absent, line);
}

#[test]
fn an_intel_fixed_counter_left_running_is_found() {
    let indices = (0x186..0x18a).chain(0xc1..0xc5).chain(0x309..0x30c).chain(0x38d..0x390);
    let mut msrs = FakeMsrs { counts: true, ..FakeMsrs::with(indices) };
    let cpuid = intel([0x0730_0402, 0, 0, 3]);
    assert_eq!(check(cpuid, &mut msrs).0.status, PmuStatus::Present { driver: "Intel".into() });
    msrs.registers.insert(0x38d, 0x20);
    let expected = PmuStatus::BrokenBios { msr: 0x38d, value: 0x20 };
    assert_eq!(check(cpuid, &mut msrs).0.status, expected);
}

#[test]
fn an_unknown_vendor_has_no_driver() {
    let cpuid = PmuCpuid { vendor: *b"TCGTCGTCGTCG", ..amd(true, 6) };
    let line = "Performance Events: no PMU driver, software events only.";
    check_first_line(cpuid, &mut FakeMsrs::default(), &PmuStatus::Absent, line);
}
