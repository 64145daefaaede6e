//! Bytes of patterns, both ways.

use agent_protocol::{Pattern, Transfer, Transferred};

use super::super::super::connection::TRANSFER_ALLOC;
use super::*;

const SEED: u64 = 0x5eed;

fn request(to_host: u64, to_guest: u64, message: u32) -> Vec<u8> {
    let transfer = Transfer { to_host, message, to_guest, seed: SEED };
    frame::encode(&Request::Transfer(transfer)).unwrap()
}

fn pattern(len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    Pattern::to_guest(SEED).fill(&mut bytes);
    bytes
}

/// Takes what the agent has sent, of which the first bytes are a transfer's and the rest is the reply.
#[track_caller]
fn finish(host: &mut Host, expected: u64) -> Transferred {
    host.packets();
    let reply = host.bytes.split_off(expected as usize);
    assert_eq!(Pattern::to_host(SEED).check(&host.bytes), Ok(()));
    match frame::decode(&reply).unwrap().unwrap().0 {
        Reply::Transferred(result) => result,
        other => panic!("{other:?}"),
    }
}

#[test]
fn bytes_for_the_host_come_in_messages_and_then_the_reply() {
    let mut host = Host::connected();
    host.agent.now_us = 7;
    host.send(Operation::Rw, &request(1000, 0, 300));
    let lens: Vec<_> = (0..4).map(|_| host.packet().unwrap().len).collect();
    assert_eq!(lens, [300, 300, 300, 100]);
    host.agent.now_us = 12;
    let result = finish(&mut host, 1000);
    let expected = Transferred { to_host: 1000, us: 5, ..Transferred::default() };
    assert_eq!(result, expected);
}

#[test]
fn a_message_of_no_bytes_is_one_of_a_byte() {
    let mut host = Host::connected();
    host.send(Operation::Rw, &request(3, 0, 0));
    assert_eq!(finish(&mut host, 3).to_host, 3);
}

#[test]
fn bytes_from_the_host_may_begin_in_the_packet_of_the_request_and_end_in_that_of_the_next() {
    for cut in [0, 1, 500, 1000] {
        let mut host = Host::connected();
        let bytes = pattern(1000);
        host.send(Operation::Rw, &[request(0, 1000, 1), bytes[..cut].to_vec()].concat());
        let ping = frame::encode(&Request::Ping(3)).unwrap();
        host.send(Operation::Rw, &[&bytes[cut..], &ping].concat());
        let Reply::Transferred(result) = host.reply() else { panic!("no transfer") };
        assert_eq!((result.to_guest, result.first_wrong), (1000, None), "cut at {cut}");
        assert_eq!(host.reply(), Reply::Pong(3));
        assert_eq!(host.agent.warnings, [] as [String; 0]);
    }
}

#[test]
fn bytes_in_the_packet_of_the_request_need_no_room_either() {
    let mut host = Host::connected();
    let bytes = pattern(50_000);
    let request = request(0, 100_000, 1);
    host.send(Operation::Rw, &[&request[..], &bytes].concat());
    assert_eq!(host.packet().unwrap().fwd_cnt as usize, request.len() + bytes.len());
}

#[test]
fn both_directions_run_at_the_same_time() {
    let mut host = Host::connected();
    host.send(Operation::Rw, &request(5000, 3000, 100));
    for chunk in pattern(3000).chunks(700) {
        assert_eq!(host.packet().unwrap().len, 100);
        host.send(Operation::Rw, chunk);
    }
    let result = finish(&mut host, 5000);
    assert_eq!((result.to_host, result.to_guest, result.first_wrong), (5000, 3000, None));
}

#[test]
fn the_first_wrong_byte_is_told() {
    let mut host = Host::connected();
    let mut bytes = pattern(3000);
    bytes[1234] ^= 1;
    bytes[2345] ^= 1;
    host.send(Operation::Rw, &request(0, 3000, 1));
    host.packets();
    bytes.chunks(1000).for_each(|chunk| host.send(Operation::Rw, chunk));
    assert_eq!(finish(&mut host, 0).first_wrong, Some(1234));
}

#[test]
fn without_credit_a_transfer_waits_and_counts_its_stalls() {
    let mut host = Host::connected();
    host.template.buf_alloc = 250;
    host.send(Operation::Rw, &request(1000, 0, 100));
    let mut forwarded = host.template.fwd_cnt;
    let mut credit_requests = 0;
    while host.bytes.len() < 1000 {
        let headers: Vec<_> = host.packets().into_iter().map(|h| (h.operation, h.len)).collect();
        let expected = [100, 100, 50].map(|len| (Operation::Rw, len));
        assert_eq!(headers[..3], expected);
        forwarded += 250;
        if headers.get(3) == Some(&(Operation::CreditRequest, 0)) {
            credit_requests += 1;
        }
        host.template.fwd_cnt = forwarded;
        host.send(Operation::CreditUpdate, &[]);
    }
    assert_eq!(credit_requests, 4, "the last one for the reply");
    host.template.buf_alloc = 1 << 20;
    host.send(Operation::CreditUpdate, &[]);
    assert_eq!(finish(&mut host, 1000).credit_stalls, 3);
}

#[test]
fn the_host_gets_more_credit_for_a_transfer_and_not_an_update_for_each_packet() {
    const TOTAL: usize = 6 << 20;
    let mut host = Host::connected();
    host.send(Operation::Rw, &request(0, TOTAL as u64, 1));
    let packets = host.packets();
    assert_eq!(packets.len(), 1);
    assert_eq!(
        (packets[0].operation, packets[0].buf_alloc),
        (Operation::CreditUpdate, SHARE + TRANSFER_ALLOC)
    );
    let mut updates = 0;
    for chunk in pattern(TOTAL).chunks(4096) {
        host.send(Operation::Rw, chunk);
        updates += host.operations().iter().filter(|o| **o == Operation::CreditUpdate).count();
    }
    assert!((10..=12).contains(&updates), "{updates}");
    assert_eq!(finish(&mut host, 0).to_guest, TOTAL as u64);
    let Claims { long_request, answer, .. } = host.connections.claims;
    assert_eq!((long_request, answer), (0, 0), "nothing is kept");
}

#[test]
fn counters_wrap_in_the_middle_of_a_transfer() {
    let mut host = Host::connected();
    let start = u32::MAX - 1500;
    let connection = host.connections.table.values_mut().next().unwrap();
    connection.start_counters_at(start, 1 << 20);
    host.template.fwd_cnt = start;
    host.send(Operation::Rw, &request(5000, 5000, 333));
    for chunk in pattern(5000).chunks(444) {
        host.send(Operation::Rw, chunk);
        host.packet();
    }
    let last = host.packets().pop().unwrap();
    assert!(host.template.fwd_cnt < 1 << 20 && last.fwd_cnt < 1 << 20, "both have wrapped");
    let result = finish(&mut host, 5000);
    assert_eq!((result.to_guest, result.first_wrong), (5000, None));
    assert_eq!(host.agent.warnings, [] as [String; 0]);
}

#[test]
fn a_transfer_that_the_host_cuts_short_ends_with_what_there_was() {
    let mut host = Host::connected();
    host.send(Operation::Rw, &request(0, 3000, 1));
    host.send(Operation::Rw, &pattern(1000));
    let end = Header { operation: Operation::Shutdown, flags: NO_SEND, ..host.template };
    host.send_header(end, &[]);
    let operations = host.operations();
    assert_eq!(operations[operations.len() - 2..], [Operation::Rw, Operation::Shutdown]);
    assert_eq!(finish(&mut host, 0), Transferred { to_guest: 1000, ..Transferred::default() });
}

#[test]
fn transfers_of_several_connections_take_turns() {
    let mut host = Host::connected();
    let other = Header { source_port: 2000, fwd_cnt: 0, ..host.template };
    host.send_header(other, &[]);
    host.packets();
    let hello = frame::encode(&host.agent.hello()).unwrap().len() as u32;
    host.template.fwd_cnt = hello;
    host.send(Operation::Rw, &request(1000, 0, 100));
    let other = Header { operation: Operation::Rw, fwd_cnt: hello, ..other };
    host.send_header(other, &request(1000, 0, 100));
    let turns: Vec<_> = (0..8).map(|_| host.packet().unwrap().destination_port).collect();
    assert!(turns.windows(2).all(|pair| pair[0] != pair[1]), "{turns:?}");
}
