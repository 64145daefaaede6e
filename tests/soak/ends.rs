//! How soaks and their machines' processes end.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::process::Signal;
use serde_json::Value;

use super::{Running, verdict};
use crate::harness::process::Process;
use crate::harness::{Started, cleanslate, eventually, run, temp_dir};

#[test]
fn with_keep_going_every_machine_gets_to_its_end() {
    let dir = temp_dir();
    let bundle = dir.path().join("found");
    let bundle = bundle.to_str().unwrap();
    let arguments =
        ["soak", "--json", "--vms", "2", "--resets", "12", "--keep-going", "--inject", "fpu-kept"];
    let outcome =
        run(&[&arguments[..], &["--bundle", bundle, "--seed", "3"]].concat()).expect_status(1);
    let (last, names) = verdict(&outcome);
    assert_eq!((&last["ending"], &last["resets"]), (&"complete".into(), &24.into()), "{outcome}");
    assert_eq!((names, &last["findings"]), (vec!["fpu-kept".into()], &24.into()), "{outcome}");
    assert_eq!(fs::read_dir(bundle).unwrap().count(), 20, "bundles are limited");
    // What was found once is not overwritten by another soak.
    run(&["soak", "--resets", "1", "--bundle", bundle])
        .expect_status(2)
        .expect_stderr("is not empty")
        .expect_one_line_of_stderr();
}

#[test]
fn a_machines_process_that_is_killed_is_a_finding_and_another_takes_its_place() {
    for whom in ["machine", "caller"] {
        let mut soak = Running::start(&["--keep-going"], 2);
        let callers = soak.callers();
        assert_eq!(callers.len(), 2, "{}", soak.seen);
        let victim = if whom == "machine" { Running::machine_of(callers[0]) } else { callers[0] };
        victim.signal(Signal::KILL);
        soak.read_until(|line| line["findings"][0]["name"] == "vm-killed");
        // It goes on: a new process for that machine, after the first life of which it is the second.
        let mut new = Vec::new();
        eventually("there are two processes again", || {
            new = soak.callers();
            new.len() == 2 && new != callers
        });
        // Its lives begin again, with a seed of its own.
        soak.read_until(|line| line["process"] == 1 && line["life"].as_u64() > Some(3));
        soak.signal(Signal::INT);
        let (outcome, dir) = soak.finish();
        let outcome = outcome.expect_status(130);
        let (last, names) = verdict(&outcome);
        assert_eq!((&last["verdict"], &last["ending"]), (&Value::Null, &"interrupted".into()));
        assert_eq!(names, ["vm-killed"], "{outcome}");
        let bundles = fs::read_dir(dir.path()).unwrap().next().expect("a bundle").unwrap().path();
        let facts =
            fs::read_dir(bundles).unwrap().next().unwrap().unwrap().path().join("finding.json");
        assert!(fs::read_to_string(facts).unwrap().contains("vm-killed"), "{outcome}");
    }
}

#[test]
fn without_keep_going_a_killed_process_ends_the_soak_with_a_verdict() {
    let mut soak = Running::start(&[], 2);
    soak.a_machine().signal(Signal::KILL);
    let (outcome, _dir) = soak.finish();
    let outcome = outcome.expect_status(1);
    assert_eq!(verdict(&outcome).1, ["vm-killed"], "{outcome}");
    assert!(outcome.stdout.contains("killed by signal 9"), "{outcome}");
}

#[test]
fn a_machines_process_that_hangs_is_a_finding() {
    // It may say nothing for ten times that.
    let mut soak = Running::start(&["--timeout", "1"], 2);
    soak.a_machine().signal(Signal::STOP);
    let (outcome, _dir) = soak.finish();
    let outcome = outcome.expect_status(1);
    assert_eq!(verdict(&outcome).1, ["vm-hung"], "{outcome}");
}

#[test]
fn a_machines_process_that_runs_out_of_memory_is_a_finding() {
    let mut soak = Running::start(&[], 2);
    let caller = soak.callers()[0];
    let group = control_group(Running::machine_of(caller));
    // What it has just now, until that was one of the moments in which a reset has let go of the guest's memory.
    let v2 = group.join("memory.max").exists();
    let (limit, usage) = match v2 {
        true => ("memory.max", "memory.current"),
        false => ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    };
    eventually("the limit is met", || {
        // Both fail once the group is gone, and the limit while more than that is in use.
        let usage = fs::read_to_string(group.join(usage)).unwrap_or_default();
        let _ = fs::write(group.join(limit), usage.trim());
        !caller.is_there()
    });
    let (outcome, _dir) = soak.finish();
    let outcome = outcome.expect_status(1);
    assert_eq!(verdict(&outcome).1, ["vm-out-of-memory"], "{outcome}");
}

/// The control group that limits a process's memory.
fn control_group(process: Process) -> PathBuf {
    let groups = fs::read_to_string(format!("/proc/{}/cgroup", process.pid)).unwrap();
    let memory = groups.lines().find_map(|line| {
        let mut parts = line.splitn(3, ':').skip(1);
        let (controllers, path) = (parts.next()?, parts.next()?);
        let top = match controllers {
            "" => "/sys/fs/cgroup",
            names if names.split(',').any(|name| name == "memory") => "/sys/fs/cgroup/memory",
            _ => return None,
        };
        let path = Path::new(top).join(path.trim_start_matches('/'));
        ["memory.max", "memory.limit_in_bytes"]
            .iter()
            .any(|file| path.join(file).exists())
            .then_some(path)
    });
    memory.expect("the machine has a control group")
}

#[test]
fn ctrl_c_ends_all_machines_and_tells_what_was_done() {
    let mut soak = Running::start(&[], 3);
    soak.signal(Signal::INT);
    let (outcome, dir) = soak.finish();
    let outcome = outcome.expect_status(130);
    let (last, names) = verdict(&outcome);
    assert_eq!(last["ending"], "interrupted", "{outcome}");
    assert!(names.is_empty() && last["lives"].as_u64() > Some(9), "{outcome}");
    assert_eq!(
        fs::read_dir(dir.path()).unwrap().count(),
        0,
        "nothing was found, so nothing is kept"
    );
}

#[test]
fn machines_do_not_outlive_a_soak_that_is_killed() {
    let mut soak = Running::start(&[], 2);
    let callers = soak.callers();
    let groups: Vec<_> =
        callers.into_iter().map(|caller| control_group(Running::machine_of(caller))).collect();
    assert!(groups.iter().all(|group| group.exists()));
    soak.signal(Signal::KILL);
    let (outcome, _dir) = soak.finish();
    assert_eq!(outcome.status, None, "{outcome}");
    eventually("no control group is left", || !groups.iter().any(|group| group.exists()));
}

#[test]
fn a_soak_ends_when_its_time_is_up() {
    let outcome = run(&["soak", "--json", "--duration", "1s", "--seed", "4"]).expect_status(0);
    let (last, _) = verdict(&outcome);
    assert_eq!(
        (&last["verdict"], &last["ending"]),
        (&"clean".into(), &"time-up".into()),
        "{outcome}"
    );
}

#[test]
fn a_soak_outlives_the_terminal_if_that_was_asked_for() {
    let dir = temp_dir();
    let program = cleanslate(&["soak", "--json", "--duration", "1h"]);
    let mut command = Command::new("nohup");
    // Not by a shell, whose process this would be.
    command.arg(program.get_program()).args(program.get_args()).current_dir(dir.path());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).process_group(0);
    let mut soak = Running::new(Started::new(command), dir, 1);
    soak.signal(Signal::HUP);
    let mut lives = 0;
    soak.read_until(|line| {
        lives += u64::from(line["life"].is_u64());
        lives == 50
    });
    soak.signal(Signal::INT);
    soak.finish().0.expect_status(130);
    // And otherwise not.
    let mut soak = Running::start(&[], 1);
    soak.signal(Signal::HUP);
    soak.finish().0.expect_status(130);
}

#[test]
fn a_soak_that_nobody_reads_ends() {
    let mut soak = Running::start(&[], 1);
    soak.look();
    let Running { program, stdout, processes, .. } = soak;
    drop(stdout);
    let outcome = program.finish("cleanslate soak --json --duration 1h | true").expect_status(130);
    assert!(outcome.stderr.is_empty(), "{outcome}");
    eventually("no process is left", || !processes.iter().any(Process::is_there));
}
