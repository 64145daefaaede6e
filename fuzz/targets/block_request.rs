//! What a guest asks of a disk.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vmm::fuzzing::block::{
    HEADER_LEN, ID_LEN, MOST_RANGE_SECTORS, MOST_RANGES, RANGE_LEN, Range, Request, SECTOR, Status,
};

/// Lengths of the buffers and size of the disk, then the header, then a range.
const NUMBERS: usize = 3 * 8;

fuzz_target!(|bytes: &[u8]| {
    let Some((numbers, rest)) = bytes.split_first_chunk::<NUMBERS>() else { return };
    let [payload, room, capacity] =
        std::array::from_fn(|at| u64::from_le_bytes(*numbers[8 * at..].first_chunk().expect("8 bytes")));
    if let Some((header, ranges)) = rest.split_first_chunk::<HEADER_LEN>() {
        request(*header, payload, room, capacity);
        for bytes in ranges.as_chunks::<RANGE_LEN>().0.iter().take(MOST_RANGES) {
            range(*bytes, false, capacity);
            range(*bytes, true, capacity);
        }
    }
});

/// Whatever is done to the disk is done within it, by the length of the buffers that there are.
fn request(header: [u8; HEADER_LEN], payload: u64, room: u64, capacity: u64) {
    let word = |at: usize| u32::from_le_bytes(*header[at..].first_chunk().expect("4 bytes"));
    let (kind, sector) = (word(0), u64::from(word(12)) << 32 | u64::from(word(8)));
    // Exact in 128 bits, where nothing wraps.
    let start = u128::from(sector) * u128::from(SECTOR);
    let fits = |len: u64| {
        len.is_multiple_of(SECTOR) && start + u128::from(len) <= u128::from(capacity)
    };
    let parsed = Request::parse(header, payload, room, capacity);
    match parsed {
        Ok(Request::Read(extent)) => {
            assert!(kind == 0 && fits(room));
            assert_eq!((u128::from(extent.offset), extent.len), (start, room));
        }
        Ok(Request::Write(extent)) => {
            assert!(kind == 1 && fits(payload));
            assert_eq!((u128::from(extent.offset), extent.len), (start, payload));
        }
        Ok(Request::Flush) => assert_eq!(kind, 4),
        Ok(Request::GetId) => assert!(kind == 8 && room >= ID_LEN as u64),
        Ok(Request::Discard(count) | Request::WriteZeroes(count)) => {
            assert!(matches!(kind, 11 | 13) && (1..=MOST_RANGES).contains(&count));
            assert_eq!((count * RANGE_LEN) as u64, payload);
        }
        Err(Status::Failed) => match kind {
            0 => assert!(!fits(room)),
            1 => assert!(!fits(payload)),
            8 => assert!(room < ID_LEN as u64),
            _ => assert!(matches!(kind, 11 | 13)),
        },
        Err(status) => {
            assert_eq!(status, Status::Unsupported);
            assert!(!matches!(kind, 0 | 1 | 4 | 8 | 11 | 13));
        }
    }
    let changes = parsed.is_ok_and(|request| request.changes_the_disk());
    assert!(!changes || matches!(kind, 1 | 11 | 13), "type {kind} changes the disk");
}

/// A range is on the disk and no longer than one system call should take.
fn range(bytes: [u8; RANGE_LEN], is_discard: bool, capacity: u64) {
    let word = |at: usize| u32::from_le_bytes(*bytes[at..].first_chunk().expect("4 bytes"));
    if let Ok(Range { extent, may_unmap }) = Range::parse(bytes, is_discard, capacity) {
        let end = u128::from(extent.offset) + u128::from(extent.len);
        assert!(end <= u128::from(capacity));
        assert!(extent.len.is_multiple_of(SECTOR) && extent.offset.is_multiple_of(SECTOR));
        assert_eq!(extent.len, u64::from(word(8)) * SECTOR);
        assert!(extent.len <= u64::from(MOST_RANGE_SECTORS) * SECTOR);
        assert!(may_unmap || !is_discard);
        assert!(word(12) <= 1);
    }
}
