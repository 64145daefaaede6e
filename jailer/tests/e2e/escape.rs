//! What a process inside tries and must not succeed with. Each try is made without a jail as well, where it has to succeed:
//! otherwise its failure inside would prove nothing. System call filters have tests of their own; here the jail holds alone.

mod files;
mod processes;
mod resources;

use std::fs::File;
use std::io;
use std::path::Path;

use jailer::{CgroupPlan, End, Id, Jail, Mount, Network, ResourceLimit, Root};
use rustix::io::Errno;
use rustix::mount::MountPropagationFlags;
use rustix::process::{Pid, WaitOptions};
use rustix::thread::UnshareFlags;

use crate::harness::runner::Test;
use crate::harness::{expect_no_traces, new_id, raw};

/// All of them.
pub const TESTS: [&[Test]; 3] = [files::TESTS, processes::TESTS, resources::TESTS];

/// What a try came to: as a process's exit status, the number of the error, or 0 for success.
type Try<'a> = &'a dyn Fn() -> io::Result<()>;

fn number(result: io::Result<()>) -> i32 {
    match result {
        Ok(()) => 0,
        Err(error) => error.raw_os_error().unwrap_or(255),
    }
}

/// A jail as a machine has it: it opens no file.
pub fn machine() -> Jail {
    Jail {
        id: new_id().parse::<Id>().unwrap(),
        user: None,
        network: Network::New,
        new_pid_namespace: true,
        root: Root::Empty,
        mounts: Vec::new(),
        cgroup: CgroupPlan::default(),
        limits: vec![ResourceLimit::NO_CORE],
        runs_a_program: false,
    }
}

/// A jail as the `jailer` program makes it: what is in sight can be used, and processes are in sight.
fn program() -> Jail {
    Jail { new_pid_namespace: false, runs_a_program: true, ..machine() }
}

fn showing(path: &str, jail: Jail) -> Jail {
    let mount = Mount { source: path.into(), target: path.into(), read_only: false };
    Jail { mounts: vec![mount], ..jail }
}

/// How a try ends in a jail.
#[track_caller]
fn try_in(jail: Jail, attempt: Try<'_>) -> End {
    let id = jail.id.to_string();
    let prepared = jail.prepare().expect("prepare a jail");
    let is_root = rustix::process::geteuid().is_root();
    assert!(!is_root || prepared.lacks().is_empty(), "{:?}", prepared.lacks());
    let end = prepared.run(
        (),
        |()| Vec::new(),
        |(), entered| match entered {
            Ok(inside) => {
                inside.let_signals_come();
                number(attempt()) as u8
            }
            Err(error) => panic!("enter a jail: {error:?}"),
        },
    );
    expect_no_traces(&id);
    end.expect("run in a jail")
}

/// How a try ends in a copy of this process, whose mounts are its own if it is root.
fn try_without_jail(attempt: Try<'_>) -> i32 {
    let child = raw::fork(|| {
        if rustix::process::geteuid().is_root() {
            raw::unshare(UnshareFlags::NEWNS).expect("make a mount namespace");
            let flags = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
            rustix::mount::mount_change("/", flags).expect("make mounts private");
        }
        number(attempt())
    })
    .expect("fork");
    status_of(child)
}

pub fn status_of(child: Pid) -> i32 {
    let ended = rustix::process::waitpid(Some(child), WaitOptions::empty()).expect("wait");
    ended.expect("a child has ended").1.exit_status().unwrap_or(-1)
}

/// Fails the test unless the try succeeds without a jail, and fails in each of the jails with its error.
#[track_caller]
fn check(what: &str, attempt: Try<'_>, jails: impl IntoIterator<Item = (Jail, Errno)>) {
    assert_eq!(try_without_jail(attempt), 0, "{what} works without a jail");
    for (jail, expected) in jails {
        let kind = if jail.runs_a_program { "a program's jail" } else { "a machine's jail" };
        let end = try_in(jail, attempt);
        let status = expected.raw_os_error();
        assert!(
            matches!(end, End::Exited(got) if i32::from(got) == status),
            "{what} in {kind}: {end:?} instead of {expected:?} ({status})"
        );
    }
}

/// Fails the test unless the try succeeds in this jail: it shows that another one fails for the reason that is meant.
#[track_caller]
fn works_in(what: &str, jail: Jail, attempt: Try<'_>) {
    let end = try_in(jail, attempt);
    assert!(matches!(end, End::Exited(0)), "{what}: {end:?}");
}

fn open(path: &str) -> io::Result<()> {
    File::open(path).map(drop)
}

/// True where the host's files are in sight.
fn is_outside() -> bool {
    Path::new("/etc/passwd").exists()
}
