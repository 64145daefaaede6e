//! Sockets for messages over vsock, both ways, and as many connections as there may be.

use std::fs::Permissions;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, Shutdown, SocketAddrUnix, SocketType, accept, bind,
    connect, listen, recv, send, shutdown, socket, sockopt,
};
use rustix::process::{Resource, Rlimit, Signal, getrlimit, setrlimit};
use tempfile::TempDir;

use crate::harness::guest::Guest;
use crate::harness::vsock_guest::{Packet, SEQPACKET, STREAM, VsockGuest, op};
use crate::harness::{Started, cleanslate, eventually, file, signal, skipped, temp_dir};

const HOST_PORT: u32 = 1234;
const GUEST_PORT: u32 = 777;
/// The first port that the device gives to a client.
const CLIENT_PORT: u32 = 1 << 30;

/// A packet from the guest on one of its sockets for messages.
fn packet(host_port: u32, op: u32) -> Packet<'static> {
    Packet { kind: SEQPACKET, guest_port: GUEST_PORT, host_port, op, flags: 0, payload: b"" }
}

fn message(host_port: u32, payload: &[u8], ends: bool) -> Packet<'_> {
    Packet { flags: ends.into(), payload, ..packet(host_port, op::READ_WRITE) }
}

/// A directory that the machine's process, which is nobody, can enter.
fn open_dir() -> TempDir {
    let dir = temp_dir();
    std::fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
    dir
}

/// Runs `guest` with sockets of both types in `dir`.
fn start(dir: &TempDir, guest: &Guest) -> Started {
    Started::new(command(dir, guest))
}

fn command(dir: &TempDir, guest: &Guest) -> Command {
    let kernel = file(dir, "guest.elf", &guest.elf());
    let (streams, messages) = (dir.path().join("vsock"), dir.path().join("messages"));
    cleanslate(&[
        "run",
        "--kernel",
        kernel.to_str().unwrap(),
        "--uds",
        streams.to_str().unwrap(),
        "--uds-seqpacket",
        messages.to_str().unwrap(),
    ])
}

/// The same in this process's own rights, of which few descriptors are one, as shells start programs.
fn start_without_jail(dir: &TempDir, guest: &Guest) -> Started {
    let command = command(dir, guest);
    let mut shell = Command::new("sh");
    shell.args(["-c", "ulimit -Sn 256; exec \"$0\" \"$@\" --no-jail"]);
    shell.arg(command.get_program()).args(command.get_args());
    shell.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    Started::new(shell)
}

fn new_socket() -> OwnedFd {
    let socket = socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).unwrap();
    let patience = Some(Duration::from_secs(30));
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, patience).unwrap();
    socket
}

fn address(path: &Path) -> SocketAddrUnix {
    SocketAddrUnix::new(path).unwrap()
}

fn receive(socket: &OwnedFd) -> Vec<u8> {
    let mut bytes = vec![0; 100_000];
    let (len, _) = recv(socket, &mut bytes[..], RecvFlags::empty()).unwrap();
    bytes.truncate(len);
    bytes
}

#[test]
fn messages_of_the_guest_reach_the_host_whole_and_come_back_in_pieces() {
    let guest = VsockGuest::start()
        .send(packet(HOST_PORT, op::REQUEST))
        .send(message(HOST_PORT, b"two ", false))
        .send(message(HOST_PORT, b"pieces", true))
        .send(message(HOST_PORT, b"one", true))
        .post(64)
        .expect(0, SEQPACKET, op::RESPONSE)
        // A message of 100 bytes takes two buffers.
        .post(64)
        .post(64)
        .wait_received(3)
        .expect_word(1, 24, 64)
        .expect_word(1, 32, 0)
        .expect_word(2, 24, 36)
        .expect_word(2, 32, 1)
        .expect_word(2, 44, u32::from_le_bytes([64, 65, 66, 67]))
        .send(message(HOST_PORT, b"whole", true))
        // The end comes after a message of no bytes, which nobody is told of.
        .post(64)
        .expect(3, SEQPACKET, op::SHUTDOWN)
        .send(Packet { flags: 3, ..packet(HOST_PORT, op::SHUTDOWN) })
        .guest()
        .print("done")
        .power_off();
    let dir = open_dir();
    let port = dir.path().join(format!("vsock_{HOST_PORT}"));
    let listener = new_socket();
    bind(&listener, &address(&port)).unwrap();
    listen(&listener, 1).unwrap();
    std::fs::set_permissions(&port, Permissions::from_mode(0o777)).unwrap();
    let program = start(&dir, &guest);
    let connection = accept(&listener).unwrap();
    let patience = Some(Duration::from_secs(30));
    sockopt::set_socket_timeout(&connection, sockopt::Timeout::Recv, patience).unwrap();
    assert_eq!(receive(&connection), b"two pieces");
    assert_eq!(receive(&connection), b"one");
    let bytes: Vec<u8> = (0..100).collect();
    send(&connection, &bytes, SendFlags::empty()).unwrap();
    assert_eq!(receive(&connection), b"whole");
    send(&connection, b"", SendFlags::empty()).unwrap();
    shutdown(&connection, Shutdown::Write).unwrap();
    assert_eq!(receive(&connection), b"");
    program.finish("cleanslate run --uds-seqpacket").expect_status(0).expect_stdout("done");
    assert!(!dir.path().join("messages").exists(), "the socket was left behind");
}

#[test]
fn a_client_of_the_socket_for_messages_talks_to_the_guest_in_messages() {
    let guest = VsockGuest::start()
        .post(64)
        .expect(0, SEQPACKET, op::REQUEST)
        .send(packet(CLIENT_PORT, op::RESPONSE))
        .post(64)
        .post(64)
        .wait_received(3)
        .expect_word(1, 24, 5)
        .expect_word(1, 32, 1)
        .expect_word(2, 24, 6)
        .send(message(CLIENT_PORT, b"an answer", true))
        .guest()
        .halt();
    let dir = open_dir();
    let program = start(&dir, &guest);
    let path = dir.path().join("messages");
    eventually("there is a socket for messages", || path.exists());
    let client = new_socket();
    connect(&client, &address(&path)).unwrap();
    send(&client, format!("CONNECT {GUEST_PORT}\n").as_bytes(), SendFlags::empty()).unwrap();
    assert_eq!(receive(&client), format!("OK {CLIENT_PORT}\n").into_bytes());
    send(&client, b"first", SendFlags::empty()).unwrap();
    send(&client, b"second", SendFlags::empty()).unwrap();
    assert_eq!(receive(&client), b"an answer");
    signal(&program.child, Signal::TERM);
    program.finish("cleanslate run --uds-seqpacket").expect_status(130);
    assert!(!path.exists(), "the socket was left behind");
}

#[test]
fn four_thousand_connections_are_open_at_once_and_one_more_is_refused() {
    const MOST: u32 = 4000;
    let limit = getrlimit(Resource::Nofile).maximum;
    if limit.is_some_and(|limit| limit < 6000) {
        return skipped("no process may have 6000 descriptors here (ulimit -Hn)");
    }
    setrlimit(Resource::Nofile, Rlimit { current: limit, maximum: limit }).unwrap();
    let mut guest = VsockGuest::start();
    for guest_port in 1..=MOST + 1 {
        let stream = Packet { kind: STREAM, guest_port, ..packet(HOST_PORT, op::REQUEST) };
        guest = guest.send(stream);
        if guest_port % 128 == 0 {
            guest = guest.wait_taken();
        }
    }
    // Refusals come before answers.
    let guest = guest.wait_taken().post(64).post(64).wait_received(2);
    let guest = guest.expect(0, STREAM, op::RESET).expect_word(0, 20, MOST + 1);
    let guest = guest.expect(1, STREAM, op::RESPONSE).guest().print("done").power_off();

    for start in [start, start_without_jail] {
        let dir = open_dir();
        let port = dir.path().join(format!("vsock_{HOST_PORT}"));
        let listener = UnixListener::bind(&port).unwrap();
        listen(&listener, MOST as i32).unwrap();
        std::fs::set_permissions(&port, Permissions::from_mode(0o777)).unwrap();
        let program = start(&dir, &guest);
        let connections: Vec<_> = (0..MOST).map(|_| listener.accept().unwrap().0).collect();
        let outcome = program.finish("cleanslate run --uds").expect_status(0).expect_stdout("done");
        assert!(!outcome.stderr.contains("broke rules"), "{outcome}");
        listener.set_nonblocking(true).unwrap();
        assert!(listener.accept().is_err(), "one more came than may be");
        drop(connections);
    }
}
