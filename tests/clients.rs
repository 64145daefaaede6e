//! Host clients that break rules hurt only themselves: the monitor goes on, holds no more than before, and serves everybody else.

use std::io::{BufReader, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::Duration;

use agent_protocol::{AGENT_PORT, Reply, Request, frame};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketType, recv, send, socket,
};

use crate::harness::client::{ask, connect, greeted};
use crate::harness::held::Held;
use crate::harness::holdings::Holdings;
use crate::harness::temp_dir;

/// A client that keeps to the rules beside others that do not.
struct Bystander {
    stream: BufReader<UnixStream>,
    asked: u64,
}

impl Bystander {
    fn new(path: &Path) -> Self {
        Self { stream: greeted(path).0, asked: 0 }
    }

    /// Gets what it asks for.
    #[track_caller]
    fn is_served(&mut self) {
        self.asked += 1;
        let bytes: Vec<u8> = (0..20_000).map(|i| (i * self.asked % 251) as u8).collect();
        assert!(ask(&mut self.stream, &Request::Echo(bytes.clone())) == Reply::Echo(bytes));
        assert_eq!(ask(&mut self.stream, &Request::Ping(self.asked)), Reply::Pong(self.asked));
    }
}

/// Writes as much of `bytes` as the other side takes.
fn write_what_is_taken(stream: &mut UnixStream, bytes: &[u8]) {
    if let Err(error) = stream.write_all(bytes) {
        assert!(
            matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset),
            "{error}"
        );
    }
}

#[test]
fn bytes_that_are_no_line_close_the_client() {
    let machine = Held::start();
    let mut bystander = Bystander::new(&machine.path);
    // Now all is there that stays.
    bystander.is_served();
    let before = Holdings::of(machine.process());
    let mib = |byte| vec![byte; 1 << 20];
    for (name, bytes) in [
        ("a mebibyte without a line feed", mib(b'x')),
        ("a mebibyte of zeroes", mib(0)),
        ("a mebibyte of line feeds", mib(b'\n')),
        ("a mebibyte of spaces", mib(b' ')),
        ("a zero behind the port", b"CONNECT 5005\0\n".to_vec()),
        ("a zero in the word", b"CONN\0ECT 5005\n".to_vec()),
        ("a zero instead of the line feed", [&b"CONNECT 5005\0"[..], &[0; 64]].concat()),
        ("an endless port", [&b"CONNECT 5005"[..], &mib(b'0')].concat()),
        ("bytes that are no text", b"CONNECT \xff\xfe\n".to_vec()),
    ] {
        let mut stream = UnixStream::connect(&machine.path).unwrap();
        // One that is neither read nor closed fails rather than waits.
        let patience = Some(Duration::from_secs(30));
        stream.set_read_timeout(patience).unwrap();
        stream.set_write_timeout(patience).unwrap();
        write_what_is_taken(&mut stream, &bytes);
        let mut answer = Vec::new();
        let end = stream.read_to_end(&mut answer);
        assert!(
            end.is_ok() || end.is_err_and(|e| e.kind() == ErrorKind::ConnectionReset),
            "{name}"
        );
        assert_eq!(answer, b"", "{name}");
        bystander.is_served();
    }
    machine.expect_no_more(before);
    machine.end();
}

#[test]
fn half_lines_keep_nobody_out() {
    // More than there are places for clients without a line.
    const SILENT: usize = 300;
    let machine = Held::start();
    let mut bystander = Bystander::new(&machine.path);
    // Now all is there that stays.
    bystander.is_served();
    let before = Holdings::of(machine.process());
    let silent: Vec<_> = (0..SILENT)
        .map(|number| {
            let mut stream = UnixStream::connect(&machine.path).unwrap();
            write_what_is_taken(&mut stream, &b"CONNECT 50"[..number % 11]);
            stream
        })
        .collect();
    for _ in 0..3 {
        Bystander::new(&machine.path).is_served();
        bystander.is_served();
    }
    drop(silent);
    machine.expect_no_more(before);
    machine.end();
}

#[test]
fn floods_of_clients_that_vanish_leave_nothing() {
    const THREADS: usize = 8;
    const EACH: usize = 100;
    let machine = Held::start();
    let mut bystander = Bystander::new(&machine.path);
    let flood = || {
        let clients: Vec<_> = (0..THREADS)
            .map(|_| {
                let path = machine.path.clone();
                thread::spawn(move || (0..EACH).for_each(|number| vanish(&path, number)))
            })
            .collect();
        clients.into_iter().for_each(|client| client.join().unwrap());
    };
    // Tables grow to what was needed at once, and stay so.
    flood();
    bystander.is_served();
    let before = Holdings::of(machine.process());
    for _ in 0..4 {
        flood();
        bystander.is_served();
    }
    machine.expect_no_more(before);
    machine.end();
}

/// Connects and is gone: at once, in its line, behind it, before the answer was read, in a direction alone, behind the greeting.
fn vanish(path: &Path, number: usize) {
    let mut stream = UnixStream::connect(path).unwrap();
    match number % 6 {
        0 => {}
        1 => write_what_is_taken(&mut stream, b"CONNE"),
        2 => write_what_is_taken(&mut stream, b"CONNECT 5005\n"),
        3 => write_what_is_taken(&mut stream, b"CONNECT 4242\n"),
        4 => {
            write_what_is_taken(&mut stream, b"CONNECT 5005\n");
            stream.shutdown(Shutdown::Write).unwrap();
        }
        _ => {
            write_what_is_taken(&mut stream, b"CONNECT 5005\n");
            let _ = stream.read(&mut [0; 4]);
        }
    }
}

#[test]
fn clients_that_vanish_in_the_middle_of_a_transfer_leave_nothing() {
    let machine = Held::start();
    let mut bystander = Bystander::new(&machine.path);
    let request = frame::encode(&Request::Echo(vec![7; 200_000])).unwrap();
    let mut round = |count: usize| {
        for number in 0..count {
            let (mut stream, _) = greeted(&machine.path);
            // Of the request a part, all, or more; of the answer nothing, or a part.
            match number % 4 {
                0 => write_what_is_taken(stream.get_mut(), &request[..150_000]),
                1 => write_what_is_taken(stream.get_mut(), &request),
                2 => {
                    write_what_is_taken(stream.get_mut(), &request);
                    write_what_is_taken(stream.get_mut(), &request[..50_000]);
                }
                _ => {
                    write_what_is_taken(stream.get_mut(), &request);
                    let _ = stream.read_exact(&mut [0; 100_000]);
                }
            }
            drop(stream);
            if number % 8 == 0 {
                bystander.is_served();
            }
        }
    };
    round(16);
    let before = Holdings::of(machine.process());
    round(120);
    machine.expect_no_more(before);
    machine.end();
}

#[test]
fn clients_that_never_read_stall_nobody() {
    // What they leave unread has room in the agent's memory.
    const DEAF: usize = 10;
    let machine = Held::start();
    let mut bystander = Bystander::new(&machine.path);
    // Now all is there that stays.
    bystander.is_served();
    let before = Holdings::of(machine.process());
    let request = frame::encode(&Request::Echo(vec![7; 100_000])).unwrap();
    let mut deaf = Vec::new();
    for _ in 0..DEAF {
        let (stream, _) = greeted(&machine.path);
        let stream = stream.into_inner();
        // Until nothing more is taken.
        stream.set_nonblocking(true).unwrap();
        while let Ok(written) = (&stream).write(&request) {
            if written < request.len() {
                break;
            }
        }
        deaf.push(stream);
        bystander.is_served();
    }
    for _ in 0..20 {
        bystander.is_served();
    }
    let (mut late, answer) = connect(&machine.path, AGENT_PORT);
    assert!(answer.starts_with("OK "), "{answer:?}");
    assert!(late.read(&mut [0]).unwrap() == 1);
    drop((deaf, late));
    bystander.is_served();
    machine.expect_no_more(before);
    machine.end();
}

/// Connects to a socket for messages and sends as many of `messages` as the other side takes.
fn send_messages(path: &Path, messages: &[&[u8]]) -> OwnedFd {
    let client = socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).unwrap();
    // One that is not closed fails rather than waits.
    set_socket_timeout(&client, Timeout::Recv, Some(Duration::from_secs(30))).unwrap();
    rustix::net::connect(&client, &SocketAddrUnix::new(path).unwrap()).unwrap();
    for message in messages {
        match send(&client, message, SendFlags::NOSIGNAL) {
            Ok(len) => assert_eq!(len, message.len()),
            Err(error) => assert!(matches!(error, Errno::PIPE | Errno::CONNRESET), "{error}"),
        }
    }
    client
}

#[test]
fn messages_that_are_no_line_close_the_client() {
    let dir = temp_dir();
    let path = dir.path().join("messages");
    let machine = Held::start_with(&["--uds-seqpacket", path.to_str().unwrap()]);
    let mut bystander = Bystander::new(&machine.path);
    let long = [b'x'; 150_000];
    let cases: [(&str, &[&[u8]]); 9] = [
        ("an empty message", &[b""]),
        ("a line behind an empty message", &[b"", b"CONNECT 5005\n"]),
        ("a line in two messages", &[b"CONNECT ", b"5005\n"]),
        ("a byte more than a line may have", &[b"CONNECT 5005                    \n"]),
        ("a message as long as a socket takes", &[&long]),
        ("several of them", &[&long, &long, &long]),
        ("a zero behind the port", &[b"CONNECT 5005\0\n"]),
        ("bytes that are no text", &[b"CONNECT \xff\xfe\n"]),
        ("a line, and a port where nobody takes messages", &[b"CONNECT 5005\n", b"x", b""]),
    ];
    let mut round = |times: usize| {
        for (name, messages) in cases {
            let client = send_messages(&path, messages);
            match recv(&client, &mut [0; 64][..], RecvFlags::empty()) {
                Ok((len, _)) => assert_eq!(len, 0, "{name}: an answer"),
                Err(error) => assert_eq!(error, Errno::CONNRESET, "{name}"),
            }
            bystander.is_served();
            // Gone at once, behind the first message, behind all.
            for _ in 0..times {
                drop(send_messages(&path, &[]));
                drop(send_messages(&path, &messages[..1]));
                drop(send_messages(&path, messages));
            }
            bystander.is_served();
        }
    };
    // Tables grow to what was needed at once, and stay so.
    round(10);
    let before = Holdings::of(machine.process());
    round(40);
    machine.expect_no_more(before);
    machine.end();
}
