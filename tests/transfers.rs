//! Bytes in either direction, on connections that either side has opened.

use std::fs::Permissions;
use std::io::{BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use agent_protocol::{
    AGENT_PORT, ConnectError, Hello, PROTOCOL_VERSION, Pattern, Reply, Request, Transfer,
    Transferred, frame,
};

use crate::harness::held::Held;
use crate::vsock::{ask, connect, receive};

const HOST_PORT: u32 = 5200;
const SEED: u64 = 0x7261_6e64_6f6d;

/// A machine, a conversation with its agent, and a listener at [`HOST_PORT`] of the host.
struct Scene {
    machine: Held,
    agent: BufReader<UnixStream>,
    listener: UnixListener,
}

impl Scene {
    #[track_caller]
    fn new() -> Self {
        let machine = Held::start();
        let (mut agent, _) = connect(&machine.path, AGENT_PORT);
        receive::<Hello>(&mut agent);
        let path = path_of(&machine, HOST_PORT);
        let listener = UnixListener::bind(&path).unwrap();
        // The machine's process is nobody.
        std::fs::set_permissions(&path, Permissions::from_mode(0o777)).unwrap();
        std::fs::set_permissions(path.parent().unwrap(), Permissions::from_mode(0o755)).unwrap();
        Self { machine, agent, listener }
    }

    /// A connection that the guest has opened, greeted.
    #[track_caller]
    fn opened_by_guest(&mut self) -> BufReader<UnixStream> {
        let outcome = ask(&mut self.agent, &connect_to(HOST_PORT));
        assert!(matches!(outcome, Reply::Connected(Ok(_))), "{outcome:?}");
        let mut stream = BufReader::new(self.listener.accept().unwrap().0);
        let patience = Some(std::time::Duration::from_secs(30));
        stream.get_ref().set_read_timeout(patience).unwrap();
        assert_eq!(receive::<Hello>(&mut stream).version, PROTOCOL_VERSION);
        stream
    }
}

/// Where a port of the host has its socket.
fn path_of(machine: &Held, port: u32) -> PathBuf {
    let mut path = machine.path.clone().into_os_string();
    path.push(format!("_{port}"));
    path.into()
}

fn connect_to(host_port: u32) -> Request {
    Request::Connect { host_port, timeout_ms: 10_000 }
}

/// Moves bytes both ways at the same time, checks those for the host, and gives the agent's word for the others.
#[track_caller]
fn transfer(stream: &mut BufReader<UnixStream>, transfer: Transfer) -> Transferred {
    let request = frame::encode(&Request::Transfer(transfer)).unwrap();
    let mut writer = stream.get_ref().try_clone().unwrap();
    let writes = std::thread::spawn(move || {
        writer.write_all(&request).unwrap();
        let mut pattern = Pattern::to_guest(transfer.seed);
        let mut buffer = vec![0; 48 * 1024 + 1];
        while pattern.position() < transfer.to_guest {
            let left = transfer.to_guest - pattern.position();
            let len = buffer.len().min(usize::try_from(left).unwrap());
            pattern.fill(&mut buffer[..len]);
            writer.write_all(&buffer[..len]).unwrap();
        }
    });
    let mut pattern = Pattern::to_host(transfer.seed);
    let mut buffer = vec![0; 64 * 1024];
    while pattern.position() < transfer.to_host {
        let left = usize::try_from(transfer.to_host - pattern.position()).unwrap();
        let window = buffer.len().min(left);
        let len = stream.read(&mut buffer[..window]).unwrap();
        assert!(len > 0, "the end came after {} bytes", pattern.position());
        pattern.check(&buffer[..len]).expect("the bytes changed");
    }
    writes.join().unwrap();
    match receive(stream) {
        Reply::Transferred(result) => result,
        other => panic!("{other:?}"),
    }
}

/// Every kind of transfer on a connection.
#[track_caller]
fn all_kinds(stream: &mut BufReader<UnixStream>) {
    for (to_host, to_guest, message) in [
        (0, 0, 1),
        (1, 0, 65_536),
        (0, 1, 65_536),
        (3 << 20, 0, 65_536),
        (0, 3 << 20, 65_536),
        (2 << 20, 2 << 20, u32::MAX),
        (100_003, 70_001, 1000),
        (5000, 5000, 1),
    ] {
        let wanted = Transfer { to_host, message, to_guest, seed: SEED };
        let Transferred { to_host, to_guest, first_wrong, .. } = transfer(stream, wanted);
        assert_eq!((to_host, to_guest, first_wrong), (wanted.to_host, wanted.to_guest, None));
    }
    assert_eq!(ask(stream, &Request::Ping(1)), Reply::Pong(1), "the conversation goes on");
}

#[test]
fn bytes_pass_both_ways_on_a_connection_of_the_hosts() {
    let mut scene = Scene::new();
    all_kinds(&mut scene.agent);
    scene.machine.end();
}

#[test]
fn bytes_pass_both_ways_on_a_connection_of_the_guests() {
    let mut scene = Scene::new();
    all_kinds(&mut scene.opened_by_guest());
    scene.machine.end();
}

#[test]
fn many_connections_of_both_kinds_transfer_at_the_same_time() {
    let mut scene = Scene::new();
    let mut streams: Vec<_> = (0..4).map(|_| scene.opened_by_guest()).collect();
    streams.extend((0..4).map(|_| {
        let mut stream = connect(&scene.machine.path, AGENT_PORT).0;
        receive::<Hello>(&mut stream);
        stream
    }));
    let wanted = Transfer { to_host: 1 << 20, message: 9000, to_guest: 1 << 20, seed: SEED };
    let threads = streams
        .into_iter()
        .map(|mut stream| std::thread::spawn(move || transfer(&mut stream, wanted).first_wrong));
    for thread in threads.collect::<Vec<_>>() {
        assert_eq!(thread.join().unwrap(), None);
    }
    scene.machine.end();
}

#[test]
fn a_port_where_nobody_listens_refuses_the_guest() {
    let mut scene = Scene::new();
    let refused = Reply::Connected(Err(ConnectError::Refused));
    assert_eq!(ask(&mut scene.agent, &connect_to(HOST_PORT + 1)), refused);
    // Nor does one that is no port.
    assert_eq!(ask(&mut scene.agent, &connect_to(u32::MAX)), refused);
    drop(scene.opened_by_guest());
    scene.machine.end();
}

#[test]
fn a_wrong_byte_is_told_by_its_place() {
    let mut scene = Scene::new();
    let mut bytes = vec![0; 1 << 20];
    Pattern::to_guest(SEED).fill(&mut bytes);
    bytes[654_321] ^= 4;
    let wanted = Transfer { to_host: 0, message: 1, to_guest: 1 << 20, seed: SEED };
    let request = frame::encode(&Request::Transfer(wanted)).unwrap();
    scene.agent.get_mut().write_all(&request).unwrap();
    scene.agent.get_mut().write_all(&bytes).unwrap();
    let Reply::Transferred(result) = receive(&mut scene.agent) else { panic!("no transfer") };
    assert_eq!((result.to_guest, result.first_wrong), (1 << 20, Some(654_321)));
    scene.machine.end();
}

#[test]
fn either_side_can_close_one_direction_and_go_on_in_the_other() {
    let mut scene = Scene::new();
    // The agent sends no more: the end of its bytes comes behind its reply, and it still takes what it is sent.
    let mut stream = scene.opened_by_guest();
    let close = Request::Shutdown { send: true, receive: false };
    assert_eq!(ask(&mut stream, &close), Reply::Done);
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    stream.get_mut().write_all(&frame::encode(&Request::Ping(1)).unwrap()).unwrap();
    stream.get_ref().shutdown(std::net::Shutdown::Write).unwrap();
    // The host sends no more: it still gets its answers.
    let mut stream = scene.opened_by_guest();
    let echo = Request::Echo(vec![9; 100_000]);
    stream.get_mut().write_all(&frame::encode(&echo).unwrap()).unwrap();
    stream.get_ref().shutdown(std::net::Shutdown::Write).unwrap();
    assert!(receive::<Reply>(&mut stream) == Reply::Echo(vec![9; 100_000]));
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    scene.machine.end();
}
