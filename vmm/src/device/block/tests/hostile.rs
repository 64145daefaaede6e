//! Guests that break the rules: counted, answered, survived.

use std::sync::atomic::Ordering;

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::device::virtio::testing::{AVAILABLE, NEXT, USED};

#[test]
fn chains_without_request_or_room_for_an_answer_are_given_back_unused() {
    let mut driver = driver(&image());
    driver.put(HEADER, &header(1, 0));
    let size = HEADER_LEN as u32;
    let status = (STATUS, 1, WRITE);
    for (count, (name, chain)) in (1..).zip([
        ("no header", &[status][..]),
        ("short header", &[(HEADER, size - 1, 0), (ANSWER, 512, WRITE), status]),
        ("header to write", &[(HEADER, size, WRITE), status]),
        ("no status", &[(HEADER, size, 0)]),
        ("no status behind data", &[(HEADER, size, 0), (DATA, 512, 0)]),
        ("empty status", &[(HEADER, size, 0), (STATUS, 0, WRITE)]),
        ("data behind the status", &[(HEADER, size, 0), status, (DATA, 512, 0)]),
        ("status outside RAM", &[(HEADER, size, 0), (RAM_LEN, 1, WRITE)]),
        ("data outside RAM", &[(HEADER, size, 0), (RAM_LEN - 511, 512, 0), status]),
        ("huge data", &[(HEADER, size, 0), (DATA, u32::MAX, 0), status]),
    ]) {
        driver.describe_chain(0, chain);
        assert_eq!(driver.submit(0), 0, "{name}");
        assert_eq!(driver.device.stats().bad_chains, count, "{name}");
    }
    driver.describe(0, (HEADER, size, NEXT, 0));
    assert_eq!(driver.submit(0), 0, "a loop");
    assert_eq!(driver.device.stats().requests, 0);
    assert_eq!(driver.read(3, 512), [3; 512], "the device goes on");
    assert!(!driver.device.needs_reset());
}

#[test]
fn requests_for_what_there_is_not_are_refused() {
    let file = image();
    let mut driver = driver(&file);
    for (count, (kind, sector, data, room, expected)) in (1..).zip([
        (0, SECTORS, 0, 512, (FAILED, 0)),
        (0, SECTORS - 1, 0, 1024, (FAILED, 0)),
        (0, u64::MAX, 0, 512, (FAILED, 0)),
        (0, 1 << 55, 0, 512, (FAILED, 0)),
        (0, 0, 0, 100, (FAILED, 0)),
        (1, SECTORS, 512, 0, (FAILED, 1)),
        (1, SECTORS - 1, 1024, 0, (FAILED, 1)),
        (1, u64::MAX / 512, 512, 0, (FAILED, 1)),
        (1, 0, 100, 0, (FAILED, 1)),
        (11, 0, 15, 0, (FAILED, 1)),
        (13, 0, 17 * 16, 0, (FAILED, 1)),
        (2, 0, 0, 0, (UNSUPPORTED, 1)),
        (10, 0, 0, 24, (UNSUPPORTED, 0)),
        (14, 0, 16, 0, (UNSUPPORTED, 1)),
        (u32::MAX, u64::MAX, 512, 512, (UNSUPPORTED, 0)),
    ]) {
        let answer = driver.ask(kind, sector, &vec![0x55; data], room);
        assert_eq!(answer, expected, "type {kind} at {sector}");
        assert_eq!(driver.device.stats().bad_requests, count);
    }
    assert_eq!(file.as_file().metadata().unwrap().len(), SECTORS * SECTOR);
    for sector in [0, SECTORS - 1] {
        assert_eq!(contents(&file, sector, 512), [sector as u8; 512]);
    }
}

#[test]
fn a_guest_that_reads_into_its_own_rings_confuses_itself_alone() {
    let file = image();
    for at in [0, AVAILABLE, USED, HEADER] {
        let mut driver = driver(&file);
        driver.put(HEADER, &header(0, 77));
        driver.describe_chain(0, &[(HEADER, 16, 0), (at, 4096, WRITE), (at, 1, WRITE)]);
        driver.add(0);
        driver.notify();
        // Whatever becomes of the queue, the threads are done at the end, and the device can begin anew.
        driver.device.reset();
        let mut driver = TestDriver::new(driver.device, RING_FEATURES);
        assert_eq!(driver.read(3, 512), [3; 512], "{at:#x}");
    }
}

#[test]
fn a_broken_ring_stops_the_device_until_it_is_reset() {
    let mut driver = driver(&image());
    driver.added = driver.added.wrapping_add(300);
    driver.add(0);
    driver.notify();
    assert!(driver.device.needs_reset());
    assert_eq!(driver.interrupts.config.load(Ordering::SeqCst), 1);
    driver.device.handle_queue(0);
    driver.run();
    assert_eq!(driver.device.stats().broken_rings, 1);
    driver.device.reset();
    assert!(!driver.device.needs_reset());

    let mut queue = TestDriver::<Block>::queue(QUEUE_SIZE);
    queue.set_desc_table_address(Some(RAM_LEN as u32 - 16), None);
    driver.activate(0, queue);
    assert!(driver.device.needs_reset(), "a table outside RAM");
}

#[test]
fn a_request_that_changes_on_its_way_stays_what_it_was() {
    // The header is looked at once: what the guest makes of it afterwards is nothing to the device.
    let file = image();
    let mut driver = driver(&file);
    driver.put(HEADER, &header(0, 5));
    driver.describe_chain(0, &[(HEADER, 16, 0), (HEADER, 512, WRITE), (STATUS, 1, WRITE)]);
    assert_eq!(driver.submit(0), 513);
    assert_eq!(driver.bytes(HEADER, 512), [5; 512]);
    assert_eq!(driver.ram.read_obj::<u8>(GuestAddress(STATUS)).unwrap(), OK);
}

#[test]
fn notifications_without_a_driver_or_a_queue_do_nothing() {
    let file = image();
    let mut block = block(&file, false);
    block.handle_queue(0);
    block.handle_backend();
    block.reset();
    let mut driver = TestDriver::new(block, RING_FEATURES);
    driver.device.reset();
    let mut queue = TestDriver::<Block>::queue(QUEUE_SIZE);
    queue.set_ready(false);
    driver.activate(0, queue);
    driver.device.handle_queue(0);
    assert_eq!(driver.device.stats(), BlockStats::default());
}
