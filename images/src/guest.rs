//! What a Linux guest takes: a kernel, and a first file system with the agent and the drivers that it loads.

use std::path::{Path, PathBuf};

use crate::archive::Archive;
use crate::cache::cached;
use crate::kernel::{Kernel, KernelError, read};
use crate::{LINUX_AGENT, unpack};

/// Drivers by what they are for, as the agent knows it (`guest-agent/linux/src/modules.rs`), and whether it works without.
const GROUPS: [(&str, &[&str], bool); 5] = [
    ("socket", &["vsock"], false),
    ("transport", &["virtio_mmio", "vmw_vsock_virtio_transport"], false),
    ("rng", &["virtio_rng"], true),
    ("block", &["virtio_blk"], true),
    ("msr", &["msr"], true),
];

/// A Linux guest.
#[derive(Clone, Debug)]
pub struct LinuxGuest {
    /// Which kernel it is.
    pub kernel: Kernel,
    /// The kernel in the form that kexec takes, for a guest that is to use it.
    pub kexec: Option<PathBuf>,
}

impl LinuxGuest {
    /// With the kernel in the file, or with the newest that is installed. `kexec` says whether the guest is to load it itself.
    ///
    /// # Errors
    /// [`KernelError`].
    pub fn new(kernel: Option<&Path>, kexec: bool) -> Result<Self, KernelError> {
        let kernel = match kernel {
            Some(path) => Kernel::of(path)?,
            None => Kernel::find()?,
        };
        let kexec = if kexec { Some(kernel.packed()?) } else { None };
        Ok(Self { kernel, kexec })
    }

    /// The kernel unpacked, if it is packed in a way that is known here. `None` if its file is to be booted as it is.
    ///
    /// # Errors
    /// [`KernelError`].
    pub fn unpacked_image(&self) -> Result<Option<Vec<u8>>, KernelError> {
        if self.kernel.is_elf()? {
            return Ok(None);
        }
        let file = read(&self.kernel.path)?;
        cached("kernel", &[&file], || Ok(self.unpacked(&file)?.0)).map(Some)
    }

    /// What is in the kernel's file, unpacked if that can be, and how distributions call such a file.
    pub(crate) fn unpacked(&self, file: &[u8]) -> Result<(Vec<u8>, &'static str), KernelError> {
        let broken = |what| KernelError::Broken(self.kernel.path.clone(), what);
        Ok(match unpack::elf(file).map_err(broken)? {
            Some(elf) => (elf, "vmlinux"),
            None if file.starts_with(b"\x7fELF") => (file.to_vec(), "vmlinux"),
            None => (file.to_vec(), "vmlinuz"),
        })
    }

    /// All drivers that there are for it.
    pub(crate) fn module_names(&self) -> Vec<&'static str> {
        let names = GROUPS.into_iter().flat_map(|(_, names, _)| names);
        let there = names.filter(|name| self.kernel.modules(&[name]).is_ok());
        there.copied().collect()
    }

    /// The first file system.
    ///
    /// # Errors
    /// [`KernelError`].
    pub fn file_system(&self) -> Result<Vec<u8>, KernelError> {
        let mut archive = Archive::default();
        archive.file("/init", LINUX_AGENT);
        let mut order = String::new();
        for (group, names, optional) in GROUPS {
            let modules = match self.kernel.modules(names) {
                Err(KernelError::NoModule { .. }) if optional => Vec::new(),
                modules => modules?,
            };
            for module in modules {
                order += &format!("{group} {}\n", module.file);
                archive.file(Path::new("/modules").join(&module.file), &module.contents);
            }
        }
        archive.file("/modules/order", order.as_bytes());
        if let Some(path) = &self.kexec {
            archive.file("/kernel", &read(path)?);
        }
        // The kernel opens it for the first process, whose standard error it becomes.
        archive.directory("/dev");
        Ok(archive.finish())
    }
}
