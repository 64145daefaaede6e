//! Connections that the agent opens.

use super::*;

const HOST_PORT: u32 = 52;

/// Asks for a connection to [`HOST_PORT`] and takes its REQUEST.
fn asked(host: &mut Host) -> Header {
    host.ask(&Request::Connect { host_port: HOST_PORT, timeout_ms: 20 });
    let packets = host.packets();
    assert_eq!(packets.len(), 1, "{packets:?}");
    assert_eq!((packets[0].operation, packets[0].len), (Operation::Request, 0));
    assert_eq!((packets[0].destination_port, packets[0].buf_alloc), (HOST_PORT, SHARE));
    packets[0]
}

/// A packet of the host's on the connection of `request`.
fn on(request: Header, operation: Operation) -> Header {
    Header {
        source_cid: HOST_CID,
        destination_cid: CID,
        source_port: request.destination_port,
        destination_port: request.source_port,
        operation,
        buf_alloc: 1 << 20,
        ..request
    }
}

#[test]
fn a_connection_that_the_agent_opens_is_greeted_and_served_like_any_other() {
    let mut host = Host::connected();
    let request = asked(&mut host);
    host.send_header(on(request, Operation::Response), &[]);
    let packets = host.packets();
    let to = |port| packets.iter().filter(move |header| header.destination_port == port);
    assert_eq!((to(1000).count(), to(HOST_PORT).count()), (1, 1), "{packets:?}");
    // The reply on the one and the greeting on the other, in whatever order.
    let reply = frame::encode(&Reply::Connected(Ok(request.source_port))).unwrap();
    let hello = frame::encode(&host.agent.hello()).unwrap();
    assert!(host.bytes == [&reply[..], &hello].concat() || host.bytes == [hello, reply].concat());
    host.bytes.clear();

    let ping = frame::encode(&Request::Ping(8)).unwrap();
    let forwarded = frame::encode(&host.agent.hello()).unwrap().len() as u32;
    host.send_header(Header { fwd_cnt: forwarded, ..on(request, Operation::Rw) }, &ping);
    assert_eq!(host.reply(), Reply::Pong(8));
    assert_eq!(host.agent.stale, [] as [String; 0]);
}

#[test]
fn a_connection_that_was_accepted_in_time_has_all_the_time() {
    let mut host = Host::connected();
    let request = asked(&mut host);
    host.send_header(on(request, Operation::Response), &[]);
    host.packets();
    host.agent.now_us = u64::MAX;
    host.connections.expire(&host.agent);
    assert_eq!(host.operations(), []);
    assert_eq!(host.connections.table.len(), 2);
}

#[test]
fn who_asked_hears_that_the_host_refused_and_can_ask_again() {
    let mut host = Host::connected();
    for _ in 0..3 {
        let request = asked(&mut host);
        host.send_header(on(request, Operation::Rst), &[]);
        assert_eq!(host.reply(), Reply::Connected(Err(ConnectError::Refused)));
    }
    assert_eq!(host.connections.table.len(), 1);
}

#[test]
fn who_asked_waits_for_the_outcome_and_for_nothing_else() {
    let mut host = Host::connected();
    let request = asked(&mut host);
    host.ask(&Request::Ping(1));
    assert_eq!(host.operations(), [], "one request at a time");
    host.send_header(Header { source_port: 2000, fwd_cnt: 0, ..host.template }, &[]);
    assert_eq!(host.operations(), [Operation::Response, Operation::Rw], "others are served");
    host.bytes.clear();
    host.send_header(on(request, Operation::Rst), &[]);
    assert_eq!(host.reply(), Reply::Connected(Err(ConnectError::Refused)));
    assert_eq!(host.reply(), Reply::Pong(1));
}

#[test]
fn a_host_that_does_not_answer_in_time_hears_that_it_is_too_late() {
    let mut host = Host::connected();
    host.agent.now_us = 1_000_000;
    assert_eq!(host.connections.next_deadline(), None);
    let request = asked(&mut host);
    assert_eq!(host.connections.next_deadline(), Some(1_020_000));
    host.agent.now_us = 1_019_999;
    host.connections.expire(&host.agent);
    assert_eq!(host.packets(), []);
    host.agent.now_us = 1_020_000;
    host.connections.expire(&host.agent);
    let packets = host.packets();
    let rst = packets.iter().find(|header| header.operation == Operation::Rst).unwrap();
    assert_eq!((rst.source_port, rst.destination_port), (request.source_port, HOST_PORT));
    assert_eq!(host.reply(), Reply::Connected(Err(ConnectError::TimedOut)));
    assert_eq!(host.connections.next_deadline(), None);
    // An answer that crossed with the RST belongs to this life all the same.
    host.send_header(on(request, Operation::Response), &[]);
    assert_eq!(host.operations(), [Operation::Rst]);
    assert_eq!(host.agent.stale, [] as [String; 0]);
}

#[test]
fn nothing_but_an_answer_is_an_answer() {
    for operation in [
        Operation::Request,
        Operation::Rw,
        Operation::Shutdown,
        Operation::CreditUpdate,
        Operation::CreditRequest,
    ] {
        let mut host = Host::connected();
        let request = asked(&mut host);
        host.send_header(Header { flags: 3, ..on(request, operation) }, &[]);
        assert_eq!(host.reply(), Reply::Connected(Err(ConnectError::Refused)), "{operation:?}");
        assert_eq!(host.connections.table.len(), 1);
        assert_eq!(host.agent.warnings.len(), 1);
    }
    // Not before the question either.
    let mut host = Host::connected();
    host.ask(&Request::Connect { host_port: HOST_PORT, timeout_ms: 20 });
    let early = Header { operation: Operation::Request, ..host.template };
    let ports = Ports { guest: host.connections.next_port, host: HOST_PORT };
    let early = Header { source_port: ports.host, destination_port: ports.guest, ..early };
    host.send_header(on(on(early, Operation::Rw), Operation::Response), &[]);
    assert_eq!(host.agent.stale.len(), 1);
}

#[test]
fn each_life_begins_at_other_ports() {
    let first = |life| Connections::new(CID, life).next_port;
    assert_ne!(first(1), first(2));
    for life in [0, 1, 77, 1 << 18, u32::MAX] {
        assert!((FIRST_PORT..2 * FIRST_PORT).contains(&first(life)));
    }
}

#[test]
fn ports_in_use_are_passed_over_when_the_numbers_come_round() {
    let mut host = Host::connected();
    host.connections.next_port = 2 * FIRST_PORT - 1;
    let last = asked(&mut host);
    assert_eq!(last.source_port, 2 * FIRST_PORT - 1);
    host.send_header(on(last, Operation::Response), &[]);
    host.packets();
    host.bytes.clear();
    let next = asked(&mut host);
    assert_eq!(next.source_port, FIRST_PORT);
    host.send_header(on(next, Operation::Rst), &[]);
    host.reply();
    host.connections.next_port = 2 * FIRST_PORT - 1;
    assert_eq!(asked(&mut host).source_port, FIRST_PORT);
}

#[test]
fn with_a_full_table_the_answer_is_no() {
    let mut host = Host::connected();
    for port in 0..MAX_CONNECTIONS as u32 - 1 {
        host.send_header(Header { source_port: port + 2000, fwd_cnt: 0, ..host.template }, &[]);
    }
    host.packets();
    host.bytes.clear();
    host.template.fwd_cnt = frame::encode(&host.agent.hello()).unwrap().len() as u32;
    host.ask(&Request::Connect { host_port: HOST_PORT, timeout_ms: 20 });
    assert_eq!(host.reply(), Reply::Connected(Err(ConnectError::TooMany)));
}

#[test]
fn an_outcome_for_somebody_who_has_left_is_dropped() {
    let mut host = Host::connected();
    let request = asked(&mut host);
    host.send(Operation::Rst, &[]);
    host.send_header(on(request, Operation::Response), &[]);
    assert_eq!(host.operations(), [Operation::Rw], "the greeting");
    assert_eq!(host.connections.table.len(), 1);
}
