//! What a template holds, for RAM that is in no file: it is copied there, and again at each reset.

use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::{GuestRam, MemoryError, Template, map_file};
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
    pub fn new(template: &Template) -> Result<Self, MemoryError> {
        let Template { file, bytes } = template;
        let in_file = template.extents().map_err(MemoryError::Look)?;
        let mut extents = Vec::new();
        for (start, end) in in_file {
            let mut offset = 0;
            for (guest, len) in layout::ram_ranges(*bytes) {
                let (from, to) = (start.max(offset), end.min(offset + len));
                if from < to {
                    extents.push(Extent { guest: guest + (from - offset), len: to - from });
                }
                offset += len;
            }
        }
        Ok(Self { ram: map_file(file, *bytes, libc::MAP_PRIVATE)?, extents })
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
