//! Packet headers (virtio 1.2, section 5.10.6): names for their values, parsing, building.
//!
//! Knows no queue and no guest memory: a header arrives here as bytes that were copied out once.

use virtio_vsock::packet::PKT_HEADER_SIZE;

use super::poll::{FIRST_PARTED, PORT_ANY};

/// The host's own context identifier (virtio 1.2, section 5.10.4).
pub const HOST_CID: u64 = 2;

/// Length of a header in bytes.
pub const HEADER_LEN: usize = PKT_HEADER_SIZE;

/// The flag `VIRTIO_VSOCK_SEQ_EOM`: the packet's payload ends a message (virtio 1.2, section 5.10.6.6). Beside it there is
/// `VIRTIO_VSOCK_SEQ_EOR`, which marks messages that end a record; a Unix socket cannot carry it.
pub const END_OF_MESSAGE: u32 = 1;

/// What a connection carries (virtio 1.2, section 5.10.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SocketType {
    /// Bytes in order.
    Stream,
    /// Messages in order, each with its boundaries.
    Seqpacket,
}

impl SocketType {
    fn parse(raw: u16) -> Option<Self> {
        match raw {
            1 => Some(Self::Stream),
            2 => Some(Self::Seqpacket),
            _ => None,
        }
    }

    fn raw(self) -> u16 {
        match self {
            Self::Stream => 1,
            Self::Seqpacket => 2,
        }
    }
}

/// The guest's context identifier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestCid(u64);

impl GuestCid {
    /// The first one that is not reserved.
    pub const FIRST: Self = Self(HOST_CID + 1);

    /// Takes an identifier that a guest may have: 3 to 2³²−2; the others are reserved (virtio 1.2, section 5.10.4).
    pub fn new(cid: u64) -> Option<Self> {
        (cid > HOST_CID && cid < u64::from(u32::MAX)).then_some(Self(cid))
    }

    /// The number that goes into headers and the configuration space.
    pub fn get(self) -> u64 {
        self.0
    }
}

/// A port on the host's side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostPort(pub u32);

/// A port on the guest's side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GuestPort(pub u32);

/// What tells one connection from another: there is one host and one guest, so the two ports do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ConnectionKey {
    /// Port on the host's side.
    pub host: HostPort,
    /// Port on the guest's side.
    pub guest: GuestPort,
}

impl ConnectionKey {
    /// A key for a connection that is over for the guest while its last bytes wait for a slow reader: its own key is free
    /// for another. No packet has such a key; the lower 31 bits of `number` tell one from the other.
    pub fn parted(number: u32) -> Self {
        Self { host: HostPort(PORT_ANY), guest: GuestPort(FIRST_PARTED | number) }
    }
}

/// What a packet is for (virtio 1.2, section 5.10.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Asks for a connection.
    Request,
    /// Accepts one.
    Response,
    /// Refuses or ends one.
    Reset,
    /// The sender is done with one direction or both.
    Shutdown,
    /// Carries payload.
    ReadWrite,
    /// Tells the sender's buffer space.
    CreditUpdate,
    /// Asks for a [`Op::CreditUpdate`].
    CreditRequest,
}

impl Op {
    /// Gives the operation for the number in a header, if there is one.
    pub fn parse(raw: u16) -> Option<Self> {
        Some(match raw {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::ReadWrite,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }

    fn raw(self) -> u16 {
        match self {
            Self::Request => 1,
            Self::Response => 2,
            Self::Reset => 3,
            Self::Shutdown => 4,
            Self::ReadWrite => 5,
            Self::CreditUpdate => 6,
            Self::CreditRequest => 7,
        }
    }
}

/// The directions that a SHUTDOWN closes, seen from its sender (virtio 1.2, section 5.10.6.5).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shutdown {
    /// The sender will receive no more.
    pub receive: bool,
    /// The sender will send no more.
    pub send: bool,
}

impl Shutdown {
    /// Both directions.
    pub const BOTH: Self = Self { receive: true, send: true };
    /// The sending direction alone.
    pub const SEND: Self = Self { receive: false, send: true };
    /// The receiving direction alone.
    pub const RECEIVE: Self = Self { receive: true, send: false };

    /// Reads the flags of a SHUTDOWN packet; bits without a meaning are ignored.
    pub fn parse(flags: u32) -> Self {
        Self { receive: flags & 1 != 0, send: flags & 2 != 0 }
    }

    /// The flags of a SHUTDOWN packet.
    pub fn flags(self) -> u32 {
        u32::from(self.receive) | u32::from(self.send) << 1
    }

    /// The directions that either of the two closes: a direction never opens again.
    pub fn union(self, other: Self) -> Self {
        Self { receive: self.receive || other.receive, send: self.send || other.send }
    }
}

/// A header as it stands in memory, decoded but not judged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Sender's context identifier.
    pub src_cid: u64,
    /// Receiver's context identifier.
    pub dst_cid: u64,
    /// Sender's port.
    pub src_port: u32,
    /// Receiver's port.
    pub dst_port: u32,
    /// Bytes of payload after the header.
    pub len: u32,
    /// Socket type, see [`SocketType`].
    pub socket_type: u16,
    /// Operation, see [`Op`].
    pub op: u16,
    /// Flags; they mean something for SHUTDOWN, and for payload of messages.
    pub flags: u32,
    /// Sender's buffer space in bytes, free or not.
    pub buf_alloc: u32,
    /// Bytes that the sender has taken out of its buffer so far, modulo 2³².
    pub fwd_cnt: u32,
}

/// What a packet from the guest turns out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parsed {
    /// A packet for the connection named.
    Packet(ConnectionKey, SocketType, Op),
    /// Not for a socket of this host; the reply is this RST.
    Refuse(Header),
    /// Not worth a reply: a forged sender, or an RST for something that does not exist.
    Ignore,
}

impl Header {
    /// Decodes a header's bytes.
    pub fn from_bytes(bytes: &[u8; HEADER_LEN]) -> Self {
        let le = |range: std::ops::Range<usize>| {
            bytes[range].iter().rev().fold(0u64, |value, &byte| value << 8 | u64::from(byte))
        };
        // The ranges are as wide as the fields, so the conversions lose nothing.
        Self {
            src_cid: le(0..8),
            dst_cid: le(8..16),
            src_port: le(16..20) as u32,
            dst_port: le(20..24) as u32,
            len: le(24..28) as u32,
            socket_type: le(28..30) as u16,
            op: le(30..32) as u16,
            flags: le(32..36) as u32,
            buf_alloc: le(36..40) as u32,
            fwd_cnt: le(40..44) as u32,
        }
    }

    /// Encodes the header.
    pub fn to_bytes(self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[0..8].copy_from_slice(&self.src_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.socket_type.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }

    /// Judges a packet that the guest `guest` sent. Messages are a socket type only if `seqpacket` was negotiated.
    ///
    /// An unknown socket type or operation is answered with an RST (virtio 1.2, sections 5.10.6.1 and 5.10.6.4), and
    /// so is a context identifier that is not the host's, lest a `connect` in the guest hang.
    pub fn parse(&self, guest: GuestCid, seqpacket: bool) -> Parsed {
        let op = Op::parse(self.op);
        if self.src_cid != guest.get() {
            return Parsed::Ignore;
        }
        let socket_type = SocketType::parse(self.socket_type)
            .filter(|&socket_type| socket_type == SocketType::Stream || seqpacket);
        let Some(socket_type) = socket_type.filter(|_| self.dst_cid == HOST_CID) else {
            return match op {
                Some(Op::Reset) => Parsed::Ignore,
                _ => Parsed::Refuse(self.reset_reply()),
            };
        };
        let key = ConnectionKey { host: HostPort(self.dst_port), guest: GuestPort(self.src_port) };
        match op {
            Some(op) => Parsed::Packet(key, socket_type, op),
            None => Parsed::Refuse(self.reset_reply()),
        }
    }

    /// The RST that answers this packet: same socket type, sender and receiver exchanged.
    pub fn reset_reply(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            socket_type: self.socket_type,
            op: Op::Reset.raw(),
            ..Self::default()
        }
    }

    /// A packet from the host to the guest, without payload, flags or credit yet.
    pub fn to_guest(guest: GuestCid, key: ConnectionKey, socket_type: SocketType, op: Op) -> Self {
        Self {
            src_cid: HOST_CID,
            dst_cid: guest.get(),
            src_port: key.host.0,
            dst_port: key.guest.0,
            socket_type: socket_type.raw(),
            op: op.raw(),
            ..Self::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Header {
        Header {
            src_cid: 3,
            dst_cid: HOST_CID,
            src_port: 0x0102_0304,
            dst_port: 0xfffe_fdfc,
            len: 77,
            socket_type: 1,
            op: 5,
            flags: 0x8000_0001,
            buf_alloc: 0x1122_3344,
            fwd_cnt: 0xaabb_ccdd,
        }
    }

    fn guest() -> GuestCid {
        GuestCid::new(3).unwrap()
    }

    #[test]
    fn bytes_decode_to_what_was_encoded() {
        assert_eq!(Header::from_bytes(&sample().to_bytes()), sample());
        // Two fields checked by hand against the layout in the specification.
        let bytes = sample().to_bytes();
        assert_eq!(&bytes[16..20], &[4, 3, 2, 1]);
        assert_eq!(&bytes[28..32], &[1, 0, 5, 0]);
    }

    #[test]
    fn guests_cannot_have_reserved_cids() {
        for (cid, allowed) in [
            (0, false),
            (1, false),
            (2, false),
            (3, true),
            (0xffff_fffe, true),
            (0xffff_ffff, false),
        ] {
            assert_eq!(GuestCid::new(cid).is_some(), allowed, "{cid}");
        }
        assert_eq!(GuestCid::new(u64::MAX), None);
    }

    #[test]
    fn packets_are_judged_by_address_type_and_operation() {
        let key = ConnectionKey { host: HostPort(0xfffe_fdfc), guest: GuestPort(0x0102_0304) };
        let base = sample();
        let refuse = |header: Header| Parsed::Refuse(header.reset_reply());
        let unknown_op = Header { op: 8, ..base };
        let no_op = Header { op: 0, ..base };
        let message = Header { socket_type: 2, ..base };
        let other_type = Header { socket_type: 3, ..base };
        let other_host = Header { dst_cid: 9, ..base };
        for (header, expected) in [
            (base, Parsed::Packet(key, SocketType::Stream, Op::ReadWrite)),
            (Header { op: 3, ..base }, Parsed::Packet(key, SocketType::Stream, Op::Reset)),
            (message, Parsed::Packet(key, SocketType::Seqpacket, Op::ReadWrite)),
            (unknown_op, refuse(unknown_op)),
            (no_op, refuse(no_op)),
            (other_type, refuse(other_type)),
            (other_host, refuse(other_host)),
            (Header { op: 3, socket_type: 0, ..base }, Parsed::Ignore),
            (Header { src_cid: 4, ..base }, Parsed::Ignore),
            (Header { src_cid: 1 << 32 | 3, ..base }, Parsed::Ignore),
        ] {
            assert_eq!(header.parse(guest(), true), expected, "{header:?}");
        }
        // Not negotiated.
        assert_eq!(message.parse(guest(), false), refuse(message));
        assert_eq!(Header { op: 3, ..message }.parse(guest(), false), Parsed::Ignore);
    }

    #[test]
    fn a_refusal_goes_back_where_it_came_from_with_the_same_type() {
        let reply = Header { socket_type: 2, ..sample() }.reset_reply();
        assert_eq!((reply.src_cid, reply.dst_cid), (HOST_CID, 3));
        assert_eq!((reply.src_port, reply.dst_port), (0xfffe_fdfc, 0x0102_0304));
        assert_eq!((reply.socket_type, reply.op, reply.len), (2, 3, 0));
    }

    #[test]
    fn shutdown_flags_keep_the_directions_apart() {
        for (flags, receive, send) in [
            (0, false, false),
            (1, true, false),
            (2, false, true),
            (3, true, true),
            (0xf0, false, false),
        ] {
            assert_eq!(Shutdown::parse(flags), Shutdown { receive, send });
        }
        assert_eq!(Shutdown::SEND.union(Shutdown::RECEIVE), Shutdown::BOTH);
        assert_eq!(Shutdown::BOTH.flags(), 3);
    }
}
