//! Connections of the guest that the monitor itself takes, and connections that a device goes on with by mistake.

use std::io::Write;

use super::super::connector::Acceptance;
use super::*;
use crate::device::virtio::VirtioDevice;

const PORT: HostPort = HostPort(52);

fn expect(driver: &TestDriver, acceptance: Acceptance) -> UnixStream {
    let stream = driver.vsock.connector().expect(PORT, acceptance).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    stream
}

#[test]
fn the_guests_next_connection_to_a_port_reaches_whoever_expects_it_and_only_the_next() {
    let mut driver = TestDriver::new(pathless());
    // The guest may ask before the device has looked for what the monitor wants.
    let mut stream = expect(&driver, Acceptance::AtOnce);
    stream.write_all(b"before").unwrap();
    driver.send_op(key(PORT.0, 7), Op::Request);
    driver.expect(Op::Response);
    assert_eq!(driver.expect(Op::ReadWrite).1, b"before");
    driver.send_data(key(PORT.0, 7), b"answer");
    assert_eq!(read_exact(&stream, 6), b"answer");

    driver.send_op(key(PORT.0, 8), Op::Request);
    driver.expect(Op::Reset);
    assert_eq!(driver.vsock.stats().connections_opened, 1);
}

#[test]
fn who_expects_first_is_served_first_and_other_ports_are_others() {
    let mut driver = TestDriver::new(pathless());
    let streams = [(); 2].map(|()| expect(&driver, Acceptance::AtOnce));
    driver.send_op(key(PORT.0 + 1, 7), Op::Request);
    driver.expect(Op::Reset);
    for (guest, stream) in (7..).zip(&streams) {
        driver.send_op(key(PORT.0, guest), Op::Request);
        driver.expect(Op::Response);
        driver.send_data(key(PORT.0, guest), &[guest as u8]);
        assert_eq!(read_exact(stream, 1), [guest as u8]);
    }
}

#[test]
fn a_connection_that_is_never_accepted_is_refused_when_nobody_wants_it_any_more() {
    let mut driver = TestDriver::new(pathless());
    let stream = expect(&driver, Acceptance::Never);
    (&stream).write_all(b"unread").unwrap();
    driver.send_op(key(PORT.0, 7), Op::Request);
    driver.expect_silence();
    assert_eq!(driver.connections(), 1);
    drop(stream);
    driver.expect(Op::Reset);
    driver.expect_silence();
    let stats = driver.vsock.stats();
    assert_eq!((stats.connections_opened, stats.connections_refused), (0, 1));
    assert_eq!(driver.connections(), 0);
}

#[test]
fn a_guest_that_does_not_wait_ends_it_for_the_monitor() {
    let mut driver = TestDriver::new(pathless());
    let stream = expect(&driver, Acceptance::Never);
    driver.send_op(key(PORT.0, 7), Op::Request);
    driver.send_op(key(PORT.0, 7), Op::Reset);
    assert_eq!(read_all(&stream), b"");
    driver.expect_silence();
}

#[test]
fn a_reset_ends_what_was_expected_and_what_came_of_it() {
    for acceptance in [Acceptance::AtOnce, Acceptance::Never] {
        let mut driver = TestDriver::new(pathless());
        let before = driver.watched();
        let streams = [(); 3].map(|()| expect(&driver, acceptance));
        driver.send_op(key(PORT.0, 7), Op::Request);
        let not_picked_up = expect(&driver, acceptance);
        driver.vsock.reset();
        streams.iter().chain([&not_picked_up]).for_each(|s| assert_eq!(read_all(s), b""));
        assert_eq!((driver.connections(), driver.watched()), (0, before));
        let mut driver = TestDriver::new(driver.vsock);
        driver.send_op(key(PORT.0, 7), Op::Request);
        driver.expect(Op::Reset);
    }
}

#[test]
fn connections_that_are_put_back_after_a_reset_speak_to_the_next_life() {
    let mut driver = TestDriver::new(pathless());
    let (stream, key) = connected(&mut driver);
    let kept = driver.vsock.take_connections();
    driver.vsock.reset();
    driver.vsock.put_back_connections(kept);
    let mut driver = TestDriver::new(driver.vsock);
    driver.expect_silence();
    drop(stream);
    let (header, _) = driver.expect(Op::Shutdown);
    assert_eq!((header.src_port, header.dst_port), (key.host.0, key.guest.0));
    driver.send_op(key, Op::Reset);
    assert_eq!(driver.connections(), 0);
}
