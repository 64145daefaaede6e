use alloc::string::String;

use agent_protocol::{GuestReset, Hello, Reply, Request};

use super::super::connection::{NO_RECEIVE, NO_SEND, SHUTDOWN_TIMEOUT_US};
use super::super::memory::{SHARE, SMALL_SHARE};
use super::*;

mod close;
mod open;
mod room;
mod transfer;

const CID: u64 = 3;
const LIFE: u32 = 5;

#[derive(Default)]
struct FakeAgent {
    warnings: Vec<String>,
    requests: Vec<Request>,
    stale: Vec<String>,
    now_us: u64,
}

impl Answer for FakeAgent {
    fn hello(&self) -> Hello {
        Hello { version: 1, life: 1, tsc_entry: 0, tsc_ready: 0 }
    }

    fn answer(&mut self, request: Request) -> Option<Reply> {
        self.requests.push(request.clone());
        match request {
            Request::Ping(number) => Some(Reply::Pong(number)),
            Request::Echo(bytes) => Some(Reply::Echo(bytes)),
            Request::Random { bytes } => Some(Reply::Random(vec![0; bytes as usize])),
            _ => None,
        }
    }

    fn now_us(&self) -> u64 {
        self.now_us
    }

    fn note_stale(&mut self, _guest_port: u32, packet: String) {
        self.stale.push(packet);
    }

    fn warn(&mut self, text: String) {
        self.warnings.push(text);
    }
}

/// A host with one agent; it counts what it has received on the port of its template.
struct Host {
    connections: Connections,
    agent: FakeAgent,
    template: Header,
    bytes: Vec<u8>,
}

impl Host {
    fn new() -> Self {
        let template = Header {
            source_cid: HOST_CID,
            destination_cid: CID,
            source_port: 1000,
            destination_port: AGENT_PORT,
            len: 0,
            operation: Operation::Request,
            flags: 0,
            buf_alloc: 1 << 20,
            fwd_cnt: 0,
        };
        let connections = Connections::new(CID, LIFE);
        Self { connections, agent: FakeAgent::default(), template, bytes: vec![] }
    }

    fn connected() -> Self {
        let mut host = Self::new();
        host.send(Operation::Request, &[]);
        assert_eq!(host.operations(), [Operation::Response, Operation::Rw]);
        host.bytes.clear();
        host
    }

    /// Sends a packet; the agent looks at it when it sends the next one.
    fn send_header(&mut self, header: Header, payload: &[u8]) {
        let mut bytes = [0; HEADER_LEN];
        Header { len: payload.len() as u32, ..header }.write(&mut bytes);
        self.connections.receive(&[&bytes, payload].concat(), &mut self.agent);
    }

    fn send(&mut self, operation: Operation, payload: &[u8]) {
        self.send_header(Header { operation, ..self.template }, payload);
    }

    /// Takes the next packet; payload goes to `bytes` and counts as forwarded.
    fn packet(&mut self) -> Option<Header> {
        let mut buffer = [0; 1024];
        let len = self.connections.next_packet(&mut buffer, &mut self.agent)?;
        let (header, payload) = Header::parse(&buffer[..len]).unwrap();
        self.bytes.extend_from_slice(payload);
        if header.destination_port == self.template.source_port {
            self.template.fwd_cnt = self.template.fwd_cnt.wrapping_add(header.len);
        }
        Some(header)
    }

    /// Takes all packets.
    fn packets(&mut self) -> Vec<Header> {
        std::iter::from_fn(|| self.packet()).collect()
    }

    /// The next reply, once all packets were taken.
    #[track_caller]
    fn reply(&mut self) -> Reply {
        self.packets();
        let (reply, used) = frame::decode(&self.bytes).unwrap().expect("a reply");
        self.bytes.drain(..used);
        reply
    }

    fn ask(&mut self, request: &Request) {
        self.send(Operation::Rw, &frame::encode(request).unwrap());
    }

    fn operations(&mut self) -> Vec<Operation> {
        self.packets().iter().map(|header| header.operation).collect()
    }
}

#[test]
fn a_connection_is_greeted_at_once() {
    let mut host = Host::new();
    host.send(Operation::Request, &[]);
    let packets = host.packets();
    assert_eq!(packets.len(), 2);
    assert_eq!((packets[0].operation, packets[0].buf_alloc), (Operation::Response, SHARE));
    let hello = frame::decode::<Hello>(&host.bytes).unwrap().unwrap().0;
    assert_eq!(hello, host.agent.hello());
}

#[test]
fn requests_may_be_split_and_pipelined() {
    let mut host = Host::connected();
    let bytes =
        [frame::encode(&Request::Ping(1)).unwrap(), frame::encode(&Request::Ping(2)).unwrap()];
    for byte in bytes.concat() {
        host.send(Operation::Rw, &[byte]);
    }
    host.packets();
    host.send(Operation::Rw, &bytes.concat());
    host.packets();
    assert!(host.connections.are_quiet(), "everything is answered");
    let mut at = 0;
    for number in [1, 2, 1, 2] {
        let (reply, used) = frame::decode::<Reply>(&host.bytes[at..]).unwrap().unwrap();
        assert_eq!(reply, Reply::Pong(number));
        at += used;
    }
    assert_eq!(at, host.bytes.len());
}

#[test]
fn a_large_echo_gets_credit_in_both_directions() {
    let mut host = Host::connected();
    let request = frame::encode(&Request::Echo(vec![7; 200_000])).unwrap();
    let mut updates = 0;
    for chunk in request.chunks(4096) {
        host.send(Operation::Rw, chunk);
        updates += host.operations().iter().filter(|o| **o == Operation::CreditUpdate).count();
    }
    assert!((1..=3).contains(&updates), "{updates}");
    let reply = frame::decode::<Reply>(&host.bytes).unwrap().unwrap().0;
    assert_eq!(reply, Reply::Echo(vec![7; 200_000]));
}

#[test]
fn a_request_that_uses_all_credit_at_once_gets_more() {
    let mut host = Host::connected();
    let request = frame::encode(&Request::Echo(vec![7; 200_000])).unwrap();
    let (first, rest) = request.split_at(SHARE as usize);
    host.send(Operation::Rw, first);
    let update = host.packet().unwrap();
    let room = SHARE + request.len() as u32;
    assert_eq!((update.operation, update.buf_alloc), (Operation::CreditUpdate, room));
    host.send(Operation::Rw, rest);
    assert_eq!(host.reply(), Reply::Echo(vec![7; 200_000]));
}

#[test]
fn nothing_is_sent_beyond_the_hosts_credit() {
    let mut host = Host::new();
    host.template.buf_alloc = 5;
    host.send(Operation::Request, &[]);
    let next = |host: &mut Host| {
        let forwarded = host.template.fwd_cnt;
        let header = host.packet()?;
        host.template.fwd_cnt = forwarded;
        Some((header.operation, header.len))
    };
    assert_eq!(next(&mut host), Some((Operation::Response, 0)));
    assert_eq!(next(&mut host), Some((Operation::Rw, 5)));
    assert_eq!(next(&mut host), Some((Operation::CreditRequest, 0)));
    assert_eq!(next(&mut host), None);
    host.template.fwd_cnt = 3;
    host.send(Operation::CreditUpdate, &[]);
    assert_eq!(next(&mut host), Some((Operation::Rw, 3)));
}

#[test]
fn a_host_that_does_not_read_its_replies_loses_its_credit() {
    let mut host = Host::connected();
    host.template.buf_alloc = 0;
    let request = frame::encode(&Request::Echo(vec![1; 1000])).unwrap();
    let sent = (0..).take_while(|_| {
        host.send(Operation::Rw, &request);
        host.packets();
        host.agent.warnings.is_empty()
    });
    // The first is answered and so leaves the buffer, of which the host hears.
    assert_eq!(sent.count() as u32, 1 + SHARE / request.len() as u32);
}

#[test]
fn misbehaviour_closes_the_connection_with_rst() {
    let check = |operation: Operation, payload: &[u8]| {
        let mut host = Host::connected();
        host.send(operation, payload);
        assert_eq!(host.operations(), [Operation::Rst], "{operation:?}");
        assert!(!host.connections.exist());
        assert_eq!(host.agent.warnings.len(), 1);
    };
    check(Operation::Request, &[]);
    check(Operation::Response, &[]);
    check(Operation::CreditUpdate, b"payload");
    check(Operation::Rw, &[0xff; 8]);
    let mut host = Host::connected();
    host.template.fwd_cnt += 1;
    host.send(Operation::CreditUpdate, &[]);
    assert_eq!(host.operations(), [Operation::Rst]);
}

#[test]
fn strangers_are_refused() {
    let check = |header: Header, expected: &[Operation]| {
        let mut host = Host::new();
        host.send_header(header, &[]);
        let packets = host.packets();
        let operations: Vec<_> = packets.iter().map(|header| header.operation).collect();
        assert_eq!(operations, expected, "{header:?}");
        for packet in packets {
            assert_eq!(packet.source_port, header.destination_port);
            assert_eq!(packet.destination_port, header.source_port);
        }
    };
    let header = Host::new().template;
    check(Header { destination_port: 80, ..header }, &[Operation::Rst]);
    check(Header { operation: Operation::Rw, ..header }, &[Operation::Rst]);
    check(Header { operation: Operation::Rst, ..header }, &[]);
    check(Header { source_cid: 9, ..header }, &[]);
    check(Header { destination_cid: 9, ..header }, &[]);
}

#[test]
fn the_table_is_bounded() {
    let mut host = Host::new();
    for port in 0..MAX_CONNECTIONS as u32 + 1 {
        host.send_header(Header { source_port: port, ..host.template }, &[]);
    }
    let refused: Vec<_> =
        host.packets().into_iter().filter(|header| header.operation == Operation::Rst).collect();
    assert_eq!(refused.len(), 1);
    assert_eq!(refused[0].destination_port, MAX_CONNECTIONS as u32);
}

#[test]
fn a_connection_that_only_waits_for_its_confirmation_makes_room() {
    let mut host = Host::connected();
    host.ask(&Request::Shutdown { send: true, receive: true });
    host.packets();
    host.template.fwd_cnt = 0;
    for port in 0..MAX_CONNECTIONS as u32 {
        host.send_header(Header { source_port: 2000 + port, ..host.template }, &[]);
    }
    let packets = host.packets();
    let mut rst = packets.iter().filter(|header| header.operation == Operation::Rst);
    assert_eq!(rst.next().unwrap().destination_port, 1000);
    assert_eq!(rst.next(), None);
}

#[test]
fn memory_is_everybodys_again_when_a_connection_is_over() {
    let mut host = Host::new();
    let long = (frame::MAX_PAYLOAD as u32).to_le_bytes();
    let half = [&long[..], &vec![0; SHARE as usize - 4]].concat();
    for _ in 0..100 {
        host.template.fwd_cnt = 0;
        host.send(Operation::Request, &[]);
        host.packets();
        host.send(Operation::Rw, &half);
        host.packets();
        assert_eq!(host.connections.claims.long_request, frame::MAX_FRAME);
        host.send(Operation::Rst, &[]);
        assert_eq!(host.connections.claims, Claims::default());
    }
    // A whole request that nobody waits for any more.
    host.template.fwd_cnt = 0;
    host.send(Operation::Request, &[]);
    host.packets();
    host.ask(&Request::Echo(vec![7; 1000]));
    let flags = NO_RECEIVE | NO_SEND;
    host.send_header(Header { operation: Operation::Shutdown, flags, ..host.template }, &[]);
    assert_eq!(host.agent.requests.len(), 1);
    assert_eq!(host.connections.claims, Claims::default());
    assert_eq!(host.agent.warnings, [] as [String; 0]);
}

#[test]
fn packets_for_connections_that_this_life_never_had_are_noted() {
    let mut host = Host::new();
    let operations = [
        Operation::Rw,
        Operation::Response,
        Operation::Shutdown,
        Operation::CreditUpdate,
        Operation::CreditRequest,
        Operation::Rst,
    ];
    for operation in operations {
        host.send(operation, &[]);
        let answer = [Operation::Rst];
        let expected = if operation == Operation::Rst { &[][..] } else { &answer };
        assert_eq!(host.operations(), expected);
    }
    assert_eq!(host.agent.stale.len(), operations.len());
    assert_eq!(host.agent.stale[0], "Rw from 1000 to 5005");
    // None of them: a request, and what somebody else is meant to get.
    host.send_header(Header { destination_cid: 9, operation: Operation::Rw, ..host.template }, &[]);
    host.send(Operation::Request, &[]);
    host.packets();
    assert_eq!(host.agent.stale.len(), operations.len());
}

#[test]
fn packets_that_cross_with_an_rst_are_not_stale_whoever_sent_it_and_however_often() {
    let mut host = Host::new();
    for port in 0..3 * MAX_CLOSED as u32 {
        host.template.source_port = port;
        host.template.fwd_cnt = 0;
        host.send(Operation::Request, &[]);
        if port % 2 == 0 {
            host.send(Operation::Rw, &[0xff; 8]);
            host.packets();
            host.send(Operation::Rw, &[0xff; 8]);
        } else {
            host.send(Operation::Rst, &[]);
        }
        host.send(Operation::Rst, &[]);
        host.packets();
    }
    assert_eq!(host.agent.stale, [] as [String; 0]);
    assert!(host.connections.closed.len() <= MAX_CLOSED);
}

#[test]
fn a_transport_reset_forgets_everything() {
    let mut host = Host::connected();
    host.connections.transport_reset(9);
    host.send(Operation::Rw, &[]);
    assert_eq!(host.operations(), [], "the old context id is not ours any more");
    host.template.destination_cid = 9;
    host.send(Operation::Rw, &[]);
    assert_eq!(host.operations(), [Operation::Rst]);
}

#[test]
fn random_packets_never_panic() {
    let mut host = Host::connected();
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for _ in 0..50_000 {
        let mut random = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        let operation = match random() % 8 {
            1 => Operation::Rw,
            2 => Operation::Shutdown,
            3 => Operation::CreditUpdate,
            4 => Operation::CreditRequest,
            5 => Operation::Rst,
            _ => Operation::Request,
        };
        let header = Header {
            operation,
            source_port: 1000 + random() as u32 % 80,
            flags: random() as u32 % 4,
            buf_alloc: random() as u32,
            fwd_cnt: random() as u32 % 100,
            ..host.template
        };
        let payload = random().to_le_bytes();
        host.send_header(header, &payload[..random() as usize % 9]);
        if random() % 4 == 0 {
            host.operations();
        }
    }
}
