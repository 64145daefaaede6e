//! What is behind a machine's RAM: which parts of it are a template's, and which are in no file.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use vm_memory::{GuestMemoryRegion, GuestRegionMmap};

use super::image::Image;
use super::{MemoryError, PAGE, Template, WriteLog};

/// What is behind a machine's RAM. All that has to be found out is, when it is made: to put it there takes `mmap` and `madvise` alone.
#[derive(Debug)]
pub struct Backing {
    /// None if nothing is mapped of any.
    file: Option<File>,
    bytes: u64,
    /// What is mapped of the file, as starts and ends, lowest first.
    pieces: Vec<(u64, u64)>,
    /// The guest address from which on RAM in no file comes in large pages.
    large: u64,
    image: Option<Image>,
}

/// A stretch of a range of RAM, as offsets into the range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stretch {
    pub start: u64,
    pub end: u64,
    pub kind: Kind,
}

/// What a stretch is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A private mapping of a file.
    File,
    /// No file.
    Small,
    /// No file, and large pages where the host has them.
    Large,
}

impl Backing {
    /// A private mapping of all of the template.
    ///
    /// # Errors
    /// [`MemoryError::Look`].
    pub fn private(template: &Template) -> Result<Self, MemoryError> {
        Self::new(template, vec![(0, template.bytes)], u64::MAX)
    }

    /// RAM that is in no file, with a copy of the template: all of it comes in large pages where the host has them. For guests
    /// that use most of their image and their RAM, such as a Linux, for which KVM would have to be asked for each small page.
    ///
    /// # Errors
    /// [`MemoryError::Look`] or [`MemoryError::Map`].
    pub fn copy(template: &Template) -> Result<Self, MemoryError> {
        let image = Some(Image::new(template)?);
        Ok(Self { image, ..Self::new(template, Vec::new(), 0)? })
    }

    /// A private mapping of the template as far as there is anything in it. RAM behind that comes from no file: what is only read
    /// there costs no memory, which a hole of a file does, and what is written is there to stay (see [`super::Memory::restore`]). From
    /// the guest address `large` on, a multiple of the page size, it comes in large pages where the host has them, so a guest that
    /// looks at all of it is done in milliseconds.
    ///
    /// # Errors
    /// [`MemoryError::Look`].
    pub fn contents(template: &Template, large: u64) -> Result<Self, MemoryError> {
        let extents = template.extents().map_err(MemoryError::Look)?;
        let front = extents.last().map(|(_, end)| (0, *end));
        Self::new(template, front.into_iter().collect(), large)
    }

    /// The same for a template with contents all over it, as a snapshot's: what is empty between them is in no file either, if
    /// it is long enough to be worth a mapping of its own.
    ///
    /// # Errors
    /// [`MemoryError::Look`].
    pub fn extents(template: &Template, large: u64) -> Result<Self, MemoryError> {
        /// The kernel gives a process 65,530 mappings by default (`vm.max_map_count`).
        const MOST_PIECES: u64 = 1024;
        const LEAST_HOLE: u64 = 1 << 20;
        let least = LEAST_HOLE.max(template.bytes / MOST_PIECES);
        let mut pieces: Vec<(u64, u64)> = Vec::new();
        for (start, end) in template.extents().map_err(MemoryError::Look)? {
            match pieces.last_mut() {
                Some((_, last)) if start - *last < least => *last = end,
                _ => pieces.push((start, end)),
            }
        }
        Self::new(template, pieces, large)
    }

    /// Nothing: RAM that is empty, or that somebody serves ([`super::paging`]).
    pub fn nothing(bytes: u64) -> Self {
        Self { file: None, bytes, pieces: Vec::new(), large: u64::MAX, image: None }
    }

    fn new(template: &Template, pieces: Vec<(u64, u64)>, large: u64) -> Result<Self, MemoryError> {
        let file = Some(template.file.try_clone().map_err(MemoryError::Look)?);
        Ok(Self { file, bytes: template.bytes, pieces, large, image: None })
    }

    /// How much RAM it is of.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Puts it behind `region`, which is in no file, at `offset` of the file.
    pub(super) fn lay(
        &self,
        region: &GuestRegionMmap<WriteLog>,
        offset: u64,
    ) -> Result<Vec<Stretch>, MemoryError> {
        let len = region.len();
        let mut stretches = Vec::new();
        let mut at = 0;
        for (start, end) in &self.pieces {
            let start = start.saturating_sub(offset).min(len);
            let end = end.saturating_sub(offset).min(len);
            if start < end {
                self.lay_nothing(region, (at, start), &mut stretches);
                let file = self.file.as_ref().map(|file| (file, offset + start));
                map_fixed(region, (start, end), file)?;
                stretches.push(Stretch { start, end, kind: Kind::File });
                at = end;
            }
        }
        self.lay_nothing(region, (at, len), &mut stretches);
        Ok(stretches)
    }

    /// What is in no file: small pages up to [`Backing::large`], large ones behind.
    fn lay_nothing(
        &self,
        region: &GuestRegionMmap<WriteLog>,
        (start, end): (u64, u64),
        stretches: &mut Vec<Stretch>,
    ) {
        let middle = self.large.saturating_sub(region.start_addr().0).clamp(start, end);
        if middle < end {
            let address = region.as_ptr().wrapping_add(middle as usize).cast();
            // SAFETY: advice alone, for a part of the region; a kernel without large pages refuses it, and then there are none.
            unsafe { libc::madvise(address, (end - middle) as usize, libc::MADV_HUGEPAGE) };
        }
        for (start, end, kind) in [(start, middle, Kind::Small), (middle, end, Kind::Large)] {
            if start < end {
                stretches.push(Stretch { start, end, kind });
            }
        }
    }

    /// What has to be copied into RAM, now and at each reset.
    pub(super) fn into_image(self) -> Option<Image> {
        self.image
    }
}

/// Makes all of `region` empty memory that is in no file.
pub(super) fn clear(region: &GuestRegionMmap<WriteLog>) -> Result<(), MemoryError> {
    map_fixed(region, (0, region.len()), None)
}

/// Maps the part of `region` anew: of a file at an offset, or of none.
fn map_fixed(
    region: &GuestRegionMmap<WriteLog>,
    (start, end): (u64, u64),
    file: Option<(&File, u64)>,
) -> Result<(), MemoryError> {
    assert!(start < end && end <= region.len(), "{start}..{end} of {}", region.len());
    assert!(start.is_multiple_of(PAGE as u64), "{start} is within a page");
    let flags = libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE;
    let (flags, fd, offset) = match file {
        Some((file, offset)) => (flags, file.as_raw_fd(), offset),
        None => (flags | libc::MAP_ANONYMOUS, -1, 0),
    };
    let address = region.as_ptr().wrapping_add(start as usize).cast();
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: the range lies in the mapping that `region` owns and unmaps whole, so nothing else is replaced. No Rust reference points
    // into it: guest memory is reached only through vm-memory's volatile accessors, which expect contents to change at any time. A
    // file is a sealed template: its contents do not change, and it does not become shorter.
    let mapped = unsafe {
        libc::mmap(address, (end - start) as usize, protection, flags, fd, offset as libc::off_t)
    };
    match mapped == libc::MAP_FAILED {
        true => Err(MemoryError::Lay(io::Error::last_os_error())),
        false => Ok(()),
    }
}
