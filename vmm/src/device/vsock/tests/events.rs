//! The event queue: what the guest is told of its transport, and when.

use std::sync::atomic::Ordering;

use vm_memory::{Bytes, GuestAddress};

use super::super::testing::EVENT_BUFFERS;
use super::*;
use crate::device::virtio::VirtioDevice;

/// Takes the event that the guest was told, checks that nothing but its four bytes was written, and gives the descriptor.
fn take_event(driver: &mut TestDriver) -> Option<u16> {
    let (id, len) = driver.events.take_used(&driver.ram)?;
    assert_eq!(len, 4);
    let at = GuestAddress(EVENT_BUFFERS + u64::from(id) * 64);
    assert_eq!(driver.ram.read_obj::<[u8; 4]>(at).unwrap(), [0; 4]);
    Some(id)
}

/// Fills the places of event buffers with what is no event.
fn mark_buffers(driver: &TestDriver) {
    driver.ram.write_slice(&[0xa5; 64 * 64], GuestAddress(EVENT_BUFFERS)).unwrap();
}

#[test]
fn a_transport_reset_ends_all_connections_and_tells_the_guest() {
    let dir = TempDir::new();
    let mut driver = TestDriver::new(listening(&dir));
    let before = driver.watched();
    mark_buffers(&driver);
    for _ in 0..8 {
        driver.post_event_buffer(64);
    }
    let (open, key) = connected(&mut driver);
    let pending = driver.vsock.connector().connect(GuestPort(1)).unwrap();
    driver.expect(Op::Request);
    let interrupts = driver.interrupts.used.load(Ordering::Relaxed);

    driver.vsock.reset_transport();
    assert_eq!(take_event(&mut driver), Some(0));
    assert_eq!(take_event(&mut driver), None, "told once");
    assert_eq!(driver.interrupts.used.load(Ordering::Relaxed), interrupts + 1);
    let mut behind = [0; 60];
    driver.ram.read_slice(&mut behind, GuestAddress(EVENT_BUFFERS + 4)).unwrap();
    assert_eq!(behind, [0xa5; 60], "the device writes the event and not a byte more");
    assert_eq!((read_all(&open), read_all(&pending)), (vec![], vec![]));
    assert_eq!((driver.connections(), driver.watched()), (0, before));

    // Nothing overtakes the event: the guest gets packets again once it has posted another buffer for events.
    let early = driver.vsock.connector().connect(GuestPort(1)).unwrap();
    driver.send_data(key, b"late");
    driver.run_backend();
    driver.expect_silence();
    assert!(!driver.backend_is_ready(), "it is the guest's move");
    driver.post_event_buffer(64);

    // What the guest still sends on the old connection is a stranger's, and new ones work.
    driver.expect(Op::Reset);
    driver.expect(Op::Request);
    let (stream, key) = connected(&mut driver);
    driver.send_data(key, b"new");
    assert_eq!(read_exact(&stream, 3), b"new");
    assert!(!driver.vsock.needs_reset());
    drop(early);
}

#[test]
fn each_transport_reset_takes_the_next_buffer() {
    for event_idx in [false, true] {
        let mut driver = TestDriver::without_buffers(pathless(), event_idx);
        driver.post(8);
        for round in 0..100 {
            driver.post_event_buffer(4);
            driver.vsock.reset_transport();
            assert_eq!(take_event(&mut driver), Some(round));
        }
    }
}

#[test]
fn an_event_waits_for_a_buffer_and_takes_what_was_opened_meanwhile_with_it() {
    for event_idx in [false, true] {
        let mut driver = TestDriver::without_buffers(pathless(), event_idx);
        driver.post(8);
        driver.vsock.reset_transport();
        driver.vsock.reset_transport();
        assert!(!driver.backend_is_ready(), "it is the guest's move");
        let (stream, key) = connected(&mut driver);
        driver.send_data(key, b"works");
        assert_eq!(read_exact(&stream, 5), b"works");
        // Too small for an event: given back unused.
        driver.post_event_buffer(3);
        assert_eq!(driver.events.take_used(&driver.ram), Some((0, 0)));
        assert_eq!(driver.connections(), 1);

        driver.post_event_buffer(4);
        driver.run_backend();
        assert_eq!(take_event(&mut driver), Some(1));
        assert_eq!(driver.connections(), 0);
        assert_eq!(read_all(&stream), b"");
        // Two that nobody heard of are one.
        driver.post_event_buffer(4);
        driver.run_backend();
        assert_eq!(take_event(&mut driver), None);
    }
}

#[test]
fn a_restored_device_tells_the_guest_before_anything_else() {
    for event_idx in [false, true] {
        check_restored(event_idx);
    }
}

fn check_restored(event_idx: bool) {
    let mut driver = TestDriver::without_buffers(pathless(), event_idx);
    driver.post(8);
    for _ in 0..5 {
        driver.post_event_buffer(4);
    }
    let (_stream, key) = connected(&mut driver);
    driver.add(driver.header(key, Op::CreditRequest), &[]);

    // The guest and its RAM stay, the device is another one.
    let other = pathless();
    let client = other.connector().connect(GuestPort(7)).unwrap();
    driver.continue_with(other);
    assert_eq!(take_event(&mut driver), Some(0));
    driver.expect_silence();
    driver.post_event_buffer(4);
    // The packet of an earlier connection has no other answer, and the client's request comes from a port of its own.
    driver.expect(Op::Reset);
    let (request, _) = driver.expect(Op::Request);
    assert_eq!((request.dst_port, request.src_port), (7, key.host.0 + 1));
    drop(client);
}

#[test]
fn packets_on_their_way_belong_to_what_ends() {
    let mut driver = TestDriver::new(pathless());
    driver.post_event_buffer(4);
    let (stream, key) = connected(&mut driver);
    // Posted, and nobody was told yet.
    let header = Header { len: 4, ..driver.header(key, Op::ReadWrite) };
    driver.add(header, b"last");
    driver.add(driver.header(key, Op::CreditRequest), &[]);
    driver.vsock.reset_transport();
    assert_eq!(read_all(&stream), b"last");
    assert_eq!(take_event(&mut driver), Some(0));
    // The answer to the last packet, and nothing about any that has none.
    driver.expect(Op::CreditUpdate);
    driver.expect_silence();
}

#[test]
fn without_a_driver_or_its_event_queue_nobody_is_told() {
    let mut vsock = pathless();
    let waiting = vsock.connector().connect(GuestPort(1)).unwrap();
    vsock.handle_backend();
    vsock.reset_transport();
    assert_eq!(read_all(&waiting), b"");
    let mut driver = TestDriver::new(vsock);
    driver.post_event_buffer(4);
    driver.run_backend();
    assert_eq!(take_event(&mut driver), None, "a driver that starts has nothing to forget");
}

#[test]
fn a_reset_of_the_device_takes_a_waiting_event_with_it() {
    let mut driver = TestDriver::new(pathless());
    driver.vsock.reset_transport();
    driver.vsock.reset();
    let mut driver = TestDriver::new(driver.vsock);
    driver.post_event_buffer(4);
    driver.run_backend();
    assert_eq!(take_event(&mut driver), None);
}

#[test]
fn a_broken_event_queue_stops_the_device() {
    let mut driver = TestDriver::new(pathless());
    driver.events.added = 300;
    driver.events.add(&driver.ram, 0);
    assert!(!driver.vsock.needs_reset(), "nobody has looked");
    driver.vsock.reset_transport();
    assert!(driver.vsock.needs_reset());
    assert_eq!(driver.interrupts.config.load(Ordering::Relaxed), 1);
}
