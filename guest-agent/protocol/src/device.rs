//! What the host has the agent do with its devices other than vsock.

use alloc::string::String;
use alloc::vec::Vec;

use serde::{Deserialize, Serialize};

/// What to ask of a disk. Nothing is checked on the way, so that the disk has to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DiskRequest {
    /// What is it?
    Describe,
    /// Read from `sector` on.
    Read {
        /// The first one.
        sector: u64,
        /// How many bytes, up to [`MAX_DISK_BYTES`].
        bytes: u32,
    },
    /// Write from `sector` on.
    Write {
        /// The first one.
        sector: u64,
        /// What, up to [`MAX_DISK_BYTES`].
        bytes: Vec<u8>,
    },
    /// Have on the medium what was written.
    Flush,
    /// Forget these sectors.
    Discard {
        /// The first one.
        sector: u64,
        /// How many.
        sectors: u32,
    },
    /// Make these sectors zero.
    WriteZeroes {
        /// The first one.
        sector: u64,
        /// How many.
        sectors: u32,
        /// They may be forgotten, too.
        may_unmap: bool,
    },
    /// Read or write again and again, each time somewhere else, and keep nothing of it: for figures.
    Sweep(Sweep),
}

/// The most bytes that one request moves.
pub const MAX_DISK_BYTES: u32 = 64 << 10;

/// Requests one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sweep {
    /// To be written instead of read.
    pub writes: bool,
    /// Bytes of each request, up to [`MAX_DISK_BYTES`].
    pub bytes: u32,
    /// How many.
    pub requests: u32,
    /// How many requests' worth of disk lie from the start of one to the start of the next; the disk's end leads to its start.
    pub stride: u32,
}

/// What came of a [`DiskRequest`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DiskAnswer {
    /// To [`DiskRequest::Describe`].
    Description(DiskDescription),
    /// To [`DiskRequest::Read`].
    Bytes(Vec<u8>),
    /// To any other.
    Done,
    /// The disk's status (virtio 1.2, section 5.2.6): 1 is a failure, 2 is not supported.
    Status(u8),
}

/// A disk as its driver sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskDescription {
    /// Its length in sectors of 512 bytes.
    pub sectors: u64,
    /// The feature bits on offer.
    pub features: u64,
    /// Its name.
    pub name: String,
}
