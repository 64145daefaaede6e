//! Tries to reach other processes, to run other programs, and to get rights.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use jailer::{Jail, ResourceLimit, Root, User};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::process::{DumpableBehavior, Pid, Resource, Rlimit, Signal};

use super::{check, is_outside, machine, open, program, showing, status_of, works_in};
use crate::harness::runner::{tests, this_program};
use crate::harness::{not_run, pause, probe, raw, temp_dir};

tests! {
    Root other_processes_are_out_of_reach,
    Nobody other_processes_are_out_of_reach_for_nobody,
    Root processes_of_the_same_user_are_out_of_reach,
    Root other_programs_do_not_run,
    Nobody other_programs_do_not_run_for_nobody,
    Root a_set_user_id_program_gives_nothing,
    Root rights_do_not_come_back,
}

/// A process outside that waits until the test is over.
struct Victim(Pid);

impl Victim {
    fn new(uid: u32) -> Self {
        let (ready, writer) = rustix::pipe::pipe().unwrap();
        let victim = raw::fork(|| {
            if rustix::process::geteuid().is_root() {
                raw::become_user(uid).expect("become a user");
            }
            // As it was before it became somebody else: those who are the same may look into it.
            rustix::process::set_dumpable_behavior(DumpableBehavior::Dumpable).expect("ask");
            rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).expect("ask");
            rustix::io::write(&writer, b"x").expect("write into a pipe");
            pause()
        });
        let victim = Self(victim.expect("fork"));
        assert_eq!(rustix::io::read(&ready, &mut [0]), Ok(1));
        victim
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = rustix::process::kill_process(self.0, Signal::KILL);
        status_of(self.0);
    }
}

fn check_processes(victim: &Victim, program_errno: Errno) {
    let pid = victim.0;
    let jails = || [(machine(), Errno::SRCH), (program(), program_errno)];
    check("signal a process", &|| Ok(rustix::process::test_kill_process(pid)?), jails());
    check("trace a process", &|| raw::seize(pid), jails());
    let environment = format!("/proc/{}/environ", pid.as_raw_pid());
    let jails = [(machine(), Errno::NOENT), (program(), Errno::NOENT)];
    check("read a process's environment", &|| open(&environment), jails);
}

fn other_processes_are_out_of_reach() {
    let victim = Victim::new(0);
    check_processes(&victim, Errno::PERM);
    // With /proc in sight it is who they are that counts.
    let environment = format!("/proc/{}/environ", victim.0.as_raw_pid());
    check(
        "read a process's environment",
        &|| open(&environment),
        [
            (showing("/proc", machine()), Errno::ACCESS),
            (showing("/proc", program()), Errno::ACCESS),
        ],
    );
}

fn other_processes_are_out_of_reach_for_nobody() {
    // Without root there always is a pid namespace.
    check_processes(&Victim::new(65534), Errno::SRCH);
}

fn processes_of_the_same_user_are_out_of_reach() {
    /// The first version that keeps signals in (landlock(7)).
    const SCOPES: i64 = 6;
    if raw::landlock_version() < SCOPES {
        return not_run("this kernel's Landlock does not keep signals in; it takes Linux 6.12");
    }
    let victim = Victim::new(65534);
    let as_the_same = |attempt: fn(Pid) -> io::Result<()>| {
        let pid = victim.0;
        move || {
            if is_outside() {
                raw::become_user(65534)?;
            }
            attempt(pid)
        }
    };
    let signal = as_the_same(|pid| Ok(rustix::process::test_kill_process(pid)?));
    check("signal a process of the same user", &signal, [(program(), Errno::PERM)]);
    check("trace a process of the same user", &as_the_same(raw::seize), [(program(), Errno::PERM)]);
}

fn check_programs() {
    let path = this_program();
    let by_path = || {
        let opened = rustix::fs::open(&path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
        Err(raw::execute(&opened, probe::NOTHING))
    };
    check("run a program", &by_path, [(machine(), Errno::NOENT), (program(), Errno::NOENT)]);
    // As a file of a directory that is in sight.
    let dir = path.parent().unwrap().to_str().unwrap();
    check("run a program in sight", &by_path, [(showing(dir, program()), Errno::ACCESS)]);
    // A file that was named itself may be run, but not by a machine.
    let file = path.to_str().unwrap();
    check("run a program in sight", &by_path, [(showing(file, machine()), Errno::ACCESS)]);
    works_in("run a program that was named", showing(file, program()), &by_path);
}

fn other_programs_do_not_run() {
    check_programs();
}

fn other_programs_do_not_run_for_nobody() {
    check_programs();
}

fn a_set_user_id_program_gives_nothing() {
    let root = temp_dir();
    let path = root.path().join("program");
    fs::copy(this_program(), &path).unwrap();
    fs::set_permissions(&path, PermissionsExt::from_mode(0o4755)).unwrap();
    let attempt = || {
        if is_outside() {
            raw::become_user(65534)?;
        }
        let path = if is_outside() { path.as_path() } else { Path::new("/program") };
        let opened = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
        // Its exit status is 0 if it is root, and EPERM otherwise.
        Err(raw::execute(&opened, probe::AM_I_ROOT))
    };
    let jail = Jail { root: Root::Directory(root.path().into()), ..program() };
    check("become root by a program", &attempt, [(jail, Errno::PERM)]);
}

fn rights_do_not_come_back() {
    let both = || [(machine(), Errno::PERM), (program(), Errno::PERM)];
    check("become root", &|| raw::become_user(0), both());
    let attempt = || Ok(rustix::thread::set_thread_groups(&[rustix::process::Gid::ROOT])?);
    check("join a group", &attempt, both());
    // Not even to root.
    let root = |jail: Jail| Jail { user: Some(User { uid: 0, gid: 0 }), ..jail };
    let all = || {
        both().into_iter().chain([(root(machine()), Errno::PERM), (root(program()), Errno::PERM)])
    };
    let name = rustix::system::uname().nodename().to_owned();
    let attempt = || Ok(rustix::system::sethostname(name.to_bytes())?);
    check("name the host", &attempt, all());
    check("change the root", &|| Ok(rustix::process::chroot("/")?), all());
    let limited = |jail: Jail| Jail { limits: vec![ResourceLimit::descriptors(50)], ..jail };
    let more = Rlimit { current: Some(60), maximum: Some(60) };
    let attempt = || Ok(rustix::process::setrlimit(Resource::Nofile, more)?);
    check(
        "raise a limit",
        &attempt,
        [(limited(machine()), Errno::PERM), (limited(program()), Errno::PERM)],
    );
}
