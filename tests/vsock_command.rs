//! `cleanslate vsock`: pipes between a shell and a guest's ports, of any monitor that has the convention.

use std::fs::Permissions;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use agent_protocol::{AGENT_PORT, Hello, Reply, Request, frame};
use rustix::process::Signal;

use crate::harness::guest::Guest;
use crate::harness::held::Held;
use crate::harness::vsock_guest::{Packet, STREAM, VsockGuest, op};
use crate::harness::{Outcome, Started, cleanslate, eventually, file, signal, temp_dir};

/// The program with standard input open.
fn command(arguments: &[&str]) -> Started {
    let mut command = cleanslate(&[&["vsock"], arguments].concat());
    command.stdin(Stdio::piped());
    Started::new(command)
}

/// Gives `input` to the program and closes its standard input.
fn feed(program: &mut Started, input: &[u8]) {
    program.child.stdin.take().unwrap().write_all(input).unwrap();
}

/// A monitor's side of the convention: takes a client that wants to go to `port`, and answers `answer`.
fn meet(listener: &UnixListener, port: u32, answer: &str) -> UnixStream {
    let (mut stream, _) = listener.accept().unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let mut line = String::new();
    // Byte by byte: what follows is payload.
    while !line.ends_with('\n') {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        line.push(byte[0] as char);
    }
    assert_eq!(line, format!("CONNECT {port}\n"));
    stream.write_all(answer.as_bytes()).unwrap();
    stream
}

fn read_all(stream: &mut UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    bytes
}

#[test]
fn connect_pipes_both_ways_and_each_direction_ends_on_its_own() {
    let dir = temp_dir();
    let path = dir.path().join("v.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let mut program = command(&["connect", "--uds", path.to_str().unwrap(), "52"]);
    feed(&mut program, b"from standard input");
    // The answer comes in one piece with the first payload.
    let mut guest = meet(&listener, 52, "OK 1073741824\nfirst ");
    assert_eq!(read_all(&mut guest), b"from standard input");
    guest.write_all(b"and last").unwrap();
    drop(guest);
    let outcome = program.finish("cleanslate vsock connect").expect_status(0);
    assert_eq!((outcome.stdout.as_str(), outcome.stderr.as_str()), ("first and last", ""));

    // The other way round: the guest is done first, and still receives, more than any buffer holds.
    let mut program = command(&["connect", "--uds", path.to_str().unwrap(), "52"]);
    let mut guest = meet(&listener, 52, "OK 1\n");
    guest.write_all(b"done").unwrap();
    guest.shutdown(std::net::Shutdown::Write).unwrap();
    let mut stdout = program.child.stdout.take().unwrap();
    let mut four = [0; 4];
    stdout.read_exact(&mut four).unwrap();
    assert_eq!(&four, b"done");
    let mut stdin = program.child.stdin.take().unwrap();
    let later = vec![7; 4 << 20];
    std::thread::scope(|scope| {
        let later = &later;
        // It fails if the program has ended.
        scope.spawn(move || stdin.write_all(later));
        assert!(read_all(&mut guest) == *later, "not all of standard input arrived");
    });
    program.finish("cleanslate vsock connect").expect_status(0);
}

#[test]
fn connect_moves_more_than_any_buffer_both_ways_at_once() {
    let dir = temp_dir();
    let path = dir.path().join("v.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let mut program = command(&["connect", "--uds", path.to_str().unwrap(), "52"]);
    let bytes: Vec<u8> = (0..8 << 20).map(|i: u32| (i ^ i >> 8) as u8).collect();
    let mut stdin = program.child.stdin.take().unwrap();
    let mut stdout = program.child.stdout.take().unwrap();
    let guest = meet(&listener, 52, "OK 1\n");
    let echo = std::thread::spawn(move || {
        // Sends back what comes, and reads on only when that is gone: a guest with little room.
        let (mut reader, mut writer) = (&guest, &guest);
        std::io::copy(&mut reader, &mut writer).unwrap();
        guest.shutdown(std::net::Shutdown::Write).unwrap();
    });
    let sent = bytes.clone();
    let feeder = std::thread::spawn(move || stdin.write_all(&sent).unwrap());
    let mut back = Vec::new();
    stdout.read_to_end(&mut back).unwrap();
    assert!(back == bytes, "the bytes changed");
    feeder.join().unwrap();
    echo.join().unwrap();
    program.finish("cleanslate vsock connect").expect_status(0);
}

#[test]
fn connect_ends_with_the_connection_whatever_standard_input_does() {
    let dir = temp_dir();
    let path = dir.path().join("v.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let mut program = command(&["connect", "--uds", path.to_str().unwrap(), "52"]);
    let stdin = program.child.stdin.take();
    drop(meet(&listener, 52, "OK 1\n"));
    program.finish("cleanslate vsock connect").expect_status(0);
    drop(stdin);
}

#[test]
fn connect_ends_when_nobody_reads_its_output() {
    let dir = temp_dir();
    let path = dir.path().join("v.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let mut program = command(&["connect", "--uds", path.to_str().unwrap(), "52"]);
    let stdin = program.child.stdin.take();
    drop(program.child.stdout.take());
    let mut guest = meet(&listener, 52, "OK 1\n");
    guest.write_all(b"nobody reads this").unwrap();
    program.finish("cleanslate vsock connect").expect_status(0);
    drop(stdin);
}

#[test]
fn connect_says_in_a_line_what_went_wrong() {
    let dir = temp_dir();
    let path = dir.path().join("v.sock");
    let path = path.to_str().unwrap();
    let check = |port: &str, what: &str, meeting: &dyn Fn()| {
        let mut program = command(&["connect", "--uds", path, port]);
        // Input that a guest would have to take.
        let stdin = program.child.stdin.take();
        meeting();
        drop(stdin);
        let command = format!("cleanslate vsock connect {port}");
        program.finish(&command).expect_status(2).expect_one_line_of_stderr().expect_stderr(what);
    };
    check("52", "No such file or directory", &|| ());
    check("4294967295", "a port is a number from 0 to 4294967294", &|| ());
    check("x", "a port is a number", &|| ());
    let listener = UnixListener::bind(path).unwrap();
    check("52", "refused the connection to its port 52", &|| drop(meet(&listener, 52, "")));
    check("52", "answered \"HTTP/1.1 400\" instead of OK", &|| {
        drop(meet(&listener, 52, "HTTP/1.1 400\r\n"));
    });
    drop(listener);
    check("52", "Connection refused", &|| ());
    std::fs::remove_file(path).unwrap();
    std::fs::write(path, "").unwrap();
    check("52", "Connection refused", &|| ());
}

#[test]
fn connect_tells_of_bytes_that_the_guest_did_not_take() {
    let dir = temp_dir();
    let path = dir.path().join("v.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let mut program = command(&["connect", "--uds", path.to_str().unwrap(), "52"]);
    let mut stdin = program.child.stdin.take().unwrap();
    let guest = meet(&listener, 52, "OK 1\n");
    guest.shutdown(std::net::Shutdown::Read).unwrap();
    stdin.write_all(b"to nobody").unwrap();
    drop(guest);
    program
        .finish("cleanslate vsock connect")
        .expect_status(2)
        .expect_one_line_of_stderr()
        .expect_stderr("did not take all of standard input");
    drop(stdin);
}

#[test]
fn connect_reaches_the_agent_of_a_machine() {
    let machine = Held::start();
    let port = AGENT_PORT.to_string();
    let path = machine.path.to_str().unwrap();
    let mut program = command(&["connect", "--uds", path, &port]);
    let mut stdout = BufReader::new(program.child.stdout.take().unwrap());
    let mut stdin = program.child.stdin.take().unwrap();
    stdin.write_all(&frame::encode(&Request::Ping(7)).unwrap()).unwrap();
    let mut bytes = Vec::new();
    let hello_and_pong = |bytes: &[u8]| -> Option<Reply> {
        let (_, used) = frame::decode::<Hello>(bytes).unwrap()?;
        Some(frame::decode::<Reply>(&bytes[used..]).unwrap()?.0)
    };
    while hello_and_pong(&bytes).is_none() {
        let chunk = stdout.fill_buf().unwrap();
        assert!(!chunk.is_empty(), "the connection ended");
        bytes.extend_from_slice(chunk);
        let len = chunk.len();
        stdout.consume(len);
    }
    assert_eq!(hello_and_pong(&bytes), Some(Reply::Pong(7)));
    drop(stdin);
    program.finish("cleanslate vsock connect").expect_status(0);

    let refused = command(&["connect", "--uds", path, "4242"]);
    refused
        .finish("cleanslate vsock connect 4242")
        .expect_status(2)
        .expect_one_line_of_stderr()
        .expect_stderr("the guest refused the connection to its port 4242");
    machine.end();
}

/// Waits until the socket is there and connects to it, as a monitor does for its guest.
fn call(path: &Path) -> UnixStream {
    let mut stream = None;
    eventually("somebody listens", || {
        stream = UnixStream::connect(path).ok();
        stream.is_some()
    });
    stream.unwrap()
}

fn uds(dir: &tempfile::TempDir) -> (PathBuf, PathBuf) {
    (dir.path().join("v.sock"), dir.path().join("v.sock_52"))
}

#[test]
fn listen_takes_one_connection_and_removes_its_socket() {
    let dir = temp_dir();
    let (path, port) = uds(&dir);
    let mut program = command(&["listen", "--uds", path.to_str().unwrap(), "52"]);
    let mut guest = call(&port);
    guest.write_all(b"from the guest").unwrap();
    guest.shutdown(std::net::Shutdown::Write).unwrap();
    let mut stdout = program.child.stdout.take().unwrap();
    let mut text = [0; 14];
    stdout.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"from the guest");
    assert!(!port.exists(), "a second connection would find nobody");
    feed(&mut program, b"from standard input");
    assert_eq!(read_all(&mut guest), b"from standard input");
    program.finish("cleanslate vsock listen").expect_status(0);
}

#[test]
fn listen_can_be_interrupted_before_and_after_the_connection() {
    for connected in [false, true] {
        let dir = temp_dir();
        let (path, port) = uds(&dir);
        let program = command(&["listen", "--uds", path.to_str().unwrap(), "52"]);
        eventually("somebody listens", || port.exists());
        let guest = connected.then(|| call(&port));
        if connected {
            eventually("the connection is accepted", || !port.exists());
        }
        signal(&program.child, Signal::INT);
        let outcome = program.finish("cleanslate vsock listen").expect_status(130);
        assert_eq!(outcome.stderr, "");
        assert!(!port.exists());
        drop(guest);
    }
}

#[test]
fn listen_refuses_a_path_that_exists() {
    let dir = temp_dir();
    let (path, port) = uds(&dir);
    std::fs::write(&port, "precious").unwrap();
    command(&["listen", "--uds", path.to_str().unwrap(), "52"])
        .finish("cleanslate vsock listen")
        .expect_status(2)
        .expect_one_line_of_stderr()
        .expect_stderr("v.sock_52");
    assert_eq!(std::fs::read(&port).unwrap(), b"precious");
}

/// A guest that connects to port 52 of the host with a socket of `kind`, sends a greeting, and is done.
fn caller(kind: u32, flags: u32) -> Guest {
    let packet = |op| Packet { kind, guest_port: 777, host_port: 52, op, flags: 0, payload: b"" };
    VsockGuest::start()
        .send(packet(op::REQUEST))
        .send(Packet { payload: b"hello from the guest", flags, ..packet(op::READ_WRITE) })
        .send(Packet { flags: 3, ..packet(op::SHUTDOWN) })
        .wait_taken()
        .guest()
        .power_off()
}

#[test]
fn listen_is_reached_by_the_guest_of_a_jailed_machine() {
    for (kind, flags, arguments) in [(STREAM, 0, &[][..]), (2, 1, &["--seqpacket"])] {
        let dir = temp_dir();
        std::fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
        let (path, port) = uds(&dir);
        let listen = ["listen", "--uds", path.to_str().unwrap(), "52"];
        let program = command(&[&listen[..], arguments].concat());
        eventually("somebody listens", || port.exists());
        // The owner changes right after.
        if rustix::process::geteuid().is_root() {
            use std::os::unix::fs::MetadataExt;
            eventually("it is nobody's", || port.metadata().is_ok_and(|file| file.uid() == 65534));
        }
        let kernel = file(&dir, "guest.elf", &caller(kind, flags).elf());
        let run = ["run", "--kernel", kernel.to_str().unwrap(), "--uds", path.to_str().unwrap()];
        let machine = Started::new(cleanslate(&run)).finish("cleanslate run --uds");
        machine.expect_status(0);
        let outcome: Outcome = program.finish("cleanslate vsock listen").expect_status(0);
        assert_eq!(outcome.stdout, "hello from the guest");
    }
}
