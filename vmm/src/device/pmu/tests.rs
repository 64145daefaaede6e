use super::*;

/// Cycles not halted, both rings, interrupt, enabled: what Linux's NMI watchdog writes.
const CYCLES: u64 = 0x53_0076;

fn core_select(number: u32) -> u32 {
    CORE_SELECT + 2 * number
}

fn shapes() -> Vec<Shape> {
    [(1, 4), (1, 6), (2, 4), (2, 5), (2, 6)]
        .map(|(version, counters)| Shape::new(version, counters).unwrap())
        .to_vec()
}

/// Every register number in and around the model's ranges.
fn all_indices() -> impl Iterator<Item = u32> {
    (0xc000_02f0..0xc000_0310).chain(0xc000_fff0..0xc001_0010).chain(0xc001_01f0..0xc001_0220)
}

#[test]
fn only_shapes_that_exist_can_be_had() {
    let check = |version, counters, expected| {
        assert_eq!(Shape::new(version, counters).is_ok(), expected, "{version} {counters}");
    };
    for counters in 0..=u8::MAX {
        check(0, counters, false);
        check(1, counters, counters == 4 || counters == 6);
        check(2, counters, (4..=6).contains(&counters));
        check(3, counters, false);
    }
    assert_eq!(Shape::new(2, 6), Ok(Shape::FULL));
}

#[test]
fn registers_that_the_shape_lacks_raise_a_fault() {
    for shape in shapes() {
        let mut pmu = Pmu::new(shape, 0);
        let core_end = CORE_SELECT + 2 * u32::from(shape.counters());
        for index in all_indices() {
            let expected = (K7_SELECT..K7_SELECT + 8).contains(&index)
                || shape.has_core() && (CORE_SELECT..core_end).contains(&index)
                || shape.has_globals() && (0xc000_0300..=0xc000_0303).contains(&index);
            assert_eq!(pmu.read(index, 0).is_ok(), expected, "read {index:x} of {shape}");
            assert_eq!(pmu.write(index, 0, 0).is_ok(), expected, "write {index:x} of {shape}");
            assert_eq!(pmu.put_back(index, 0).is_ok(), expected, "put back {index:x} of {shape}");
            let reserved = REGISTERS.iter().any(|range| range.contains(&index));
            assert!(reserved || !expected, "{index:x} would not reach the model");
        }
    }
}

#[test]
fn at_power_on_all_is_clear_and_the_global_enables_are_set() {
    for shape in shapes() {
        let mut pmu = Pmu::new(shape, 0);
        for index in all_indices() {
            let expected = match index {
                GLOBAL_CONTROL => (1 << shape.counters()) - 1,
                _ => 0,
            };
            let found = pmu.read(index, 1_000_000).unwrap_or(expected);
            assert_eq!(found, expected, "{index:x} of {shape}");
        }
    }
}

#[test]
fn reserved_bits_are_dropped() {
    let check = |index, expected| {
        let mut pmu = Pmu::new(Shape::FULL, 0);
        // Not enabled, so that nothing counts in between.
        pmu.write(GLOBAL_CONTROL, 0, 0).unwrap();
        assert_eq!(pmu.write(index, u64::MAX, 0), Ok(()));
        assert_eq!(pmu.read(index, 0), Ok(expected), "{index:x}");
    };
    for number in 0..6 {
        check(core_select(number), 0x0000_000f_ffd7_ffff);
        check(core_select(number) + 1, 0xffff_ffff_ffff);
    }
    check(K7_SELECT, 0x0000_000f_ffd7_ffff);
    check(K7_COUNT + 3, 0xffff_ffff_ffff);
    check(GLOBAL_CONTROL, 0x3f);
    check(GLOBAL_STATUS, 0);
    check(GLOBAL_STATUS_CLEAR, 0);
    check(GLOBAL_STATUS_SET, 0);
}

#[test]
fn legacy_registers_are_the_first_four_core_ones() {
    let mut pmu = Pmu::new(Shape::FULL, 0);
    for number in 0..4 {
        pmu.write(K7_SELECT + number, 0x10_0000 + u64::from(number), 0).unwrap();
        pmu.write(core_select(number) + 1, 70 + u64::from(number), 0).unwrap();
        assert_eq!(pmu.read(core_select(number), 0), Ok(0x10_0000 + u64::from(number)));
        assert_eq!(pmu.read(K7_COUNT + number, 0), Ok(70 + u64::from(number)));
    }
    for number in 4..6 {
        assert_eq!(pmu.read(core_select(number), 0), Ok(0), "no legacy register leads here");
    }
}

#[test]
fn status_is_set_and_cleared_by_its_own_registers_alone() {
    let mut pmu = Pmu::new(Shape::FULL, 0);
    let status = |pmu: &mut Pmu| pmu.read(GLOBAL_STATUS, 0).unwrap();
    pmu.write(GLOBAL_STATUS, 0x3f, 0).unwrap();
    assert_eq!(status(&mut pmu), 0, "the guest cannot write the status itself");
    pmu.write(GLOBAL_STATUS_SET, 1 << 63 | 0x15, 0).unwrap();
    assert_eq!(status(&mut pmu), 0x15);
    pmu.write(GLOBAL_STATUS_CLEAR, 1 << 63 | 0x11, 0).unwrap();
    assert_eq!(status(&mut pmu), 0x04);
    pmu.put_back(GLOBAL_STATUS_CLEAR, 0x3f).unwrap();
    pmu.put_back(GLOBAL_STATUS_SET, 0x3f).unwrap();
    assert_eq!(status(&mut pmu), 0x04, "what only acts takes no value");
    pmu.put_back(GLOBAL_STATUS, u64::MAX).unwrap();
    assert_eq!(status(&mut pmu), 0x3f);
    pmu.put_back(GLOBAL_STATUS, 0).unwrap();
    assert_eq!(status(&mut pmu), 0);
}

#[test]
fn cycles_count_the_ticks_while_enabled() {
    let check = |select, control, expected| {
        let mut pmu = Pmu::new(Shape::FULL, 0);
        pmu.write(GLOBAL_CONTROL, control, 0).unwrap();
        pmu.write(CORE_SELECT + 1, 100, 0).unwrap();
        pmu.write(CORE_SELECT, select, 1000).unwrap();
        assert_eq!(pmu.read(CORE_SELECT + 1, 4500), Ok(expected), "{select:x} {control:x}");
    };
    check(CYCLES, 1, 3600);
    check(CYCLES, 0x3f, 3600);
    check(CYCLES, 0x3e, 100);
    check(CYCLES & !SELECT_ENABLE, 1, 100);
    check(CYCLES & !SELECT_RINGS, 1, 100);
    check(CYCLES & !(1 << 16), 1, 3600);
    check(CYCLES & !SELECT_INTERRUPT, 1, 3600);
}

#[test]
fn without_globals_the_enable_bit_is_enough() {
    let mut pmu = Pmu::new(Shape::new(1, 4).unwrap(), 0);
    pmu.write(K7_SELECT + 2, CYCLES, 7).unwrap();
    assert_eq!(pmu.read(K7_COUNT + 2, 17), Ok(10));
    assert_eq!(pmu.read(K7_COUNT + 1, 17), Ok(0));
}

#[test]
fn a_clock_that_goes_back_counts_nothing() {
    let mut pmu = Pmu::new(Shape::FULL, 0);
    pmu.write(CORE_SELECT, CYCLES, 1000).unwrap();
    assert_eq!(pmu.read(CORE_SELECT + 1, 900), Ok(0));
    assert_eq!(pmu.read(CORE_SELECT + 1, 1000), Ok(0));
    assert_eq!(pmu.read(CORE_SELECT + 1, 1001), Ok(1));
}

/// What a counter of `event` shows after each of some steps of the clock.
fn counts(event: u64, seed: u64) -> Vec<u64> {
    let mut pmu = Pmu::new(Shape::FULL, seed);
    pmu.write(CORE_SELECT, SELECT_ENABLE | SELECT_RINGS | event, 0).unwrap();
    [10, 1_000, 1_000_000, 1_000_003].map(|now| pmu.read(CORE_SELECT + 1, now).unwrap()).to_vec()
}

#[test]
fn other_events_come_at_a_rate_that_the_seed_decides() {
    for event in [0x00, 0xc0, 0x1_00c2, 0x2_0000_0029, 0xff40] {
        let once = counts(event, 1);
        assert_eq!(once, counts(event, 1), "{event:x} is not reproducible");
        assert_ne!(once, counts(event, 2), "{event:x} does not depend on the seed");
        assert!(once[2] > 0 && once[2] <= 1_000_000, "{event:x}: {once:?}");
    }
    assert_ne!(counts(0xc0, 1), counts(0xc1, 1));
    assert_ne!(counts(0x1c0, 1), counts(0x2c0, 1), "the unit mask belongs to the event");
    assert_ne!(counts(0xc0, 1), counts(0x1_0000_00c0, 1), "so do the high bits of its number");
}

#[test]
fn how_often_one_looks_does_not_change_what_is_counted() {
    let select = SELECT_ENABLE | SELECT_RINGS | 0xc0;
    let (mut often, mut once) = (Pmu::new(Shape::FULL, 9), Pmu::new(Shape::FULL, 9));
    often.write(CORE_SELECT, select, 0).unwrap();
    once.write(CORE_SELECT, select, 0).unwrap();
    (0..10_000).for_each(|now| often.advance(now));
    assert_eq!(often.read(CORE_SELECT + 1, 9999), once.read(CORE_SELECT + 1, 9999));
}

#[test]
fn an_overflow_wraps_shows_in_the_status_and_interrupts_once() {
    let check = |shape: Shape, select: u64, interrupts: bool| {
        let mut pmu = Pmu::new(shape, 0);
        pmu.write(K7_COUNT, COUNT_MASK - 9, 0).unwrap();
        pmu.write(K7_SELECT, select, 0).unwrap();
        assert_eq!(pmu.ticks_to_interrupt(), interrupts.then_some(10), "{shape}");
        pmu.advance(9);
        assert!(!pmu.take_interrupt());
        pmu.advance(10);
        assert_eq!(pmu.take_interrupt(), interrupts, "{shape} {select:x}");
        assert!(!pmu.take_interrupt(), "once");
        assert_eq!(pmu.read(K7_COUNT, 15), Ok(5));
        if shape.has_globals() {
            assert_eq!(pmu.read(GLOBAL_STATUS, 15), Ok(1));
        }
        assert!(pmu.ticks_to_interrupt().is_none_or(|ticks| ticks == COUNT_MASK - 4));
    };
    for shape in shapes() {
        check(shape, CYCLES, true);
        check(shape, CYCLES & !SELECT_INTERRUPT, false);
    }
}

#[test]
fn the_nearest_interrupt_is_the_one_that_counts() {
    let mut pmu = Pmu::new(Shape::FULL, 3);
    assert_eq!(pmu.ticks_to_interrupt(), None);
    for (number, distance) in [(0, 5_000), (1, 300), (5, 700)] {
        pmu.write(core_select(number) + 1, COUNT_MASK + 1 - distance, 0).unwrap();
        pmu.write(core_select(number), CYCLES, 0).unwrap();
    }
    assert_eq!(pmu.ticks_to_interrupt(), Some(300));
    pmu.write(GLOBAL_CONTROL, 0x3d, 100).unwrap();
    assert_eq!(pmu.ticks_to_interrupt(), Some(600));
    pmu.write(GLOBAL_CONTROL, 0, 200).unwrap();
    assert_eq!(pmu.ticks_to_interrupt(), None);
}

#[test]
fn an_interrupt_is_due_exactly_when_it_was_said_to_be() {
    for event in [0x76, 0xc0, 0xc2, 0x40] {
        let mut pmu = Pmu::new(Shape::FULL, 5);
        pmu.write(CORE_SELECT + 1, COUNT_MASK - 12_345, 0).unwrap();
        pmu.write(CORE_SELECT, SELECT_ENABLE | SELECT_INTERRUPT | SELECT_RINGS | event, 0).unwrap();
        let ticks = pmu.ticks_to_interrupt().unwrap();
        pmu.advance(ticks - 1);
        assert!(!pmu.take_interrupt(), "{event:x} too early");
        assert_eq!(pmu.ticks_to_interrupt(), Some(1));
        pmu.advance(ticks);
        assert!(pmu.take_interrupt(), "{event:x} too late");
    }
}

#[test]
fn counters_go_on_in_another_model_whose_clock_shows_another_time() {
    let mut pmu = Pmu::new(Shape::FULL, 3);
    pmu.write(CORE_SELECT + 1, COUNT_MASK - 999, 50).unwrap();
    pmu.write(CORE_SELECT, CYCLES, 50).unwrap();
    pmu.write(CORE_SELECT + 4, CYCLES & !0xff | 0xc0, 50).unwrap();
    pmu.advance(650);
    let mut other = Pmu::new(Shape::FULL, 3);
    other.restore(&pmu.save(), 1 << 40);
    assert_eq!(other.save(), pmu.save());
    assert_eq!(other.ticks_to_interrupt(), Some(400));
    for (one, another) in [(650, 1 << 40), (1049, (1 << 40) + 399), (1050, (1 << 40) + 400)] {
        for index in REGISTERS.into_iter().flatten() {
            assert_eq!(pmu.read(index, one), other.read(index, another), "{index:x} at {one}");
        }
    }
    assert!(pmu.take_interrupt() && other.take_interrupt());
}

#[test]
fn bits_that_no_register_has_do_not_come_from_a_file() {
    let mut saved = Pmu::new(Shape::FULL, 0).save();
    (saved.global_status, saved.global_control) = (u64::MAX, u64::MAX);
    saved.counters = [Counter { select: u64::MAX, value: u64::MAX, fraction: u64::MAX }; 6];
    let mut pmu = Pmu::new(Shape::new(2, 4).unwrap(), 0);
    pmu.restore(&saved, 7);
    assert_eq!((pmu.global_status, pmu.global_control), (0xf, 0xf));
    let counter = Counter { select: !SELECT_RESERVED, value: COUNT_MASK, fraction: ONE_A_TICK - 1 };
    assert_eq!(pmu.counters[..4], [counter; 4]);
    assert_eq!(pmu.counters[4..], [Counter::default(); 2]);
}

#[test]
fn extreme_values_neither_stop_nor_break_the_model() {
    let mut pmu = Pmu::new(Shape::FULL, u64::MAX);
    let mut random = 1_u64;
    let mut now = 0_u64;
    for _ in 0..20_000 {
        random = mix(random);
        let index = match random % 3 {
            0 => GLOBAL_STATUS + (random >> 8) as u32 % 4,
            1 => K7_SELECT + (random >> 8) as u32 % 8,
            _ => CORE_SELECT + (random >> 8) as u32 % 12,
        };
        let value = [mix(random), u64::MAX, CYCLES, COUNT_MASK][(random >> 40) as usize % 4];
        now = now.wrapping_add([0, 1, 1 << 50, u64::MAX][(random >> 44) as usize % 4]);
        pmu.write(index, value, now).unwrap();
        let read = pmu.read(index, now).unwrap();
        assert!(read <= COUNT_MASK, "{index:x} is {read:x}");
        assert!(pmu.ticks_to_interrupt() != Some(0), "an overflow that is always due");
        pmu.take_interrupt();
    }
}
