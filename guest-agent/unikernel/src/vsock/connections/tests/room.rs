//! What connections may make the agent hold, together.

use super::*;

/// Connections of so many clients, from port 0 on, all greeted. Returns the room that each was given.
fn connected(host: &mut Host, count: usize) -> Vec<u32> {
    let mut rooms = vec![];
    for port in 0..count as u32 {
        host.template.source_port = port;
        host.template.fwd_cnt = 0;
        host.send(Operation::Request, &[]);
        rooms.push(host.packet().unwrap().buf_alloc);
        host.packets();
    }
    host.bytes.clear();
    rooms
}

/// Sends as the client of this port, which has taken all that it was sent. Returns what comes of it.
fn send_from(host: &mut Host, port: u32, greeting: u32, payload: &[u8]) -> Vec<Header> {
    host.template.source_port = port;
    host.template.fwd_cnt = greeting;
    host.send(Operation::Rw, payload);
    let packets = host.packets();
    assert_eq!(host.agent.warnings, [] as [String; 0], "port {port}");
    packets
}

fn greeting(host: &Host) -> u32 {
    frame::encode(&host.agent.hello()).unwrap().len() as u32
}

#[test]
fn the_more_connections_the_less_room_until_some_are_over() {
    let mut host = Host::new();
    let rooms = connected(&mut host, 40);
    assert_eq!(rooms, [[SHARE; 16].to_vec(), [SMALL_SHARE; 24].to_vec()].concat());
    host.template.source_port = 3;
    host.send(Operation::Rst, &[]);
    host.template.source_port = 3000;
    host.template.fwd_cnt = 0;
    host.send(Operation::Request, &[]);
    assert_eq!(host.packet().unwrap().buf_alloc, SHARE);
}

/// Whoever keeps to its credit is served, though all want more at once than there is.
#[test]
fn everybody_may_send_the_longest_request_at_once_and_is_served_in_turn() {
    const CLIENTS: usize = 40;
    let mut host = Host::new();
    let greeting = greeting(&host);
    let mut edges = connected(&mut host, CLIENTS);
    let request = frame::encode(&Request::Echo(vec![7; frame::MAX_PAYLOAD - 16])).unwrap();
    let mut sent = vec![0; CLIENTS];
    let mut taken = vec![greeting; CLIENTS];
    for _ in 0..CLIENTS {
        for port in 0..CLIENTS {
            let end = request.len().min(edges[port] as usize);
            let payload = &request[sent[port]..end];
            sent[port] = end;
            for packet in send_from(&mut host, port as u32, taken[port], payload) {
                let port = packet.destination_port as usize;
                edges[port] = packet.fwd_cnt.wrapping_add(packet.buf_alloc);
                taken[port] += packet.len;
            }
            let claims = host.connections.claims;
            assert!(claims.long_request <= 4 * frame::MAX_FRAME, "{claims:?}");
        }
    }
    let answer = request.len() as u32;
    assert!(taken.iter().all(|taken| *taken == greeting + answer), "{taken:?}");
    let Claims { long_request, answer, .. } = host.connections.claims;
    assert_eq!((long_request, answer), (0, 0));
}

/// Bytes of a transfer are not kept, so the credit for them is none for anything else.
#[test]
fn credit_for_a_transfer_is_gone_with_its_last_byte() {
    const TOTAL: u32 = 200_000;
    let mut host = Host::new();
    let greeting = greeting(&host);
    connected(&mut host, 1);
    let transfer =
        agent_protocol::Transfer { to_host: 0, message: 1, to_guest: TOTAL.into(), seed: 1 };
    let request = frame::encode(&Request::Transfer(transfer)).unwrap();
    let update = send_from(&mut host, 0, greeting, &request)[0];
    assert_eq!(update.buf_alloc, SHARE + TOTAL);
    let mut last = update;
    for chunk in vec![0; TOTAL as usize].chunks(4096) {
        let packets = send_from(&mut host, 0, greeting, chunk);
        last = packets.last().copied().unwrap_or(last);
    }
    assert_eq!(last.buf_alloc, SHARE);
    assert_eq!(last.fwd_cnt, request.len() as u32 + TOTAL);
}

/// A request is answered when there is room for its answer, and not dropped before.
#[test]
fn clients_that_do_not_read_keep_others_waiting_and_nobody_is_closed() {
    const LEN: u32 = 200_000;
    let mut host = Host::new();
    let greeting = greeting(&host);
    host.template.buf_alloc = greeting;
    connected(&mut host, 17);
    let request = frame::encode(&Request::Random { bytes: LEN }).unwrap();
    let ping = frame::encode(&Request::Ping(1)).unwrap();
    let unread = |host: &mut Host, port| send_from(host, port, greeting, &request);
    (0..16).for_each(|port| drop(unread(&mut host, port)));
    let answered = host.agent.requests.len();
    assert!((4..=8).contains(&answered), "{answered}");
    assert!(host.connections.are_quiet(), "nobody spins");
    for _ in 0..3 {
        // A client that waits may say things, and is in the queue once.
        send_from(&mut host, 15, greeting, &[]);
    }
    assert!(host.connections.waiting.len() <= 16 - answered, "{:?}", host.connections.waiting);
    // A short answer takes no room.
    send_from(&mut host, 16, greeting, &ping);
    assert_eq!(host.agent.requests.len(), answered + 1);
    let mut read = |ports: std::ops::Range<u32>| {
        for port in ports {
            host.template.source_port = port;
            host.template.buf_alloc = 1 << 20;
            host.template.fwd_cnt = greeting;
            host.send(Operation::CreditUpdate, &[]);
            host.packets();
        }
        host.agent.requests.len()
    };
    assert_eq!(read(0..1), answered + 1 + 1, "one that waited, and says nothing");
    read(0..17);
    assert_eq!(host.agent.requests.len(), 16 + 1);
    assert!(host.bytes.len() > 16 * LEN as usize, "{}", host.bytes.len());
    assert_eq!(host.connections.claims.answer, 0);
}
