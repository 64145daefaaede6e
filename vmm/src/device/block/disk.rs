//! The file behind a disk: what the user may name, and what becomes of a request. Its calls block; it knows no queue.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind, Seek, SeekFrom};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{FallocateFlags, fallocate, fdatasync};
use rustix::io::{Errno, retry_on_intr};
use vm_memory::VolatileSlice;

use super::request::{Extent, SECTOR};
use crate::device::virtio::chain::Chain;
use crate::memory::{GuestRam, Pieces};

/// The most that one system call moves, in bytes: between two, a request can be cancelled.
const MOST_BYTES: u64 = 1 << 20;

/// What the user says of a disk: `PATH`, or `PATH,ro`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskConfig {
    /// A regular file or a block device: the disk's bytes and nothing else.
    pub path: PathBuf,
    /// The guest may not write.
    pub read_only: bool,
}

impl FromStr for DiskConfig {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (path, read_only) = match text.strip_suffix(",ro") {
            Some(path) => (path, true),
            None => (text, false),
        };
        match path.is_empty() {
            true => Err("the path is missing"),
            false => Ok(Self { path: path.into(), read_only }),
        }
    }
}

/// Why a file cannot be a disk.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// It cannot be opened.
    #[error("open disk {path:?}{hint}")]
    Open {
        /// Its path.
        path: PathBuf,
        /// What may help.
        hint: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// It is a directory, a terminal, a socket.
    #[error("disk {0:?} is neither a regular file nor a block device")]
    Kind(PathBuf),
    /// Its last sector would not be whole, or it has none.
    #[error(
        "disk {path:?} has {bytes} bytes, and a disk has a multiple of 512 and more than none: truncate -s %512 FILE fills \
         the last sector up"
    )]
    Size {
        /// Its path.
        path: PathBuf,
        /// Its length.
        bytes: u64,
    },
    /// Somebody else has it.
    #[error(
        "disk {0:?} is in use: machines, and disks of one machine, share a file only if all of them have it with \",ro\""
    )]
    InUse(PathBuf),
}

/// A disk's file, open and locked. Knows its length, which does not change.
#[derive(Debug)]
pub struct Disk {
    file: File,
    path: PathBuf,
    capacity: u64,
    is_read_only: bool,
}

impl Disk {
    /// Opens a disk's file and takes its lock (flock(2)), which lasts as long as somebody has the descriptor.
    ///
    /// # Errors
    /// [`DiskError`].
    pub fn open(config: &DiskConfig) -> Result<Self, DiskError> {
        let DiskConfig { path, read_only } = config;
        let refuse = |hint, source| DiskError::Open { path: path.clone(), hint, source };
        // A FIFO that nobody writes to would keep the open waiting.
        let opened = OpenOptions::new()
            .read(true)
            .write(!read_only)
            .custom_flags(libc::O_NONBLOCK)
            .open(path);
        let mut file = opened.map_err(|error| match error.kind() {
            ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem if !read_only => {
                refuse(" for writing (\",ro\" behind the path lets the guest only read it)", error)
            }
            ErrorKind::IsADirectory => DiskError::Kind(path.clone()),
            _ => refuse("", error),
        })?;
        let kind = file.metadata().map_err(|error| refuse("", error))?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(DiskError::Kind(path.clone()));
        }
        let locked = if *read_only { file.try_lock_shared() } else { file.try_lock() };
        match locked {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(DiskError::InUse(path.clone())),
            Err(TryLockError::Error(error)) => return Err(refuse(" and lock it", error)),
        }
        // The metadata of a block device have no length.
        let bytes = file.seek(SeekFrom::End(0)).map_err(|error| refuse("", error))?;
        if bytes == 0 || !bytes.is_multiple_of(SECTOR) {
            return Err(DiskError::Size { path: path.clone(), bytes });
        }
        Ok(Self { file, path: path.clone(), capacity: bytes, is_read_only: *read_only })
    }

    /// Its path, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its length in bytes, a multiple of [`SECTOR`].
    pub fn capacity(&self) -> u64 {
        self.capacity
    }

    /// Whether nothing may be written.
    pub fn is_read_only(&self) -> bool {
        self.is_read_only
    }

    /// Reads `extent` into the writable part of `chain`, which has room for it. Gives the number of bytes that came, too.
    pub(super) fn read(
        &self,
        ram: &GuestRam,
        chain: &Chain,
        extent: Extent,
        cancelled: &AtomicBool,
    ) -> (u64, io::Result<()>) {
        let start = chain.readable_len();
        in_steps(extent, cancelled, |offset, done, len| {
            let slices = chain.slices(ram, (start + done) as usize, len as usize);
            Pieces::new(slices).read_at(&self.file, offset)
        })
    }

    /// Writes the bytes of `chain` from `start` on to `extent`.
    pub(super) fn write(
        &self,
        ram: &GuestRam,
        (chain, start): (&Chain, u64),
        extent: Extent,
        is_durable: bool,
        cancelled: &AtomicBool,
    ) -> io::Result<()> {
        let (_, result) = in_steps(extent, cancelled, |offset, done, len| {
            let slices = chain.slices(ram, (start + done) as usize, len as usize);
            Pieces::new(slices).write_at(&self.file, offset, is_durable)
        });
        result
    }

    /// Puts everything that was written on the medium.
    pub(super) fn flush(&self) -> io::Result<()> {
        Ok(retry_on_intr(|| fdatasync(&self.file))?)
    }

    /// Gives the blocks of `extent` back to the file system, where it can take them.
    pub(super) fn discard(&self, extent: Extent) -> io::Result<()> {
        match self.allocate(FallocateFlags::PUNCH_HOLE, extent) {
            // What nobody needs may stay.
            Err(Errno::OPNOTSUPP) => Ok(()),
            result => Ok(result?),
        }
    }

    /// Makes `extent` read as zeroes. With `may_unmap` its blocks may go.
    pub(super) fn write_zeroes(
        &self,
        extent: Extent,
        may_unmap: bool,
        cancelled: &AtomicBool,
    ) -> io::Result<()> {
        let how = if may_unmap { FallocateFlags::PUNCH_HOLE } else { FallocateFlags::ZERO_RANGE };
        match self.allocate(how, extent) {
            Err(Errno::OPNOTSUPP) => {}
            result => return Ok(result?),
        }
        let mut zeroes = [0; 1 << 14];
        let zeroes = VolatileSlice::from(&mut zeroes[..]);
        let (_, result) = in_steps(extent, cancelled, |offset, _, len| {
            // Whole pieces, and a shorter one at the end.
            let pieces = (0..len).step_by(zeroes.len()).map(|start| {
                let piece = (len - start).min(zeroes.len() as u64) as usize;
                zeroes.subslice(0, piece).expect("no longer than the whole")
            });
            Pieces::new(pieces).write_at(&self.file, offset, false)
        });
        result
    }

    fn allocate(&self, how: FallocateFlags, Extent { offset, len }: Extent) -> Result<(), Errno> {
        if len == 0 {
            return Ok(());
        }
        let flags = how | FallocateFlags::KEEP_SIZE;
        retry_on_intr(|| fallocate(&self.file, flags, offset, len))
    }
}

impl AsFd for Disk {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Has `step` move the bytes of `extent`: it gets the place in the file, how many bytes are done, and how many to move at
/// most. Gives how many were moved.
fn in_steps(
    extent: Extent,
    cancelled: &AtomicBool,
    mut step: impl FnMut(u64, u64, u64) -> io::Result<usize>,
) -> (u64, io::Result<()>) {
    let mut done = 0;
    while done < extent.len {
        if cancelled.load(Ordering::Relaxed) {
            return (done, Err(ErrorKind::Interrupted.into()));
        }
        match step(extent.offset + done, done, (extent.len - done).min(MOST_BYTES)) {
            // The file has become shorter than it was.
            Ok(0) => return (done, Err(ErrorKind::UnexpectedEof.into())),
            Ok(moved) => done += moved as u64,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return (done, Err(error)),
        }
    }
    (done, Ok(()))
}

#[cfg(test)]
mod tests;
