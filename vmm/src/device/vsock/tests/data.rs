//! Bytes, in order and complete, and no more wake-ups and notifications than they need.

use std::io::Write;

use super::super::credit::BUF_ALLOC;
use super::super::packet::HEADER_LEN;
use super::super::testing::BUFFER_LEN;
use super::super::traffic::BURST;
use super::*;

/// Takes payload until `len` bytes have come, and says so in credit updates every 16 KiB.
fn sink(driver: &mut TestDriver, key: ConnectionKey, len: usize) -> Vec<u8> {
    let (mut received, mut told) = (Vec::new(), 0);
    while received.len() < len {
        let (header, payload) = driver.receive();
        match Op::parse(header.op).unwrap() {
            Op::ReadWrite => received.extend_from_slice(&payload),
            Op::CreditRequest => {}
            op => panic!("unexpected {op:?}"),
        }
        assert!(received.len() - told <= 1 << 16, "more than the credit");
        if received.len() - told > 1 << 14 {
            told = received.len();
            let header = driver.header(key, Op::CreditUpdate);
            driver.send(Header { fwd_cnt: told as u32, ..header }, &[]);
        }
    }
    received
}

/// Sends `bytes` in packets of `packet`, as credit allows. Gives the number of updates that it took.
fn source(driver: &mut TestDriver, key: ConnectionKey, bytes: &[u8], packet: usize) -> usize {
    let (mut sent, mut forwarded, mut updates) = (0, 0, 0);
    while sent < bytes.len() {
        let room = BUF_ALLOC as usize - (sent - forwarded);
        if room > 0 {
            let end = bytes.len().min(sent + packet.min(room));
            driver.send_data(key, &bytes[sent..end]);
            sent = end;
        }
        driver.run_backend();
        while let Some((header, _)) = driver.try_receive() {
            assert_eq!(Op::parse(header.op), Some(Op::CreditUpdate));
            forwarded = header.fwd_cnt as usize;
            updates += 1;
        }
    }
    updates
}

#[test]
fn more_than_the_credit_flows_to_the_guest() {
    let mut driver = TestDriver::new(pathless());
    let (mut stream, key) = connected(&mut driver);
    let data = pattern(3 << 20);
    let sent = data.clone();
    let writer = std::thread::spawn(move || {
        stream.write_all(&sent).unwrap();
        stream
    });
    assert!(sink(&mut driver, key, data.len()) == data);
    assert_eq!(driver.vsock.stats().bytes_to_guest, 3 << 20);
    let _stream = writer.join().unwrap();
    driver.expect_silence();
}

#[test]
fn more_than_the_credit_flows_to_the_host_with_few_updates() {
    for packet in [100, 4096, 1 << 16] {
        let mut driver = TestDriver::new(pathless());
        let (stream, key) = connected(&mut driver);
        let data = pattern(if packet == 100 { 1 << 20 } else { 3 << 20 });
        let len = data.len();
        let reader = std::thread::spawn(move || (read_exact(&stream, len), stream));
        let updates = source(&mut driver, key, &data, packet);
        driver.run_backend();
        while !reader.is_finished() {
            driver.run_backend();
        }
        assert!(reader.join().unwrap().0 == data);
        assert!(updates <= len / (BUF_ALLOC as usize / 4), "{updates} updates");
        assert_eq!(driver.vsock.stats().bytes_to_host, len as u64);
    }
}

#[test]
fn a_host_that_does_not_read_costs_a_bounded_buffer() {
    let mut driver = TestDriver::new(pathless());
    let (stream, key) = connected(&mut driver);
    let data = pattern(1 << 20);
    let (mut sent, mut forwarded) = (0, 0);
    loop {
        let room = BUF_ALLOC as usize - (sent - forwarded);
        let len = room.min(1 << 16);
        if len == 0 {
            break;
        }
        driver.send_data(key, &data[sent..sent + len]);
        sent += len;
        if let Some((header, _)) = driver.try_receive() {
            assert_eq!(Op::parse(header.op), Some(Op::CreditUpdate));
            forwarded = header.fwd_cnt as usize;
        }
    }
    driver.expect_silence();
    // Now the host reads: everything comes, and the guest hears of it.
    let reader = std::thread::spawn(move || (read_exact(&stream, sent), stream));
    while !reader.is_finished() {
        driver.run_backend();
    }
    assert!(reader.join().unwrap().0 == data[..sent]);
    driver.run_backend();
    driver.expect(Op::CreditUpdate);
}

#[test]
fn sockets_with_bytes_do_not_wake_the_loop_while_the_guest_has_no_room() {
    // No buffers.
    let mut driver = TestDriver::without_buffers(pathless(), true);
    let mut stream = driver.vsock.connector().connect(GuestPort(1)).unwrap();
    driver.run_backend();
    driver.post(1);
    let key = driver.accept();
    // The one buffer is posted again, and used.
    stream.write_all(&pattern(3 * BUFFER_LEN as usize)).unwrap();
    driver.run_backend();
    assert!(!driver.backend_is_ready());
    let used = driver.to_guest.take_used(&driver.ram);
    assert_eq!(used.map(|(_, len)| len), Some(BUFFER_LEN));
    stream.write_all(b"more").unwrap();
    driver.run_backend();
    assert!(!driver.backend_is_ready());
    driver.post(2);
    assert!(driver.try_receive().is_some() && driver.try_receive().is_some());
    let _ = key;

    // No credit.
    let mut driver = TestDriver::new(pathless());
    let (mut stream, key) = connected(&mut driver);
    let header = Header { buf_alloc: 10, ..driver.header(key, Op::CreditUpdate) };
    driver.send(header, &[]);
    stream.write_all(b"0123456789abcdef").unwrap();
    assert_eq!(driver.expect(Op::ReadWrite).1, b"0123456789");
    driver.expect(Op::CreditRequest);
    let calls = driver.backend_calls;
    driver.expect_silence();
    assert_eq!(driver.backend_calls, calls);
    driver.send(Header { fwd_cnt: 10, ..header }, &[]);
    assert_eq!(driver.expect(Op::ReadWrite).1, b"abcdef");
}

#[test]
fn connections_take_turns_of_bounded_length() {
    let mut driver = TestDriver::new(pathless());
    let mut ends: Vec<_> = (0..3).map(|_| connected(&mut driver)).collect();
    for (stream, key) in &mut ends {
        let header = driver.header(*key, Op::CreditUpdate);
        driver.send(Header { buf_alloc: 1 << 20, ..header }, &[]);
        stream.write_all(&pattern(150_000)).unwrap();
    }
    // One buffer each; then it shows that there is more.
    let mut turns = [[0, 1].as_slice(), &[1, 1], &[2, 1]].concat();
    for _ in 0..2 {
        turns.extend([0, BURST as u32, 1, BURST as u32, 2, BURST as u32]);
    }
    for turn in turns.chunks(2) {
        for _ in 0..turn[1] {
            assert_eq!(driver.receive().0.src_port - (1 << 30), turn[0]);
        }
    }
}

#[test]
fn bytes_for_many_buffers_come_in_order_whatever_they_fill() {
    let mut driver = TestDriver::new(pathless());
    let (mut stream, key) = connected(&mut driver);
    let header = driver.header(key, Op::CreditUpdate);
    driver.send(Header { buf_alloc: 1 << 20, ..header }, &[]);
    let piece = BUFFER_LEN as usize - HEADER_LEN;
    let mut received = 0;
    // Around the ends of a buffer and of a burst.
    for len in [1, piece, piece + 1, 5 * piece - 1, 17 * piece, 17 * piece + 1, 40 * piece, 2] {
        let sent = pattern(len);
        stream.write_all(&sent).unwrap();
        let mut bytes = Vec::new();
        while bytes.len() < len {
            bytes.extend(driver.expect(Op::ReadWrite).1);
        }
        assert!(bytes == sent, "{len}");
        driver.expect_silence();
        received += len;
        let header = Header { buf_alloc: 1 << 20, fwd_cnt: received as u32, ..header };
        driver.send(header, &[]);
    }
}

#[test]
fn a_broken_buffer_amid_many_is_skipped_and_the_order_stays() {
    let mut driver = TestDriver::without_buffers(pathless(), true);
    let mut stream = driver.vsock.connector().connect(GuestPort(1)).unwrap();
    driver.post(1);
    driver.run_backend();
    let key = driver.accept();
    let header = driver.header(key, Op::CreditUpdate);
    driver.send(Header { buf_alloc: 1 << 20, ..header }, &[]);
    // The one buffer is posted again; behind it nine sound ones, of which every third is followed by one to read.
    for id in 1..=12 {
        let flags = if id % 4 == 0 { 0 } else { 2 };
        let at = 0x30_0000 + u64::from(id) * 4096;
        driver.to_guest.write_descriptor(&driver.ram, id, (at, 4096, flags, 0));
        driver.to_guest.add(&driver.ram, id);
    }
    let piece = BUFFER_LEN as usize - HEADER_LEN;
    stream.write_all(&pattern(10 * piece)).unwrap();
    driver.run_backend();
    let used: Vec<_> = std::iter::from_fn(|| driver.to_guest.take_used(&driver.ram)).collect();
    let expected: Vec<_> =
        (0..=12).map(|id| (id, if id > 0 && id % 4 == 0 { 0 } else { BUFFER_LEN })).collect();
    assert_eq!(used, expected);
    assert_eq!(driver.vsock.stats().bad_chains, 3);
}

#[test]
fn one_batch_takes_one_interrupt_and_no_kick_that_was_not_asked_for() {
    use std::sync::atomic::Ordering;
    let mut driver = TestDriver::new(pathless());
    let (stream, key) = connected(&mut driver);
    let (interrupts, kicks) = (driver.interrupts.used.load(Ordering::Relaxed), driver.kicks);
    for _ in 0..50 {
        let header = Header { len: 10, ..driver.header(key, Op::ReadWrite) };
        driver.add(header, b"0123456789");
    }
    driver.kick_to_host();
    assert_eq!(read_exact(&stream, 500).len(), 500);
    assert_eq!(driver.kicks - kicks, 1);
    assert!(driver.interrupts.used.load(Ordering::Relaxed) - interrupts <= 1);
}

#[test]
fn without_the_event_index_the_rings_flags_suppress_notifications() {
    use std::sync::atomic::Ordering;
    use vm_memory::Bytes;
    let mut driver = TestDriver::without_buffers(pathless(), false);
    driver.post(256);
    let (mut stream, key) = connected(&mut driver);
    let kicks = driver.kicks;
    for _ in 0..20 {
        stream.write_all(b"one packet").unwrap();
        driver.expect(Op::ReadWrite);
    }
    assert_eq!(driver.kicks, kicks, "there are buffers enough");
    let interrupts = driver.interrupts.used.load(Ordering::Relaxed);
    for queue in [&driver.to_guest, &driver.to_host] {
        driver.ram.write_obj(1u16, queue.avail).unwrap();
    }
    stream.write_all(b"polled").unwrap();
    driver.send_data(key, b"polled");
    driver.run_backend();
    assert!(driver.to_guest.take_used(&driver.ram).is_some());
    assert_eq!(driver.interrupts.used.load(Ordering::Relaxed), interrupts);
}

#[test]
fn a_full_ring_is_served_with_one_kick_and_so_is_what_comes_after() {
    for event_idx in [false, true] {
        let mut driver = TestDriver::without_buffers(pathless(), event_idx);
        driver.post(64);
        let (stream, key) = connected(&mut driver);
        // All packets in the ring are this one.
        let header = Header { len: 2, ..driver.header(key, Op::ReadWrite) };
        driver.add(header, b"ab");
        driver.kick_to_host();
        let head = driver.to_host.take_used(&driver.ram).unwrap().0;
        let kicks = driver.kicks;
        for _ in 0..256 {
            driver.to_host.add(&driver.ram, head);
        }
        driver.kick_to_host();
        assert_eq!(read_exact(&stream, 514), b"ab".repeat(257));
        assert_eq!(driver.kicks, kicks + 1);
        driver.run_backend();
        while driver.to_host.take_used(&driver.ram).is_some() {}
        driver.send_data(key, b"after");
        assert_eq!(read_exact(&stream, 5), b"after");
    }
}

#[test]
fn a_buffer_that_is_not_needed_after_all_serves_the_next_packet() {
    let mut driver = TestDriver::new(pathless());
    let (mut stream, key) = connected(&mut driver);
    // Exactly as much as fits: only another read can tell that there is no more.
    let chunk = pattern(BUFFER_LEN as usize - HEADER_LEN);
    for round in 1..=600u32 {
        stream.write_all(&chunk).unwrap();
        assert_eq!(driver.expect(Op::ReadWrite).1, chunk);
        let fwd_cnt = round * chunk.len() as u32;
        driver.send(Header { fwd_cnt, ..driver.header(key, Op::CreditUpdate) }, &[]);
    }
}

#[test]
fn a_packet_spreads_over_the_buffers_of_a_chain() {
    use vm_memory::{Bytes, GuestAddress};
    let mut driver = TestDriver::without_buffers(pathless(), true);
    let mut stream = driver.vsock.connector().connect(GuestPort(1)).unwrap();
    driver.post(1);
    driver.run_backend();
    driver.accept();
    assert_eq!(driver.to_guest.take_used(&driver.ram), None);
    // The header itself is in two pieces. Number 0 is the buffer that was posted before.
    for (id, desc) in
        [(10, (0x20_0000, 30, 3, 11)), (11, (0x21_0000, 20, 3, 12)), (12, (0x22_0000, 100, 2, 0))]
    {
        driver.to_guest.write_descriptor(&driver.ram, id, desc);
    }
    driver.to_guest.add(&driver.ram, 10);
    stream.write_all(&pattern(BUFFER_LEN as usize - 44 + 106)).unwrap();
    driver.run_backend();
    assert_eq!(driver.to_guest.take_used(&driver.ram).unwrap().1, BUFFER_LEN);
    assert_eq!(driver.to_guest.take_used(&driver.ram), Some((10, 150)));
    let (mut head, mut tail) = ([0; 20], [0; 100]);
    driver.ram.read_slice(&mut head, GuestAddress(0x21_0000)).unwrap();
    driver.ram.read_slice(&mut tail, GuestAddress(0x22_0000)).unwrap();
    let expected = &pattern(BUFFER_LEN as usize - 44 + 106)[BUFFER_LEN as usize - 44..];
    assert_eq!((&head[14..], &tail[..]), (&expected[..6], &expected[6..]));
}
