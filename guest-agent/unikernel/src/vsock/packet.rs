//! The packet header (virtio 1.3, section 5.10.6) and its checks.

/// Bytes of a header.
pub const HEADER_LEN: usize = 44;
/// The host's context id.
pub const HOST_CID: u64 = 2;
/// Socket type: stream.
const STREAM: u16 = 1;

/// What a packet asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Operation {
    Request = 1,
    Response = 2,
    Rst = 3,
    Shutdown = 4,
    Rw = 5,
    CreditUpdate = 6,
    CreditRequest = 7,
}

impl Operation {
    fn parse(number: u16) -> Option<Self> {
        Some(match number {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Rst,
            4 => Self::Shutdown,
            5 => Self::Rw,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }
}

/// A header of the stream type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub source_cid: u64,
    pub destination_cid: u64,
    pub source_port: u32,
    pub destination_port: u32,
    pub len: u32,
    pub operation: Operation,
    pub flags: u32,
    pub buf_alloc: u32,
    pub fwd_cnt: u32,
}

/// Why a packet is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PacketError {
    /// Shorter than a header, or not as long as the header says.
    Length,
    /// Not a stream, or no known operation. The addresses could be read, so the sender gets a RST.
    Unsupported { source_cid: u64, source_port: u32, destination_port: u32 },
}

impl Header {
    /// Parses a packet into header and payload.
    pub fn parse(packet: &[u8]) -> Result<(Self, &[u8]), PacketError> {
        let (header, payload) =
            packet.split_first_chunk::<HEADER_LEN>().ok_or(PacketError::Length)?;
        let u64_at =
            |at: usize| u64::from(u32_at(header, at)) | u64::from(u32_at(header, at + 4)) << 32;
        let u16_at = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
        let (source_cid, source_port) = (u64_at(0), u32_at(header, 16));
        let (destination_port, len) = (u32_at(header, 20), u32_at(header, 24));
        if payload.len() != len as usize {
            return Err(PacketError::Length);
        }
        let unsupported = PacketError::Unsupported { source_cid, source_port, destination_port };
        let operation = Operation::parse(u16_at(30)).filter(|_| u16_at(28) == STREAM);
        let header = Self {
            source_cid,
            destination_cid: u64_at(8),
            source_port,
            destination_port,
            len,
            operation: operation.ok_or(unsupported)?,
            flags: u32_at(header, 32),
            buf_alloc: u32_at(header, 36),
            fwd_cnt: u32_at(header, 40),
        };
        Ok((header, payload))
    }

    /// Writes the header to the start of a packet.
    pub fn write(&self, packet: &mut [u8; HEADER_LEN]) {
        packet[0..8].copy_from_slice(&self.source_cid.to_le_bytes());
        packet[8..16].copy_from_slice(&self.destination_cid.to_le_bytes());
        packet[16..20].copy_from_slice(&self.source_port.to_le_bytes());
        packet[20..24].copy_from_slice(&self.destination_port.to_le_bytes());
        packet[24..28].copy_from_slice(&self.len.to_le_bytes());
        packet[28..30].copy_from_slice(&STREAM.to_le_bytes());
        packet[30..32].copy_from_slice(&(self.operation as u16).to_le_bytes());
        packet[32..36].copy_from_slice(&self.flags.to_le_bytes());
        packet[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        packet[40..44].copy_from_slice(&self.fwd_cnt.to_le_bytes());
    }
}

fn u32_at(header: &[u8; HEADER_LEN], at: usize) -> u32 {
    u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: Header = Header {
        source_cid: HOST_CID,
        destination_cid: 0x1_0000_0003,
        source_port: 0xdead_beef,
        destination_port: 5005,
        len: 3,
        operation: Operation::Rw,
        flags: 3,
        buf_alloc: 0x1_0000,
        fwd_cnt: u32::MAX,
    };

    fn bytes(payload: &[u8]) -> Vec<u8> {
        let mut packet = [0; HEADER_LEN];
        HEADER.write(&mut packet);
        [&packet, payload].concat()
    }

    #[test]
    fn a_packet_survives_the_round_trip() {
        assert_eq!(Header::parse(&bytes(b"abc")), Ok((HEADER, &b"abc"[..])));
    }

    #[test]
    fn bad_packets_are_refused() {
        assert_eq!(Header::parse(&[0; HEADER_LEN - 1]), Err(PacketError::Length));
        assert_eq!(Header::parse(&bytes(b"ab")), Err(PacketError::Length));
        assert_eq!(Header::parse(&bytes(b"abcd")), Err(PacketError::Length));
        let unsupported = PacketError::Unsupported {
            source_cid: HOST_CID,
            source_port: 0xdead_beef,
            destination_port: 5005,
        };
        for (at, value) in [(28, 2), (30, 0), (30, 8), (31, 1)] {
            let mut packet = bytes(b"abc");
            packet[at] = value;
            assert_eq!(Header::parse(&packet), Err(unsupported), "byte {at} = {value}");
        }
    }
}
