//! The state file: magic, version, length, checksum, then the header and the machine's state in postcard's format.
//!
//! | at | bytes | |
//! |---|---|---|
//! | 0 | 8 | [`MAGIC`] |
//! | 8 | 4 | version; what follows is of version [`VERSION`] |
//! | 12 | 8 | length of the body |
//! | 20 | 16 | XXH3-128 of the body |
//! | 36 | | the body: [`Header`], then the state |
//!
//! All numbers are little-endian.

use std::fs::File;
use std::os::unix::fs::FileExt;

use serde::Serialize;
use serde::de::DeserializeOwned;
use twox_hash::XxHash3_128;

use super::{Header, PAGE, Snapshot, SnapshotError};
use crate::kvm::identity::HostIdentity;

/// Of what this program writes and reads. Whoever changes a type that is in a body counts on.
pub const VERSION: u32 = 1;

/// What a state file begins with.
const MAGIC: [u8; 8] = *b"CLNSLATE";

const PREFIX: usize = 8 + 4 + 8 + 16;

/// The longest body: room for the map of the largest machine, with three bytes for every other page at worst.
const MOST: u64 = 256 << 20;

/// The bytes of a state file.
///
/// # Errors
/// [`SnapshotError::Encode`] or [`SnapshotError::TooLarge`].
pub fn encode<S: Serialize>(header: &Header, state: &S) -> Result<Vec<u8>, SnapshotError> {
    let bytes = postcard::to_extend(header, vec![0; PREFIX]);
    let mut bytes =
        bytes.and_then(|bytes| postcard::to_extend(state, bytes)).map_err(SnapshotError::Encode)?;
    let len = (bytes.len() - PREFIX) as u64;
    if len > MOST {
        return Err(SnapshotError::TooLarge(len));
    }
    let checksum = XxHash3_128::oneshot(&bytes[PREFIX..]);
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
    bytes[12..20].copy_from_slice(&len.to_le_bytes());
    bytes[20..PREFIX].copy_from_slice(&checksum.to_le_bytes());
    Ok(bytes)
}

/// Reads a state file for a machine at the host `here`.
///
/// # Errors
/// [`SnapshotError`]: the first thing that is wrong, version first.
pub fn read_state<S: DeserializeOwned>(
    file: &File,
    here: &HostIdentity,
) -> Result<Snapshot<S>, SnapshotError> {
    let body = read_body(file)?;
    let (header, rest) = parse_header(&body)?;
    header.check_host(here)?;
    let state = parse_state(rest)?;
    Ok(Snapshot { header, state })
}

/// Reads what a state file says besides the machine's state.
///
/// # Errors
/// [`SnapshotError`], but none for another host.
pub fn read_header(file: &File) -> Result<Header, SnapshotError> {
    Ok(parse_header(&read_body(file)?)?.0)
}

/// The body of a file, whole and undamaged.
fn read_body(file: &File) -> Result<Vec<u8>, SnapshotError> {
    const ACTION: &str = "read the state file";
    let len = file.metadata().map_err(SnapshotError::io(ACTION))?.len();
    let mut prefix = [0; PREFIX];
    let there = (len as usize).min(PREFIX);
    file.read_exact_at(&mut prefix[..there], 0).map_err(SnapshotError::io(ACTION))?;
    let expected = parse_prefix(&prefix[..there], len)?;
    let mut body = vec![0; expected as usize];
    file.read_exact_at(&mut body, PREFIX as u64).map_err(SnapshotError::io(ACTION))?;
    check_body(&prefix, &body)?;
    Ok(body)
}

/// The length of the body of a file of `len` bytes that begins like this.
fn parse_prefix(prefix: &[u8], len: u64) -> Result<u64, SnapshotError> {
    let is_ours = prefix.iter().zip(MAGIC).all(|(found, expected)| *found == expected);
    if !is_ours {
        return Err(SnapshotError::NotState);
    }
    if let Some(version) = prefix.get(8..).and_then(|rest| rest.first_chunk()) {
        let version = u32::from_le_bytes(*version);
        if version != VERSION {
            return Err(SnapshotError::Version(version));
        }
    }
    let body = prefix.get(12..).and_then(|rest| rest.first_chunk());
    let Some(body) = body.filter(|_| prefix.len() == PREFIX) else {
        return Err(SnapshotError::CutShort { expected: PREFIX as u64, found: len });
    };
    let body = u64::from_le_bytes(*body);
    if body > MOST {
        return Err(SnapshotError::TooLarge(body));
    }
    let expected = body + PREFIX as u64;
    match len {
        found if found < expected => Err(SnapshotError::CutShort { expected, found }),
        found if found > expected => Err(SnapshotError::TooLong { expected, found }),
        _ => Ok(body),
    }
}

fn check_body(prefix: &[u8; PREFIX], body: &[u8]) -> Result<(), SnapshotError> {
    match prefix[20..] == XxHash3_128::oneshot(body).to_le_bytes() {
        true => Ok(()),
        false => Err(SnapshotError::StateChecksum),
    }
}

/// The header, checked, and the bytes behind it.
fn parse_header(body: &[u8]) -> Result<(Header, &[u8]), SnapshotError> {
    let (header, rest): (Header, _) =
        postcard::take_from_bytes(body).map_err(|_| SnapshotError::Malformed("header"))?;
    if !header.ram_bytes.is_multiple_of(PAGE) {
        return Err(SnapshotError::Uneven(header.ram_bytes));
    }
    match header.pages.fits(header.ram_bytes / PAGE) {
        true => Ok((header, rest)),
        false => Err(SnapshotError::Malformed("pages beyond RAM")),
    }
}

fn parse_state<S: DeserializeOwned>(rest: &[u8]) -> Result<S, SnapshotError> {
    let (state, rest) =
        postcard::take_from_bytes(rest).map_err(|_| SnapshotError::Malformed("machine's state"))?;
    match rest {
        [] => Ok(state),
        _ => Err(SnapshotError::Malformed("bytes behind the machine's state")),
    }
}

/// Reads `bytes` as a state file; the checksum may be made right before. For the fuzzer.
///
/// # Errors
/// [`SnapshotError`].
#[cfg(feature = "fuzzing")]
pub fn parse<S: DeserializeOwned>(
    bytes: &mut [u8],
    repair: bool,
) -> Result<Snapshot<S>, SnapshotError> {
    if repair && let Some((prefix, body)) = bytes.split_first_chunk_mut::<PREFIX>() {
        prefix[12..20].copy_from_slice(&(body.len() as u64).to_le_bytes());
        prefix[20..].copy_from_slice(&XxHash3_128::oneshot(body).to_le_bytes());
    }
    let len = bytes.len() as u64;
    parse_prefix(&bytes[..bytes.len().min(PREFIX)], len)?;
    let (prefix, body) = bytes.split_first_chunk::<PREFIX>().ok_or(SnapshotError::NotState)?;
    check_body(prefix, body)?;
    let (header, rest) = parse_header(body)?;
    Ok(Snapshot { header, state: parse_state(rest)? })
}
