//! All machines' jails at once: what `run` is told of one.

use std::collections::BTreeSet;
use std::fs;

use rustix::process::Signal;

use super::Running;
use crate::harness::{run, temp_dir};

fn status(pid: u32, name: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    line.split_whitespace().next().unwrap().to_owned()
}

#[test]
fn each_machine_has_a_name_and_a_user_of_its_own() {
    let options = ["--id", "soak-test", "--uid", "+54321", "--gid", "+54400"];
    let limits = ["--resource-limit", "no-file=777", "--cgroup", "cpu.shares=512"];
    // As root: others cannot change users.
    let mut soak = Running::start(&[&options[..], &limits].concat(), 2);
    let mut seen = BTreeSet::new();
    for caller in soak.callers() {
        let pid = Running::machine_of(caller).pid;
        let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
        let name = ["soak-test-1", "soak-test-2"]
            .into_iter()
            .find(|name| groups.lines().any(|line| line.ends_with(&format!("/{name}"))));
        seen.insert((name, status(pid, "Uid:"), status(pid, "Gid:")));
        let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
        let files = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
        assert_eq!(files.split_whitespace().nth(3), Some("777"), "{limits}");
    }
    let expected = [("soak-test-1", "54321", "54400"), ("soak-test-2", "54322", "54401")]
        .map(|(name, uid, gid)| (Some(name), uid.to_owned(), gid.to_owned()));
    assert_eq!(seen, BTreeSet::from(expected));
    soak.signal(Signal::INT);
    soak.finish().0.expect_status(130);
}

#[test]
fn jails_that_cannot_be_are_refused_in_one_line() {
    let check = |arguments: &[&str], message: &str| {
        let outcome = run(&[&["soak", "--vms", "2"], arguments].concat()).expect_status(2);
        outcome.expect_stderr(message).expect_one_line_of_stderr();
    };
    check(&["--id", "a/b"], "an id has 1 to 64 letters, digits or hyphens");
    check(&["--id", &"x".repeat(63)], "an id has 1 to 64 letters, digits or hyphens");
    check(&["--gid", "+5"], "--uid");
    check(&["--uid", "no-such-user"], "user \"no-such-user\" does not exist");
    // The second machine's would be the number that means nobody.
    check(&["--uid", "+4294967294"], "--uid +4294967294 leaves no numbers for --vms 2");
    check(&["--uid", "+1", "--gid", "+4294967294"], "--gid +4294967294 leaves no numbers");
    check(&["--netns", "/no/such/namespace"], "/no/such/namespace");
    check(&["--resource-limit", "no-file"], "a limit is no-file=NUMBER");
    check(&["--no-jail", "--uid", "+5"], "--no-jail");
}

#[test]
fn what_each_jail_lacks_is_said_once() {
    let outcome = run(&["soak", "--vms", "3", "--resets", "2", "--no-jail"]).expect_status(0);
    let outcome = outcome.expect_stderr("--no-jail: the machine runs").expect_one_line_of_stderr();
    assert!(outcome.stdout.contains("clean: 3 machines"), "{outcome}");
    // A cause to fail comes first.
    let dir = temp_dir();
    let page = dir.path().join("page");
    run(&["soak", "--no-jail", "--id", "x", "--html", page.to_str().unwrap()]).expect_status(2);
    assert!(!page.exists(), "what was refused leaves nothing");
}
