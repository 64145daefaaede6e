//! Guests that break the rules: counted, answered, survived.

use std::io::Write;
use std::sync::atomic::Ordering;

use virtio_queue::QueueT;
use vm_memory::{Address, Bytes};

use super::super::credit::BUF_ALLOC;
use super::super::packet::HEADER_LEN;
use super::super::traffic::MAX_REFUSALS;
use super::*;
use crate::device::virtio::{Driver, VirtioDevice};

const NEXT: u16 = 1;
const WRITE: u16 = 2;

#[test]
fn broken_chains_are_counted_and_given_back_unused() {
    let mut driver = TestDriver::new(pathless());
    let (stream, key) = connected(&mut driver);
    let header = HEADER_LEN as u32;
    for (name, descriptor) in [
        ("loop", (0x40_0000, header, NEXT, 0)),
        ("writable", (0x40_0000, header, WRITE, 0)),
        ("too short", (0x40_0000, header - 1, 0, 0)),
        ("empty", (0x40_0000, 0, 0, 0)),
        ("outside RAM", (u64::MAX - 10, header, 0, 0)),
        ("huge", (0x40_0000, u32::MAX, 0, 0)),
        ("link out of the table", (0x40_0000, header, NEXT, 256)),
    ] {
        let before = driver.vsock.stats().bad_chains;
        driver.to_host.write_descriptor(&driver.ram, 0, descriptor);
        driver.to_host.add(&driver.ram, 0);
        driver.kick_to_host();
        assert_eq!(driver.to_host.take_used(&driver.ram), Some((0, 0)), "{name}");
        assert_eq!(driver.vsock.stats().bad_chains, before + 1, "{name}");
    }
    driver.send_data(key, b"unharmed");
    assert_eq!(read_exact(&stream, 8), b"unharmed");
    assert!(!driver.vsock.needs_reset());
}

#[test]
fn broken_buffers_are_skipped_and_packets_go_into_sound_ones() {
    let mut driver = TestDriver::without_buffers(pathless(), true);
    let _stream = driver.vsock.connector().connect(GuestPort(1)).unwrap();
    driver.run_backend();
    for (id, descriptor) in [
        (0, (0x10_0000, 4096, 0, 0)),
        (1, (0x10_1000, HEADER_LEN as u32, WRITE, 0)),
        (2, (u64::MAX, 4096, WRITE, 0)),
    ] {
        driver.to_guest.write_descriptor(&driver.ram, id, descriptor);
        driver.to_guest.add(&driver.ram, id);
    }
    driver.post(1);
    for id in 0..3 {
        assert_eq!(driver.to_guest.take_used(&driver.ram), Some((id, 0)));
    }
    driver.expect(Op::Request);
    assert_eq!(driver.vsock.stats().bad_chains, 3);
}

#[test]
fn payload_that_is_not_there_ends_the_connection() {
    let mut driver = TestDriver::new(pathless());
    let (stream, key) = connected(&mut driver);
    let header = Header { len: 100, ..driver.header(key, Op::ReadWrite) };
    driver.send(header, b"short");
    driver.expect(Op::Reset);
    assert_eq!(read_all(&stream), b"");
    assert_eq!(driver.vsock.stats().bad_chains, 1);
}

#[test]
fn a_jump_of_the_ring_stops_the_device_until_it_is_reset() {
    let mut driver = TestDriver::new(pathless());
    let (stream, key) = connected(&mut driver);
    driver.to_host.added = driver.to_host.added.wrapping_add(300);
    driver.to_host.add(&driver.ram, 0);
    driver.vsock.handle_queue(1);
    assert!(driver.vsock.needs_reset());
    assert_eq!(driver.interrupts.config.load(Ordering::Relaxed), 1);
    assert_eq!(read_all(&stream), b"", "the host's side does not hang");
    let bytes = driver.vsock.stats().bytes_to_host;
    driver.add(Header { len: 5, ..driver.header(key, Op::ReadWrite) }, b"nobody looks");
    driver.vsock.handle_queue(1);
    driver.run_backend();
    assert_eq!(driver.vsock.stats().bytes_to_host, bytes);
    assert_eq!(driver.interrupts.config.load(Ordering::Relaxed), 1);
    driver.vsock.reset();
    assert!(!driver.vsock.needs_reset());
}

#[test]
fn a_head_out_of_the_table_stops_the_device() {
    let mut driver = TestDriver::new(pathless());
    driver.to_host.add(&driver.ram, 256);
    driver.kick_to_host();
    assert!(driver.vsock.needs_reset());
}

#[test]
fn rings_outside_ram_stop_the_device_at_once() {
    let donor = TestDriver::new(pathless());
    let mut queue = virtio_queue::Queue::new(256).unwrap();
    queue.set_used_ring_address(Some(0x7fff_fff0), None);
    queue.set_avail_ring_address(Some(0x1000), None);
    queue.set_ready(true);
    let mut vsock = pathless();
    let untouched = || virtio_queue::Queue::new(256).unwrap();
    vsock.activate(Driver {
        ram: donor.ram.clone(),
        features: 0,
        queues: [untouched(), queue, untouched()].map(Into::into).into(),
        interrupt: donor.interrupts.clone(),
    });
    assert!(vsock.needs_reset());
    assert_eq!(donor.interrupts.config.load(Ordering::Relaxed), 1);
}

#[test]
fn a_driver_that_leaves_the_queues_alone_is_left_alone() {
    let donor = TestDriver::new(pathless());
    let mut vsock = pathless();
    for count in [0, 1, 3] {
        vsock.activate(Driver {
            ram: donor.ram.clone(),
            features: 0,
            queues: (0..count).map(|_| virtio_queue::Queue::new(256).unwrap().into()).collect(),
            interrupt: donor.interrupts.clone(),
        });
        vsock.handle_queue(1);
        assert!(!vsock.needs_reset());
        vsock.reset();
    }
}

#[test]
fn packets_that_mean_nothing_are_refused_and_touch_nobody() {
    let mut driver = TestDriver::new(pathless());
    let (stream, key) = connected(&mut driver);
    let good = driver.header(key, Op::CreditUpdate);
    for (header, answered) in [
        (Header { op: 99, ..good }, true),
        (Header { socket_type: 3, ..good }, true),
        // There is a connection for these ports, and it is a stream.
        (Header { socket_type: 2, ..good }, true),
        (Header { socket_type: 2, op: 1, ..good }, true),
        (Header { socket_type: 2, op: 3, ..good }, false),
        (Header { dst_cid: 77, ..good }, true),
        (Header { src_cid: 77, ..good }, false),
        (Header { op: 3, socket_type: 3, ..good }, false),
    ] {
        driver.send(header, &[]);
        if answered {
            let (reset, _) = driver.expect(Op::Reset);
            assert_eq!(reset.socket_type, header.socket_type);
        }
        driver.expect_silence();
    }
    assert_eq!(driver.vsock.stats().bad_packets, 8);
    driver.send_data(key, b"unharmed");
    assert_eq!(read_exact(&stream, 8), b"unharmed");
}

#[test]
fn breaking_the_protocol_ends_that_connection_and_no_other() {
    for op in [Op::Request, Op::Response] {
        let mut driver = TestDriver::new(pathless());
        let (stream, key) = connected(&mut driver);
        let (other, other_key) = connected(&mut driver);
        driver.send_op(key, op);
        driver.expect(Op::Reset);
        assert_eq!(read_all(&stream), b"");
        driver.send_data(other_key, b"unharmed");
        assert_eq!(read_exact(&other, 8), b"unharmed");
        let stats = driver.vsock.stats();
        assert_eq!((stats.bad_packets, stats.connections_reset), (1, 1));
    }
}

#[test]
fn sending_more_than_the_credit_ends_that_connection_and_no_other() {
    let mut driver = TestDriver::new(pathless());
    let (_other, other_key) = connected(&mut driver);
    let (stream, key) = connected(&mut driver);
    let chunk = vec![7; 1 << 16];
    let mut sent = 0;
    while driver.vsock.stats().credit_violations == 0 {
        driver.send_data(key, &chunk);
        sent += chunk.len();
        assert!(sent < 1 << 21, "no limit is enforced");
    }
    assert!(sent > BUF_ALLOC as usize);
    while Op::parse(driver.receive().0.op) != Some(Op::Reset) {}
    assert!(read_all(&stream).len() <= sent);
    assert_eq!(driver.connections(), 1);
    driver.send_data(other_key, b"unharmed");

    // Taking bytes that were never sent.
    let lie = Header { fwd_cnt: 1, ..driver.header(other_key, Op::CreditUpdate) };
    driver.send(lie, &[]);
    driver.expect(Op::Reset);
    assert_eq!(driver.vsock.stats().credit_violations, 2);
}

#[test]
fn a_flood_without_buffers_for_the_answers_stalls_the_guest_and_grows_nothing() {
    for (event_idx, buffers) in [(false, 64), (true, 64), (false, 256), (true, 256)] {
        let mut driver = TestDriver::without_buffers(pathless(), event_idx);
        let mut answered = 0;
        let mut floods = 0u32;
        for _ in 0..20 {
            for guest in 0..60 {
                let header = driver.header(key(52, guest), Op::Request);
                if driver.to_host.added.wrapping_sub(floods as u16) < 60 {
                    driver.add(header, &[]);
                }
            }
            driver.kick_to_host();
            while driver.to_host.take_used(&driver.ram).is_some() {
                floods += 1;
            }
        }
        assert_eq!(driver.vsock.host.refusals.len(), MAX_REFUSALS);
        assert_eq!(driver.vsock.stats().packets_to_host, MAX_REFUSALS as u64);
        assert!(!driver.backend_is_ready(), "it is the guest's move");
        // As buffers come, so does everything that waits.
        driver.post(buffers);
        driver.run_backend();
        while let Some((header, _)) = driver.try_receive() {
            assert_eq!(Op::parse(header.op), Some(Op::Reset));
            answered += 1;
            driver.run_backend();
        }
        assert_eq!(answered, u32::from(driver.to_host.added));
        assert_eq!(driver.vsock.host.refusals.len(), 0);
    }
}

#[test]
fn opening_and_ending_in_a_loop_leaves_nothing_queued() {
    let dir = TempDir::new();
    let listener = std::os::unix::net::UnixListener::bind(dir.path("vsock_52")).unwrap();
    let mut driver = TestDriver::without_buffers(listening(&dir), true);
    let before = driver.watched();
    for guest in 0..2000 {
        driver.send_op(key(52, guest), Op::Request);
        drop(listener.accept().unwrap());
        driver.send_op(key(52, guest), Op::Reset);
    }
    driver.run_backend();
    assert_eq!((driver.connections(), driver.watched()), (0, before));
    assert!(!driver.vsock.host.has_packet());
}

#[test]
fn seeded_noise_neither_stops_nor_grows_the_device() {
    let mut driver = TestDriver::new(pathless());
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut ends = Vec::new();
    for round in 0..20_000 {
        if round % 100 == 0 {
            while driver.try_receive().is_some() {}
            let (stream, key) = connected(&mut driver);
            stream.set_nonblocking(true).unwrap();
            ends.push((stream, key));
        }
        let choice = random();
        let index = random() as usize % ends.len();
        let header = Header {
            // Mostly payload: the other operations end connections soon.
            op: if choice & 7 == 0 { (choice >> 3) as u16 % 9 } else { 5 },
            flags: (choice >> 20) as u32 % 5,
            len: (choice >> 24) as u32 % 300,
            buf_alloc: (choice >> 32) as u32 % 5000,
            fwd_cnt: if choice >> 60 == 0 { (choice >> 50) as u32 % 9 } else { 0 },
            ..driver.header(ends[index].1, Op::Request)
        };
        driver.send(header, &vec![0; 290 + (random() % 100) as usize]);
        match random() % 50 {
            0 if ends.len() > 1 => drop(ends.swap_remove(index)),
            0..20 => drop(ends[index].0.write(&[1; 100])),
            _ => {}
        }
        driver.run_backend();
        while driver.try_receive().is_some() {}
        assert!(driver.connections() <= 250);
    }
    assert!(!driver.vsock.needs_reset());
    let stats = driver.vsock.stats();
    assert_eq!(stats.connections_opened, 200);
    assert!(stats.bytes_to_host > 100_000 && stats.bytes_to_guest > 1000, "{stats:?}");
    assert!(
        stats.bad_packets > 0 && stats.credit_violations > 0 && stats.bad_chains > 0,
        "{stats:?}"
    );
    let (stream, key) = connected(&mut driver);
    driver.send_data(key, b"alive");
    assert_eq!(read_exact(&stream, 5), b"alive");
}

#[test]
fn junk_in_descriptor_tables_is_survived() {
    let mut driver = TestDriver::new(pathless());
    let mut state = 1u64;
    for _ in 0..5000 {
        for id in 0..8 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let addr =
                [state >> 20, state >> 38, 0x40_0000, u64::MAX - 3][state as usize >> 60 & 3];
            let len = (state >> 33) as u32 & 0xfff;
            let flags = (state >> 16) as u16 & 7;
            driver.to_host.write_descriptor(&driver.ram, id, (addr, len, flags, (id + 1) & 7));
        }
        driver.to_host.add(&driver.ram, 0);
        driver.kick_to_host();
        while driver.to_host.take_used(&driver.ram).is_some() {}
        while driver.try_receive().is_some() {}
        if driver.vsock.needs_reset() {
            return;
        }
    }
    let idx = driver.to_host.used.unchecked_add(2);
    assert_eq!(driver.ram.read_obj::<u16>(idx).unwrap(), 5000);
}
