//! Puts a kernel and what it is told into guest RAM, before any vCPU exists.
//!
//! `image` finds out what a file is and refuses what cannot work, `pvh` and `linux64` write what each boot protocol asks
//! for, `acpi` describes the machine.

mod acpi;
mod image;
mod linux64;
mod pvh;

use std::fs::File;
use std::io::{self, Cursor, Seek, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use agent_protocol::GENERATION_LEN;
use images::guest::LinuxGuest;
use images::kernel::KernelError;
use linux_loader::loader::{self, KernelLoader};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::rand::{GetRandomFlags, getrandom};
use vm_memory::{Bytes, GuestAddress};

use crate::layout::{self, Entry, VirtioSlot};
use crate::memory::{GuestRam, MemoryError};
use image::Kind;

/// What to boot.
#[derive(Clone, Debug)]
pub enum Payload {
    /// A guest agent: the embedded one, or the image in a file.
    Agent(Option<PathBuf>),
    /// A kernel of the user's: an ELF with or without a PVH note, or a bzImage.
    Kernel {
        /// The kernel.
        kernel: PathBuf,
        /// An initial RAM disk.
        initrd: Option<PathBuf>,
    },
    /// A Linux whose first process is the agent.
    Linux(LinuxGuest),
}

/// A payload whose files are open: what a confined process can load.
#[derive(Debug)]
pub enum Image {
    /// A guest agent: the embedded one, or the image in a file.
    Agent(Option<ImageFile>),
    /// A kernel of the user's.
    Kernel {
        /// The kernel.
        kernel: ImageFile,
        /// An initial RAM disk.
        initrd: Option<ImageFile>,
    },
}

/// An open file, and how the user calls it.
#[derive(Debug)]
pub struct ImageFile {
    file: File,
    path: PathBuf,
}

impl Payload {
    /// Whether an agent runs in it, in either personality.
    pub fn has_agent(&self) -> bool {
        matches!(self, Self::Agent(_) | Self::Linux(_))
    }

    /// Whether that is the agent that needs no kernel.
    pub fn is_unikernel(&self) -> bool {
        matches!(self, Self::Agent(_))
    }

    /// Opens the files. What is in them is looked at by [`load`] alone.
    ///
    /// # Errors
    /// [`BootError::Read`].
    pub fn open(&self) -> Result<Image, BootError> {
        match self {
            Self::Agent(None) => Ok(Image::Agent(None)),
            Self::Agent(Some(path)) => Ok(Image::Agent(Some(ImageFile::open(AGENT, path)?))),
            Self::Kernel { kernel, initrd } => Ok(Image::Kernel {
                kernel: ImageFile::open("kernel", kernel)?,
                initrd: match initrd {
                    Some(path) => Some(ImageFile::open("initrd", path)?),
                    None => None,
                },
            }),
            Self::Linux(guest) => {
                let path = guest.kernel.path.clone();
                Ok(Image::Kernel {
                    kernel: match guest.unpacked_image()? {
                        Some(bytes) => ImageFile::of(path, &bytes)?,
                        None => ImageFile::open("kernel", &path)?,
                    },
                    initrd: Some(ImageFile::of("of the agent".into(), &guest.file_system()?)?),
                })
            }
        }
    }
}

impl ImageFile {
    /// A file without a name that holds `bytes`.
    fn of(path: PathBuf, bytes: &[u8]) -> Result<Self, BootError> {
        let file = memfd_create("image", MemfdFlags::CLOEXEC).map(File::from);
        let written = file.map_err(io::Error::from).and_then(|mut file| {
            file.write_all(bytes)?;
            file.rewind()?;
            Ok(file)
        });
        match written {
            Ok(file) => Ok(Self { file, path }),
            Err(source) => Err(BootError::Keep { path, source }),
        }
    }

    /// Opens a regular file. A directory opens well and fails late, a FIFO blocks: neither is a kernel.
    fn open(what: &'static str, path: &Path) -> Result<Self, BootError> {
        let opened = std::fs::metadata(path).and_then(|metadata| match metadata.is_file() {
            true => File::open(path),
            false => Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file")),
        });
        match opened {
            Ok(file) => Ok(Self { file, path: path.into() }),
            Err(source) => Err(BootError::Read { what, path: path.into(), source }),
        }
    }
}

impl Image {
    /// The open files.
    pub fn files(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let (kernel, initrd) = match self {
            Self::Agent(agent) => (agent.as_ref(), None),
            Self::Kernel { kernel, initrd } => (Some(kernel), initrd.as_ref()),
        };
        kernel.into_iter().chain(initrd).map(|image| image.file.as_fd())
    }
}

/// Why a payload cannot be booted. All are the user's to mend, except where a source says otherwise.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The file cannot be opened or read.
    #[error("read {what} {path:?}")]
    Read {
        /// `agent`, `kernel` or `initrd`.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The host has no random bytes.
    #[error("get random bytes for the machine's generation")]
    Random(#[source] io::Error),
    /// There is no kernel with modules, or it lacks one.
    #[error(transparent)]
    Linux(#[from] KernelError),
    /// No memory for what was made of it.
    #[error("keep {path:?} in memory")]
    Keep {
        /// Its path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file is nothing that this machine can run.
    #[error("{what} {path:?} {problem}")]
    Unfit {
        /// `agent` or `kernel`.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The initrd does not fit.
    #[error(
        "initrd {path:?} of {bytes} bytes does not fit between the kernel and the end of RAM; give --mem more"
    )]
    InitrdTooLarge {
        /// Its path.
        path: PathBuf,
        /// Its length.
        bytes: u64,
    },
    /// The command line is too long or contains a zero byte.
    #[error(
        "the kernel command line has {bytes} bytes with what the machine adds; it must have fewer than {max} and no zero \
         byte",
        max = layout::COMMAND_LINE_MAX
    )]
    CommandLine {
        /// Its length.
        bytes: usize,
    },
    /// Boot data does not fit into RAM. Cannot happen with a size that the configuration accepts.
    #[error("write boot data into guest memory")]
    BootData(#[from] vm_memory::GuestMemoryError),
    /// The template could not be made.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// Loads `image` with its command line into `ram` for a machine with `vcpus` processors and virtio devices in `slots`.
///
/// # Errors
/// [`BootError`].
pub fn load(
    ram: &GuestRam,
    image: Image,
    command_line: &str,
    vcpus: u8,
    slots: impl Iterator<Item = VirtioSlot>,
) -> Result<Entry, BootError> {
    write_command_line(ram, command_line)?;
    acpi::write(ram, vcpus, slots)?;
    match image {
        Image::Agent(None) => {
            load_agent(ram, PathBuf::from("(embedded)"), &mut Cursor::new(images::AGENT))
        }
        Image::Agent(Some(ImageFile { mut file, path })) => load_agent(ram, path, &mut file),
        Image::Kernel { kernel: ImageFile { mut file, path }, initrd } => {
            load_image(ram, ("kernel", path), &mut file, initrd, u64::MAX)
        }
    }
}

/// Says whether `text` can be a command line.
///
/// # Errors
/// [`BootError::CommandLine`].
pub fn check_command_line(text: &str) -> Result<(), BootError> {
    match text.len() < layout::COMMAND_LINE_MAX && !text.contains('\0') {
        true => Ok(()),
        false => Err(BootError::CommandLine { bytes: text.len() }),
    }
}

/// Replaces the command line.
///
/// # Errors
/// [`BootError::CommandLine`].
pub fn write_command_line(ram: &GuestRam, text: &str) -> Result<(), BootError> {
    check_command_line(text)?;
    ram.write_slice(text.as_bytes(), GuestAddress(layout::COMMAND_LINE))?;
    Ok(ram.write_obj(0u8, GuestAddress(layout::COMMAND_LINE + text.len() as u64))?)
}

/// Writes a generation that no machine had before.
///
/// # Errors
/// [`BootError`] if there is no RAM, or the host has no random bytes.
pub fn write_generation(ram: &GuestRam) -> Result<(), BootError> {
    let mut generation = [0; GENERATION_LEN];
    getrandom(&mut generation, GetRandomFlags::empty())
        .map_err(|errno| BootError::Random(errno.into()))?;
    Ok(ram.write_slice(&generation, GuestAddress(layout::GENERATION))?)
}

/// Where an initrd lies in RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct InitrdRange {
    start: u64,
    bytes: u64,
}

/// What an agent is called in errors.
const AGENT: &str = "agent";

fn load_agent<F: io::Read + vm_memory::ReadVolatile + Seek>(
    ram: &GuestRam,
    path: PathBuf,
    file: &mut F,
) -> Result<Entry, BootError> {
    match load_image(ram, (AGENT, path.clone()), file, None, layout::AGENT_END)? {
        entry @ Entry::Pvh { .. } => Ok(entry),
        Entry::Linux64 { .. } => {
            let problem = "has no PVH note".into();
            Err(BootError::Unfit { what: AGENT, path, problem })
        }
    }
}

/// Loads what has to end at `highest`, and is called this in errors.
fn load_image<F: io::Read + vm_memory::ReadVolatile + Seek>(
    ram: &GuestRam,
    (what, path): (&'static str, PathBuf),
    file: &mut F,
    initrd: Option<ImageFile>,
    highest: u64,
) -> Result<Entry, BootError> {
    let refuse = |problem: String| BootError::Unfit { what, path: path.clone(), problem };
    let kind = image::inspect(file, ram).map_err(refuse)?;
    let lowest = Some(GuestAddress(layout::HIGH_MEMORY));
    let loaded = match kind {
        Kind::Elf => loader::Elf::load(ram, None, file, lowest),
        Kind::BzImage => loader::BzImage::load(ram, None, file, lowest),
    };
    let loaded = loaded.map_err(|e| refuse(format!("cannot be loaded: {e}")))?;
    let kernel_end = loaded.setup_header.map_or(loaded.kernel_end, |header| {
        // A bzImage unpacks itself to its preferred address and needs room there.
        loaded.kernel_end.max(header.pref_address.saturating_add(u64::from(header.init_size)))
    });
    if kernel_end > highest {
        let mib = highest >> 20;
        return Err(refuse(format!("does not end below {mib} MiB")));
    }
    let limit = linux64::initrd_limit(loaded.setup_header.as_ref());
    let initrd = initrd.map(|initrd| load_initrd(ram, initrd, kernel_end, limit)).transpose()?;
    match loaded.pvh_boot_cap {
        loader::PvhBootCapability::PvhEntryPresent(rip) => {
            pvh::write(ram, initrd)?;
            Ok(Entry::Pvh { rip: rip.0 })
        }
        _ => {
            linux64::write(ram, loaded.setup_header, initrd)?;
            let offset = if kind == Kind::BzImage { linux64::BZIMAGE_ENTRY } else { 0 };
            Ok(Entry::Linux64 { rip: loaded.kernel_load.0 + offset })
        }
    }
}

/// Puts the initrd as high as it may lie, page-aligned, out of the unpacking kernel's way.
fn load_initrd(
    ram: &GuestRam,
    initrd: ImageFile,
    kernel_end: u64,
    limit: u64,
) -> Result<InitrdRange, BootError> {
    let ImageFile { mut file, path } = initrd;
    let read_error =
        |path: &PathBuf, source| BootError::Read { what: "initrd", path: path.clone(), source };
    let bytes = file.metadata().map_err(|e| read_error(&path, e))?.len();
    let top = image::low_ram_end(ram).min(limit);
    let start = top.checked_sub(bytes).map_or(0, |start| start & !0xfff);
    if start < kernel_end || start < layout::HIGH_MEMORY {
        return Err(BootError::InitrdTooLarge { path, bytes });
    }
    ram.read_exact_volatile_from(GuestAddress(start), &mut file, bytes as usize)
        .map_err(|e| read_error(&path, io::Error::other(e)))?;
    Ok(InitrdRange { start, bytes })
}

/// RAM as a boot protocol tells it: usable ranges, lowest first, the legacy hole left out.
fn usable_ram(ram: &GuestRam) -> Vec<(u64, u64)> {
    let mut ranges = vec![(0, layout::LOW_MEMORY_END)];
    for (start, bytes) in image::ram_ranges(ram) {
        let from = start.max(layout::HIGH_MEMORY);
        ranges.push((from, start + bytes - from));
    }
    ranges
}
