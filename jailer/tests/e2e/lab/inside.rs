//! The first process of the lab's Linux: makes of an empty system what the tests take for granted, runs them, and turns the
//! machine off. Should it fail, the kernel has lost its first process and panics, which ends the machine as well.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use rustix::mount::MountFlags;
use rustix::process::WaitOptions;
use rustix::system::RebootCommand;

use crate::harness::{raw, runner};

/// Tells the first process, on the kernel's command line, that it is the lab's.
pub const WORD: &str = "in-the-lab";

/// Where the `jailer` program is.
pub const PROGRAM: &str = "/jailer";

/// Begins the line that says where the tests are.
pub const GREETING: &str = "the lab is Linux ";

const PASSWD: &str = "\
root:x:0:0:root:/:/bin/sh
daemon:x:1:1:daemon:/:/bin/false
nobody:x:65534:65534:nobody:/:/bin/false
";
const GROUP: &str = "root:x:0:\ndaemon:x:1:\nnogroup:x:65534:\n";

/// True if this is that process.
pub fn is_here() -> bool {
    std::process::id() == 1 && std::env::args().nth(1).as_deref() == Some(WORD)
}

pub fn main() -> std::process::ExitCode {
    set_up();
    let (name, controllers) = (rustix::system::uname(), read("/sys/fs/cgroup/cgroup.controllers"));
    let release = name.release().to_string_lossy();
    println!("{GREETING}{release} with control groups of version 2: {controllers}");
    let runner = raw::fork(|| {
        join_a_group();
        // There is little that one test keeps busy.
        let jobs = std::thread::available_parallelism().map_or(1, usize::from) + 1;
        let all = crate::tests();
        let all: Vec<_> = all.iter().collect();
        i32::from(!runner::run_all(&all, jobs, Path::new(PROGRAM)))
    })
    .expect("fork");
    // Orphans come to the first process, who has to wait for them.
    while let Ok(Some((ended, _))) = rustix::process::wait(WaitOptions::empty()) {
        if ended == runner {
            break;
        }
    }
    raw::drain_stdout();
    let result = rustix::system::reboot(RebootCommand::PowerOff);
    panic!("power off: {result:?}");
}

fn read(path: &str) -> String {
    let text = fs::read_to_string(path).unwrap_or_else(|error| panic!("read {path}: {error}"));
    text.trim_end().into()
}

fn set_up() {
    let mount = |kind: &str, place: &str| {
        fs::create_dir_all(place).unwrap_or_else(|error| panic!("make {place}: {error}"));
        let none = None::<&std::ffi::CStr>;
        rustix::mount::mount(kind, place, kind, MountFlags::empty(), none)
            .unwrap_or_else(|error| panic!("mount {kind}: {error}"));
    };
    mount("proc", "/proc");
    mount("sysfs", "/sys");
    mount("devtmpfs", "/dev");
    mount("cgroup2", "/sys/fs/cgroup");
    mount("tmpfs", "/tmp");
    for (place, mode) in [("/", 0o755), ("/tmp", 0o1777)] {
        fs::set_permissions(place, PermissionsExt::from_mode(mode)).expect("set a mode");
    }
    fs::create_dir_all("/etc").expect("make /etc");
    fs::write("/etc/passwd", PASSWD).expect("write /etc/passwd");
    fs::write("/etc/group", GROUP).expect("write /etc/group");
    raw::bring_up_loopback().expect("bring up lo");
}

/// Where users start programs no process is in the root of the control groups: jails come beside the group of their caller.
fn join_a_group() {
    fs::create_dir("/sys/fs/cgroup/tests").expect("make a control group");
    fs::write("/sys/fs/cgroup/tests/cgroup.procs", "0").expect("join a control group");
}
