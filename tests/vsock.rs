//! Host clients and the guest over vsock, in Firecracker's socket convention.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use agent_protocol::{
    AGENT_PORT, Hello, PROTOCOL_VERSION, Pattern, Reply, Request, Transfer, frame,
};

use crate::harness::client::{ask, connect, receive};
use crate::harness::held::Held;
use crate::harness::{eventually, signal};

#[test]
fn a_client_connects_and_talks_to_the_agent() {
    let machine = Held::start();
    let (mut stream, answer) = connect(&machine.path, AGENT_PORT);
    assert!(answer.starts_with("OK "), "{answer:?}");
    assert_eq!(receive::<Hello>(&mut stream).version, PROTOCOL_VERSION);
    assert_eq!(ask(&mut stream, &Request::Ping(7)), Reply::Pong(7));
    machine.end();
}

#[test]
fn bytes_of_every_size_come_back_unchanged() {
    let machine = Held::start();
    let (mut stream, _) = connect(&machine.path, AGENT_PORT);
    receive::<Hello>(&mut stream);
    for size in [0, 1, 63, 64, 4095, 4096, 65_537, 200_000] {
        let bytes: Vec<u8> = (0..size).map(|i| (i * 7 % 251) as u8).collect();
        assert!(
            ask(&mut stream, &Request::Echo(bytes.clone())) == Reply::Echo(bytes),
            "{size} bytes changed"
        );
    }
    machine.end();
}

#[test]
fn many_clients_are_served_beside_each_other() {
    let machine = Held::start();
    let mut streams: Vec<_> = (0..20).map(|_| connect(&machine.path, AGENT_PORT).0).collect();
    streams
        .iter_mut()
        .for_each(|stream| assert_eq!(receive::<Hello>(stream).version, PROTOCOL_VERSION));
    for (number, stream) in (0..).zip(&mut streams) {
        assert_eq!(ask(stream, &Request::Ping(number)), Reply::Pong(number));
    }
    machine.end();
}

#[test]
fn a_port_without_listener_is_refused_by_closing() {
    let machine = Held::start();
    let (_, answer) = connect(&machine.path, 4242);
    assert_eq!(answer, "");
    machine.end();
}

#[test]
fn clients_that_speak_nonsense_or_vanish_disturb_nobody() {
    let machine = Held::start();
    for junk in
        [&b"HELLO\n"[..], b"CONNECT\n", b"CONNECT x\n", b"CONNECT 99999999999\n", &[0xff; 5000]]
    {
        let mut stream = UnixStream::connect(&machine.path).unwrap();
        let _ = stream.write_all(junk);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        assert_eq!(answer, b"", "{junk:?}");
    }
    drop(UnixStream::connect(&machine.path).unwrap());
    let mut half = UnixStream::connect(&machine.path).unwrap();
    half.write_all(b"CONN").unwrap();
    let (mut stream, _) = connect(&machine.path, AGENT_PORT);
    receive::<Hello>(&mut stream);
    stream.get_mut().write_all(&[0xff; 64]).unwrap();
    let mut rest = Vec::new();
    assert!(matches!(stream.read_to_end(&mut rest), Ok(_) | Err(_)) && rest.is_empty());
    let (mut stream, _) = connect(&machine.path, AGENT_PORT);
    receive::<Hello>(&mut stream);
    assert_eq!(ask(&mut stream, &Request::Ping(1)), Reply::Pong(1));
    machine.end();
}

#[test]
fn a_reset_drops_open_connections() {
    let machine = Held::start();
    let (mut bystander, _) = connect(&machine.path, AGENT_PORT);
    receive::<Hello>(&mut bystander);
    let (mut stream, _) = connect(&machine.path, AGENT_PORT);
    receive::<Hello>(&mut stream);
    let reset = Request::Reset(agent_protocol::GuestReset::Cf9);
    stream.get_mut().write_all(&frame::encode(&reset).unwrap()).unwrap();
    for mut stream in [stream, bystander] {
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest);
        assert_eq!(rest, b"");
    }
    let (mut stream, _) = connect(&machine.path, AGENT_PORT);
    assert_eq!(receive::<Hello>(&mut stream).life, 2);
    machine.end();
}

#[test]
fn sigusr1_ends_all_connections_and_the_guest_goes_on() {
    for arguments in [&[][..], &["--no-jail"]] {
        let machine = Held::start_with(arguments);
        for events in 1..=3 {
            let mut streams: Vec<_> =
                (0..3).map(|_| connect(&machine.path, AGENT_PORT).0).collect();
            for stream in &mut streams {
                assert_eq!(receive::<Hello>(stream).life, 1);
            }
            signal(machine.child(), rustix::process::Signal::USR1);
            for mut stream in streams {
                let mut rest = Vec::new();
                stream.read_to_end(&mut rest).unwrap();
                assert_eq!(rest, b"");
            }
            // It is the same life, and the guest has heard of it.
            let (mut stream, _) = connect(&machine.path, AGENT_PORT);
            assert_eq!(receive::<Hello>(&mut stream).life, 1);
            let Reply::State(state, _) = ask(&mut stream, &Request::GetState) else {
                panic!("no state")
            };
            let heard = state.iter().find(|reading| reading.item == "vsock.events").unwrap();
            assert_eq!(heard.value, Some(events));
        }
        machine.end();
    }
}

#[test]
fn clients_beyond_the_descriptors_of_a_machine_wait_and_disturb_nobody() {
    let machine = Held::start_with(&["--resource-limit", "no-file=40"]);
    let (mut first, _) = connect(&machine.path, AGENT_PORT);
    receive::<Hello>(&mut first);
    let waiting: Vec<_> = (0..60).map(|_| UnixStream::connect(&machine.path).unwrap()).collect();
    waiting.iter().for_each(|mut stream| writeln!(stream, "CONNECT {AGENT_PORT}").unwrap());
    assert_eq!(ask(&mut first, &Request::Ping(1)), Reply::Pong(1));
    drop(waiting);
    eventually("there is room again", || {
        let (mut stream, answer) = connect(&machine.path, AGENT_PORT);
        answer.starts_with("OK ") && receive::<Hello>(&mut stream).life == 1
    });
    machine.end();
}

#[test]
fn announcements_of_long_frames_do_not_exhaust_the_agent() {
    let machine = Held::start();
    let mut idle = Vec::new();
    for _ in 0..60 {
        let (mut stream, _) = connect(&machine.path, AGENT_PORT);
        receive::<Hello>(&mut stream);
        // The prefix of the longest frame, and nothing behind it.
        let prefix = (frame::MAX_PAYLOAD as u32).to_le_bytes();
        stream.get_mut().write_all(&prefix).unwrap();
        idle.push(stream);
    }
    let (mut stream, _) = connect(&machine.path, AGENT_PORT);
    receive::<Hello>(&mut stream);
    let bytes = vec![7; 200_000];
    assert!(ask(&mut stream, &Request::Echo(bytes.clone())) == Reply::Echo(bytes));
    machine.end();
}

#[test]
fn a_client_that_stops_reading_costs_nothing_and_is_served_when_it_reads_again() {
    const REQUESTS: usize = 30;
    let machine = Held::start();
    let (mut stream, _) = connect(&machine.path, AGENT_PORT);
    receive::<Hello>(&mut stream);
    let request = Request::Echo((0..128 * 1024).map(|i| (i % 251) as u8).collect());
    let mut writer = stream.get_ref().try_clone().unwrap();
    let bytes = frame::encode(&request).unwrap();
    let writes =
        std::thread::spawn(move || (0..REQUESTS).for_each(|_| writer.write_all(&bytes).unwrap()));
    // Everything is full then.
    await_idle(&machine);
    for _ in 0..REQUESTS {
        let Reply::Echo(bytes) = receive(&mut stream) else { panic!("not an echo") };
        assert!(Request::Echo(bytes) == request, "the bytes changed");
    }
    writes.join().unwrap();
    machine.end();
}

/// More than the agent could hold of all, had they not to wait: it has told each that it takes a lot.
#[test]
fn clients_that_send_all_they_may_at_once_are_all_served() {
    const CLIENTS: usize = 16;
    const REQUESTS: usize = 12;
    let machine = Held::start();
    let mut streams = Vec::new();
    for _ in 0..CLIENTS {
        let (mut stream, _) = connect(&machine.path, AGENT_PORT);
        receive::<Hello>(&mut stream);
        let transfer = Transfer { to_host: 0, message: 1, to_guest: 1 << 20, seed: 1 };
        let mut bytes = vec![0; 1 << 20];
        Pattern::to_guest(1).fill(&mut bytes);
        stream.get_mut().write_all(&frame::encode(&Request::Transfer(transfer)).unwrap()).unwrap();
        stream.get_mut().write_all(&bytes).unwrap();
        assert!(matches!(receive(&mut stream), Reply::Transferred(_)));
        streams.push(stream);
    }
    let request = Request::Echo((0..128 * 1024).map(|i| (i % 251) as u8).collect());
    let bytes = &frame::encode(&request).unwrap();
    std::thread::scope(|scope| {
        for stream in &streams {
            let mut writer = stream.get_ref().try_clone().unwrap();
            scope.spawn(move || (0..REQUESTS).for_each(|_| writer.write_all(bytes).unwrap()));
        }
        await_idle(&machine);
        for mut stream in streams {
            let request = &request;
            scope.spawn(move || {
                for _ in 0..REQUESTS {
                    let Reply::Echo(bytes) = receive(&mut stream) else { panic!("not an echo") };
                    assert!(Request::Echo(bytes) == *request, "the bytes changed");
                }
            });
        }
    });
    machine.end();
}

/// Waits until the machine does nothing any more: two looks a moment apart see the same processor time.
#[track_caller]
fn await_idle(machine: &Held) {
    let stat = format!("/proc/{}/stat", machine.process());
    let ticks = || {
        let stat = std::fs::read_to_string(&stat).unwrap();
        let fields: Vec<_> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    };
    eventually("the machine is idle", || {
        let before = ticks();
        std::thread::sleep(std::time::Duration::from_millis(300));
        ticks() == before
    });
}
