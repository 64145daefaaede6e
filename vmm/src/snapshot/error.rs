//! Why a snapshot could not be written or cannot be used: for each reason what to do about it.

use std::io;

use super::{PAGE, SnapshotId, VERSION};
use crate::kvm::identity::HostMismatch;
use crate::memory::MemoryError;

/// Why a snapshot could not be written or cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The host failed.
    #[error("{action}")]
    Io {
        /// What was asked of it.
        action: &'static str,
        /// What it said.
        source: io::Error,
    },
    /// RAM could not be read.
    #[error("read the guest's RAM")]
    Ram(#[source] vm_memory::GuestMemoryError),
    /// Something in the state cannot be written.
    #[error("write the machine's state in the snapshot's format")]
    Encode(#[source] postcard::Error),
    /// RAM for a restored machine could not be had.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The state would be larger than anything that is read back.
    #[error("the state file would have {0} bytes, more than any is allowed to have")]
    TooLarge(u64),
    /// Another kind of file.
    #[error(
        "this is no state file of a snapshot: name the file that holds the state, not the memory"
    )]
    NotState,
    /// Another format.
    #[error(
        "the snapshot's format has version {0}, and this program reads version {VERSION}: restore it with the program that \
         wrote it, or make it anew"
    )]
    Version(u32),
    /// A part of a state file.
    #[error(
        "the state file has {found} bytes of {expected}: its writing or copying was cut short, so make or copy it anew"
    )]
    CutShort {
        /// Bytes that there should be.
        expected: u64,
        /// Bytes that there are.
        found: u64,
    },
    /// More than a state file.
    #[error(
        "the state file has {found} bytes, but says {expected}: it was damaged, so make or copy it anew"
    )]
    TooLong {
        /// Bytes that there should be.
        expected: u64,
        /// Bytes that there are.
        found: u64,
    },
    /// Other bytes than were written.
    #[error("the state file's checksum is wrong: it was damaged, so make or copy it anew")]
    StateChecksum,
    /// Bytes that are as they were written and make no sense.
    #[error(
        "the state file's contents make no sense to this program ({0}): make the snapshot anew"
    )]
    Malformed(&'static str),
    /// Another host.
    #[error("the snapshot was made on {0}: restore it on a host like that, or make it anew here")]
    Host(#[source] HostMismatch),
    /// A memory file of another length.
    #[error(
        "the memory file has {found} bytes, and the state is of a machine with {expected} bytes of RAM: it is another snapshot's, \
         or was cut short"
    )]
    MemoryLength {
        /// Bytes that there should be.
        expected: u64,
        /// Bytes that there are.
        found: u64,
    },
    /// Other bytes than were written.
    #[error(
        "the memory file's checksum is wrong: it is another snapshot's than the state, or was damaged; take both from one \
         snapshot"
    )]
    MemoryChecksum,
    /// Nothing to begin with.
    #[error(
        "snapshot {id} holds only what changed since snapshot {parent}: name that one before it"
    )]
    NoBase {
        /// The layer.
        id: SnapshotId,
        /// What it needs.
        parent: SnapshotId,
    },
    /// On the wrong base.
    #[error(
        "snapshot {id} holds what changed since snapshot {parent}, not since {found}, which was named before it: name its own \
         parent there"
    )]
    WrongBase {
        /// The layer.
        id: SnapshotId,
        /// What it needs.
        parent: SnapshotId,
        /// What it got.
        found: SnapshotId,
    },
    /// A snapshot that needs no other, behind others.
    #[error("snapshot {0} holds all of RAM: leave out what was named before it")]
    FullBehind(SnapshotId),
    /// No snapshot at all.
    #[error("a machine's RAM needs a snapshot to come from")]
    NoLayers,
    /// RAM of another size than the layer's base.
    #[error(
        "snapshot {id} is of {found} bytes of RAM and its parent of {expected}: the files are damaged"
    )]
    RamBytes {
        /// The layer.
        id: SnapshotId,
        /// Its parent's size.
        expected: u64,
        /// Its own.
        found: u64,
    },
    /// A guest whose RAM is no multiple of pages.
    #[error("{0} bytes of RAM are no multiple of {PAGE}")]
    Uneven(u64),
}

impl SnapshotError {
    /// For `map_err`: says what was asked of the host.
    pub(super) fn io<E: Into<io::Error>>(action: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::Io { action, source: source.into() }
    }
}
