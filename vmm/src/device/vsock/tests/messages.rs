//! Sockets for messages (`SOCK_SEQPACKET`): boundaries stay where they were, whatever a message goes through.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, accept, bind, connect, listen, recv, send,
    shutdown, socket,
};

use super::super::credit::{BUF_ALLOC, SMALL_BUF_ALLOC};
use super::super::packet::{END_OF_MESSAGE, HEADER_LEN};
use super::super::testing::BUFFER_LEN;
use super::*;
use crate::device::virtio::VirtioDevice;

/// Bytes of payload in a packet to the guest.
const PIECE: usize = BUFFER_LEN as usize - HEADER_LEN;

fn new_socket() -> OwnedFd {
    socket(AddressFamily::UNIX, rustix::net::SocketType::SEQPACKET, None).unwrap()
}

/// A device that listens at `vsock` and at `messages` in `dir`.
fn listening(dir: &TempDir) -> Vsock {
    let (mut listener, streams) = Listener::bind(&dir.path("vsock")).unwrap();
    let messages = listener.bind_messages(&dir.path("messages")).unwrap();
    std::mem::forget((streams, messages));
    Vsock::new(cid(), Some(listener)).unwrap()
}

/// A client of the listener for messages that has sent `line`.
fn client(dir: &TempDir, line: &[u8]) -> OwnedFd {
    let client = new_socket();
    connect(&client, &SocketAddrUnix::new(dir.path("messages")).unwrap()).unwrap();
    send(&client, line, SendFlags::empty()).unwrap();
    client
}

fn receive(fd: impl AsFd) -> Vec<u8> {
    let mut bytes = vec![0; 1 << 20];
    let (len, _) = recv(fd, &mut bytes[..], RecvFlags::DONTWAIT).unwrap();
    bytes.truncate(len);
    bytes
}

fn message(driver: &TestDriver, key: ConnectionKey, op: Op) -> Header {
    Header { socket_type: 2, buf_alloc: 1 << 20, ..driver.header(key, op) }
}

/// Sends `payload` in packets of `piece` bytes; the last one ends the message.
fn send_message(driver: &mut TestDriver, key: ConnectionKey, payload: &[u8], piece: usize) {
    let mut pieces = payload.chunks(piece).peekable();
    while let Some(part) = pieces.next() {
        let flags = if pieces.peek().is_none() { END_OF_MESSAGE } else { 0 };
        let header = message(driver, key, Op::ReadWrite);
        driver.send(Header { len: part.len() as u32, flags, ..header }, part);
    }
}

/// The next message for the guest, in whatever pieces it comes. Gives their number too.
fn expect_message(driver: &mut TestDriver) -> (Vec<u8>, usize) {
    let (mut bytes, mut pieces) = (Vec::new(), 0);
    loop {
        let (header, payload) = driver.expect(Op::ReadWrite);
        assert_eq!((header.socket_type, header.flags & !END_OF_MESSAGE), (2, 0));
        assert!(!payload.is_empty());
        bytes.extend(payload);
        pieces += 1;
        if header.flags == END_OF_MESSAGE {
            return (bytes, pieces);
        }
    }
}

/// A client and the guest, connected.
fn connected(dir: &TempDir) -> (TestDriver, OwnedFd, ConnectionKey) {
    let mut driver = TestDriver::new(listening(dir));
    let client = client(dir, b"CONNECT 1024\n");
    let (request, _) = driver.expect(Op::Request);
    assert_eq!(request.socket_type, 2);
    let key = key(request.src_port, request.dst_port);
    driver.send(message(&driver, key, Op::Response), &[]);
    assert_eq!(receive(&client), format!("OK {}\n", key.host.0).into_bytes());
    (driver, client, key)
}

#[test]
fn the_line_of_a_client_is_a_message_of_its_own() {
    let dir = TempDir::new();
    let mut driver = TestDriver::new(listening(&dir));
    for line in [&b"CONNECT 1024\n"[..], b"CONNECT 1024"] {
        let client = client(&dir, line);
        let (request, _) = driver.expect(Op::Request);
        assert_eq!((request.socket_type, request.dst_port), (2, 1024));
        driver.send(message(&driver, key(request.src_port, 1024), Op::Reset), &[]);
        assert_eq!(receive(&client), b"");
    }
    let long = format!("CONNECT 1024{}", " ".repeat(30));
    for junk in [&b"CONNECT 1024\nCONNECT 1024\n"[..], b"CONN", long.as_bytes(), b""] {
        let client = client(&dir, junk);
        driver.expect_silence();
        assert_eq!(receive(&client), b"", "{junk:?}");
    }
    assert_eq!(driver.connections(), 0);
}

#[test]
fn messages_to_the_guest_keep_their_boundaries() {
    let dir = TempDir::new();
    let (mut driver, client, key) = connected(&dir);
    let mut received = 0;
    for len in [1, 5, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE, 100_000, 2] {
        let sent = pattern(len);
        send(&client, &sent, SendFlags::empty()).unwrap();
        send(&client, b"next", SendFlags::empty()).unwrap();
        let (bytes, pieces) = expect_message(&mut driver);
        assert!(bytes == sent, "{len}");
        assert_eq!(pieces, len.div_ceil(PIECE), "{len}");
        assert_eq!(expect_message(&mut driver), (b"next".to_vec(), 1), "{len}");
        received += len + 4;
        let update = message(&driver, key, Op::CreditUpdate);
        driver.send(Header { fwd_cnt: received as u32, ..update }, &[]);
    }
    driver.expect_silence();
    assert_eq!(driver.vsock.stats().bytes_to_guest, received as u64);
}

#[test]
fn messages_to_the_host_keep_their_boundaries() {
    let dir = TempDir::new();
    let (mut driver, client, key) = connected(&dir);
    for (len, piece) in [(1, 1), (5, 2), (4096, 4096), (60_000, 60_000), (60_000, 999)] {
        let sent = pattern(len);
        send_message(&mut driver, key, &sent, piece);
        send_message(&mut driver, key, b"next", 4);
        assert!(receive(&client) == sent, "{len}");
        assert_eq!(receive(&client), b"next", "{len}");
        while driver.try_receive().is_some() {}
    }
    // In as many packets as there are, the end of a message alone in one of its own.
    let header = message(&driver, key, Op::ReadWrite);
    driver.send(Header { len: 4, ..header }, b"half");
    assert!(recv(&client, &mut [0; 9][..], RecvFlags::DONTWAIT).is_err(), "half a message is none");
    driver.send(Header { flags: END_OF_MESSAGE, ..header }, &[]);
    assert_eq!(receive(&client), b"half");
    assert_eq!(driver.vsock.stats().bad_packets, 0);
}

#[test]
fn a_message_of_the_whole_credit_arrives_and_a_longer_one_ends_the_connection() {
    let dir = TempDir::new();
    let (mut driver, client, key) = connected(&dir);
    let whole = pattern(BUF_ALLOC as usize);
    send_message(&mut driver, key, &whole, 1 << 16);
    assert!(receive(&client) == whole);
    let (update, _) = driver.expect(Op::CreditUpdate);
    assert_eq!(update.fwd_cnt, BUF_ALLOC);

    send_message(&mut driver, key, &pattern(BUF_ALLOC as usize + 1), 1 << 16);
    driver.expect(Op::Reset);
    assert_eq!(receive(&client), b"");
    assert_eq!(driver.vsock.stats().credit_violations, 1);
}

#[test]
fn a_message_that_the_guest_has_no_room_for_ends_the_connection() {
    let dir = TempDir::new();
    let (mut driver, client, key) = connected(&dir);
    let update = message(&driver, key, Op::CreditUpdate);
    driver.send(Header { buf_alloc: 1000, ..update }, &[]);
    send(&client, &pattern(1000), SendFlags::empty()).unwrap();
    assert_eq!(expect_message(&mut driver).0, pattern(1000));
    driver.expect(Op::CreditRequest);
    driver.send(Header { buf_alloc: 1000, fwd_cnt: 1000, ..update }, &[]);
    send(&client, &pattern(1001), SendFlags::empty()).unwrap();
    driver.expect(Op::Reset);
    // The message was not read.
    let error = recv(&client, &mut [0; 9][..], RecvFlags::DONTWAIT).unwrap_err();
    assert_eq!(error, rustix::io::Errno::CONNRESET);
    assert_eq!(driver.vsock.stats().connections_reset, 1);
}

#[test]
fn a_message_goes_on_where_credit_ended() {
    let dir = TempDir::new();
    let (mut driver, client, key) = connected(&dir);
    let update = message(&driver, key, Op::CreditUpdate);
    driver.send(Header { buf_alloc: 3000, ..update }, &[]);
    send(&client, &pattern(2000), SendFlags::empty()).unwrap();
    send(&client, &pattern(2500), SendFlags::empty()).unwrap();
    assert_eq!(expect_message(&mut driver).0, pattern(2000));
    let (header, first) = driver.expect(Op::ReadWrite);
    assert_eq!((header.flags, &first[..]), (0, &pattern(2500)[..1000]));
    driver.expect(Op::CreditRequest);
    driver.expect_silence();
    driver.send(Header { buf_alloc: 3000, fwd_cnt: 2000, ..update }, &[]);
    let (header, rest) = driver.expect(Op::ReadWrite);
    assert_eq!((header.flags, &rest[..]), (END_OF_MESSAGE, &pattern(2500)[1000..]));
}

#[test]
fn messages_wait_for_a_slow_host_in_order_and_within_the_credit() {
    let dir = TempDir::new();
    let (mut driver, client, key) = connected(&dir);
    let (mut lens, mut sent, mut forwarded) = (Vec::new(), 0, 0);
    for len in (0..).map(|round| 1 + round * 7919 % 9000) {
        while let Some((update, _)) = driver.try_receive() {
            forwarded = update.fwd_cnt as usize;
        }
        if sent - forwarded + len > BUF_ALLOC as usize {
            break;
        }
        send_message(&mut driver, key, &pattern(len), 4000);
        lens.push(len);
        sent += len;
    }
    assert!(driver.vsock.host.table.iter().any(|(_, endpoint)| endpoint.has_backlog()));
    driver.expect_silence();
    let mut received = lens.iter().map(|&len| {
        driver.run_backend();
        receive(&client) == pattern(len)
    });
    assert!(received.all(|same| same));
    driver.run_backend();
    driver.expect(Op::CreditUpdate);
}

#[test]
fn tiny_messages_that_nobody_reads_take_memory_in_proportion() {
    let dir = TempDir::new();
    let (mut driver, client, key) = connected(&dir);
    let total = 5000;
    for number in 0..total {
        send_message(&mut driver, key, &[number as u8], 1);
    }
    driver.expect_silence();
    let mut received = 0;
    while received < total {
        driver.run_backend();
        assert_eq!(receive(&client), [received as u8]);
        received += 1;
    }
}

#[test]
fn messages_of_no_bytes_are_passed_over() {
    let dir = TempDir::new();
    let (mut driver, client, key) = connected(&dir);
    for bytes in [&b""[..], b"", b"first", b"", b"second", b""] {
        send(&client, bytes, SendFlags::empty()).unwrap();
    }
    assert_eq!(expect_message(&mut driver).0, b"first");
    assert_eq!(expect_message(&mut driver).0, b"second");
    driver.expect_silence();
    // Right before the end as well.
    for bytes in [&b""[..], b"third", b"", b""] {
        send(&client, bytes, SendFlags::empty()).unwrap();
    }
    shutdown(&client, rustix::net::Shutdown::Write).unwrap();
    assert_eq!(expect_message(&mut driver).0, b"third");
    let (closed, _) = driver.expect(Op::Shutdown);
    assert_eq!(Shutdown::parse(closed.flags), Shutdown::SEND);
    // And from the guest.
    driver.send(Header { flags: END_OF_MESSAGE, ..message(&driver, key, Op::ReadWrite) }, &[]);
    send_message(&mut driver, key, b"from the guest", 100);
    assert_eq!(receive(&client), b"from the guest");
}

#[test]
fn each_direction_closes_on_its_own() {
    let dir = TempDir::new();
    let (mut driver, client, key) = connected(&dir);
    // Half a message is lost with the end.
    let header = message(&driver, key, Op::ReadWrite);
    driver.send(Header { len: 4, ..header }, b"half");
    let closing = message(&driver, key, Op::Shutdown);
    driver.send(Header { flags: Shutdown::SEND.flags(), ..closing }, &[]);
    assert_eq!(receive(&client), b"");
    send(&client, b"still open", SendFlags::empty()).unwrap();
    assert_eq!(expect_message(&mut driver).0, b"still open");
    drop(client);
    let (closed, _) = driver.expect(Op::Shutdown);
    assert_eq!(Shutdown::parse(closed.flags), Shutdown::BOTH);
    driver.send(message(&driver, key, Op::Reset), &[]);
    assert_eq!(driver.connections(), 0);
}

#[test]
fn the_guest_reaches_sockets_of_the_same_type_alone() {
    let dir = TempDir::new();
    let _streams = UnixListener::bind(dir.path("vsock_1")).unwrap();
    let messages = new_socket();
    bind(&messages, &SocketAddrUnix::new(dir.path("vsock_2")).unwrap()).unwrap();
    listen(&messages, 5).unwrap();
    let mut driver = TestDriver::new(listening(&dir));
    for (socket_type, port, op) in
        [(1, 1, Op::Response), (2, 1, Op::Reset), (1, 2, Op::Reset), (2, 2, Op::Response)]
    {
        let key = key(port, 100 + u32::from(socket_type));
        driver.send(Header { socket_type, ..driver.header(key, Op::Request) }, &[]);
        let (answer, _) = driver.expect(op);
        assert_eq!(answer.socket_type, socket_type);
    }
    let accepted = accept(&messages).unwrap();
    send_message(&mut driver, key(2, 102), b"reached", 4);
    assert_eq!(receive(&accepted), b"reached");
}

#[test]
fn a_guest_that_knows_no_messages_gets_none() {
    let dir = TempDir::new();
    let mut vsock = listening(&dir);
    // Before there is a driver, and after.
    let early = client(&dir, b"CONNECT 1\n");
    vsock.handle_backend();
    vsock.handle_backend();
    let mut driver = TestDriver::with_features(vsock, 0);
    driver.post(8);
    let late = client(&dir, b"CONNECT 1\n");
    driver.expect_silence();
    assert_eq!((receive(early), receive(late)), (vec![], vec![]));
    assert_eq!(driver.vsock.stats().connections_refused, 2);
    driver.send(Header { socket_type: 2, ..driver.header(key(1, 1), Op::Request) }, &[]);
    driver.expect(Op::Reset);
    // The next driver may.
    driver.vsock.reset();
    let mut driver = TestDriver::new(driver.vsock);
    let _client = client(&dir, b"CONNECT 1\n");
    assert_eq!(driver.expect(Op::Request).0.socket_type, 2);
}

#[test]
fn a_message_in_more_pieces_than_one_call_takes_arrives_whole() {
    let dir = TempDir::new();
    let (mut driver, client, key) = connected(&dir);
    let header = Header { len: 200, flags: END_OF_MESSAGE, ..message(&driver, key, Op::ReadWrite) };
    let bytes = pattern(200);
    driver.add_in_pieces(header, &bytes);
    driver.kick_to_host();
    assert_eq!(receive(&client), bytes);
}

#[test]
fn streams_and_messages_do_not_disturb_each_other() {
    let dir = TempDir::new();
    let (mut driver, client, key) = connected(&dir);
    let (stream, other) = super::connected(&mut driver);
    send_message(&mut driver, key, b"a message", 3);
    driver.send_data(other, b"bytes");
    assert_eq!(read_exact(&stream, 5), b"bytes");
    assert_eq!(receive(&client), b"a message");
    // A stranger's type does not touch the connection.
    driver.send(driver.header(key, Op::Reset), &[]);
    driver.send(driver.header(key, Op::Request), &[]);
    assert_eq!(driver.expect(Op::Reset).0.socket_type, 1);
    send_message(&mut driver, key, b"unharmed", 8);
    assert_eq!(receive(&client), b"unharmed");
}

#[test]
fn with_many_connections_messages_are_as_long_as_the_small_buffer() {
    let dir = TempDir::new();
    let mut driver = TestDriver::new(listening(&dir));
    let _large: Vec<_> = (0..64).map(|_| super::connected(&mut driver)).collect();
    let client = client(&dir, b"CONNECT 1\n");
    let (request, _) = driver.expect(Op::Request);
    assert_eq!(request.buf_alloc, SMALL_BUF_ALLOC);
    let key = key(request.src_port, 1);
    driver.send(message(&driver, key, Op::Response), &[]);
    receive(&client);
    let whole = pattern(SMALL_BUF_ALLOC as usize);
    send_message(&mut driver, key, &whole, 5000);
    assert!(receive(&client) == whole);
}

#[test]
fn a_client_of_the_wrong_type_is_told_by_the_system() {
    let dir = TempDir::new();
    let _vsock = listening(&dir);
    let error = UnixStream::connect(dir.path("messages")).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(rustix::io::Errno::PROTOTYPE.raw_os_error()));
}
