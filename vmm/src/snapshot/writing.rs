//! Writes a snapshot to open files. Whoever has opened them names them once they are whole ([`super::Drafts`]).
//!
//! A thread that does this needs `pwrite64` and `ftruncate`, and `getrandom` for the name of the snapshot.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;
use twox_hash::xxhash3_128::Hasher;
use vm_memory::{
    Bytes, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress,
};

use super::pages::PageMapBuilder;
use super::state_file::encode;
use super::{Header, Kind, PAGE, SnapshotError, SnapshotId, Targets};
use crate::kvm::identity::HostIdentity;
use crate::memory::{GuestRam, PageSet, WriteLog};

/// Which pages are written.
#[derive(Clone, Copy, Debug)]
pub enum Pages<'a> {
    /// All that are not empty.
    All,
    /// Those that have changed since a snapshot.
    Since {
        /// That one.
        parent: SnapshotId,
        /// Those pages.
        dirty: &'a PageSet,
    },
}

/// A snapshot that was written.
#[derive(Clone, Debug)]
pub struct Summary {
    /// What it is.
    pub header: Header,
    /// Length of the state file.
    pub state_bytes: u64,
    /// How much of RAM is in the memory file.
    pub memory_bytes: u64,
}

/// Writes a snapshot of `ram`, which nobody writes to meanwhile, and of the state of the machine that it is of.
///
/// # Errors
/// [`SnapshotError::Io`] if the host does not take it; the files are then worth nothing. [`SnapshotError::Ram`],
/// [`SnapshotError::Encode`] or [`SnapshotError::TooLarge`] for what cannot be.
pub fn write<S: Serialize>(
    targets: &Targets,
    host: HostIdentity,
    state: &S,
    ram: &GuestRam,
    pages: Pages<'_>,
) -> Result<Summary, SnapshotError> {
    let ram_bytes = ram.iter().map(GuestMemoryRegion::len).sum();
    let mut memory = MemoryWriter::new(&targets.memory, ram_bytes)?;
    let mut first = 0;
    for region in ram.iter() {
        let here = region.len() / PAGE;
        match pages {
            Pages::All => memory.write(region, first, (first, here), false)?,
            Pages::Since { dirty, .. } => {
                // Runs go across the gap between ranges.
                for (start, count) in dirty.runs() {
                    let (from, to) = (start.max(first), (start + count).min(first + here));
                    if from < to {
                        memory.write(region, first, (from, to - from), true)?;
                    }
                }
            }
        }
        first += here;
    }
    let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
    let header = Header {
        kind: match pages {
            Pages::All => Kind::Full,
            Pages::Since { parent, .. } => Kind::Layer(parent),
        },
        id: SnapshotId::new().map_err(SnapshotError::io("draw random bytes"))?,
        host,
        ram_bytes,
        pages: memory.pages.finish(),
        memory_checksum: memory.hasher.finish_128(),
        created,
    };
    let bytes = encode(&header, state)?;
    targets.state.write_all_at(&bytes, 0).map_err(SnapshotError::io("write the state file"))?;
    let memory_bytes = header.pages.stored() * PAGE;
    Ok(Summary { header, state_bytes: bytes.len() as u64, memory_bytes })
}

/// Pages that are copied at once: as many bytes as stay in a processor's nearer caches until they are written.
const CHUNK: usize = 64;

struct MemoryWriter<'a> {
    file: &'a File,
    buffer: Vec<u8>,
    pages: PageMapBuilder,
    hasher: Hasher,
}

impl<'a> MemoryWriter<'a> {
    fn new(file: &'a File, bytes: u64) -> Result<Self, SnapshotError> {
        file.set_len(bytes).map_err(SnapshotError::io("give the memory file its length"))?;
        Ok(Self {
            file,
            buffer: vec![0; CHUNK * PAGE as usize],
            pages: PageMapBuilder::default(),
            hasher: Hasher::new(),
        })
    }

    /// Writes the pages `start..start + count` of `region`, whose first has the number `first`. Empty ones are named if
    /// `names_empty`.
    fn write(
        &mut self,
        region: &GuestRegionMmap<WriteLog>,
        first: u64,
        (start, count): (u64, u64),
        names_empty: bool,
    ) -> Result<(), SnapshotError> {
        let mut at = start;
        while at < start + count {
            let pages = (start + count - at).min(CHUNK as u64);
            let chunk = &mut self.buffer[..(pages * PAGE) as usize];
            let address = MemoryRegionAddress((at - first) * PAGE);
            region.read_slice(chunk, address).map_err(SnapshotError::Ram)?;
            self.write_chunk(at, pages as usize, names_empty)?;
            at += pages;
        }
        Ok(())
    }

    /// Writes what is in the buffer: `count` pages from `first` on.
    fn write_chunk(
        &mut self,
        first: u64,
        count: usize,
        names_empty: bool,
    ) -> Result<(), SnapshotError> {
        let page = PAGE as usize;
        let empty: Vec<bool> = self.buffer[..count * page].chunks(page).map(is_empty).collect();
        let mut at = 0;
        for run in empty.chunk_by(bool::eq) {
            let number = first + at as u64;
            if !run[0] || names_empty {
                (0..run.len() as u64).for_each(|page| self.pages.push(number + page, run[0]));
            }
            if !run[0] {
                let bytes = &self.buffer[at * page..(at + run.len()) * page];
                self.hasher.write(bytes);
                self.file
                    .write_all_at(bytes, number * PAGE)
                    .map_err(SnapshotError::io("write the memory file"))?;
            }
            at += run.len();
        }
        Ok(())
    }
}

fn is_empty(page: &[u8]) -> bool {
    // The C library compares as many bytes at once as the processor can.
    static EMPTY: [u8; PAGE as usize] = [0; PAGE as usize];
    page == EMPTY
}
