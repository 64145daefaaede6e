//! A reset ends everything that the guest knew of, and nothing else.

use std::io::Write;
use std::os::unix::net::UnixStream;

use super::*;
use crate::device::virtio::VirtioDevice;

#[test]
fn a_reset_ends_all_connections_and_frees_their_descriptors() {
    let dir = TempDir::new();
    let mut driver = TestDriver::new(listening(&dir));
    let before = driver.watched();
    let (open, _) = connected(&mut driver);
    let pending = driver.vsock.connector().connect(GuestPort(1)).unwrap();
    driver.expect(Op::Request);
    let undecided = UnixStream::connect(dir.path("vsock")).unwrap();
    (&undecided).write_all(b"CONNECT 1").unwrap();
    driver.run_backend();
    let not_picked_up = driver.vsock.connector().connect(GuestPort(2)).unwrap();

    driver.vsock.reset();
    for stream in [open, pending, not_picked_up] {
        assert_eq!(read_all(&stream), b"");
    }
    assert_eq!(read_all(&undecided), b"");
    assert_eq!((driver.connections(), driver.watched()), (0, before));
    driver.run_backend();
}

#[test]
fn the_device_works_in_its_next_life() {
    let dir = TempDir::new();
    let mut vsock = listening(&dir);
    for _ in 0..20 {
        let mut driver = TestDriver::new(vsock);
        let (stream, key) = connected(&mut driver);
        driver.send_data(key, b"alive");
        assert_eq!(read_exact(&stream, 5), b"alive");
        let mut client = UnixStream::connect(dir.path("vsock")).unwrap();
        client.write_all(b"CONNECT 5\n").unwrap();
        driver.accept();
        assert_eq!(read_exact(&client, 3), b"OK ");
        driver.vsock.reset();
        vsock = driver.vsock;
    }
    assert_eq!(vsock.stats().connections_opened, 40);
}

#[test]
fn a_reset_before_any_driver_is_harmless() {
    let mut vsock = pathless();
    vsock.reset();
    vsock.handle_queue(0);
    vsock.handle_backend();
    assert!(!vsock.needs_reset());
}

#[test]
fn connectors_are_told_when_the_device_goes() {
    let vsock = pathless();
    let connector = vsock.connector();
    let waiting = connector.connect(GuestPort(1)).unwrap();
    drop(vsock);
    assert_eq!(read_all(&waiting), b"");
    assert!(connector.connect(GuestPort(1)).is_err());
}

#[test]
fn what_the_guest_was_owed_is_forgotten_by_a_reset() {
    let mut driver = TestDriver::without_buffers(pathless(), true);
    driver.send_op(key(52, 1), Op::Request);
    driver.vsock.reset();
    let mut driver = TestDriver::new(driver.vsock);
    driver.expect_silence();
}
