//! A jail in the background, and what is left when one of its processes is killed.

use std::fs;
use std::process::Stdio;

use rustix::process::{Pid, Signal};

use crate::harness::runner::tests;
use crate::harness::{
    Started, contents, eventually, expect_no_traces, finish, jail_probe, new_id, run_probe,
    temp_dir, traces,
};

tests! {
    Root a_daemon_runs_until_it_is_told_to_end,
    Nobody a_daemon_of_nobody_runs_until_it_is_told_to_end,
    Root a_daemons_supervisor_that_is_killed_takes_everything_along,
    Nobody a_daemons_supervisor_of_nobody_that_is_killed_takes_everything_along,
    Root a_daemon_that_ends_by_itself_leaves_nothing,
    Root a_daemon_holds_nothing_of_whoever_started_it,
    Root a_daemon_that_cannot_be_told_of_does_not_run,
    Root a_jailer_that_is_killed_takes_everything_along,
    Nobody a_jailer_of_nobody_that_is_killed_takes_everything_along,
    Root a_janitor_that_is_killed_leaves_its_work_to_the_jailer,
}

/// A daemon that waits, and the number of its supervisor, which has said that the command runs.
#[track_caller]
fn start(id: &str, flags: &[&str]) -> Pid {
    let flags = [&["--daemonize"], flags].concat();
    let outcome = run_probe(id, &flags, &["wait"]).expect_status(0).expect_stderr("");
    let pid = outcome.stdout.trim_end().parse().ok().and_then(Pid::from_raw);
    let pid = pid.unwrap_or_else(|| panic!("no number: {outcome}"));
    // Three processes: supervisor, janitor, and the command, which is no jailer any more.
    let is_probe = |trace: &String| trace.contains("/e2e probe") && !trace.contains("/jailer ");
    let running = traces(id).iter().filter(|trace| is_probe(trace)).count();
    assert_eq!(running, 1, "the command runs: {:?}", traces(id));
    pid
}

#[track_caller]
fn gone(id: &str, why: &str) {
    eventually(&format!("everything is gone after {why}"), || traces(id).is_empty());
}

#[track_caller]
fn check_end(flags: &[&str], signal: Signal) {
    let (id, base) = (new_id(), temp_dir());
    let below = base.path().join("made");
    let flags = [&["--chroot-base-dir", below.to_str().unwrap()], flags].concat();
    let supervisor = start(&id, &flags);
    assert!(below.exists());
    rustix::process::kill_process(supervisor, signal).unwrap();
    gone(&id, "a signal to the supervisor");
    eventually("the directory is gone", || contents(base.path()).is_empty());
}

const GROUP: [&str; 4] = ["--cgroup", "pids.max=10", "--cgroup", "cpu.shares=512"];

fn a_daemon_runs_until_it_is_told_to_end() {
    check_end(&[], Signal::TERM);
    check_end(&["--new-pid-ns"], Signal::TERM);
    check_end(&GROUP[..2], Signal::INT);
}

fn a_daemon_of_nobody_runs_until_it_is_told_to_end() {
    let (id, signal) = (new_id(), Signal::TERM);
    let supervisor = start(&id, &[]);
    rustix::process::kill_process(supervisor, signal).unwrap();
    gone(&id, "a signal to the supervisor");
    check_end_of_nobody(signal);
}

/// Nobody owns the directory that the tests make, so there is a root to be made as well.
fn check_end_of_nobody(signal: Signal) {
    check_end(&[], signal);
}

fn a_daemons_supervisor_that_is_killed_takes_everything_along() {
    check_end(&[], Signal::KILL);
    check_end(&["--new-pid-ns"], Signal::KILL);
    check_end(&GROUP[..2], Signal::KILL);
}

fn a_daemons_supervisor_of_nobody_that_is_killed_takes_everything_along() {
    check_end_of_nobody(Signal::KILL);
}

fn a_daemon_that_ends_by_itself_leaves_nothing() {
    let id = new_id();
    let flags = ["--daemonize", "--cgroup", "pids.max=10"];
    run_probe(&id, &flags, &["exit", "3"]).expect_status(0).expect_stderr("");
    gone(&id, "the command's end");
}

fn a_daemon_holds_nothing_of_whoever_started_it() {
    // `finish` reads both streams to their ends, which come only when nobody has them open any more.
    let (id, dir) = (new_id(), temp_dir());
    let supervisor = start(&id, &["--cgroup", "pids.max=10"]);
    let directory = fs::read_link(format!("/proc/{}/cwd", supervisor.as_raw_pid())).unwrap();
    assert_eq!(directory, std::path::Path::new("/"));
    assert!(rustix::process::getsid(Some(supervisor)).unwrap() == supervisor, "its own session");
    drop(dir);
    rustix::process::kill_process(supervisor, Signal::TERM).unwrap();
    gone(&id, "SIGTERM");
}

fn a_daemon_that_cannot_be_told_of_does_not_run() {
    let id = new_id();
    let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let mut command = jail_probe(&id, &["--daemonize"], &["wait"]);
    command.stdout(Stdio::from(full));
    finish(command).expect_status(2).expect_stderr("print the supervisor's number");
    gone(&id, "the refusal");
}

#[track_caller]
fn check_killed(flags: &[&str]) {
    let (id, base) = (new_id(), temp_dir());
    let below = base.path().join("made");
    let flags = [&["--chroot-base-dir", below.to_str().unwrap()], flags].concat();
    let mut jail = Started::new(jail_probe(&id, &flags, &["wait"]));
    assert!(below.exists());
    jail.signal(Signal::KILL);
    // Ends when the command is dead.
    jail.read_to_end();
    assert_eq!(jail.wait(), None);
    gone(&id, "SIGKILL to the jailer");
    eventually("the directory is gone", || contents(base.path()).is_empty());
}

fn a_jailer_that_is_killed_takes_everything_along() {
    check_killed(&[]);
    check_killed(&["--new-pid-ns"]);
    check_killed(&["--cgroup", "pids.max=10"]);
}

fn a_jailer_of_nobody_that_is_killed_takes_everything_along() {
    check_killed(&[]);
}

fn a_janitor_that_is_killed_leaves_its_work_to_the_jailer() {
    let (id, base) = (new_id(), temp_dir());
    let below = base.path().join("made");
    let flags = ["--cgroup", "pids.max=10", "--chroot-base-dir", below.to_str().unwrap()];
    let mut jail = Started::new(jail_probe(&id, &flags, &["wait"]));
    let parent = jail.child.id();
    let children = fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")).unwrap();
    let janitor = children
        .split_whitespace()
        .find(|child| {
            let name = fs::read_to_string(format!("/proc/{child}/comm")).unwrap();
            name.trim_end() == "jail-janitor"
        })
        .and_then(|child| Pid::from_raw(child.parse().ok()?))
        .expect("the jailer has a janitor");
    rustix::process::kill_process(janitor, Signal::KILL).unwrap();
    jail.signal(Signal::TERM);
    jail.read_to_end();
    assert_eq!(jail.wait(), Some(128 + 15));
    expect_no_traces(&id);
    assert!(contents(base.path()).is_empty());
}
