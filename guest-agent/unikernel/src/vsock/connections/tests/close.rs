//! How connections end.

use super::*;

#[test]
fn a_half_closed_connection_still_gets_its_reply() {
    let mut host = Host::connected();
    host.send(Operation::Rw, &frame::encode(&Request::Ping(1)).unwrap());
    host.send_header(
        Header { operation: Operation::Shutdown, flags: NO_SEND, ..host.template },
        &[],
    );
    assert_eq!(host.operations(), [Operation::Rw, Operation::Shutdown]);
    host.send(Operation::Rst, &[]);
    assert!(!host.connections.exist());
    assert_eq!(host.operations(), []);
}

#[test]
fn a_full_shutdown_is_confirmed_with_rst() {
    let mut host = Host::connected();
    host.send_header(Header { operation: Operation::Shutdown, flags: 3, ..host.template }, &[]);
    assert_eq!(host.operations(), [Operation::Rst]);
    assert_eq!(host.agent.warnings, [] as [String; 0]);
}

#[test]
fn requests_right_before_a_full_shutdown_are_served() {
    let check = |payload: &[u8], expected: &[Request], warnings: usize| {
        let mut host = Host::connected();
        host.send_header(Header { operation: Operation::Rw, ..host.template }, payload);
        let shutdown = Header { operation: Operation::Shutdown, flags: 3, ..host.template };
        host.send_header(shutdown, &[]);
        assert_eq!(host.agent.requests, expected);
        assert_eq!(host.agent.warnings.len(), warnings);
        assert_eq!(host.operations(), [Operation::Rst], "answers are dropped");
    };
    let reset = Request::Reset(GuestReset::I8042);
    let frames = [Request::Ping(1), Request::Ping(2), reset.clone()]
        .map(|request| frame::encode(&request).unwrap())
        .concat();
    check(&frames, &[Request::Ping(1), Request::Ping(2), reset], 0);
    check(&frames[..frames.len() - 1], &[Request::Ping(1), Request::Ping(2)], 0);
    check(&[0xff; 8], &[], 1);
    check(&[], &[], 0);
}

#[test]
fn a_host_that_takes_no_more_is_still_listened_to() {
    let mut host = Host::connected();
    let closed = Header { operation: Operation::Shutdown, flags: NO_RECEIVE, ..host.template };
    host.send_header(closed, &[]);
    host.ask(&Request::Ping(1));
    host.ask(&Request::Ping(2));
    assert_eq!(host.operations(), [], "answers are dropped");
    assert_eq!(host.agent.requests, [Request::Ping(1), Request::Ping(2)]);
    host.send_header(Header { flags: NO_SEND, ..closed }, &[]);
    assert_eq!(host.operations(), [Operation::Rst]);
    assert!(!host.connections.exist());
    assert_eq!(host.agent.warnings, [] as [String; 0]);
}

#[test]
fn a_host_that_stops_taking_in_the_middle_of_a_transfer_ends_half_of_it() {
    let mut host = Host::connected();
    let transfer = agent_protocol::Transfer { to_host: 9000, message: 10, to_guest: 4, seed: 0 };
    host.ask(&Request::Transfer(transfer));
    host.packet();
    let closed = Header { operation: Operation::Shutdown, flags: NO_RECEIVE, ..host.template };
    host.send_header(closed, &[]);
    let packets = host.packets();
    assert!(packets.iter().all(|header| header.operation != Operation::Rw), "{packets:?}");
    host.send(Operation::Rw, &[0; 4]);
    host.ask(&Request::Ping(1));
    host.packets();
    assert_eq!(host.agent.requests, [Request::Ping(1)], "the transfer is over");
}

#[test]
fn data_after_the_end_of_data_are_out_of_order() {
    let mut host = Host::connected();
    // A request that is not complete keeps the agent from closing its half first.
    host.template.buf_alloc = 0;
    host.ask(&Request::Ping(1));
    let end = Header { operation: Operation::Shutdown, flags: NO_SEND, ..host.template };
    host.send_header(end, &[]);
    host.send(Operation::Rw, b"more");
    assert_eq!(host.operations(), [Operation::Rst]);
}

#[test]
fn a_shutdown_of_nothing_is_out_of_order() {
    let mut host = Host::connected();
    host.send_header(Header { operation: Operation::Shutdown, flags: 4, ..host.template }, &[]);
    assert_eq!(host.operations(), [Operation::Rst]);
    assert_eq!(host.agent.warnings.len(), 1);
}

/// Has the agent close directions, and returns the flags of its SHUTDOWN.
#[track_caller]
fn agent_closes(host: &mut Host, send: bool, receive: bool) -> u32 {
    host.ask(&Request::Shutdown { send, receive });
    let packets = host.packets();
    assert_eq!(frame::decode::<Reply>(&host.bytes).unwrap().unwrap().0, Reply::Done);
    host.bytes.clear();
    let operations: Vec<_> = packets.iter().map(|header| header.operation).collect();
    assert_eq!(operations, [Operation::Rw, Operation::Shutdown], "the reply comes first");
    packets[1].flags
}

#[test]
fn a_direction_is_not_closed_before_the_reply_has_left() {
    let mut host = Host::connected();
    host.template.buf_alloc = 0;
    host.ask(&Request::Shutdown { send: true, receive: true });
    assert_eq!(host.operations(), [Operation::CreditRequest]);
    host.template.buf_alloc = 1000;
    host.send(Operation::CreditUpdate, &[]);
    assert_eq!(host.operations(), [Operation::Rw, Operation::Shutdown]);
}

#[test]
fn an_agent_that_sends_no_more_still_listens() {
    let mut host = Host::connected();
    assert_eq!(agent_closes(&mut host, true, false), NO_SEND);
    host.ask(&Request::Ping(1));
    assert_eq!(host.operations(), []);
    assert_eq!(host.agent.requests, [Request::Ping(1)]);
    host.send_header(
        Header { operation: Operation::Shutdown, flags: NO_SEND, ..host.template },
        &[],
    );
    let packets = host.packets();
    assert_eq!((packets[0].operation, packets[0].flags), (Operation::Shutdown, 3));
}

#[test]
fn an_agent_that_takes_no_more_drops_what_comes_and_gives_credit_for_it() {
    let mut host = Host::connected();
    assert_eq!(agent_closes(&mut host, false, true), NO_RECEIVE);
    for _ in 0..10 {
        host.send(Operation::Rw, &vec![0xff; SHARE as usize / 4]);
        host.packets();
    }
    assert_eq!(host.agent.warnings, [] as [String; 0]);
    assert!(host.agent.requests.is_empty() && host.connections.exist());
}

#[test]
fn an_agent_that_closes_waits_for_the_confirmation_but_not_for_ever() {
    let mut host = Host::connected();
    host.agent.now_us = 100;
    assert_eq!(agent_closes(&mut host, true, true), 3);
    assert_eq!(host.connections.next_deadline(), Some(100 + SHUTDOWN_TIMEOUT_US));
    host.agent.now_us = 99 + SHUTDOWN_TIMEOUT_US;
    host.connections.expire(&host.agent);
    assert_eq!(host.operations(), []);
    host.agent.now_us += 1;
    host.connections.expire(&host.agent);
    assert_eq!(host.operations(), [Operation::Rst]);
    assert!(!host.connections.exist());
    // What crossed with that belongs to this life all the same.
    host.send(Operation::CreditUpdate, &[]);
    assert_eq!(host.operations(), [Operation::Rst]);
    assert_eq!(host.agent.stale, [] as [String; 0]);
}

#[test]
fn a_confirmation_in_time_ends_it() {
    let mut host = Host::connected();
    agent_closes(&mut host, true, true);
    host.send(Operation::Rst, &[]);
    assert!(!host.connections.exist());
    host.agent.now_us = u64::MAX;
    host.connections.expire(&host.agent);
    assert_eq!(host.operations(), []);
    assert_eq!(host.connections.next_deadline(), None);
}

#[test]
fn ports_can_be_used_again_at_once() {
    // After the host's last word, after the agent's, and when the host does not wait for it.
    let check = |end: &[Header]| {
        let mut host = Host::connected();
        end.iter().for_each(|header| host.send_header(*header, &[]));
        host.packets();
        host.template.fwd_cnt = 0;
        host.bytes.clear();
        host.send(Operation::Request, &[]);
        assert_eq!(host.operations(), [Operation::Response, Operation::Rw], "{end:?}");
        host.bytes.clear();
        host.ask(&Request::Ping(4));
        assert_eq!(host.reply(), Reply::Pong(4));
    };
    let header = Host::connected().template;
    let rst = Header { operation: Operation::Rst, ..header };
    let half = Header { operation: Operation::Shutdown, flags: NO_SEND, ..header };
    check(&[rst]);
    check(&[half, Header { flags: NO_RECEIVE, ..half }]);
    check(&[Header { flags: 3, ..half }]);
    check(&[half, rst]);
    check(&[half]);
}
