//! Tries to reach files, devices and mounts.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use jailer::{Jail, Root};
use rustix::fs::{CWD, FileType, Mode};
use rustix::io::Errno;
use rustix::mount::MountFlags;
use rustix::thread::UnshareFlags;

use super::{check, is_outside, machine, open, program, showing, works_in};
use crate::harness::runner::tests;
use crate::harness::{raw, temp_dir};

tests! {
    Root files_of_the_host_are_out_of_reach,
    Nobody files_of_the_host_are_out_of_reach_for_nobody,
    Root landlock_keeps_a_machine_from_files_that_are_in_sight,
    Nobody landlock_keeps_a_machine_of_nobody_from_files_that_are_in_sight,
    Root nothing_is_written_outside,
    Nobody nothing_is_written_outside_by_nobody,
    Root no_path_leads_out_of_a_directory,
    Root no_device_is_made_and_none_is_opened,
    Root nothing_is_mounted,
    Nobody nothing_is_mounted_by_nobody,
}

fn check_files() {
    let both = |errno| [(machine(), errno), (program(), errno)];
    for path in ["/etc/passwd", "/proc/self/status", "/dev/null", "/sys/kernel", "/tmp", "/../etc"]
    {
        check(&format!("open {path}"), &|| open(path), both(Errno::NOENT));
    }
    // Where the caller was when the jail was made.
    check("open by the working directory", &|| open("etc/passwd"), both(Errno::NOENT));
}

fn files_of_the_host_are_out_of_reach() {
    std::env::set_current_dir("/").unwrap();
    check_files();
}

fn files_of_the_host_are_out_of_reach_for_nobody() {
    std::env::set_current_dir("/").unwrap();
    check_files();
}

fn check_landlock() {
    // /etc is in sight of both; only one may open what is there.
    let jails = || [(showing("/etc", machine()), Errno::ACCESS)];
    check("open a file in sight", &|| open("/etc/passwd"), jails());
    check("list a directory in sight", &|| fs::read_dir("/etc").map(drop), jails());
    works_in("open a file in sight", showing("/etc", program()), &|| open("/etc/passwd"));
    check("list the root", &|| fs::read_dir("/").map(drop), [(machine(), Errno::ACCESS)]);
    works_in("list the root", program(), &|| fs::read_dir("/").map(drop));
}

fn landlock_keeps_a_machine_from_files_that_are_in_sight() {
    check_landlock();
}

fn landlock_keeps_a_machine_of_nobody_from_files_that_are_in_sight() {
    check_landlock();
}

fn check_writing() {
    let dir = temp_dir();
    fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o777)).unwrap();
    let shown = dir.path().to_str().unwrap();
    // In the root. Without a jail, where root alone may write there, in the directory instead.
    let place =
        |name: &str| if is_outside() { dir.path().join(name) } else { Path::new("/").join(name) };
    let both = || [(machine(), Errno::ROFS), (program(), Errno::ROFS)];
    check("make a file", &|| File::create(place("file")).map(drop), both());
    check("make a directory", &|| fs::create_dir(place("dir")), both());
    // A directory that is shown can be written to by whoever may open files at all.
    let attempt = || {
        let path = dir.path().join("other");
        File::create(&path)?;
        fs::remove_file(path)
    };
    check("make a file in sight", &attempt, [(showing(shown, machine()), Errno::ACCESS)]);
    works_in("make a file in sight", showing(shown, program()), &attempt);
    // Unless it is shown to be looked at alone.
    let mut jail = showing(shown, program());
    jail.mounts[0].read_only = true;
    check("make a file in a directory that is read-only", &attempt, [(jail, Errno::ROFS)]);
}

fn nothing_is_written_outside() {
    check_writing();
}

fn nothing_is_written_outside_by_nobody() {
    check_writing();
}

fn no_path_leads_out_of_a_directory() {
    let (root, outside) = (temp_dir(), temp_dir());
    let secret = outside.path().join("secret");
    fs::write(&secret, "").unwrap();
    symlink(&secret, root.path().join("link")).unwrap();
    symlink("../../../../../../../../etc/passwd", root.path().join("up")).unwrap();
    let jail = || Jail { root: Root::Directory(root.path().into()), ..program() };
    for name in ["link", "up"] {
        let attempt = || {
            if is_outside() {
                open(root.path().join(name).to_str().unwrap())
            } else {
                open(&format!("/{name}"))
            }
        };
        check(&format!("follow {name}"), &attempt, [(jail(), Errno::NOENT)]);
    }
    // The classical way out: a second root below, while the working directory stays above it.
    fs::create_dir(root.path().join("below")).unwrap();
    let attempt = || {
        let below = if is_outside() { root.path().join("below") } else { "/below".into() };
        rustix::process::chroot(below)?;
        open("../../../../../../etc/passwd")
    };
    std::env::set_current_dir(root.path()).unwrap();
    check("change the root", &attempt, [(jail(), Errno::PERM)]);
}

fn no_device_is_made_and_none_is_opened() {
    let root = temp_dir();
    fs::set_permissions(root.path(), PermissionsExt::from_mode(0o777)).unwrap();
    let jail = || Jail { root: Root::Directory(root.path().into()), ..program() };
    let here = |name: &str| {
        if is_outside() { root.path().join(name) } else { Path::new("/").join(name) }
    };
    let make = |path: PathBuf| {
        let device = rustix::fs::makedev(1, 3);
        Ok(rustix::fs::mknodat(
            CWD,
            path,
            FileType::CharacterDevice,
            Mode::RUSR | Mode::ROTH,
            device,
        )?)
    };
    let attempt = || make(here(if is_outside() { "made" } else { "new" }));
    check("make a device", &attempt, [(jail(), Errno::PERM)]);
    // One that somebody has put there.
    let attempt = || open(here("made").to_str().unwrap());
    check("open a device", &attempt, [(jail(), Errno::ACCESS)]);
    works_in("open a device that is shown by name", showing("/dev/null", program()), &|| {
        open("/dev/null")
    });
}

fn mount() -> io::Result<()> {
    let none = None::<&std::ffi::CStr>;
    Ok(rustix::mount::mount("none", "/", "tmpfs", MountFlags::empty(), none)?)
}

/// As root of a user namespace, which everybody may become: filters keep a machine from it as well, and a program that
/// does it is not outside by that.
fn mount_in_a_user_namespace() -> io::Result<()> {
    raw::unshare(UnshareFlags::NEWUSER | UnshareFlags::NEWNS)?;
    mount()
}

fn nothing_is_mounted() {
    let both = || [(machine(), Errno::PERM), (program(), Errno::PERM)];
    check("mount", &mount, both());
    let attempt = || Ok(rustix::mount::mount_remount("/", MountFlags::empty(), "")?);
    check("make the root writable", &attempt, both());
    check("make a mount namespace", &|| raw::unshare(UnshareFlags::NEWNS), both());
    let machine = [(machine(), Errno::PERM)];
    check("mount in a user namespace", &mount_in_a_user_namespace, machine);
}

fn nothing_is_mounted_by_nobody() {
    let machine = [(machine(), Errno::PERM)];
    check("mount in a user namespace", &mount_in_a_user_namespace, machine);
}
