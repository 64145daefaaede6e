//! How connections come about, and how they do not.

use std::io::Write;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use super::super::packet::HEADER_LEN;
use super::*;
use crate::device::virtio::VirtioDevice;

fn client(dir: &TempDir, bytes: &[u8]) -> UnixStream {
    let mut stream = UnixStream::connect(dir.path("vsock")).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    stream.write_all(bytes).unwrap();
    stream
}

fn impatient(dir: &TempDir) -> Vsock {
    Vsock::with_patience(cid(), Some(listener(dir)), Duration::from_millis(50)).unwrap()
}

#[test]
fn the_guest_reads_its_cid_and_nothing_else() {
    let vsock = pathless();
    for (offset, expected) in
        [(0, [3, 0, 0, 0]), (3, [0; 4]), (6, [0; 4]), (8, [0; 4]), (u64::MAX - 7, [0; 4])]
    {
        let mut data = [0xaa; 4];
        vsock.read_config(offset, &mut data);
        assert_eq!(data, expected, "at {offset}");
    }
}

#[test]
fn the_guest_connects_to_a_port_that_somebody_listens_on() {
    let dir = TempDir::new();
    let listener = UnixListener::bind(dir.path("vsock_52")).unwrap();
    let mut driver = TestDriver::new(listening(&dir));
    driver.send_op(key(52, 7000), Op::Request);
    let (response, _) = driver.expect(Op::Response);
    assert_eq!((response.src_port, response.dst_port), (52, 7000));
    assert!(response.buf_alloc > 0);

    let (mut stream, _) = listener.accept().unwrap();
    stream.write_all(b"from the host").unwrap();
    assert_eq!(driver.expect(Op::ReadWrite).1, b"from the host");
    driver.send_data(key(52, 7000), b"from the guest");
    assert_eq!(read_exact(&stream, 14), b"from the guest");
    assert_eq!(driver.vsock.stats().connections_opened, 1);
}

#[test]
fn the_guest_is_refused_where_nobody_listens() {
    let dir = TempDir::new();
    // A socket file that nobody listens on any more.
    drop(UnixListener::bind(dir.path("vsock_53")).unwrap());
    // The port number that means any port.
    let _listener = UnixListener::bind(dir.path("vsock_4294967295")).unwrap();
    for vsock in [listening(&dir), pathless()] {
        let mut driver = TestDriver::new(vsock);
        for port in [52, 53, u32::MAX] {
            driver.send_op(key(port, 7000), Op::Request);
            let (reset, _) = driver.expect(Op::Reset);
            assert_eq!((reset.src_port, reset.dst_port), (port, 7000));
        }
        assert_eq!(driver.vsock.stats().connections_refused, 3);
        assert_eq!(driver.connections(), 0);
    }
}

#[test]
fn a_listener_with_a_full_backlog_does_not_hold_up_the_device() {
    let dir = TempDir::new();
    let listener = UnixListener::bind(dir.path("vsock_52")).unwrap();
    rustix::net::listen(&listener, 1).unwrap();
    let mut driver = TestDriver::new(listening(&dir));
    let ops: Vec<_> = (0..4)
        .map(|port| {
            driver.send_op(key(52, port), Op::Request);
            Op::parse(driver.receive().0.op).unwrap()
        })
        .collect();
    assert_eq!(ops, [Op::Response, Op::Response, Op::Reset, Op::Reset]);
}

#[test]
fn a_client_hears_ok_once_the_guest_has_accepted() {
    let dir = TempDir::new();
    let mut driver = TestDriver::new(listening(&dir));
    // Bytes right behind the line are for the guest.
    let mut stream = client(&dir, b"CONNECT 1024\nearly");
    let key = driver.accept();
    assert_eq!(key, super::key(1 << 30, 1024));
    assert_eq!(read_exact(&stream, 14), b"OK 1073741824\n");
    assert_eq!(driver.expect(Op::ReadWrite).1, b"early");
    stream.write_all(b"later").unwrap();
    assert_eq!(driver.expect(Op::ReadWrite).1, b"later");
    driver.send_data(key, b"reply");
    assert_eq!(read_exact(&stream, 5), b"reply");
}

#[test]
fn a_line_may_come_in_pieces() {
    let dir = TempDir::new();
    let mut driver = TestDriver::new(listening(&dir));
    let mut stream = client(&dir, b"CONN");
    driver.expect_silence();
    stream.write_all(b"ECT 10").unwrap();
    driver.expect_silence();
    stream.write_all(b"24\n").unwrap();
    driver.accept();
    assert_eq!(read_exact(&stream, 3), b"OK ");
}

#[test]
fn lines_that_lead_nowhere_close_the_client() {
    let dir = TempDir::new();
    let mut driver = TestDriver::new(listening(&dir));
    let before = driver.watched();
    for bytes in [
        &b"GET / HTTP/1.1\n"[..],
        b"\n",
        b"CONNECT 99999999999\n",
        b"CONNECT 10240000000000000000000000000000",
        &[b' '; 1000],
        &[0xff; 32],
    ] {
        let stream = client(&dir, bytes);
        driver.expect_silence();
        // Unread bytes turn the end of file into a reset.
        match (&stream).read(&mut [0]) {
            Ok(0) => {}
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset),
            Ok(_) => panic!("an answer to junk"),
        }
    }
    // Half a line, and gone.
    drop(client(&dir, b"CONNECT 10"));
    driver.expect_silence();
    assert_eq!(driver.watched(), before);
}

#[test]
fn a_client_is_closed_when_the_guest_refuses() {
    let dir = TempDir::new();
    let mut driver = TestDriver::new(listening(&dir));
    let stream = client(&dir, b"CONNECT 9\n");
    let (request, _) = driver.expect(Op::Request);
    driver.send_op(key(request.src_port, 9), Op::Reset);
    assert_eq!(read_all(&stream), b"");
    assert_eq!(driver.vsock.stats().connections_refused, 1);
    assert_eq!(driver.connections(), 0);
}

#[test]
fn nobody_waits_for_an_answer_for_ever() {
    let dir = TempDir::new();
    let mut driver = TestDriver::new(impatient(&dir));
    let undecided = client(&dir, b"CONN");
    let asked = client(&dir, b"CONNECT 9\n");
    let monitor = driver.vsock.connector().connect(GuestPort(10)).unwrap();
    driver.expect(Op::Request);
    driver.expect(Op::Request);
    driver.expect(Op::Reset);
    driver.expect(Op::Reset);
    for stream in [undecided, asked, monitor] {
        assert_eq!(read_all(&stream), b"");
    }
    std::thread::sleep(Duration::from_millis(120));
    driver.run_backend();
    std::thread::sleep(Duration::from_millis(120));
    assert!(!driver.backend_is_ready(), "no deadline is left, so no timer runs");
    assert_eq!(driver.connections(), 0);
}

#[test]
fn the_monitor_waits_for_the_guest_to_boot() {
    let dir = TempDir::new();
    let mut vsock = impatient(&dir);
    let connector = vsock.connector();
    let stream = std::thread::spawn(move || connector.connect(GuestPort(1024)).unwrap());
    let mut stream = stream.join().unwrap();
    stream.write_all(b"hello").unwrap();
    vsock.handle_backend();
    std::thread::sleep(Duration::from_millis(120));
    vsock.handle_backend();

    let mut driver = TestDriver::without_buffers(vsock, false);
    driver.run_backend();
    std::thread::sleep(Duration::from_millis(60));
    driver.run_backend();
    driver.post(8);
    let key = driver.accept();
    assert_eq!(driver.expect(Op::ReadWrite).1, b"hello");
    driver.send_data(key, b"no line before this");
    assert_eq!(read_exact(&stream, 19), b"no line before this");
}

#[test]
fn whoever_hangs_up_before_the_answer_is_forgotten() {
    let mut driver = TestDriver::without_buffers(pathless(), true);
    drop(driver.vsock.connector().connect(GuestPort(1)).unwrap());
    driver.run_backend();
    assert_eq!(driver.connections(), 0, "the guest never heard of it");
    driver.post(8);
    driver.expect_silence();

    let stream = driver.vsock.connector().connect(GuestPort(1)).unwrap();
    let (request, _) = driver.expect(Op::Request);
    drop(stream);
    driver.expect(Op::Reset);
    assert_eq!(driver.connections(), 0);
    driver.send_op(key(request.src_port, 1), Op::Response);
    driver.expect(Op::Reset);
}

#[test]
fn host_ports_are_not_given_out_twice_at_a_time() {
    let mut driver = TestDriver::new(pathless());
    let (_first, first) = connected(&mut driver);
    let (_second, second) = connected(&mut driver);
    assert_eq!((first.host.0, second.host.0), (1 << 30, (1 << 30) + 1));
}

#[test]
fn thousands_of_connections_fit_and_one_more_is_refused() {
    use super::super::table::MAX_CONNECTIONS;
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let maximum = getrlimit(Resource::Nofile).maximum;
    if maximum.is_some_and(|maximum| maximum < 10_000) {
        eprintln!("not run: this process may not have 10000 descriptors");
        return;
    }
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).unwrap();
    let mut driver = TestDriver::new(pathless());
    let before = driver.watched();
    let mut streams: Vec<_> = (0..MAX_CONNECTIONS).map(|_| connected(&mut driver)).collect();
    assert_eq!(driver.connections(), MAX_CONNECTIONS);
    let refused = driver.vsock.connector().connect(GuestPort(1024)).unwrap();
    driver.expect_silence();
    assert_eq!(read_all(&refused), b"");
    driver.send_op(key(52, 1), Op::Request);
    driver.expect(Op::Reset);

    let (stream, key) = streams.swap_remove(1234);
    driver.send_data(key, b"still works");
    assert_eq!(read_exact(&stream, 11), b"still works");
    driver.send_op(key, Op::Reset);
    assert_eq!(read_all(&stream), b"");
    connected(&mut driver);
    driver.vsock.reset();
    assert!(streams.iter().all(|(stream, _)| read_all(stream).is_empty()));
    assert_eq!(driver.watched(), before);
}

#[test]
fn an_idle_connection_takes_less_than_a_kib() {
    let size = size_of::<super::super::endpoint::Endpoint>() + size_of::<ConnectionKey>();
    // A hash table is at least 7/16 full after growing.
    assert!(size * 16 / 7 < 1024, "{size}");
}

#[test]
fn headers_agree_with_the_virtio_vsock_crate() {
    use virtio_queue::desc::{RawDescriptor, split::Descriptor};
    use virtio_queue::mock::MockSplitQueue;
    use vm_memory::{Bytes, GuestAddress};
    let ram = crate::memory::GuestRam::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
    let ours = Header {
        len: 5,
        ..Header::to_guest(cid(), key(52, 1024), SocketType::Stream, Op::ReadWrite)
    };
    ram.write_slice(&ours.to_bytes(), GuestAddress(0x8000)).unwrap();
    let queue = MockSplitQueue::new(&ram, 4);
    let len = HEADER_LEN as u32 + 5;
    let descriptor = RawDescriptor::from(Descriptor::new(0x8000, len, 0, 0));
    let mut chain = queue.build_desc_chain(&[descriptor]).unwrap();
    let theirs =
        virtio_vsock::packet::VsockPacket::from_tx_virtq_chain(&ram, &mut chain, 1024).unwrap();
    assert_eq!((theirs.src_cid(), theirs.dst_cid()), (2, 3));
    assert_eq!((theirs.src_port(), theirs.dst_port()), (52, 1024));
    assert_eq!((theirs.type_(), theirs.op(), theirs.len()), (1, 5, 5));
}
