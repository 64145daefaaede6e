//! The ends of both directions, each on its own, and of the whole.

use std::io::Write;
use std::net::Shutdown as Direction;

use super::super::credit::BUF_ALLOC;
use super::*;

#[test]
fn the_host_closes_its_half_and_still_receives() {
    let mut driver = TestDriver::new(pathless());
    let (mut stream, key) = connected(&mut driver);
    stream.write_all(b"last words").unwrap();
    stream.shutdown(Direction::Write).unwrap();
    assert_eq!(driver.expect(Op::ReadWrite).1, b"last words");
    let (shutdown, _) = driver.expect(Op::Shutdown);
    assert_eq!(Shutdown::parse(shutdown.flags), Shutdown::SEND);
    driver.send_data(key, b"still there");
    assert_eq!(read_exact(&stream, 11), b"still there");
    driver.expect_silence();

    send_shutdown(&mut driver, key, Shutdown::SEND);
    assert_eq!(read_all(&stream), b"");
    let (shutdown, _) = driver.expect(Op::Shutdown);
    assert_eq!(Shutdown::parse(shutdown.flags), Shutdown::BOTH);
    driver.send_op(key, Op::Reset);
    assert_eq!(driver.connections(), 0);
    assert_eq!(driver.vsock.stats().connections_reset, 0, "this was in order");
}

#[test]
fn the_guest_closes_its_half_and_still_receives() {
    let mut driver = TestDriver::new(pathless());
    let (mut stream, key) = connected(&mut driver);
    driver.send_data(key, b"last words");
    send_shutdown(&mut driver, key, Shutdown::SEND);
    assert_eq!(read_all(&stream), b"last words");
    stream.write_all(b"still there").unwrap();
    assert_eq!(driver.expect(Op::ReadWrite).1, b"still there");
    // The other half: the host's writes fail, and the guest gets its confirmation.
    send_shutdown(&mut driver, key, Shutdown::RECEIVE);
    driver.expect(Op::Reset);
    assert!(stream.write_all(b"nobody reads").is_err());
    assert_eq!(driver.connections(), 0);
    assert_eq!(driver.vsock.stats().connections_reset, 0, "this was in order");
}

#[test]
fn a_guest_that_stops_to_receive_still_sends() {
    let mut driver = TestDriver::new(pathless());
    let (mut stream, key) = connected(&mut driver);
    send_shutdown(&mut driver, key, Shutdown::RECEIVE);
    assert!(stream.write_all(b"nobody reads").is_err());
    driver.send_data(key, b"one way");
    assert_eq!(read_exact(&stream, 7), b"one way");
    assert!(!driver.backend_is_ready(), "nothing more can be read, so nobody waits for it");
}

#[test]
fn a_host_that_stops_to_receive_still_sends() {
    let mut driver = TestDriver::new(pathless());
    let (mut stream, key) = connected(&mut driver);
    stream.shutdown(Direction::Read).unwrap();
    driver.send_data(key, b"nobody reads");
    let (shutdown, _) = driver.expect(Op::Shutdown);
    assert_eq!(Shutdown::parse(shutdown.flags), Shutdown::RECEIVE);
    for _ in 0..6 {
        driver.send_data(key, &[0; 1 << 16]);
    }
    stream.write_all(b"one way").unwrap();
    assert_eq!(driver.expect(Op::ReadWrite).1, b"one way");
    driver.expect_silence();
}

#[test]
fn bytes_sent_before_the_guest_closed_reach_a_slow_host() {
    for reset_too in [false, true] {
        let mut driver = TestDriver::new(pathless());
        let (stream, key) = connected(&mut driver);
        let data = pattern(BUF_ALLOC as usize);
        for chunk in data.chunks(1 << 16) {
            driver.send_data(key, chunk);
        }
        // Part of it is in the socket; fill what is left of the credit.
        let forwarded = driver.try_receive().map_or(0, |(header, _)| header.fwd_cnt as usize);
        assert!(forwarded < data.len(), "the socket took everything, so this tests nothing");
        send_shutdown(&mut driver, key, Shutdown::BOTH);
        if reset_too {
            driver.send_op(key, Op::Reset);
        }
        let reader = std::thread::spawn(move || read_all(&stream));
        while !reader.is_finished() {
            driver.run_backend();
        }
        assert!(reader.join().unwrap() == data);
        if !reset_too {
            driver.expect(Op::Reset);
        }
        driver.run_backend();
        assert_eq!(driver.connections(), 0);
    }
}

#[test]
fn a_host_that_goes_away_is_announced_and_confirmed() {
    let mut driver = TestDriver::new(pathless());
    let (mut stream, key) = connected(&mut driver);
    stream.write_all(b"bye").unwrap();
    drop(stream);
    assert_eq!(driver.expect(Op::ReadWrite).1, b"bye");
    let (shutdown, _) = driver.expect(Op::Shutdown);
    assert_eq!(Shutdown::parse(shutdown.flags), Shutdown::BOTH);
    driver.send_data(key, b"crossing");
    driver.expect_silence();
    driver.send_op(key, Op::Reset);
    assert_eq!(driver.connections(), 0);
}

#[test]
fn a_host_that_leaves_bytes_unread_ends_the_connection() {
    let mut driver = TestDriver::new(pathless());
    let (stream, key) = connected(&mut driver);
    driver.send_data(key, b"unread");
    drop(stream);
    driver.expect(Op::Reset);
    assert_eq!(driver.connections(), 0);
}

#[test]
fn a_guest_that_never_confirms_a_shutdown_is_not_waited_for() {
    let patience = std::time::Duration::from_millis(50);
    let mut driver = TestDriver::new(Vsock::with_patience(cid(), None, patience).unwrap());
    let (stream, _) = connected(&mut driver);
    drop(stream);
    driver.expect(Op::Shutdown);
    driver.expect(Op::Reset);
    assert_eq!(driver.connections(), 0);
}

#[test]
fn a_reset_from_the_guest_ends_the_stream() {
    let mut driver = TestDriver::new(pathless());
    let (stream, key) = connected(&mut driver);
    driver.send_op(key, Op::Reset);
    assert_eq!(read_all(&stream), b"");
    driver.expect_silence();
    assert_eq!((driver.connections(), driver.vsock.stats().connections_reset), (0, 1));
    // The pair of ports is free again.
    driver.send_data(key, b"late");
    driver.expect(Op::Reset);
}

#[test]
fn a_pair_of_ports_is_free_again_while_a_slow_host_reads_what_came_before() {
    let dir = TempDir::new();
    let listener = std::os::unix::net::UnixListener::bind(dir.path("vsock_52")).unwrap();
    let mut driver = TestDriver::new(listening(&dir));
    let key = key(52, 7000);
    let data = pattern(BUF_ALLOC as usize);
    let mut slow = Vec::new();
    for round in 0..3 {
        driver.send_op(key, Op::Request);
        let (response, _) = driver.expect(Op::Response);
        assert_eq!(response.dst_port, 7000, "round {round}");
        slow.push(listener.accept().unwrap().0);
        let end = data.len() - round;
        for chunk in data[..end].chunks(1 << 16) {
            driver.send_data(key, chunk);
        }
        assert!(driver.vsock.host.table.iter().any(|(_, endpoint)| endpoint.has_backlog()));
        while driver.try_receive().is_some() {}
        send_shutdown(&mut driver, key, Shutdown::BOTH);
        driver.send_op(key, Op::Reset);
    }
    assert_eq!(driver.connections(), 3);
    // Nobody can name the old ones.
    let parted = ConnectionKey::parted(0);
    driver.send_op(parted, Op::Reset);
    driver.send_op(parted, Op::Request);
    driver.expect(Op::Reset);
    // Each gets what was sent on its own connection.
    for (round, stream) in slow.into_iter().enumerate() {
        let reader = std::thread::spawn(move || read_all(&stream));
        while !reader.is_finished() {
            driver.run_backend();
        }
        assert!(reader.join().unwrap() == data[..data.len() - round], "round {round}");
    }
    driver.run_backend();
    assert_eq!(driver.connections(), 0);
}
