//! Snapshots as files: what is in them, how they are written whole or not at all, and how RAM comes back from them.
//!
//! A snapshot is two files. The memory file is RAM as it is, of the same length, with holes where nothing is kept. The state file
//! says all else: whose RAM it is, which of its pages count, by which checksum they are known, on which host the guest ran, and the
//! machine's state, of whatever type the caller has. It is written last, so a snapshot without a whole state file is none.
//!
//! A *layer* keeps the pages that changed since another snapshot, its parent. Only pages that the state file names are ever read
//! from a memory file, so a copy of it that lost its holes is as good.
//!
//! Whatever comes from a file may be of anybody's making: lengths are checked before they are believed, nothing is allocated that
//! the file itself does not pay for in bytes, and no file is mapped that others can change.

mod error;
mod files;
mod pages;
mod reading;
mod state_file;
#[cfg(test)]
mod tests;
mod writing;

use std::fmt;
use std::fs::File;

use serde::{Deserialize, Serialize};

pub use error::SnapshotError;
pub use files::{Drafts, FilesError, open};
pub use pages::{Extent, PageMap};
pub use reading::template;
pub use state_file::{VERSION, read_header, read_state};
#[cfg(feature = "fuzzing")]
pub use state_file::{encode, parse};
pub use writing::{Pages, Summary, write};

use crate::kvm::identity::HostIdentity;

/// Pages of RAM are counted and kept in this size.
pub const PAGE: u64 = 4096;

/// By what a snapshot is known to those that build on it: random bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotId([u8; 16]);

impl SnapshotId {
    /// A new one.
    fn new() -> std::io::Result<Self> {
        let mut id = [0; 16];
        rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::empty())?;
        Ok(Self(id))
    }
}

impl fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// How much of RAM a snapshot has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// All of it.
    Full,
    /// What changed since this other one.
    Layer(SnapshotId),
}

/// What a state file says besides the machine's state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// How much of RAM it has.
    pub kind: Kind,
    /// Its own name.
    pub id: SnapshotId,
    /// Where the guest ran.
    pub host: HostIdentity,
    /// Length of RAM, and of the memory file.
    pub ram_bytes: u64,
    /// Which pages count, and what is in them.
    pub pages: PageMap,
    /// XXH3-128 of all pages that are in the memory file, lowest first.
    pub memory_checksum: u128,
    /// When it was made: seconds since 1970.
    pub created: u64,
}

impl Header {
    /// Whether its guest can go on at the host `here`.
    ///
    /// # Errors
    /// [`SnapshotError::Host`].
    pub fn check_host(&self, here: &HostIdentity) -> Result<(), SnapshotError> {
        self.host.check(here).map_err(SnapshotError::Host)
    }
}

/// A state file's contents.
#[derive(Clone, Debug)]
pub struct Snapshot<S> {
    /// What it is.
    pub header: Header,
    /// The machine's state.
    pub state: S,
}

/// Two empty files to write a snapshot to.
#[derive(Debug)]
pub struct Targets {
    /// The state file.
    pub state: File,
    /// The memory file.
    pub memory: File,
}
