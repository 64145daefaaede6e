//! The root that a jailed process sees: an empty read-only file system in memory, or a directory of the user's.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags,
    OpenTreeFlags, UnmountFlags,
};

use crate::steps::{StepError, step};
use crate::sys;

/// What a jailed process has for a root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Root {
    /// Nothing but the [`Mount`]s, read-only.
    Empty,
    /// This directory, in which it may write what its user may.
    Directory(PathBuf),
}

/// A file or directory of the host that is shown in the jail, without what is mounted below it. A directory gives no
/// programs and no devices; a file may be a device, since somebody has named it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Its path on the host.
    pub source: PathBuf,
    /// Where the jail has it: an absolute path.
    pub target: PathBuf,
    /// Nothing can be made, changed or removed there. Sockets can be connected to all the same.
    pub read_only: bool,
}

/// Attributes of everything that is mounted: no devices, no programs with more rights than whoever starts them.
const PLAIN: MountAttrFlags =
    MountAttrFlags::MOUNT_ATTR_NOSUID.union(MountAttrFlags::MOUNT_ATTR_NODEV);

/// Nothing in there can be run either.
const INERT: MountAttrFlags = PLAIN.union(MountAttrFlags::MOUNT_ATTR_NOEXEC);

/// Makes `root` the root of this process, which is in a mount namespace of its own, and lets go of the old one.
pub(crate) fn enter(root: &Root, mounts: &[Mount]) -> Result<(), StepError> {
    // What happens to mounts in here must not reach the host.
    rustix::mount::mount_change(
        "/",
        MountPropagationFlags::PRIVATE.union(MountPropagationFlags::REC),
    )
    .map_err(step("make mounts private"))?;
    // Opened before the old root is out of sight.
    let shown: Vec<OwnedFd> = mounts
        .iter()
        .map(|mount| {
            let tree = clone_tree(&mount.source);
            tree.map_err(step(format!("show {:?}", mount.source)))
        })
        .collect::<Result<_, _>>()?;
    let new = match root {
        Root::Empty => empty().map_err(step("mount an empty root")),
        Root::Directory(dir) => clone_tree(dir).map_err(step(format!("mount the root {dir:?}"))),
    }?;
    attach(&new, Path::new("/")).map_err(step("mount the root"))?;
    rustix::process::fchdir(&new).map_err(step("enter the root"))?;
    pivot()?;
    // Now that the host's files are out of reach: a directory of the user's may hold links that lead anywhere.
    for (mount, tree) in mounts.iter().zip(&shown) {
        show(mount, tree)
            .map_err(step(format!("show {:?} as {:?}", mount.source, mount.target)))?;
    }
    let attributes = match root {
        Root::Empty => INERT.union(MountAttrFlags::MOUNT_ATTR_RDONLY),
        Root::Directory(_) => PLAIN,
    };
    sys::set_mount_attributes(&new, attributes).map_err(step("make the root read-only"))
}

/// An empty file system in memory, mounted nowhere. It has room for the places of mounts alone.
fn empty() -> rustix::io::Result<OwnedFd> {
    let context = rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    rustix::mount::fsconfig_set_string(context.as_fd(), "mode", "0755")?;
    rustix::mount::fsconfig_set_string(context.as_fd(), "size", "64k")?;
    rustix::mount::fsconfig_create(context.as_fd())?;
    rustix::mount::fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, INERT)
}

/// A copy of the mount that `path` is in, from there down, mounted nowhere.
fn clone_tree(path: &Path) -> rustix::io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    rustix::mount::open_tree(CWD, path, flags)
}

fn attach(tree: &OwnedFd, target: &Path) -> rustix::io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    rustix::mount::move_mount(tree, "", CWD, target, flags)
}

/// Makes a place in the new root, which is the root and the working directory, and mounts `tree` there.
fn show(mount: &Mount, tree: &OwnedFd) -> rustix::io::Result<()> {
    let target = mount.target.strip_prefix("/").unwrap_or(&mount.target);
    if let Some(above) = target.parent() {
        let mut path = PathBuf::new();
        for part in above {
            path.push(part);
            present(rustix::fs::mkdir(&path, Mode::from_raw_mode(0o755)))?;
        }
    }
    let is_directory =
        rustix::fs::FileType::from_raw_mode(rustix::fs::fstat(tree)?.st_mode).is_dir();
    if is_directory {
        present(rustix::fs::mkdir(target, Mode::from_raw_mode(0o755)))?;
    } else {
        // A command of before may have left a FIFO here, which would wait for a reader.
        let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        drop(rustix::fs::open(target, flags, Mode::from_raw_mode(0o644))?);
    }
    let mut attributes = if is_directory { INERT } else { MountAttrFlags::empty() };
    attributes.set(MountAttrFlags::MOUNT_ATTR_RDONLY, mount.read_only);
    sys::set_mount_attributes(tree, attributes)?;
    attach(tree, target)
}

/// It is all right if it is there already.
fn present(result: rustix::io::Result<()>) -> rustix::io::Result<()> {
    match result {
        Err(Errno::EXIST) => Ok(()),
        result => result,
    }
}

/// Makes the working directory, on which a file system is mounted, the root, and unmounts the old one.
fn pivot() -> Result<(), StepError> {
    match rustix::process::pivot_root(".", ".") {
        // Both are at the same place now, the old one on top.
        Ok(()) => rustix::mount::unmount(".", UnmountFlags::DETACH)
            .map_err(step("let go of the old root"))?,
        // The root of an initramfs cannot be put aside (pivot_root(2), NOTES). The new one covers it, so it has no path any
        // more, and nobody in here may mount, unmount or chroot.
        Err(Errno::INVAL) => rustix::process::chroot(".").map_err(step("change the root"))?,
        Err(errno) => return Err(step("change the root")(errno)),
    }
    rustix::process::chdir("/").map_err(step("enter the root"))
}
