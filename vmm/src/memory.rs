//! Guest RAM: a sealed template that all machines of an image share, and one private mapping of it for each machine.
//!
//! A reset drops the private pages or, where the template is empty anyway, empties them, so the guest sees the template
//! again and nothing of what it wrote can survive. This is one of the two modules that may be unsafe.

mod image;
mod page_set;
mod pieces;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{MemfdFlags, SealFlags, SeekFrom};
use vm_memory::mmap::MmapRegionError;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap, MmapRegion,
};

use self::image::Image;
pub use self::page_set::PageSet;
pub use self::pieces::{Pieces, peek_goes_on};
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
pub type GuestRam = vm_memory::GuestMemoryMmap<()>;

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
    /// Mapping it.
    #[error("map guest memory")]
    Map(#[source] MmapRegionError),
    /// The ranges of [`layout::ram_ranges`] were refused.
    #[error("lay out guest memory")]
    Layout(#[source] vm_memory::GuestRegionCollectionError),
    /// Finding out how far the template is not empty.
    #[error("find the end of the memory template's contents")]
    Look(#[source] io::Error),
    /// Mapping the part of the template that is not empty.
    #[error("map the image into guest memory")]
    Front(#[source] io::Error),
    /// Copying what the template holds.
    #[error("copy the image into guest memory")]
    Copy(#[source] vm_memory::GuestMemoryError),
    /// Going back to the template.
    #[error("drop or empty the private pages of guest memory")]
    Restore(#[source] io::Error),
}

/// An immutable image of guest RAM, as it is before the first instruction.
#[derive(Debug)]
pub struct Template {
    file: File,
    bytes: u64,
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
        let fill = |file: &File| {
            let staging = map(file, bytes, libc::MAP_SHARED)?;
            // A writable shared mapping would forbid the seal against writing: it is gone when this returns.
            load(&staging)
        };
        Self::fill_with(bytes, fill)
    }

    /// Makes a template of `bytes` of RAM that `fill` has written to the file of, whose offsets count all ranges of RAM without
    /// the gap between them.
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

    /// How much RAM it is of.
    pub fn bytes(&self) -> u64 {
        self.bytes
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
}

impl AsFd for Template {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// What makes a file a template: nobody can change it any more, not even its owner.
const SEALS: SealFlags =
    SealFlags::SEAL.union(SealFlags::SHRINK).union(SealFlags::GROW).union(SealFlags::WRITE);

fn create_memfd(bytes: u64) -> io::Result<File> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let fd: OwnedFd = rustix::fs::memfd_create("guest-template", flags)?;
    rustix::fs::ftruncate(&fd, bytes)?;
    Ok(File::from(fd))
}

fn map(file: &File, bytes: u64, sharing: i32) -> Result<GuestRam, MemoryError> {
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

/// One machine's RAM: a private mapping of a [`Template`].
#[derive(Debug)]
pub struct Memory {
    ram: GuestRam,
    /// What is in no file, in the order of the ranges.
    anonymous: Vec<Anonymous>,
    /// What it begins with, where all of it is in no file.
    image: Option<Image>,
}

/// Where the part of a range begins that is in no file, and where its pages become large ones; guest addresses.
#[derive(Clone, Copy, Debug)]
struct Anonymous {
    start: u64,
    large: u64,
}

impl Memory {
    /// Maps the template privately. Costs address space alone; pages come when somebody touches them.
    ///
    /// # Errors
    /// [`MemoryError::Map`] if the address space or the kernel's patience is exhausted.
    pub fn map(template: &Template) -> Result<Self, MemoryError> {
        let ram = map(&template.file, template.bytes, libc::MAP_PRIVATE)?;
        let none = |region: &GuestRegionMmap| {
            let end = region.start_addr().0 + region.len();
            Anonymous { start: end, large: end }
        };
        Ok(Self { anonymous: ram.iter().map(none).collect(), ram, image: None })
    }

    /// RAM that is in no file, with a copy of the template: all of it comes in large pages where the host has them. For guests
    /// that use most of their image and their RAM, such as a Linux, for which KVM would have to be asked for each small page.
    ///
    /// # Errors
    /// [`MemoryError`].
    pub fn map_copy(template: &Template) -> Result<Self, MemoryError> {
        let image = Image::new(&template.file, template.bytes)?;
        let empty = Self::map_front(template, 0, 0)?;
        image.copy(&empty.ram, u64::MAX)?;
        Ok(Self { image: Some(image), ..empty })
    }

    /// Maps the template privately as far as there is anything in it. RAM behind that comes from no file: what is only read
    /// there costs no memory, which a hole of a file does, and what is written is there to stay (see [`Memory::restore`]). From
    /// the guest address `large` on, a multiple of the page size, it comes in large pages where the host has them, so a guest that
    /// looks at all of it is done in milliseconds.
    ///
    /// # Errors
    /// [`MemoryError::Map`] as for [`Memory::map`], [`MemoryError::Look`] or [`MemoryError::Front`].
    pub fn map_contents(template: &Template, large: u64) -> Result<Self, MemoryError> {
        let contents = contents_end(&template.file).map_err(MemoryError::Look)?;
        Self::map_front(template, contents, large)
    }

    /// Maps `contents` bytes of the template, and RAM that is in no file behind that.
    fn map_front(template: &Template, contents: u64, large: u64) -> Result<Self, MemoryError> {
        let (mut regions, mut anonymous) = (Vec::new(), Vec::new());
        let mut offset = 0;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        for (start, len) in layout::ram_ranges(template.bytes) {
            // The kernel aligns it for large pages, so that KVM can have them too.
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            let mapping = MmapRegion::build(None, len as usize, protection, flags)
                .map_err(MemoryError::Map)?;
            let front = contents.saturating_sub(offset).min(len);
            if front > 0 {
                let flags = libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE;
                // SAFETY: the range lies in the mapping that was just made, which nobody knows yet and which is unmapped whole,
                // so nothing else is replaced. The template is sealed: no file contents change under it.
                let mapped = unsafe {
                    libc::mmap(
                        mapping.as_ptr().cast(),
                        front as usize,
                        protection,
                        flags,
                        template.file.as_raw_fd(),
                        offset as libc::off_t,
                    )
                };
                if mapped == libc::MAP_FAILED {
                    return Err(MemoryError::Front(io::Error::last_os_error()));
                }
            }
            let small = large.saturating_sub(start).clamp(front, len);
            if small < len {
                // SAFETY: the rest of the same mapping.
                let rest = unsafe { mapping.as_ptr().add(small as usize) }.cast();
                // SAFETY: advice alone; a kernel without large pages refuses it, and then there are none.
                unsafe { libc::madvise(rest, (len - small) as usize, libc::MADV_HUGEPAGE) };
            }
            anonymous.push(Anonymous { start: start + front, large: start + small });
            // `new` fails only where start + length overflows; `ram_ranges` stays far below.
            regions.extend(GuestRegionMmap::new(mapping, GuestAddress(start)));
            offset += len;
        }
        let ram = GuestRam::from_regions(regions).map_err(MemoryError::Layout)?;
        Ok(Self { ram, anonymous, image: None })
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

    /// Gives the guest the template again: every page of it that this machine wrote is dropped, and what is in no file is empty
    /// again. The caller keeps the vCPUs and the devices away meanwhile.
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
        for (region, &Anonymous { start, large }) in self.ram.iter().zip(&self.anonymous) {
            let first = region.start_addr().0;
            let end = end.clamp(first, first + region.len());
            let part = |from: u64, to: u64| {
                let offset = from.min(end) - first;
                Part {
                    region,
                    offset: offset as usize,
                    len: (to.min(end) - from.min(end)) as usize,
                }
            };
            part(first, start).drop_pages()?;
            part(start, large).empty(PAGE)?;
            let rest = part(large, end.max(large));
            // Of a guest that does not use its RAM nothing is there, however large that is.
            match rest.len > 0 && rest.starts_resident()? {
                true => rest.empty(LARGE_PAGE)?,
                false => rest.drop_pages()?,
            }
        }
        match &self.image {
            Some(image) => image.copy(&self.ram, end),
            None => Ok(()),
        }
    }
}

const PAGE: usize = 4096;
const LARGE_PAGE: usize = 2 << 20;

/// A part of one range of guest RAM; multiples of [`PAGE`].
#[derive(Clone, Copy)]
struct Part<'a> {
    region: &'a GuestRegionMmap,
    offset: usize,
    len: usize,
}

impl Part<'_> {
    fn address(&self) -> *mut libc::c_void {
        // Every part lies in its region, so this is the address of one of its bytes, or of its end.
        self.region.as_ptr().wrapping_add(self.offset).cast()
    }

    fn sub(&self, offset: usize, len: usize) -> Self {
        assert!(offset + len <= self.len, "{len} bytes at {offset} of {}", self.len);
        Self { offset: self.offset + offset, len, ..*self }
    }

    /// Drops the pages: they are as the file has them, or empty.
    fn drop_pages(&self) -> Result<(), MemoryError> {
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
    fn empty(&self, block: usize) -> Result<(), MemoryError> {
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

    fn starts_resident(&self) -> Result<bool, MemoryError> {
        Ok(is_whole(&self.sub(0, PAGE).resident()?))
    }

    /// Whether each page is resident, in the lowest bit of a byte (mincore(2)).
    fn resident(&self) -> Result<Vec<u8>, MemoryError> {
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

/// Where the last page of a file ends that holds anything; what is behind is a hole.
fn contents_end(file: &File) -> io::Result<u64> {
    let mut end = 0;
    loop {
        end = match rustix::fs::seek(file, SeekFrom::Data(end)) {
            Ok(data) => rustix::fs::seek(file, SeekFrom::Hole(data))?,
            // There is nothing behind.
            Err(rustix::io::Errno::NXIO) => return Ok(end),
            Err(errno) => return Err(errno.into()),
        };
    }
}

#[cfg(test)]
mod tests;
