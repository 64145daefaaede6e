//! The drivers that `images` has put into the first file system, and their loading.

use std::fs::{self, File};
use std::path::Path;

use nix::errno::Errno;
use nix::kmod::{ModuleInitFlags, finit_module};

/// Where they lie.
const DIRECTORY: &str = "/modules";
/// Names them in the order of loading, each line `GROUP FILE`.
const ORDER: &str = "/modules/order";

/// What a module is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Group {
    /// Sockets of AF_VSOCK.
    Socket,
    /// Their device.
    Transport,
    /// virtio-rng.
    Rng,
    /// virtio-blk.
    Block,
    /// Registers as files.
    Msr,
}

impl Group {
    fn name(self) -> &'static str {
        match self {
            Self::Socket => "socket",
            Self::Transport => "transport",
            Self::Rng => "rng",
            Self::Block => "block",
            Self::Msr => "msr",
        }
    }
}

/// Loads the modules of `group` that are not loaded yet. A group without any may be built in.
///
/// # Errors
/// In words, with the module's name.
pub fn load(group: Group) -> Result<(), String> {
    // A kernel that has everything built in comes without the file.
    let order = fs::read_to_string(ORDER).unwrap_or_default();
    for name in files(&order, group) {
        let path = Path::new(DIRECTORY).join(name);
        let file = File::open(&path).map_err(|error| format!("open {path:?}: {error}"))?;
        match finit_module(&file, c"", flags(name)) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(error) => return Err(format!("load the module {name}: {error}")),
        }
    }
    Ok(())
}

fn files(order: &str, group: Group) -> impl Iterator<Item = &str> {
    let lines = order.lines().filter_map(|line| line.split_once(' '));
    lines.filter(move |(of, _)| *of == group.name()).map(|(_, file)| file)
}

/// Distributions compress modules; kernels from 5.17 on can unpack them.
fn flags(name: &str) -> ModuleInitFlags {
    match name.ends_with(".ko") {
        true => ModuleInitFlags::empty(),
        // MODULE_INIT_COMPRESSED_FILE (linux/module.h), which the crate has no name for.
        false => ModuleInitFlags::from_bits_retain(4),
    }
}

/// Whether a driver of vsock has found its device.
pub fn has_vsock_device() -> bool {
    // Its driver links the devices that it has under their names.
    let driver = "/sys/bus/virtio/drivers/vmw_vsock_virtio_transport";
    let entries = fs::read_dir(driver).into_iter().flatten().flatten();
    entries.into_iter().any(|entry| entry.file_name().to_string_lossy().starts_with("virtio"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_come_in_the_order_of_the_file_and_by_group() {
        let order = "socket vsock.ko\ntransport virtio.ko\nrng virtio-rng.ko\ntransport virtio_mmio.ko\nbad\n";
        let of = |group| files(order, group).collect::<Vec<_>>();
        assert_eq!(of(Group::Socket), ["vsock.ko"]);
        assert_eq!(of(Group::Transport), ["virtio.ko", "virtio_mmio.ko"]);
        assert_eq!(of(Group::Block), Vec::<&str>::new());
    }

    #[test]
    fn compressed_modules_are_announced_as_such() {
        assert_eq!(flags("vsock.ko").bits(), 0);
        assert_eq!(flags("vsock.ko.xz").bits(), 4);
        assert_eq!(flags("vsock.ko.zst").bits(), 4);
    }
}
