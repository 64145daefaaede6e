//! A part of guest RAM that goes back to what it was: dropped, or emptied where it is.

use std::io;

use vm_memory::GuestRegionMmap;

use super::{LARGE_PAGE, MemoryError, PAGE, WriteLog};

/// A part of one range of guest RAM; multiples of [`PAGE`].
#[derive(Clone, Copy)]
pub(super) struct Part<'a> {
    pub region: &'a GuestRegionMmap<WriteLog>,
    pub offset: usize,
    pub len: usize,
}

impl Part<'_> {
    pub fn address(&self) -> *mut libc::c_void {
        // Every part lies in its region, so this is the address of one of its bytes, or of its end.
        self.region.as_ptr().wrapping_add(self.offset).cast()
    }

    fn sub(&self, offset: usize, len: usize) -> Self {
        assert!(offset + len <= self.len, "{len} bytes at {offset} of {}", self.len);
        Self { offset: self.offset + offset, len, ..*self }
    }

    /// Drops the pages: they are as the file has them, or empty.
    pub fn drop_pages(&self) -> Result<(), MemoryError> {
        if self.len == 0 {
            return Ok(());
        }
        // SAFETY: the part lies in the mapping that `region` owns and keeps alive. No Rust reference points into it: guest
        // memory is reached only through vm-memory's volatile accessors, which expect contents to change at any time.
        let result = unsafe { libc::madvise(self.address(), self.len, libc::MADV_DONTNEED) };
        if result != 0 {
            return Err(MemoryError::Restore(io::Error::last_os_error()));
        }
        Ok(())
    }

    /// Empties pages that are in no file: blocks of so many bytes that are resident stay so, others are dropped. (What is not
    /// resident may still hold something, in swap space.)
    pub fn empty(&self, block: usize) -> Result<(), MemoryError> {
        /// Pages that are asked for at once: 256 MiB.
        const MOST: usize = 1 << 16;
        for start in (0..self.len).step_by(MOST * PAGE) {
            let part = self.sub(start, (self.len - start).min(MOST * PAGE));
            let resident = part.resident()?;
            let mut at = 0;
            // Neighbours that are alike go together: long runs are written past the processor's caches.
            for run in
                resident.chunks(block / PAGE).map(is_whole).collect::<Vec<_>>().chunk_by(bool::eq)
            {
                let len = (run.len() * block).min(part.len - at);
                let whole = part.sub(at, len);
                match run[0] {
                    // SAFETY: as in `drop_pages`.
                    true => unsafe { whole.address().write_bytes(0, len) },
                    false => whole.drop_pages()?,
                }
                at += len;
            }
        }
        Ok(())
    }

    /// Empties pages in no file that come in large ones.
    pub fn empty_large(&self) -> Result<(), MemoryError> {
        // Of a guest that does not use its RAM nothing is there, however large that is.
        match self.len > 0 && self.starts_resident()? {
            true => self.empty(LARGE_PAGE),
            false => self.drop_pages(),
        }
    }

    fn starts_resident(&self) -> Result<bool, MemoryError> {
        Ok(is_whole(&self.sub(0, PAGE).resident()?))
    }

    /// Whether each page is resident, in the lowest bit of a byte (mincore(2)).
    pub fn resident(&self) -> Result<Vec<u8>, MemoryError> {
        let mut pages = vec![0; self.len / PAGE];
        // SAFETY: the vector has a byte for each page of the part, which lies in the mapping that `region` owns.
        if unsafe { libc::mincore(self.address(), self.len, pages.as_mut_ptr()) } != 0 {
            return Err(MemoryError::Restore(io::Error::last_os_error()));
        }
        Ok(pages)
    }
}

fn is_whole(pages: &[u8]) -> bool {
    pages.iter().all(|page| page & 1 != 0)
}
