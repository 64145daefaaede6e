use super::super::credit::BUF_ALLOC;
use super::super::packet::{GuestPort, HostPort};
use super::*;

const KEY: ConnectionKey = ConnectionKey { host: HostPort(1 << 30), guest: GuestPort(1024) };

fn guest() -> GuestCid {
    GuestCid::new(3).unwrap()
}

fn header(len: u32, flags: u32) -> Header {
    Header { len, flags, buf_alloc: 1000, ..Header::default() }
}

/// Connections in every phase, by name.
fn in_phase(name: &str) -> Connection {
    let mut connection = Connection::request(guest(), KEY, SocketType::Stream, BUF_ALLOC);
    match name {
        "requesting" => {}
        "requested" => drop(connection.packet(Op::Request, 0, false)),
        "accepting" => {
            connection =
                Connection::accept(guest(), KEY, SocketType::Stream, BUF_ALLOC, &header(0, 0))
        }
        "established" => {
            connection.packet(Op::Request, 0, false);
            assert_eq!(connection.receive(Op::Response, &header(0, 0)), Verdict::Accepted);
        }
        "ending" => {
            connection = in_phase("established");
            connection.end();
        }
        "ended" => {
            connection = in_phase("ending");
            connection.packet(Op::Reset, 0, false);
        }
        _ => unreachable!("{name}"),
    }
    connection
}

#[test]
fn each_packet_has_one_meaning_in_each_phase() {
    use Op::*;
    use Verdict::*;
    let sequence = Verdict::Violation(super::Violation::Sequence);
    // Columns: REQUEST, RESPONSE, RST, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST.
    let ops = [Request, Response, Op::Reset, Op::Shutdown, ReadWrite, CreditUpdate, CreditRequest];
    for (phase, expected) in [
        ("requesting", [sequence; 7]),
        ("requested", [sequence, Accepted, Refused, sequence, sequence, sequence, sequence]),
        (
            "accepting",
            [sequence, sequence, Verdict::Reset, Verdict::Shutdown, Payload, Nothing, Nothing],
        ),
        (
            "established",
            [sequence, sequence, Verdict::Reset, Verdict::Shutdown, Payload, Nothing, Nothing],
        ),
        ("ending", [Nothing, Nothing, Verdict::Reset, Nothing, Nothing, Nothing, Nothing]),
        ("ended", [Stray, Stray, Nothing, Stray, Stray, Stray, Stray]),
    ] {
        for (op, expected) in ops.into_iter().zip(expected) {
            assert_eq!(in_phase(phase).receive(op, &header(10, 0)), expected, "{op:?} {phase}");
        }
    }
}

#[test]
fn what_is_due_follows_from_the_phase() {
    for (phase, due) in [
        ("requesting", Some(Op::Request)),
        ("requested", None),
        ("accepting", Some(Op::Response)),
        ("established", None),
        ("ending", Some(Op::Reset)),
        ("ended", None),
    ] {
        assert_eq!(in_phase(phase).due(false), due, "{phase}");
    }
    assert_eq!(in_phase("established").due(true), Some(Op::ReadWrite));
    assert_eq!(in_phase("requested").due(true), None, "no payload before the guest accepts");
    assert_eq!(in_phase("accepting").due(true), Some(Op::Response), "the response comes first");
}

#[test]
fn ending_a_request_that_the_guest_never_saw_needs_no_reset() {
    let mut connection = in_phase("requesting");
    connection.end();
    assert!(connection.has_ended());
    let mut connection = in_phase("requested");
    connection.end();
    assert_eq!(connection.due(false), Some(Op::Reset));
}

#[test]
fn packets_carry_addresses_and_credit() {
    let mut connection = in_phase("established");
    assert_eq!(connection.receive(Op::ReadWrite, &header(300, 0)), Verdict::Payload);
    connection.forwarded(200);
    let sent = connection.packet(Op::ReadWrite, 40, false);
    assert_eq!((sent.src_cid, sent.dst_cid), (2, 3));
    assert_eq!((sent.src_port, sent.dst_port), (1 << 30, 1024));
    assert_eq!((sent.len, sent.buf_alloc, sent.fwd_cnt), (40, BUF_ALLOC, 200));
    assert_eq!(connection.payload_room(), 960);
}

#[test]
fn each_direction_closes_on_its_own() {
    let mut connection = in_phase("established");
    connection.receive(Op::Shutdown, &header(0, Shutdown::RECEIVE.flags()));
    assert_eq!(connection.payload_room(), 0, "the guest receives no more");
    assert_eq!(connection.receive(Op::ReadWrite, &header(1, 0)), Verdict::Payload);
    connection.receive(Op::Shutdown, &header(0, Shutdown::SEND.flags()));
    assert_eq!(connection.guest_shutdown(), Shutdown::BOTH);
    let verdict = connection.receive(Op::ReadWrite, &header(1, 0));
    assert_eq!(verdict, Verdict::Violation(Violation::Sequence));

    let mut connection = in_phase("established");
    connection.shut(Shutdown::SEND);
    assert_eq!(connection.due(true), Some(Op::Shutdown));
    assert_eq!(connection.packet(Op::Shutdown, 0, false).flags, Shutdown::SEND.flags());
    assert_eq!(connection.due(true), None, "told once, and nothing is sent after it");
    assert_eq!(connection.receive(Op::ReadWrite, &header(1, 0)), Verdict::Payload);
    connection.shut(Shutdown::RECEIVE);
    assert_eq!(connection.packet(Op::Shutdown, 0, false).flags, Shutdown::BOTH.flags());
    assert_eq!(connection.receive(Op::ReadWrite, &header(1, 0)), Verdict::Nothing, "discarded");
}

#[test]
fn a_guest_that_breaks_its_credit_is_found_out() {
    let credit = Verdict::Violation(Violation::Credit);
    let mut connection = in_phase("established");
    assert_eq!(connection.receive(Op::ReadWrite, &header(BUF_ALLOC, 0)), Verdict::Payload);
    assert_eq!(connection.receive(Op::ReadWrite, &header(1, 0)), credit);

    let mut connection = in_phase("established");
    let lie = Header { fwd_cnt: 1, ..header(0, 0) };
    assert_eq!(connection.receive(Op::CreditUpdate, &lie), credit);
}

#[test]
fn credit_is_asked_for_once_per_stall() {
    let mut connection = in_phase("established");
    connection.packet(Op::ReadWrite, 1000, false);
    assert_eq!(connection.payload_room(), 0);
    assert_eq!(connection.due(true), Some(Op::CreditRequest));
    connection.packet(Op::CreditRequest, 0, false);
    assert_eq!(connection.due(true), None);
    connection.receive(Op::CreditUpdate, &Header { fwd_cnt: 500, ..header(0, 0) });
    assert_eq!(connection.due(true), Some(Op::ReadWrite));
    connection.packet(Op::ReadWrite, 500, false);
    assert_eq!(connection.due(true), Some(Op::CreditRequest), "a new stall");
    assert_eq!(connection.due(false), None, "nothing to send, nothing to ask");
}

#[test]
fn a_credit_request_is_answered_and_payload_answers_it_too() {
    let mut connection = in_phase("established");
    connection.receive(Op::CreditRequest, &header(0, 0));
    assert_eq!(connection.due(false), Some(Op::CreditUpdate));
    assert_eq!(connection.due(true), Some(Op::ReadWrite));
    connection.packet(Op::ReadWrite, 1, false);
    assert_eq!(connection.due(false), None);
}

#[test]
fn more_than_four_gib_go_both_ways() {
    let mut connection = in_phase("established");
    connection.credit = Credit::starting_at(u32::MAX - 5000);
    let at = (u32::MAX - 5000, 1 << 20);
    let (mut forwarded_by_guest, alloc) = at;
    let (mut to_host, mut updates) = (0u64, 0u64);
    for _ in 0..70_000 {
        let packet = Header { buf_alloc: alloc, fwd_cnt: forwarded_by_guest, ..header(1 << 16, 0) };
        assert_eq!(connection.receive(Op::ReadWrite, &packet), Verdict::Payload);
        connection.forwarded(1 << 16);
        to_host += 1 << 16;
        if connection.due(false) == Some(Op::CreditUpdate) {
            connection.packet(Op::CreditUpdate, 0, false);
            updates += 1;
        }
        assert_eq!(connection.payload_room(), 1 << 20);
        connection.packet(Op::ReadWrite, 1 << 16, false);
        forwarded_by_guest = forwarded_by_guest.wrapping_add(1 << 16);
    }
    assert!(to_host > 1 << 32);
    assert_eq!(updates, 0, "payload the other way told the guest each time");
}

#[test]
fn dropped_payload_gives_its_credit_back() {
    let mut connection = in_phase("established");
    connection.receive(Op::ReadWrite, &header(BUF_ALLOC, 0));
    connection.discard();
    assert_eq!(connection.receive(Op::ReadWrite, &header(BUF_ALLOC, 0)), Verdict::Payload);
}
