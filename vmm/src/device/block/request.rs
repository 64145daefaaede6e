//! What a guest can ask of a disk (virtio 1.2, section 5.2.6). Pure: bytes in, requests out.

/// Bytes of a sector, whatever the disk's own are.
pub const SECTOR: u64 = 512;
/// Bytes of a request's header: type, a reserved word, first sector.
pub const HEADER_LEN: usize = 16;
/// Bytes of the disk's name.
pub const ID_LEN: usize = 20;
/// Bytes of one range to discard or to write zeroes to.
pub const RANGE_LEN: usize = 16;
/// The most ranges in one request.
pub const MOST_RANGES: usize = 16;
/// The most sectors in one range, 1 GiB: no system call takes long.
pub const MOST_RANGE_SECTORS: u32 = 1 << 21;

const TYPE_IN: u32 = 0;
const TYPE_OUT: u32 = 1;
const TYPE_FLUSH: u32 = 4;
const TYPE_GET_ID: u32 = 8;
const TYPE_DISCARD: u32 = 11;
const TYPE_WRITE_ZEROES: u32 = 13;

const RANGE_UNMAP: u32 = 1;

/// The last byte of every answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// `VIRTIO_BLK_S_OK`.
    Ok = 0,
    /// `VIRTIO_BLK_S_IOERR`: the host failed, or the guest asked for what there is not.
    Failed = 1,
    /// `VIRTIO_BLK_S_UNSUPP`.
    Unsupported = 2,
}

/// Bytes of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// From here on.
    pub offset: u64,
    /// So many.
    pub len: u64,
}

impl Extent {
    /// `len` bytes from `sector` on, if a disk of `capacity` bytes has them and they are whole sectors.
    fn new(sector: u64, len: u64, capacity: u64) -> Result<Self, Status> {
        let offset = sector.checked_mul(SECTOR).ok_or(Status::Failed)?;
        let end = offset.checked_add(len).ok_or(Status::Failed)?;
        match len.is_multiple_of(SECTOR) && end <= capacity {
            true => Ok(Self { offset, len }),
            false => Err(Status::Failed),
        }
    }
}

/// A request that makes sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Read these bytes into the answer.
    Read(Extent),
    /// Write these bytes, which follow the header.
    Write(Extent),
    /// Everything that was written has to be on the medium.
    Flush,
    /// What is the disk's name?
    GetId,
    /// Ranges follow the header, this many, whose contents nobody needs.
    Discard(usize),
    /// Ranges follow the header, this many, that have to read as zeroes.
    WriteZeroes(usize),
}

impl Request {
    /// Parses a request with `payload` bytes behind its header and `room` bytes before the status in its answer, to a disk
    /// of `capacity` bytes.
    ///
    /// # Errors
    /// How it has to be answered.
    pub fn parse(
        header: [u8; HEADER_LEN],
        payload: u64,
        room: u64,
        capacity: u64,
    ) -> Result<Self, Status> {
        let [kind, _reserved, low, high] = words(header);
        let sector = u64::from(high) << 32 | u64::from(low);
        let ranges = || match usize::try_from(payload).map(|len| (len / RANGE_LEN, len % RANGE_LEN))
        {
            Ok((count @ 1..=MOST_RANGES, 0)) => Ok(count),
            _ => Err(Status::Failed),
        };
        match kind {
            TYPE_IN => Extent::new(sector, room, capacity).map(Self::Read),
            TYPE_OUT => Extent::new(sector, payload, capacity).map(Self::Write),
            TYPE_FLUSH => Ok(Self::Flush),
            TYPE_GET_ID if room < ID_LEN as u64 => Err(Status::Failed),
            TYPE_GET_ID => Ok(Self::GetId),
            TYPE_DISCARD => ranges().map(Self::Discard),
            TYPE_WRITE_ZEROES => ranges().map(Self::WriteZeroes),
            _ => Err(Status::Unsupported),
        }
    }

    /// True if the disk is another one afterwards.
    pub fn changes_the_disk(&self) -> bool {
        matches!(self, Self::Write(_) | Self::Discard(_) | Self::WriteZeroes(_))
    }
}

/// A range of [`Request::Discard`] or [`Request::WriteZeroes`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// Which bytes.
    pub extent: Extent,
    /// They need not be kept as blocks of the file.
    pub may_unmap: bool,
}

impl Range {
    /// Parses a range of a disk of `capacity` bytes; `is_discard` says of which request.
    ///
    /// # Errors
    /// How the request has to be answered.
    pub fn parse(bytes: [u8; RANGE_LEN], is_discard: bool, capacity: u64) -> Result<Self, Status> {
        let [low, high, sectors, flags] = words(bytes);
        // A discard unmaps anyhow, so the flag has no meaning there (section 5.2.6.2).
        if flags & !RANGE_UNMAP != 0 || (is_discard && flags != 0) {
            return Err(Status::Unsupported);
        }
        if sectors > MOST_RANGE_SECTORS {
            return Err(Status::Failed);
        }
        let sector = u64::from(high) << 32 | u64::from(low);
        let extent = Extent::new(sector, u64::from(sectors) * SECTOR, capacity)?;
        Ok(Self { extent, may_unmap: is_discard || flags & RANGE_UNMAP != 0 })
    }
}

fn words(bytes: [u8; 16]) -> [u32; 4] {
    let (words, _) = bytes.as_chunks::<4>();
    std::array::from_fn(|index| u32::from_le_bytes(words[index]))
}

#[cfg(test)]
mod tests {
    use super::*;

    const CAPACITY: u64 = 1 << 20;

    fn bytes(words: [u32; 4]) -> [u8; 16] {
        words.map(u32::to_le_bytes).as_flattened().try_into().unwrap()
    }

    #[test]
    fn requests_are_what_the_disk_has_and_can_do() {
        let check = |kind: u32, sector: u64, (payload, room), expected| {
            let header = bytes([kind, u32::MAX, sector as u32, (sector >> 32) as u32]);
            let parsed = Request::parse(header, payload, room, CAPACITY);
            assert_eq!(parsed, expected, "type {kind}, sector {sector}, {payload}, {room}");
        };
        let extent = |offset, len| Extent { offset, len };
        use Status::{Failed, Unsupported};
        check(0, 2, (0, 1024), Ok(Request::Read(extent(1024, 1024))));
        check(0, 2047, (7, 512), Ok(Request::Read(extent(CAPACITY - 512, 512))));
        check(0, 2048, (0, 0), Ok(Request::Read(extent(CAPACITY, 0))));
        check(0, 2047, (0, 1024), Err(Failed));
        check(0, 2048, (0, 512), Err(Failed));
        check(0, 0, (0, 511), Err(Failed));
        check(0, u64::MAX, (0, 512), Err(Failed));
        check(0, u64::MAX / SECTOR, (0, 512), Err(Failed));
        check(0, 1 << 55, (0, 512), Err(Failed));
        check(0, 0, (0, u64::MAX), Err(Failed));
        check(1, 1, (512, 0), Ok(Request::Write(extent(512, 512))));
        check(1, 1, (513, 0), Err(Failed));
        check(1, 2048, (512, 0), Err(Failed));
        check(4, u64::MAX, (9, 9), Ok(Request::Flush));
        check(8, 0, (0, 20), Ok(Request::GetId));
        check(8, 0, (0, 19), Err(Failed));
        check(11, 0, (16, 0), Ok(Request::Discard(1)));
        check(13, 0, (256, 0), Ok(Request::WriteZeroes(16)));
        for payload in [0, 15, 17, 257, 272, u64::MAX] {
            check(11, 0, (payload, 0), Err(Failed));
            check(13, 0, (payload, 0), Err(Failed));
        }
        for kind in [2, 3, 5, 6, 7, 9, 10, 12, 14, u32::MAX] {
            check(kind, 0, (512, 512), Err(Unsupported));
        }
    }

    #[test]
    fn ranges_are_on_the_disk_and_flags_known() {
        let check = |is_discard, range: [u32; 4], expected: Result<(u64, u64, bool), Status>| {
            let parsed = Range::parse(bytes(range), is_discard, CAPACITY);
            let expected = expected.map(|(offset, len, may_unmap)| Range {
                extent: Extent { offset, len },
                may_unmap,
            });
            assert_eq!(parsed, expected, "{range:x?}");
        };
        use Status::{Failed, Unsupported};
        check(true, [4, 0, 8, 0], Ok((2048, 4096, true)));
        check(false, [4, 0, 8, 0], Ok((2048, 4096, false)));
        check(false, [0, 0, 2048, 1], Ok((0, CAPACITY, true)));
        check(true, [0, 0, 0, 0], Ok((0, 0, true)));
        check(true, [4, 0, 8, 1], Err(Unsupported));
        check(false, [4, 0, 8, 2], Err(Unsupported));
        check(false, [1, 0, 2048, 0], Err(Failed));
        check(false, [0, 1, 1, 0], Err(Failed));
        check(false, [u32::MAX, u32::MAX, 1, 0], Err(Failed));
        let large = |sectors| Range::parse(bytes([0, 0, sectors, 0]), true, 1 << 50);
        assert!(large(MOST_RANGE_SECTORS).is_ok());
        assert_eq!(large(MOST_RANGE_SECTORS + 1), Err(Failed));
    }
}
