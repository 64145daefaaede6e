//! Guest RAM: a sealed template that all machines of an image share, and one private mapping of it for each machine.
//!
//! A reset drops the private pages or, where the template is empty anyway, empties them, so the guest sees the template
//! again and nothing of what it wrote can survive. This is one of the two modules that may be unsafe.

mod backing;
mod image;
mod page_set;
pub mod paging;
mod part;
mod pieces;
mod template;
mod writes;

use std::fs::File;
use std::io;

use vm_memory::bitmap::Bitmap;
use vm_memory::mmap::MmapRegionError;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap, MmapRegion,
    VolatileSlice,
};

pub use self::backing::Backing;
use self::backing::{Kind, Stretch};
use self::image::Image;
pub use self::page_set::PageSet;
use self::part::Part;
pub use self::pieces::{Pieces, peek_goes_on};
pub use self::template::Template;
pub use self::writes::{WriteLog, WriteMark};
use crate::layout;

/// Prepares the process. A reader that goes away and a disk larger than files may be (`--resource-limit fsize`) become errors to
/// be handled: `SIGPIPE` and `SIGXFSZ` are ignored. The process's own
/// heap is one for all threads: by default the C library gives each thread its own, which costs a short-lived monitor more
/// system calls and memory than it could ever wait for a lock.
pub fn prepare_process() {
    #[cfg(target_env = "gnu")] // musl has one heap for all threads, and no `mallopt`.
    // SAFETY: `mallopt` changes a number that later allocations look at; any thread may call it at any time.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1)
    };
    for signal in [libc::SIGPIPE, libc::SIGXFSZ] {
        // SAFETY: ignoring a signal installs no handler.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
}

/// Makes the heap of the process that runs a machine resident, so that no page fault comes later and a long life holds no
/// more memory than a short one.
pub fn warm_heap() {
    /// More than a machine needs at any time, and less than the C library would map apart or give back.
    const HEAP_BYTES: usize = 120 * 1024;
    drop(std::hint::black_box(vec![1_u8; HEAP_BYTES]));
}

/// Guest RAM as the devices see it. Cheap to clone: the clones share one mapping.
pub type GuestRam = vm_memory::GuestMemoryMmap<WriteLog>;

/// A slice of it.
pub type RamSlice<'a> = VolatileSlice<'a, WriteMark<'a>>;

/// Why memory could not be had. All are host failures.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The template's file.
    #[error("create the memory template of {mib} MiB")]
    Create {
        /// Size asked for.
        mib: u64,
        /// What the kernel said.
        source: io::Error,
    },
    /// Making the template immutable.
    #[error("seal the memory template")]
    Seal(#[source] io::Error),
    /// A descriptor that is none of a template.
    #[error("the file that came for the guest's RAM is no sealed template of its size")]
    NoTemplate,
    /// A template for another machine.
    #[error("the machine has {expected} bytes of RAM, and its new template is of {found}")]
    OtherSize {
        /// What it has.
        expected: u64,
        /// What it was given.
        found: u64,
    },
    /// Mapping it.
    #[error("map guest memory")]
    Map(#[source] MmapRegionError),
    /// The ranges of [`layout::ram_ranges`] were refused.
    #[error("lay out guest memory")]
    Layout(#[source] vm_memory::GuestRegionCollectionError),
    /// Finding out how far the template is not empty.
    #[error("find the end of the memory template's contents")]
    Look(#[source] io::Error),
    /// Mapping what is not empty of the template, or emptying what is.
    #[error("map the image into guest memory")]
    Lay(#[source] io::Error),
    /// Copying what the template holds.
    #[error("copy the image into guest memory")]
    Copy(#[source] vm_memory::GuestMemoryError),
    /// Going back to the template.
    #[error("drop or empty the private pages of guest memory")]
    Restore(#[source] io::Error),
}

/// All of a template's file.
fn map_file(file: &File, bytes: u64, sharing: i32) -> Result<GuestRam, MemoryError> {
    let mut regions = Vec::new();
    let mut offset = 0;
    for (start, len) in layout::ram_ranges(bytes) {
        let file = file.try_clone().map_err(|e| MemoryError::Map(MmapRegionError::Mmap(e)))?;
        let mapping = MmapRegion::build(
            Some(FileOffset::new(file, offset)),
            len as usize,
            libc::PROT_READ | libc::PROT_WRITE,
            sharing | libc::MAP_NORESERVE,
        )
        .map_err(MemoryError::Map)?;
        // `new` fails only where start + length overflows; `ram_ranges` stays far below.
        regions.extend(GuestRegionMmap::new(mapping, GuestAddress(start)));
        offset += len;
    }
    GuestRam::from_regions(regions).map_err(MemoryError::Layout)
}

/// A range of guest RAM and where this process has it, as KVM wants to know it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamRange {
    /// Guest physical address.
    pub guest: u64,
    /// Address in this process.
    pub host: u64,
    /// Length in bytes.
    pub bytes: u64,
}

/// One machine's RAM: a mapping of its own of what is behind it, a [`Backing`].
#[derive(Debug)]
pub struct Memory {
    ram: GuestRam,
    /// What each range is made of, in the order of the ranges; lowest first.
    stretches: Vec<Vec<Stretch>>,
    /// What it begins with, where all of it is in no file.
    image: Option<Image>,
}

impl Memory {
    /// Maps RAM. Costs address space alone, unless there is an image to copy; pages come when somebody touches them.
    ///
    /// # Errors
    /// [`MemoryError::Map`] if the address space or the kernel's patience is exhausted, [`MemoryError::Lay`] or
    /// [`MemoryError::Copy`].
    pub fn map(backing: Backing) -> Result<Self, MemoryError> {
        let mut regions = Vec::new();
        for (start, len) in layout::ram_ranges(backing.bytes()) {
            // The kernel aligns it for large pages, so that KVM can have them too.
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            let mapping = MmapRegion::build(None, len as usize, protection, flags)
                .map_err(MemoryError::Map)?;
            // `new` fails only where start + length overflows; `ram_ranges` stays far below.
            regions.extend(GuestRegionMmap::new(mapping, GuestAddress(start)));
        }
        let ram = GuestRam::from_regions(regions).map_err(MemoryError::Layout)?;
        let mut memory = Self { ram, stretches: Vec::new(), image: None };
        memory.lay(backing)?;
        Ok(memory)
    }

    /// Puts another backing behind the same addresses: a machine that went on from a snapshot becomes one of its boot image. All that
    /// was in RAM is gone. The caller keeps the vCPUs and the devices away meanwhile; KVM notices by itself.
    ///
    /// # Errors
    /// [`MemoryError::OtherSize`] before anything was done, else as for [`Memory::map`]; memory is then in an unknown state and the
    /// machine must be dropped.
    pub fn replace(&mut self, backing: Backing) -> Result<(), MemoryError> {
        let bytes = self.ram.iter().map(GuestMemoryRegion::len).sum::<u64>();
        if backing.bytes() != bytes {
            return Err(MemoryError::OtherSize { expected: bytes, found: backing.bytes() });
        }
        for region in self.ram.iter() {
            backing::clear(region)?;
        }
        self.lay(backing)?;
        self.mark_below(u64::MAX);
        Ok(())
    }

    /// Makes empty RAM of what is behind it.
    fn lay(&mut self, backing: Backing) -> Result<(), MemoryError> {
        let mut offset = 0;
        self.stretches.clear();
        for region in self.ram.iter() {
            self.stretches.push(backing.lay(region, offset)?);
            offset += region.len();
        }
        self.image = backing.into_image();
        match &self.image {
            Some(image) => image.copy(&self.ram, u64::MAX),
            None => Ok(()),
        }
    }

    /// RAM as the devices see it.
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// Every range of RAM, lowest first.
    pub fn ranges(&self) -> impl Iterator<Item = RamRange> {
        self.ram.iter().map(|region| RamRange {
            guest: region.start_addr().0,
            host: region.as_ptr() as u64,
            bytes: region.len(),
        })
    }

    /// From now on it is noted which pages the host writes; a machine that is made of it has KVM note those of the guest.
    pub fn track_writes(&self) {
        self.ram.iter().for_each(|region| region.get_mmap().bitmap().begin(region.len()));
    }

    /// Whether writes are noted.
    pub fn tracks_writes(&self) -> bool {
        self.ram.iter().all(|region| region.get_mmap().bitmap().has_begun())
    }

    /// Which pages of each range the host has written since it was asked last, 64 in a word.
    pub fn take_host_writes(&self) -> impl Iterator<Item = Vec<u64>> {
        self.ram.iter().map(|region| region.get_mmap().bitmap().take())
    }

    /// Gives the guest what is behind its RAM again: every page of a file that this machine wrote is dropped, and what is in no file
    /// is empty again. The caller keeps the vCPUs and the devices away meanwhile.
    ///
    /// Pages in no file that this machine has, and will likely want again, are emptied where they are. That takes a
    /// fifth of the time that dropping them does, the kernel's emptying of new ones and their way into the guest included.
    ///
    /// # Errors
    /// [`MemoryError::Restore`]; memory is then in an unknown state and the machine must be dropped.
    pub fn restore(&mut self) -> Result<(), MemoryError> {
        self.restore_below(u64::MAX)
    }

    /// The same for what lies below the guest address `end`, which is a multiple of the page size or beyond all RAM; the
    /// rest stays as the guest left it.
    ///
    /// # Errors
    /// [`MemoryError::Restore`]; memory is then in an unknown state and the machine must be dropped.
    pub fn restore_below(&mut self, end: u64) -> Result<(), MemoryError> {
        self.mark_below(end);
        for (region, stretches) in self.ram.iter().zip(&self.stretches) {
            let room = end.saturating_sub(region.start_addr().0);
            for stretch in stretches {
                let len = stretch.end.min(room).saturating_sub(stretch.start) as usize;
                let part = Part { region, offset: stretch.start as usize, len };
                match stretch.kind {
                    Kind::File => part.drop_pages()?,
                    Kind::Small => part.empty(PAGE)?,
                    Kind::Large => part.empty_large()?,
                }
            }
        }
        match &self.image {
            Some(image) => image.copy(&self.ram, end),
            None => Ok(()),
        }
    }

    /// Notes that all pages below the guest address `end` change, where writes are noted.
    fn mark_below(&self, end: u64) {
        for region in self.ram.iter() {
            let len = end.saturating_sub(region.start_addr().0).min(region.len());
            region.get_mmap().bitmap().mark_dirty(0, len as usize);
        }
    }
}

const PAGE: usize = 4096;
const LARGE_PAGE: usize = 2 << 20;

#[cfg(test)]
mod tests;
