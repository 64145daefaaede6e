//! A snapshot's state file, of anybody's making.

#![no_main]

use libfuzzer_sys::fuzz_target;
use serde::{Deserialize, Serialize};
use vmm::fuzzing::snapshot::{Extent, PAGE, Snapshot, SnapshotError, VERSION, encode, parse};

/// A state with everything that is of no fixed length.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct State {
    registers: Vec<u64>,
    name: String,
    device: Option<Box<State>>,
}

fuzz_target!(|bytes: &[u8]| {
    // Whether length and checksum are made right, which no fuzzer finds.
    let Some((first, bytes)) = bytes.split_first() else { return };
    let (mut bytes, repair) = (bytes.to_vec(), first & 1 != 0);
    let parsed: Result<Snapshot<State>, _> = parse(&mut bytes, repair);
    match parsed {
        Ok(snapshot) => check(&snapshot, &bytes),
        Err(SnapshotError::Version(version)) => assert_ne!(version, VERSION),
        Err(SnapshotError::CutShort { expected, found }) => assert!(found < expected),
        Err(SnapshotError::TooLong { expected, found }) => assert!(found > expected),
        Err(SnapshotError::StateChecksum) => assert!(!repair),
        Err(
            SnapshotError::NotState
            | SnapshotError::TooLarge(_)
            | SnapshotError::Malformed(_)
            | SnapshotError::Uneven(_),
        ) => {}
        Err(error) => panic!("an error that no contents can cause: {error}"),
    }
});

/// What was taken names pages of RAM alone, each once, and is what would be written again.
fn check(snapshot: &Snapshot<State>, bytes: &[u8]) {
    let Snapshot { header, state } = snapshot;
    let pages = header.ram_bytes / PAGE;
    let mut end = 0;
    for Extent { first, pages: count, .. } in header.pages.extents() {
        assert!(first >= end && count > 0, "pages {first}+{count} behind {end}");
        end = first + count;
        assert!(end <= pages, "pages up to {end} of {pages}");
    }
    assert!(header.pages.stored() <= pages);
    let mut again = encode(header, state).expect("what was read can be written");
    let once_more: Snapshot<State> = parse(&mut again, false).expect("what was written is read");
    assert_eq!((&once_more.header, &once_more.state), (header, state));
    // Numbers can be written in more bytes than they need.
    assert!(again.len() <= bytes.len());
}
