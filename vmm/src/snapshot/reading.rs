//! RAM out of memory files: copied, checked while it is copied, and sealed.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::FallocateFlags;
use twox_hash::xxhash3_128::Hasher;

use super::{Extent, Header, Kind, PAGE, SnapshotError};
use crate::memory::Template;

/// Bytes that are copied at once: as many as stay in a processor's nearer caches until they are written.
const CHUNK: usize = 256 << 10;

/// Copies memory files into a template: a full snapshot's, then those of layers that build on each other. Nobody who changes a file
/// afterwards can change the template.
///
/// # Errors
/// [`SnapshotError`] with what does not fit together.
pub fn template(layers: &[(&Header, &File)]) -> Result<Template, SnapshotError> {
    let [(base, _), ..] = layers else { return Err(SnapshotError::NoLayers) };
    check_chain(layers)?;
    // Before RAM is allocated that a wrong file would not pay for.
    for (header, memory) in layers {
        check_length(header, memory)?;
    }
    Template::fill(base.ram_bytes, |target| {
        let mut buffer = vec![0; CHUNK];
        layers.iter().try_for_each(|(header, memory)| copy(header, memory, target, &mut buffer))
    })
}

fn check_chain(layers: &[(&Header, &File)]) -> Result<(), SnapshotError> {
    let mut below: Option<&Header> = None;
    for (header, _) in layers {
        let id = header.id;
        match (header.kind, below) {
            (Kind::Full, None) => {}
            (Kind::Full, Some(_)) => return Err(SnapshotError::FullBehind(id)),
            (Kind::Layer(parent), None) => return Err(SnapshotError::NoBase { id, parent }),
            (Kind::Layer(parent), Some(below)) => {
                let found = below.id;
                if parent != found {
                    return Err(SnapshotError::WrongBase { id, parent, found });
                }
                let (expected, found) = (below.ram_bytes, header.ram_bytes);
                if expected != found {
                    return Err(SnapshotError::RamBytes { id, expected, found });
                }
            }
        }
        below = Some(header);
    }
    Ok(())
}

fn check_length(header: &Header, memory: &File) -> Result<(), SnapshotError> {
    let metadata = memory.metadata().map_err(SnapshotError::io("read the memory file"))?;
    let (expected, found) = (header.ram_bytes, metadata.len());
    match found == expected {
        true => Ok(()),
        false => Err(SnapshotError::MemoryLength { expected, found }),
    }
}

/// Copies the pages of one memory file that count.
fn copy(
    header: &Header,
    memory: &File,
    target: &File,
    buffer: &mut [u8],
) -> Result<(), SnapshotError> {
    let mut hasher = Hasher::new();
    for Extent { first, pages, is_empty } in header.pages.extents() {
        let (mut at, end) = (first * PAGE, (first + pages) * PAGE);
        if is_empty {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            rustix::fs::fallocate(target, flags, at, end - at)
                .map_err(SnapshotError::io("empty pages of the memory template"))?;
            continue;
        }
        while at < end {
            let len = (end - at).min(buffer.len() as u64) as usize;
            let bytes = &mut buffer[..len];
            memory.read_exact_at(bytes, at).map_err(|error| match error.kind() {
                // Somebody cuts it short meanwhile.
                io::ErrorKind::UnexpectedEof => {
                    SnapshotError::MemoryLength { expected: header.ram_bytes, found: at }
                }
                _ => SnapshotError::Io { action: "read the memory file", source: error },
            })?;
            hasher.write(bytes);
            target
                .write_all_at(bytes, at)
                .map_err(SnapshotError::io("write the memory template"))?;
            at += len as u64;
        }
    }
    match hasher.finish_128() == header.memory_checksum {
        true => Ok(()),
        false => Err(SnapshotError::MemoryChecksum),
    }
}
