//! Guest RAM: a sealed template that all machines of an image share, and one private mapping of it for each machine.
//!
//! A reset drops the private pages with one `madvise`, so the guest sees the template again and nothing of what it
//! wrote can survive. This is one of the two modules that may be unsafe.

mod pieces;

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::fs::{MemfdFlags, SealFlags};
use vm_memory::mmap::MmapRegionError;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap, MmapRegion,
};

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
    /// Mapping it.
    #[error("map guest memory")]
    Map(#[source] MmapRegionError),
    /// The ranges of [`layout::ram_ranges`] were refused.
    #[error("lay out guest memory")]
    Layout(#[source] vm_memory::GuestRegionCollectionError),
    /// Mapping the part of the template that is not empty.
    #[error("map the image into guest memory")]
    Front(#[source] io::Error),
    /// Going back to the template.
    #[error("drop the private pages of guest memory")]
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
        let file = create_memfd(bytes)
            .map_err(|source| MemoryError::Create { mib: bytes >> 20, source })?;
        let staging = map(&file, bytes, libc::MAP_SHARED)?;
        let loaded = load(&staging)?;
        // A writable shared mapping would forbid the seal against writing.
        drop(staging);
        let seals = SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE;
        rustix::fs::fcntl_add_seals(&file, seals)
            .map_err(|errno| MemoryError::Seal(errno.into()))?;
        Ok((Self { file, bytes }, loaded))
    }
}

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
}

impl Memory {
    /// Maps the template privately. Costs address space alone; pages come when somebody touches them.
    ///
    /// # Errors
    /// [`MemoryError::Map`] if the address space or the kernel's patience is exhausted.
    pub fn map(template: &Template) -> Result<Self, MemoryError> {
        Ok(Self { ram: map(&template.file, template.bytes, libc::MAP_PRIVATE)? })
    }

    /// Maps the template privately below the guest address `end`; above, where it is empty, RAM comes from no file: what is only
    /// read there costs no memory, which a hole of a file does, and what is written comes in large pages where the host has
    /// them. So a guest that looks at all of it is done in milliseconds. `end` is a multiple of the page size.
    ///
    /// # Errors
    /// [`MemoryError::Map`] as for [`Memory::map`], or [`MemoryError::Front`].
    pub fn map_below(template: &Template, end: u64) -> Result<Self, MemoryError> {
        let mut regions = Vec::new();
        let mut offset = 0;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        for (start, len) in layout::ram_ranges(template.bytes) {
            // The kernel aligns it for large pages, so that KVM can have them too.
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            let mapping = MmapRegion::build(None, len as usize, protection, flags)
                .map_err(MemoryError::Map)?;
            let front = end.saturating_sub(start).min(len);
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
            if front < len {
                // SAFETY: the rest of the same mapping.
                let rest = unsafe { mapping.as_ptr().add(front as usize) }.cast();
                // SAFETY: advice alone; a kernel without large pages refuses it, and then there are none.
                unsafe { libc::madvise(rest, (len - front) as usize, libc::MADV_HUGEPAGE) };
            }
            // `new` fails only where start + length overflows; `ram_ranges` stays far below.
            regions.extend(GuestRegionMmap::new(mapping, GuestAddress(start)));
            offset += len;
        }
        Ok(Self { ram: GuestRam::from_regions(regions).map_err(MemoryError::Layout)? })
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

    /// Gives the guest the template again: every page that this machine wrote is dropped. The caller keeps the vCPUs and
    /// the devices away meanwhile.
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
        for region in self.ram.iter() {
            let len = end.saturating_sub(region.start_addr().0).min(region.len()) as usize;
            if len == 0 {
                continue;
            }
            let start = region.as_ptr().cast::<libc::c_void>();
            // SAFETY: [start, start + len) lies in the mapping that `region` owns and keeps alive. No Rust reference points
            // into it: guest memory is reached only through vm-memory's volatile accessors, which expect
            // contents to change at any time.
            let result = unsafe { libc::madvise(start, len, libc::MADV_DONTNEED) };
            if result != 0 {
                return Err(MemoryError::Restore(io::Error::last_os_error()));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    fn template_with(text: &'static [u8]) -> Template {
        let load = |ram: &GuestRam| -> Result<(), MemoryError> {
            ram.write_slice(text, GuestAddress(0x1000)).unwrap();
            Ok(())
        };
        Template::build(4 << 20, load).unwrap().0
    }

    fn read(memory: &Memory, address: u64) -> [u8; 4] {
        let mut bytes = [0; 4];
        memory.ram().read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    #[test]
    fn a_restore_brings_back_the_template_and_zeroes_the_rest() {
        let template = template_with(b"kern");
        let mut memory = Memory::map(&template).unwrap();
        for address in [0x1000, 0x2000, (4 << 20) - 4] {
            memory.ram().write_slice(b"leak", GuestAddress(address)).unwrap();
        }
        memory.restore().unwrap();
        assert_eq!(&read(&memory, 0x1000), b"kern");
        assert_eq!(read(&memory, 0x2000), [0; 4]);
        assert_eq!(read(&memory, (4 << 20) - 4), [0; 4]);
    }

    #[test]
    fn a_restore_below_an_address_leaves_the_rest() {
        let mut memory = Memory::map(&template_with(b"kern")).unwrap();
        for address in [0x1000, 0x2000, 0x3000] {
            memory.ram().write_slice(b"leak", GuestAddress(address)).unwrap();
        }
        memory.restore_below(0x3000).unwrap();
        assert_eq!(&read(&memory, 0x1000), b"kern");
        assert_eq!((read(&memory, 0x2000), &read(&memory, 0x3000)), ([0; 4], b"leak"));
        memory.restore_below(0).unwrap();
        assert_eq!(&read(&memory, 0x3000), b"leak");
    }

    #[test]
    fn ram_without_file_is_empty_and_a_restore_empties_it_again() {
        let template = template_with(b"kern");
        let mut memory = Memory::map_below(&template, 2 << 20).unwrap();
        let above = (4 << 20) - 4;
        assert_eq!((&read(&memory, 0x1000), read(&memory, above)), (b"kern", [0; 4]));
        for address in [0x1000, (2 << 20) - 4, 2 << 20, above] {
            memory.ram().write_slice(b"leak", GuestAddress(address)).unwrap();
        }
        memory.restore_below(2 << 20).unwrap();
        assert_eq!((read(&memory, (2 << 20) - 4), &read(&memory, above)), ([0; 4], b"leak"));
        memory.restore().unwrap();
        assert_eq!(&read(&memory, 0x1000), b"kern");
        assert_eq!((read(&memory, 2 << 20), read(&memory, above)), ([0; 4], [0; 4]));
        let whole = Memory::map_below(&template, u64::MAX).unwrap();
        assert_eq!((&read(&whole, 0x1000), read(&whole, above)), (b"kern", [0; 4]));
    }

    #[test]
    fn machines_of_one_template_do_not_see_each_other() {
        let template = template_with(b"kern");
        let (one, two) = (Memory::map(&template).unwrap(), Memory::map(&template).unwrap());
        one.ram().write_slice(b"mine", GuestAddress(0x1000)).unwrap();
        assert_eq!(&read(&two, 0x1000), b"kern");
    }

    #[test]
    fn nobody_can_change_a_template() {
        use std::os::unix::fs::FileExt;
        let template = template_with(b"kern");
        assert!(template.file.write_at(b"evil", 0x1000).is_err());
        assert!(template.file.set_len(0).is_err());
        assert!(map(&template.file, template.bytes, libc::MAP_SHARED).is_err());
    }
}
