//! A sealed image of guest RAM, which all machines of an image share.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{MemfdFlags, SealFlags, SeekFrom};
use rustix::io::Errno;

use super::{GuestRam, MemoryError, map_file};

/// What makes a file a template: nobody can change it any more, not even its owner.
const SEALS: SealFlags =
    SealFlags::SEAL.union(SealFlags::SHRINK).union(SealFlags::GROW).union(SealFlags::WRITE);

/// An immutable image of guest RAM. Offsets into its file count all ranges of RAM without the gap between them.
#[derive(Debug)]
pub struct Template {
    pub(super) file: File,
    pub(super) bytes: u64,
}

impl Template {
    /// Makes a template of `bytes` of RAM that `load` has written to.
    ///
    /// # Errors
    /// What `load` returns, or [`MemoryError`] made into it.
    pub fn build<T, E: From<MemoryError>>(
        bytes: u64,
        load: impl FnOnce(&GuestRam) -> Result<T, E>,
    ) -> Result<(Self, T), E> {
        Self::fill_with(bytes, |file| {
            let staging = map_file(file, bytes, libc::MAP_SHARED)?;
            // A writable shared mapping would forbid the seal against writing: it is gone when this returns.
            load(&staging)
        })
    }

    /// Makes a template of `bytes` of RAM whose file `fill` has written to.
    ///
    /// # Errors
    /// What `fill` returns, or [`MemoryError`] made into it.
    pub fn fill<E: From<MemoryError>>(
        bytes: u64,
        fill: impl FnOnce(&File) -> Result<(), E>,
    ) -> Result<Self, E> {
        Ok(Self::fill_with(bytes, fill)?.0)
    }

    fn fill_with<T, E: From<MemoryError>>(
        bytes: u64,
        fill: impl FnOnce(&File) -> Result<T, E>,
    ) -> Result<(Self, T), E> {
        let file = create_memfd(bytes)
            .map_err(|source| MemoryError::Create { mib: bytes >> 20, source })?;
        let filled = fill(&file)?;
        rustix::fs::fcntl_add_seals(&file, SEALS)
            .map_err(|errno| MemoryError::Seal(errno.into()))?;
        Ok((Self { file, bytes }, filled))
    }

    /// A template that came as a descriptor from another process, of `bytes` of RAM. It may be anything: what is not sealed is no
    /// template.
    ///
    /// # Errors
    /// [`MemoryError::NoTemplate`].
    pub fn from_file(file: File, bytes: u64) -> Result<Self, MemoryError> {
        let seals = rustix::fs::fcntl_get_seals(&file).unwrap_or(SealFlags::empty());
        let is_whole = file.metadata().is_ok_and(|metadata| metadata.len() == bytes);
        match seals.contains(SEALS) && is_whole {
            true => Ok(Self { file, bytes }),
            false => Err(MemoryError::NoTemplate),
        }
    }

    /// How much RAM it is of.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// What is no hole of its file, as starts and ends, lowest first.
    pub(super) fn extents(&self) -> io::Result<Vec<(u64, u64)>> {
        let mut extents = Vec::new();
        let mut at = 0;
        loop {
            let start = match rustix::fs::seek(&self.file, SeekFrom::Data(at)) {
                Ok(start) => start,
                // There is nothing behind.
                Err(Errno::NXIO) => return Ok(extents),
                Err(errno) => return Err(errno.into()),
            };
            at = rustix::fs::seek(&self.file, SeekFrom::Hole(start))?;
            extents.push((start, at));
        }
    }
}

impl AsFd for Template {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

pub(super) fn create_memfd(bytes: u64) -> io::Result<File> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let fd: OwnedFd = rustix::fs::memfd_create("guest-template", flags)?;
    rustix::fs::ftruncate(&fd, bytes)?;
    Ok(File::from(fd))
}
