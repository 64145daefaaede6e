//! What a template holds, for RAM that is in no file: it is copied there, and again at each reset.

use std::fs::File;
use std::io;

use rustix::fs::SeekFrom;
use rustix::io::Errno;
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::{GuestRam, MemoryError, map};
use crate::layout;

/// A template's contents, mapped for reading.
#[derive(Debug)]
pub(super) struct Image {
    ram: GuestRam,
    extents: Vec<Extent>,
}

/// Bytes of a template behind each other, and of the guest's RAM as well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Extent {
    guest: u64,
    len: u64,
}

impl Image {
    /// Of the template in `file`, of `bytes`.
    pub fn new(file: &File, bytes: u64) -> Result<Self, MemoryError> {
        let extents = extents(file, bytes).map_err(MemoryError::Look)?;
        Ok(Self { ram: map(file, bytes, libc::MAP_PRIVATE)?, extents })
    }

    /// Writes what lies below the guest address `end` into `ram`, of the same size.
    pub fn copy(&self, ram: &GuestRam, end: u64) -> Result<(), MemoryError> {
        for Extent { guest, len } in &self.extents {
            let len = end.saturating_sub(*guest).min(*len) as usize;
            let slices = self.ram.get_slices(GuestAddress(*guest), len);
            let mut at = *guest;
            for slice in slices {
                let slice = slice.map_err(MemoryError::Copy)?;
                let target = ram.get_slice(GuestAddress(at), slice.len());
                slice.copy_to_volatile_slice(target.map_err(MemoryError::Copy)?);
                at += slice.len() as u64;
            }
        }
        Ok(())
    }
}

/// What is no hole, as guest addresses.
fn extents(file: &File, bytes: u64) -> io::Result<Vec<Extent>> {
    let mut extents = Vec::new();
    let mut at = 0;
    loop {
        let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(start) => start,
            // There is nothing behind.
            Err(Errno::NXIO) => return Ok(extents),
            Err(errno) => return Err(errno.into()),
        };
        let end = rustix::fs::seek(file, SeekFrom::Hole(start))?;
        let mut offset = 0;
        for (guest, len) in layout::ram_ranges(bytes) {
            let (from, to) = (start.max(offset), end.min(offset + len));
            if from < to {
                extents.push(Extent { guest: guest + (from - offset), len: to - from });
            }
            offset += len;
        }
        at = end;
    }
}
