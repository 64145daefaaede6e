//! What no driver may do, and what ours does not do either.

use super::*;

/// Posts `chains`, each as (queue, head, descriptors), and expects these kinds and no others, and the first one's words.
#[track_caller]
fn check(chains: &[(u16, u16, &[Desc])], kinds: &[Kind], words: &str) {
    check_on(VIRTIO_ID_VSOCK, 3, chains, kinds, words);
}

#[track_caller]
fn check_on(
    device_type: u32,
    queues: u16,
    chains: &[(u16, u16, &[Desc])],
    kinds: &[Kind],
    words: &str,
) {
    let mut guest = Guest::with(device_type, queues);
    for (queue, head, chain) in chains {
        guest.post(*queue, *head, chain);
    }
    let found = guest.found();
    assert_eq!(
        found.iter().map(|violation| violation.name).collect::<Vec<_>>(),
        kinds,
        "{found:#?}"
    );
    assert!(found[0].detail.contains(words), "{found:#?}");
    // Whatever it was, it can be given back.
    chains.iter().for_each(|(queue, head, _)| guest.release(*queue, *head));
    guest.expect_idle();
}

use Kind::*;

#[test]
fn buffers_have_to_be_in_ram() {
    let outside = "descriptor 0 of vsock queue 1 (to host), 0x100000+0x1, is not in RAM";
    check(&[(TO_HOST, 0, &[(1 << 20, 1, 0, 0)])], &[OutsideRam], outside);
    check(&[(TO_HOST, 0, &[((1 << 20) - 4, 5, 0, 0)])], &[OutsideRam], "not in RAM");
    check(&[(TO_HOST, 0, &[(u64::MAX, u32::MAX, 0, 0)])], &[OutsideRam], "not in RAM");
    check(&[(TO_GUEST, 0, &[(u64::MAX - 63, 64, WRITE, 0)])], &[OutsideRam], "not in RAM");
}

#[test]
fn each_queue_has_its_direction() {
    let check_one = |queue, flags, what| {
        check(&[(queue, 0, &[(0x2_0000, 64, flags, 0)])], &[WrongDirection], what);
    };
    check_one(
        TO_HOST,
        WRITE,
        "queue 1 (to host), 0x20000+0x40, is for the device to write, where it reads",
    );
    check_one(
        TO_GUEST,
        0,
        "queue 0 (to guest), 0x20000+0x40, is for the device to read, where it writes",
    );
    check(
        &[(EVENT, 0, &[(0x2_0000, 64, 0, 0)])],
        &[WrongDirection, TooShort],
        "queue 2 (event), 0x20000+0x40, is for the device to read",
    );
    let order: &[Desc] = &[(0x2_0000, 64, NEXT | WRITE, 1), (0x3_0000, 64, 0, 0)];
    check_on(
        VIRTIO_ID_BLOCK,
        1,
        &[(0, 0, order)],
        &[WrongOrder],
        "descriptor 1 of block queue 0 (requests)",
    );
}

#[test]
fn answers_need_room() {
    for len in [1, 3] {
        check(
            &[(EVENT, 2, &[(0x2_0000, len, WRITE, 0)])],
            &[TooShort],
            "descriptor 2 of vsock queue 2 (event) has less",
        );
    }
    check_on(VIRTIO_ID_BLOCK, 1, &[(0, 0, &[(0x2_0000, 16, 0, 0)])], &[TooShort], "less room");
    let mut guest = Guest::new();
    guest.post(EVENT, 0, &[(0x2_0000, 4, WRITE, 0)]);
    guest.post(EVENT, 1, &[(0x2_0040, 2, WRITE | NEXT, 2), (0x2_0080, 2, WRITE, 0)]);
    assert_eq!(guest.found(), []);
}

#[test]
fn chains_have_an_end_within_their_table() {
    let beyond = "descriptor 8 of vsock queue 1 (to host) is beyond the table";
    check(&[(TO_HOST, SIZE, &[])], &[BrokenChain], beyond);
    check(&[(TO_HOST, u16::MAX, &[])], &[BrokenChain], "beyond the table");
    check(&[(TO_HOST, 0, &[(0x2_0000, 4, NEXT, 8)])], &[BrokenChain], beyond);
    check(
        &[(TO_HOST, 0, &[(0x2_0000, 4, NEXT, 0)])],
        &[BrokenChain],
        "descriptor 0 of vsock queue 1 (to host) follows itself",
    );
    let long_way_round: &[Desc] =
        &[(0x2_0000, 4, NEXT, 1), (0x3_0000, 4, NEXT, 2), (0x4_0000, 4, NEXT, 1)];
    check(
        &[(TO_HOST, 0, long_way_round)],
        &[BrokenChain],
        "descriptor 1 of vsock queue 1 (to host) follows itself",
    );
}

#[test]
fn indirect_tables_have_rules() {
    let check_table = |(start, len, flags): (u64, u32, u16), kind, what: &str| {
        let mut guest = Guest::new();
        // Each entry leads to the next, the last to the first.
        for index in 0..16 {
            let desc = (0x3_0000 + 64 * u64::from(index), 4, NEXT, (index + 1) % 16);
            write_descriptor(&guest.ram, 0x2_0000, index, desc);
        }
        write_descriptor(&guest.ram, 0x2_1000, 0, (0x2_0000, 16, INDIRECT, 0));
        guest.post(TO_HOST, 3, &[(start, len, INDIRECT | flags, 4)]);
        let found = guest.found();
        assert_eq!((found.len(), found[0].name), (1, kind), "{found:?}");
        assert!(found[0].detail.contains(what), "{found:?}");
        guest.release(TO_HOST, 3);
        guest.expect_idle();
    };
    check_table((0x2_0000, 0, 0), BrokenChain, "no whole number");
    check_table((0x2_0000, 17, 0), BrokenChain, "no whole number");
    check_table((0x2_0000, 16 * 9, 0), BrokenChain, "more descriptors than the queue has");
    check_table((0x2_0000, 32, NEXT), BrokenChain, "with something behind it");
    check_table((0x2_1000, 16, 0), BrokenChain, "an indirect table in an indirect table");
    check_table(
        (0x2_0000, 32, 0),
        BrokenChain,
        "descriptor 2 of vsock queue 1 (to host) is beyond the table",
    );
    check_table((1 << 20, 16, 0), OutsideRam, "the indirect table of descriptor 3");
    // The table of the queue itself, and a ring.
    check_table((0x3000, 16, 0), OverlapsRing, "overlaps the descriptor table of vsock queue 1");
    check_table(
        (0x2000, 16, 0),
        OverlapsRing,
        "overlaps the used ring of vsock queue 0 (to guest), 0x2000+0x46",
    );
    // A loop ends when there were as many as the queue has.
    check_table((0x2_0000, 16 * 8, 0), BrokenChain, "as many as the queue has");
}

#[test]
fn indirect_tables_have_to_be_agreed_on() {
    let mut guest = Guest::new();
    guest.device.begin(0, &guest.queues);
    guest.post(TO_HOST, 0, &[(0x2_0000, 16, INDIRECT, 0)]);
    assert!(guest.found()[0].detail.contains("not agreed on"));
}

#[test]
fn an_index_that_jumps_ends_the_audit_of_its_queue() {
    let mut guest = Guest::new();
    guest.ram.write_obj(SIZE + 1, GuestAddress(0x1002)).unwrap();
    guest.device.look();
    let words = "the available ring of vsock queue 0 (to guest), 0x1000+0x16, has an index that jumped by 9";
    assert_eq!(guest.found()[0].detail, words);
    guest.device.look();
    guest.post(TO_GUEST, 0, &[(1 << 20, 4, WRITE, 0)]);
    assert_eq!(guest.found(), []);
    // The others go on.
    guest.post(TO_HOST, 0, &[(1 << 20, 4, 0, 0)]);
    assert_eq!(guest.kinds(), [OutsideRam]);
}

#[test]
fn an_index_that_jumps_back_is_a_jump() {
    let mut guest = Guest::new();
    guest.post(TO_GUEST, 0, &[(0x2_0000, 64, WRITE, 0)]);
    guest.ram.write_obj(0_u16, GuestAddress(0x1002)).unwrap();
    guest.device.look();
    assert_eq!(guest.kinds(), [IndexJump]);
}

#[test]
fn nothing_is_posted_twice() {
    let one: &[Desc] = &[(0x2_0000, 64, WRITE, 0)];
    let words =
        "descriptor 1 of vsock queue 0 (to guest) is made available again before it was used";
    check(&[(TO_GUEST, 1, one), (TO_GUEST, 1, one)], &[PostedTwice], words);
    let words = "descriptor 2 of vsock queue 0 (to guest), 0x20000+0x40, overlaps descriptor 1 of vsock queue 0 (to guest), 0x20000+0x40";
    check(&[(TO_GUEST, 1, one), (TO_GUEST, 2, one)], &[PostedTwice], words);
    let shared: &[Desc] = &[(0x3_0000, 64, NEXT | WRITE, 1)];
    check(
        &[(TO_GUEST, 1, one), (TO_GUEST, 0, shared)],
        &[PostedTwice],
        "descriptor 1 of vsock queue 0 (to guest) is in another chain in flight",
    );
}

#[test]
fn a_chain_that_was_posted_twice_comes_back_once() {
    let mut guest = Guest::new();
    guest.post(TO_GUEST, 1, &[(0x2_0000, 64, WRITE, 0)]);
    guest.post(TO_GUEST, 1, &[]);
    guest.release(TO_GUEST, 1);
    guest.release(TO_GUEST, 1);
    guest.expect_idle();
    guest.found();
    guest.post(TO_GUEST, 1, &[(0x2_0000, 64, WRITE, 0)]);
    assert_eq!(guest.found(), []);
}

#[test]
fn buffers_are_disjoint_on_all_queues() {
    let first: (u16, u16, &[Desc]) = (TO_GUEST, 0, &[(0x2_0000, 128, WRITE, 0)]);
    let write = |start, len| [(start, len, WRITE, 0)];
    check(&[first, (TO_GUEST, 1, &write(0x2_0040, 64))], &[OverlapsBuffer], "overlaps");
    check(
        &[first, (EVENT, 1, &write(0x2_0040, 64))],
        &[OverlapsBuffer],
        "queue 2 (event), 0x20040+0x40, overlaps descriptor 0 of vsock queue 0",
    );
    // The same place on another queue was not posted twice by either.
    check(&[first, (EVENT, 1, &write(0x2_0000, 64))], &[OverlapsBuffer], "overlaps");
    check(&[first, (EVENT, 1, &write(0x1_ffc0, 1 << 16))], &[OverlapsBuffer], "overlaps");
    check(&[first, (TO_HOST, 1, &[(0x2_007f, 1, 0, 0)])], &[OverlapsBuffer], "queue 1 (to host)");
    let itself: &[Desc] = &[(0x2_0000, 64, NEXT | WRITE, 1), (0x2_0000, 128, WRITE, 0)];
    check(&[(TO_GUEST, 0, itself)], &[PostedTwice], "descriptor 1");
}

#[test]
fn the_same_bytes_may_be_sent_twice_but_ours_are_not() {
    let send: &[Desc] = &[(0x2_0000, 100, 0, 0)];
    check(&[(TO_HOST, 0, send), (TO_HOST, 1, send)], &[ReadTwice], "overlaps");
    assert_eq!(ReadTwice.level(), Level::Ours);
}

#[test]
fn rings_and_tables_are_nobodys_buffers() {
    for (at, whose) in [
        (0x0, "the descriptor table of vsock queue 0 (to guest), 0x0+0x80"),
        (0x1000, "the available ring of vsock queue 0 (to guest)"),
        (0x8000, "the used ring of vsock queue 2 (event)"),
    ] {
        check(&[(EVENT, 0, &[(at, 64, WRITE, 0)])], &[OverlapsRing], whose);
        check(&[(TO_HOST, 0, &[(at + 17, 1, 0, 0)])], &[OverlapsRing], whose);
    }
    let mut guest = Guest::new();
    write_descriptor(&guest.ram, 0x2_0000, 0, (0x3_0000, 64, 0, 0));
    guest.post(TO_HOST, 0, &[(0x2_0000, 16, INDIRECT, 0)]);
    guest.post(TO_GUEST, 0, &[(0x2_0000, 64, WRITE, 0)]);
    guest.post(TO_HOST, 1, &[(0x2_0000, 16, INDIRECT, 0)]);
    let found = guest.found();
    assert_eq!(found.iter().map(|v| (v.name, v.count)).collect::<Vec<_>>(), [(OverlapsRing, 1); 2]);
    assert!(
        found[0].detail.contains("overlaps the indirect table of descriptor 0 of vsock queue 1")
    );
}

#[test]
fn rings_are_disjoint_on_all_devices() {
    let guest = Guest::new();
    let other = guest.audit.add_device(VIRTIO_ID_BLOCK);
    other.begin(0, &[queue(0x2000)]);
    let found = guest.found();
    let words = "the descriptor table of block queue 0 (requests), 0x2000+0x80, overlaps the used ring of vsock queue 0";
    assert!(found[0].detail.starts_with(words), "{found:#?}");
    assert_eq!(found.iter().map(|v| (v.name, v.count)).collect::<Vec<_>>(), [(OverlapsRing, 3)]);
    // One that goes does not take the other's along.
    other.end();
    let other = guest.audit.add_device(VIRTIO_ID_BLOCK);
    other.begin(0, &[queue(0x2000)]);
    assert_eq!(guest.kinds(), [OverlapsRing]);
}

#[test]
fn rings_lie_in_no_buffer_in_flight() {
    let mut guest = Guest::new();
    guest.post(TO_GUEST, 0, &[(0x2_0000, 0x1000, WRITE, 0)]);
    guest.audit.add_device(VIRTIO_ID_BLOCK).begin(0, &[queue(0x2_0000)]);
    assert_eq!(guest.kinds(), [OverlapsRing]);
}

#[test]
fn buffers_to_write_are_whole_lines() {
    check(
        &[(TO_GUEST, 0, &[(0x2_0010, 48, WRITE, 0)])],
        &[Unaligned],
        "does not begin with a cache line",
    );
    check(&[(TO_GUEST, 0, &[(0x2_0030, 32, WRITE, 0)])], &[Unaligned, Straddles], "");
    check(&[(TO_GUEST, 0, &[(0x2_0030, 128, WRITE, 0)])], &[Unaligned], "");
    let words = "shares a cache line with descriptor 0 of vsock queue 0 (to guest), 0x20000+0x4";
    let first: (u16, u16, &[Desc]) = (TO_GUEST, 0, &[(0x2_0000, 4, WRITE, 0)]);
    check(&[first, (TO_HOST, 1, &[(0x2_0004, 4, 0, 0)])], &[SharesLine], words);
    check(&[first, (EVENT, 1, &[(0x2_0020, 4, WRITE, 0)])], &[Unaligned, SharesLine], "");
}

#[test]
fn rings_share_no_line_with_buffers_to_write() {
    let check_ring = |start, flags, kinds: &[Kind]| {
        let mut guest = Guest::new();
        let queue = if flags == WRITE { TO_GUEST } else { TO_HOST };
        guest.post(queue, 0, &[(start, 8, flags, 0)]);
        assert_eq!(guest.kinds(), kinds, "{start:#x}");
    };
    // The rings of 22 and 70 bytes end in lines of their own; the descriptor table is two lines.
    check_ring(0x1020, WRITE, &[Unaligned, SharesLine]);
    check_ring(0x1020, 0, &[]);
    check_ring(0x2050, WRITE, &[Unaligned, SharesLine]);
    check_ring(0x2050, 0, &[SharesLine]);
    check_ring(0x80, WRITE, &[]);
}

#[test]
fn a_flood_is_counted_and_fills_nothing() {
    let mut guest = Guest::with(VIRTIO_ID_BLOCK, 1);
    for round in 0..100_000_u64 {
        guest.post(0, 0, &[((round + 1) << 21, 64, WRITE, 0)]);
        guest.post(0, 3, &[(0x2_0000, 64, NEXT, 3)]);
        guest.release(0, 0);
        guest.release(0, 3);
        guest.device.look();
    }
    let summary = guest.audit.summary();
    assert_eq!(summary.violations.len(), 2, "{summary:?}");
    assert_eq!((summary.must, summary.chains), (200_000, 200_000));
    guest.expect_idle();
}

#[test]
fn levels_say_what_is_a_finding() {
    use AuditMode::{Off, Report, Strict};
    let forbidden = |mode: AuditMode| {
        [Level::Must, Level::Ours, Level::Observed].map(|level| mode.forbids(level))
    };
    assert_eq!(forbidden(Off), [false; 3]);
    assert_eq!(forbidden(Report), [true, false, false]);
    assert_eq!(forbidden(Strict), [true, true, false]);
}
