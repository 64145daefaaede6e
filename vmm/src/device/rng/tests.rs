use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::Ordering;

use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::device::virtio::testing::{
    AVAILABLE, Events, INDIRECT, NEXT, RAM_LEN, TestDriver, WRITE,
};
use crate::device::virtio::{F_VERSION_1, testing};

const BUFFER: u64 = 0x10_0000;

impl Events for Rng {
    fn events(&self) -> BorrowedFd<'_> {
        self.again.as_fd()
    }
}

fn driver() -> TestDriver<Rng> {
    TestDriver::new(Rng::new().unwrap(), RING_FEATURES)
}

#[test]
fn a_buffer_is_filled_and_its_length_told() {
    for features in [RING_FEATURES, F_VERSION_1, RING_FEATURES | F_IN_ORDER] {
        let mut driver = TestDriver::new(Rng::new().unwrap(), features);
        let mut seen = Vec::new();
        for _ in 0..200 {
            driver.put(BUFFER, &[0; 80]);
            driver.describe(7, (BUFFER, 64, WRITE, 0));
            assert_eq!(driver.submit(7), 64);
            let bytes = driver.bytes(BUFFER, 80);
            assert_eq!(bytes[64..], [0; 16], "nothing behind the buffer is written");
            seen.push(bytes[..64].to_vec());
        }
        // 512 random bits are never the same twice, and hardly ever have a byte of each 16 at zero.
        seen.sort();
        seen.dedup();
        assert_eq!(seen.len(), 200);
        assert!(seen.iter().flatten().filter(|byte| **byte == 0).count() < 200);
        assert_eq!((driver.device.stats().requests, driver.device.stats().bytes), (200, 12_800));
    }
}

#[test]
fn a_buffer_may_be_many() {
    let mut driver = driver();
    let parts = [(BUFFER, 1, WRITE), (BUFFER + 0x1000, 0, WRITE), (RAM_LEN / 2 - 20, 40, WRITE)];
    driver.describe_chain(0, &parts);
    assert_eq!(driver.submit(0), 41);
    let bytes = driver.bytes(RAM_LEN / 2 - 20, 40);
    assert!(bytes[..20].iter().any(|byte| *byte != 0) && bytes[20..].iter().any(|byte| *byte != 0));
    driver.describe_at(0x5000, (BUFFER, 8, WRITE, 0));
    driver.describe(0, (0x5000, 16, INDIRECT, 0));
    assert_eq!(driver.submit(0), 8);
}

#[test]
fn no_buffer_gets_more_than_a_bounded_number_of_bytes() {
    let mut driver = driver();
    driver.describe(0, (BUFFER, 1 << 20, WRITE, 0));
    assert_eq!(driver.submit(0), MOST_BYTES as u32);
    assert_eq!(driver.bytes(BUFFER + MOST_BYTES as u64, 64), [0; 64]);
}

#[test]
fn buffers_that_are_none_are_given_back_unused() {
    let mut driver = driver();
    for (count, (name, descriptor)) in (1..).zip([
        ("to read", (BUFFER, 64, 0, 0)),
        ("empty", (BUFFER, 0, WRITE, 0)),
        ("outside RAM", (RAM_LEN, 64, WRITE, 0)),
        ("half outside RAM", (RAM_LEN - 32, 64, WRITE, 0)),
        ("huge", (BUFFER, u32::MAX, WRITE, 0)),
        ("link to itself", (BUFFER, 64, WRITE | NEXT, 0)),
        ("link out of the table", (BUFFER, 64, WRITE | NEXT, 64)),
        ("table that is its own", (0, 16, INDIRECT, 0)),
    ]) {
        driver.describe(0, descriptor);
        assert_eq!(driver.submit(0), 0, "{name}");
        assert_eq!(driver.device.stats().bad_chains, count, "{name}");
    }
    driver.describe(0, (BUFFER, 64, WRITE, 0));
    assert_eq!(driver.submit(0), 64, "the device goes on");
    assert!(!driver.device.needs_reset());
}

#[test]
fn a_full_queue_is_served_in_turns() {
    let mut driver = driver();
    // While the device works, the driver has made a whole ring available, and does so again.
    for round in 0..3_u16 {
        for id in 0..64 {
            driver.describe(id, (BUFFER + 64 * u64::from(id), 64, WRITE, 0));
            driver.add(id);
        }
        driver.notify();
        assert_eq!(driver.device.stats().requests, 64 * u64::from(round + 1), "one ring at most");
        assert_eq!(driver.run(), 1, "it comes back once and sees that there is no more");
        for id in 0..64 {
            assert_eq!(driver.try_take(), Some((id, 64)));
        }
    }
}

#[test]
fn what_was_posted_before_the_device_began_is_filled() {
    let mut driver = driver();
    driver.device.reset();
    driver.ram.write_obj(0_u32, GuestAddress(testing::USED)).unwrap();
    driver.ram.write_obj(1_u16, GuestAddress(AVAILABLE + 2)).unwrap();
    driver.ram.write_obj(3_u16, GuestAddress(AVAILABLE + 4)).unwrap();
    driver.describe(3, (BUFFER, 64, WRITE, 0));
    driver.activate(RING_FEATURES, TestDriver::<Rng>::queue(64));
    assert_eq!(driver.try_take(), Some((3, 64)));
}

#[test]
fn a_broken_ring_stops_the_device_until_it_is_reset() {
    let mut driver = driver();
    driver.added = driver.added.wrapping_add(100);
    driver.add(0);
    driver.notify();
    assert!(driver.device.needs_reset());
    assert_eq!(driver.interrupts.config.load(Ordering::SeqCst), 1);
    driver.device.handle_queue(0);
    assert_eq!(driver.device.stats().broken_rings, 1);
    driver.device.reset();
    assert!(!driver.device.needs_reset());

    let mut queue = TestDriver::<Rng>::queue(64);
    queue.set_used_ring_address(Some(RAM_LEN as u32 - 4), None);
    driver.activate(RING_FEATURES, queue);
    assert!(driver.device.needs_reset(), "a ring outside RAM");
}

#[test]
fn notifications_without_a_driver_or_a_queue_do_nothing() {
    let mut rng = Rng::new().unwrap();
    rng.handle_queue(0);
    rng.handle_backend();
    rng.reset();
    let mut queue = TestDriver::<Rng>::queue(64);
    queue.set_ready(false);
    let mut driver = TestDriver::new(rng, RING_FEATURES);
    driver.device.reset();
    driver.activate(RING_FEATURES, queue);
    driver.device.handle_queue(0);
    assert_eq!(driver.device.stats(), RngStats::default());
}
