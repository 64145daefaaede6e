use super::*;
use crate::device::pmu::{Pmu, REGISTERS, Shape};
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

/// What a reset without faults writes.
fn clean_sequence(cpuid: &CpuId) -> Vec<(u32, u64)> {
    reset_sequence(cpuid, &Faults::default())
}

#[test]
fn amd_legacy_counters_are_four() {
    let expected: Vec<_> = (0xc001_0000..=0xc001_0007).map(|msr| (msr, 0)).collect();
    assert_eq!(clean_sequence(&amd(&[])), expected);
}

#[test]
fn amd_core_counters_are_six_and_selectors_go_first() {
    let writes = clean_sequence(&amd(&[leaf(AMD_EXTENDED_FEATURES, 0, 0, 1 << 23, 0)]));
    assert_eq!(writes.len(), 12);
    assert_eq!((writes[0], writes[5]), ((0xc001_0200, 0), (0xc001_020a, 0)));
    assert_eq!((writes[6], writes[11]), ((0xc001_0201, 0), (0xc001_020b, 0)));
}

#[test]
fn globals_are_off_first_and_have_their_reset_value_last() {
    let cpuid =
        amd(&[leaf(AMD_EXTENDED_FEATURES, 0, 0, 1 << 23, 0), leaf(0x8000_0022, 1, 6, 0, 0)]);
    let writes = clean_sequence(&cpuid);
    assert_eq!(writes.first(), Some(&(0xc000_0301, 0)));
    assert_eq!(writes.last(), Some(&(0xc000_0301, 0x3f)));
    let cpuid = intel(&[leaf(0xa, 4 << 8 | 2, 0, 0, 3)]);
    let writes = clean_sequence(&cpuid);
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
    for (msr, _) in all_kinds().iter().flat_map(clean_sequence) {
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
        all_kinds().iter().flat_map(clean_sequence).map(|(msr, _)| msr).collect();
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
    check(PmuAbsence::Emulated, false);
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
    assert_eq!(Registers::intel(&cpuid, &Faults::default()).sequence(|_| Some(0)), []);
}
#[test]
fn a_shown_pmu_is_what_the_sequence_and_the_model_take_it_for() {
    for (version, counters) in [(1, 4), (1, 6), (2, 4), (2, 5), (2, 6)] {
        let shape = Shape::new(version, counters).unwrap();
        let mut cpuid = amd(&[
            leaf(0x8000_0000, 0x8000_001e, 0, 0, 0),
            leaf(AMD_EXTENDED_FEATURES, 0, 0, 0, 0),
        ]);
        let globals = shape.has_globals().then_some(counters);
        show_amd(&mut cpuid, shape.has_core(), globals).unwrap();
        let range = Leaf::get(&cpuid, 0x8000_0000, 0).eax;
        assert!(range >= AMD_PMU || !shape.has_globals(), "{range:x} hides the leaf of {shape}");
        let expected = 2 * usize::from(counters) + if version == 2 { 4 } else { 0 };
        assert_eq!(clean_sequence(&cpuid).len(), expected, "{shape}");
        let mut model = Pmu::new(shape, 0);
        for index in REGISTERS.into_iter().flatten() {
            let _ = model.write(index, u64::MAX, 0);
        }
        for (index, value) in clean_sequence(&cpuid) {
            assert_eq!(model.put_back(index, value), Ok(()), "{index:x} of {shape}");
        }
        let mut fresh = Pmu::new(shape, 0);
        for index in REGISTERS.into_iter().flatten() {
            assert_eq!(model.read(index, 99), fresh.read(index, 99), "{index:x} of {shape}");
        }
    }
}

#[test]
fn each_fault_leaves_out_its_own_writes() {
    let core = leaf(AMD_EXTENDED_FEATURES, 0, 0, 1 << 23, 0);
    let v2 = amd(&[core, leaf(0x8000_0022, 1, 6, 0, 0)]);
    let written = |cpuid: &CpuId, faults: &[Fault]| -> Vec<u32> {
        let faults = Faults::new(faults.to_vec(), PmuPolicy::Host, true).unwrap();
        reset_sequence(cpuid, &faults).iter().map(|(index, _)| *index).collect()
    };
    let globals = [0xc000_0301, 0xc000_0300, 0xc000_0302, 0xc000_0301];
    let counters: Vec<_> =
        (0..6).map(|i| 0xc001_0200 + 2 * i).chain((0..6).map(|i| 0xc001_0201 + 2 * i)).collect();
    let k7: Vec<_> = (0xc001_0000..=0xc001_0007).collect();
    let around = |inner: &[u32]| [&globals[..1], inner, &globals[1..]].concat();
    assert_eq!(written(&v2, &[]), around(&counters));
    assert_eq!(written(&v2, &[Fault::PmuNotReset]), globals);
    assert_eq!(written(&v2, &[Fault::PmuK7Only]), around(&k7));
    assert_eq!(written(&v2, &[Fault::GlobalsLeft]), counters);
    assert!(written(&v2, &[Fault::GlobalsLeft, Fault::PmuNotReset]).is_empty());
    assert_eq!(written(&v2, &[Fault::GlobalsLeft, Fault::PmuK7Only]), k7);
    let intel = intel(&[leaf(0xa, 4 << 8 | 2, 0, 0, 3)]);
    assert_eq!(written(&intel, &[Fault::PmuNotReset]), [0x38f, 0x38e, 0x390, 0x38f]);
    assert_eq!(written(&intel, &[Fault::GlobalsLeft]).len(), 1 + 4 + 4 + 3);
    assert!(written(&intel, &[Fault::GlobalsLeft, Fault::PmuNotReset]).is_empty());
}

#[test]
fn faults_in_registers_that_are_not_there_are_refused() {
    let core = leaf(AMD_EXTENDED_FEATURES, 0, 0, 1 << 23, 0);
    let check = |cpuid: &CpuId, fault, expected| {
        let faults = Faults::new(vec![fault], PmuPolicy::Host, true).unwrap();
        assert_eq!(check_faults(cpuid, &faults).is_ok(), expected, "{fault}");
    };
    let (k7, v1) = (amd(&[]), amd(&[core]));
    let (four, five) =
        (amd(&[core, leaf(0x8000_0022, 1, 4, 0, 0)]), amd(&[core, leaf(0x8000_0022, 1, 5, 0, 0)]));
    check(&k7, Fault::PmuK7Only, false);
    check(&v1, Fault::PmuK7Only, true);
    check(&four, Fault::PmuK7Only, false);
    check(&five, Fault::PmuK7Only, true);
    check(&v1, Fault::GlobalsLeft, false);
    check(&four, Fault::GlobalsLeft, true);
    check(&k7, Fault::PmuNotReset, true);
    check(&intel(&[leaf(0xa, 4 << 8 | 2, 0, 0, 3)]), Fault::PmuK7Only, false);
}

#[test]
fn values_go_to_the_registers_that_they_are_of_and_nothing_counts_before_all_are_there() {
    for cpuid in all_kinds() {
        let registers = state_registers(&cpuid);
        let values: Vec<_> =
            registers.iter().map(|index| (*index, u64::from(*index) << 8 | 1)).collect();
        let writes = restore_sequence(&cpuid, &values);
        // In the end each register has its own value.
        for (index, value) in &values {
            let last = writes.iter().rfind(|(written, _)| written == index);
            assert_eq!(last, Some(&(*index, *value)), "{index:#x}");
        }
        // What lets counters run is off until the last counter has its value.
        let Registers { global_control, controls, counters, .. } =
            Registers::of(&cpuid, &Faults::default());
        let at = |wanted: (u32, u64)| writes.iter().position(|write| *write == wanted).unwrap();
        let last = counters.iter().map(|index| at((*index, u64::from(*index) << 8 | 1))).max();
        for control in controls.into_iter().chain(global_control.map(|(control, _)| control)) {
            assert!(Some(at((control, 0))) < last, "{control:#x} is not off in time");
            assert!(
                Some(at((control, u64::from(control) << 8 | 1))) > last,
                "{control:#x} is on too early"
            );
        }
        if let Some((control, _)) = global_control {
            assert_eq!(writes.last().unwrap().0, control);
        }
    }
}

#[test]
fn registers_that_no_value_is_known_of_are_left_alone() {
    let cpuid = &all_kinds()[2];
    let values = [(0xc001_0202, 0x53_0076), (0xc001_0203, 5)];
    let expected = [(0xc001_0202, 0), (0xc001_0203, 5), (0xc001_0202, 0x53_0076)];
    assert_eq!(restore_sequence(cpuid, &values), expected);
}
