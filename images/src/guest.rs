//! What a Linux guest takes: a kernel, and a first file system with the agent and the drivers that it loads.

use std::path::Path;

use crate::archive::Archive;
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
}

impl LinuxGuest {
    /// With the kernel in the file, or with the newest that is installed.
    ///
    /// # Errors
    /// [`KernelError`].
    pub fn new(kernel: Option<&Path>) -> Result<Self, KernelError> {
        let kernel = match kernel {
            Some(path) => Kernel::of(path)?,
            None => Kernel::find()?,
        };
        Ok(Self { kernel })
    }

    /// The kernel, unpacked if it is packed in a way that is known here.
    ///
    /// # Errors
    /// [`KernelError`].
    pub fn image(&self) -> Result<Vec<u8>, KernelError> {
        let path = &self.kernel.path;
        let bytes = read(path)?;
        let elf = unpack::elf(&bytes).map_err(|what| KernelError::Broken(path.clone(), what))?;
        Ok(elf.unwrap_or(bytes))
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
        // The kernel opens it for the first process, whose standard error it becomes.
        archive.directory("/dev");
        Ok(archive.finish())
    }
}
