//! Headers of vsock packets, as the monitor reads those of a guest and as the agent reads those of a host.

#![no_main]

use agent::vsock::packet as agent_side;
use libfuzzer_sys::fuzz_target;
use vmm::fuzzing::packet::{GuestCid, HEADER_LEN, HOST_CID, Header, Op, Parsed, TYPE_STREAM};

fuzz_target!(|packet: &[u8]| {
    if let Some(bytes) = packet.first_chunk::<HEADER_LEN>() {
        monitor(bytes);
    }
    agent(packet);
});

/// What a guest sends: every header means something definite, and none makes the monitor answer wrongly.
fn monitor(bytes: &[u8; HEADER_LEN]) {
    let header = Header::from_bytes(bytes);
    assert_eq!(header.to_bytes(), *bytes, "a header changed on its way through");
    let guest = GuestCid::new(3).expect("the first identifier that is not reserved");
    match header.parse(guest) {
        Parsed::Stream(key, op) => {
            assert_eq!((header.src_cid, header.dst_cid), (guest.get(), HOST_CID));
            assert_eq!(header.socket_type, TYPE_STREAM);
            assert_eq!((key.host.0, key.guest.0), (header.dst_port, header.src_port));
            assert_eq!(Op::parse(header.op), Some(op));
        }
        Parsed::Refuse(reply) => {
            assert_eq!(header.src_cid, guest.get(), "a reply to a forged sender");
            assert_eq!(Op::parse(reply.op), Some(Op::Reset));
            assert_ne!(Op::parse(header.op), Some(Op::Reset), "a reset answered by a reset");
            assert_eq!((reply.src_cid, reply.dst_cid), (header.dst_cid, header.src_cid));
            assert_eq!((reply.src_port, reply.dst_port), (header.dst_port, header.src_port));
            assert_eq!((reply.len, reply.flags, reply.buf_alloc, reply.fwd_cnt), (0, 0, 0, 0));
        }
        Parsed::Ignore => {
            let is_reset = Op::parse(header.op) == Some(Op::Reset);
            assert!(header.src_cid != guest.get() || is_reset);
        }
    }
}

/// What a host sends: the agent and the monitor read the same out of the same bytes.
fn agent(packet: &[u8]) {
    match agent_side::Header::parse(packet) {
        Ok((header, payload)) => {
            assert_eq!(payload.len(), header.len as usize);
            let mut written = [0; HEADER_LEN];
            header.write(&mut written);
            assert_eq!(written, packet[..HEADER_LEN], "a header changed on its way through");
            let other = Header::from_bytes(&written);
            assert_eq!(other.socket_type, TYPE_STREAM);
            assert!(Op::parse(other.op).is_some());
            assert_eq!(
                (other.src_cid, other.dst_cid, other.src_port, other.dst_port),
                (
                    header.source_cid,
                    header.destination_cid,
                    header.source_port,
                    header.destination_port
                )
            );
            assert_eq!(
                (other.len, other.flags, other.buf_alloc, other.fwd_cnt),
                (header.len, header.flags, header.buf_alloc, header.fwd_cnt)
            );
        }
        Err(agent_side::PacketError::Length) => {
            let announced = packet.first_chunk().map(|bytes| Header::from_bytes(bytes).len);
            let payload = packet.len().checked_sub(HEADER_LEN);
            assert!(payload.is_none() || payload != announced.map(|len| len as usize));
        }
        Err(agent_side::PacketError::Unsupported { source_cid, source_port, destination_port }) => {
            let other = Header::from_bytes(packet.first_chunk().expect("a header was read"));
            assert!(other.socket_type != TYPE_STREAM || Op::parse(other.op).is_none());
            assert_eq!(
                (other.src_cid, other.src_port, other.dst_port),
                (source_cid, source_port, destination_port)
            );
        }
    }
}
