//! Drivers that keep the rules: nothing is found, and nothing is left.

use super::*;

#[test]
fn clean_rings_go_round_and_round() {
    let mut guest = Guest::new();
    // Both indices of 16 bits wrap, with chains of one, two and three descriptors.
    for round in 0..70_000_u32 {
        let (head, buffers) = (0, 0x2_0000 + u64::from(round % 4) * 0x1000);
        let chain = [
            (buffers, 64, NEXT | WRITE, 1),
            (buffers + 64, 64, NEXT | WRITE, 2),
            (buffers + 0x400, 192, WRITE, 0),
        ];
        guest.post(TO_GUEST, head, &chain);
        guest.post(TO_HOST, 3, &[(0x4_0001, 44, NEXT, 4), (0x4_002d, 100, 0, 0)]);
        guest.release(TO_HOST, 3);
        guest.release(TO_GUEST, head);
    }
    assert_eq!(guest.found(), []);
    guest.expect_idle();
    let summary = guest.audit.summary();
    assert_eq!((summary.chains, summary.buffers), (140_000, 350_000));
    assert_eq!(summary.unwatched, 0);
}

#[test]
fn a_queue_that_is_always_full_is_clean_in_any_order() {
    let mut guest = Guest::new();
    let buffer = |head: u16| (0x2_0000 + u64::from(head) * 64, 64, WRITE, 0);
    (0..SIZE).for_each(|head| guest.post(TO_GUEST, head, &[buffer(head)]));
    for round in 0..70_000_u32 {
        let head = (round * 5 % u32::from(SIZE)) as u16;
        guest.release(TO_GUEST, head);
        guest.post(TO_GUEST, head, &[buffer(head)]);
    }
    assert_eq!(guest.found(), []);
}

#[test]
fn what_was_posted_without_a_word_is_looked_at_when_it_is_taken() {
    let mut guest = Guest::new();
    guest.describe(TO_GUEST, 0, (0x2_0000, 64, WRITE, 0));
    guest.add(TO_GUEST, 0);
    guest.device.queue(TO_GUEST).look();
    assert_eq!(guest.audit.summary().chains, 1);
    guest.release(TO_GUEST, 0);
    guest.expect_idle();
}

#[test]
fn what_was_posted_before_the_device_ran_is_looked_at_then() {
    let mut guest = Guest::new();
    guest.device.end();
    guest.describe(EVENT, 0, (0x2_0000, 64, WRITE, 0));
    guest.add(EVENT, 0);
    guest.begin();
    assert_eq!(guest.audit.summary().chains, 1);
}

#[test]
fn indirect_tables_are_followed_and_given_back() {
    let mut guest = Guest::with(VIRTIO_ID_BLOCK, 1);
    for round in 0..1000 {
        let table = 0x2_0000 + round % 3 * 256;
        for (index, desc) in
            [(0x3_0000, 16, NEXT, 1), (0x4_0000, 4096, NEXT | WRITE, 2), (0x3_0040, 1, WRITE, 0)]
                .into_iter()
                .enumerate()
        {
            write_descriptor(&guest.ram, table, index as u16, desc);
        }
        guest.post(0, 5, &[(table, 48, INDIRECT, 0)]);
        // Virtio 1.2, section 2.7.5.3.2: direct ones may come before.
        write_descriptor(&guest.ram, 0x2_8000, 0, (0x5_0000, 64, WRITE, 0));
        guest.post(0, 1, &[(0x5_1000, 16, NEXT, 2), (0x2_8000, 16, INDIRECT, 0)]);
        guest.release(0, 1);
        guest.release(0, 5);
    }
    assert_eq!(guest.found(), []);
    assert_eq!(guest.audit.summary().buffers, 5000);
    guest.expect_idle();
}

#[test]
fn a_chain_may_be_as_long_as_the_queue_in_its_table_or_in_another() {
    let mut guest = Guest::new();
    let part = |index: u16| {
        let is_last = index == SIZE - 1;
        let flags = if is_last { 0 } else { NEXT };
        (0x3_0000 + 64 * u64::from(index), 64, flags, index + 1)
    };
    let parts: Vec<_> = (0..SIZE).map(part).collect();
    guest.post(TO_HOST, 0, &parts);
    guest.release(TO_HOST, 0);
    for (index, desc) in (0..).zip(&parts) {
        write_descriptor(&guest.ram, 0x2_0000, index, *desc);
    }
    guest.post(TO_HOST, 7, &[(0x2_0000, 16 * u32::from(SIZE), INDIRECT, 0)]);
    guest.release(TO_HOST, 7);
    assert_eq!(guest.found(), []);
    assert_eq!(guest.audit.summary().buffers, 2 * u64::from(SIZE));
}

#[test]
fn a_reset_in_between_gives_everything_back() {
    let mut guest = Guest::new();
    for _ in 0..100 {
        (0..SIZE).for_each(|head| {
            guest.post(TO_GUEST, head, &[(0x2_0000 + u64::from(head) * 64, 64, WRITE, 0)]);
            guest.post(EVENT, head, &[(0x3_0000 + u64::from(head) * 64, 64, WRITE, 0)]);
        });
        guest.device.end();
        // Nobody looks before there is a driver.
        guest.device.look();
        guest.release(TO_GUEST, 0);
        guest.expect_idle();
        guest.added.fill(0);
        for queue in &guest.queues {
            guest.ram.write_obj(0_u16, GuestAddress(queue.avail_ring() + 2)).unwrap();
        }
        guest.audit.begin_life();
        guest.begin();
    }
    assert_eq!(guest.found(), []);
}

#[test]
fn queues_that_the_driver_leaves_alone_are_left_alone() {
    let mut guest = Guest::new();
    guest.device.end();
    guest.queues[usize::from(TO_HOST)].set_ready(false);
    guest.begin();
    guest.post(TO_HOST, 200, &[]);
    guest.device.queue(17).look();
    guest.release(TO_HOST, 200);
    guest.release(17, 0);
    assert_eq!(guest.found(), []);
}

#[test]
fn empty_buffers_are_in_nobodys_way() {
    let mut guest = Guest::new();
    guest.post(TO_HOST, 0, &[(0, 0, NEXT, 1), (0x2_0000, 44, 0, 0)]);
    assert_eq!(guest.found(), []);
}

#[test]
fn devices_of_one_type_have_numbers() {
    let audit = DmaAudit::new(ram());
    audit.add_device(VIRTIO_ID_BLOCK);
    let second = audit.add_device(VIRTIO_ID_BLOCK);
    let mut outside = queue(0);
    outside.set_used_ring_address(Some(1 << 20), Some(0));
    second.begin(0, &[outside]);
    let found = audit.take_all();
    assert_eq!((found[0].device.as_str(), found[0].descriptor), ("block 2", None));
    let words = "the used ring of block 2 queue 0 (requests), 0x100000+0x46, is not in RAM";
    assert_eq!(found[0].detail, words);
}
