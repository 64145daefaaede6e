//! Wrong usage and what the host refuses: one line that names the step, exit status 2, all earlier steps undone.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Stdio};

use crate::harness::runner::{program, tests, this_program};
use crate::harness::{
    Outcome, Started, contents, expect_no_traces, finish, jail_probe, memory_setting, new_id, run,
    run_probe, swap_setting, temp_dir, traces,
};

tests! {
    Root a_jail_that_cannot_be_made_is_refused_and_undone,
    Root a_jail_that_cannot_be_made_in_the_background_is_refused_and_undone,
    Nobody what_only_root_can_do_is_refused_to_nobody,
    Nobody what_only_root_can_do_is_refused_to_nobody_in_the_background,
    Root an_id_in_use_is_refused_and_its_jail_left_alone,
    Nobody wrong_usage_is_refused_in_one_line,
    Nobody a_command_that_cannot_be_run_is_refused,
    Root a_command_that_only_root_may_run_is_refused_inside,
    Root a_daemon_that_dies_before_its_command_runs_is_refused,
    Root a_daemon_is_waited_for_by_those_who_ignore_their_children,
    Nobody help_and_version_are_no_failures,
    Nobody the_readme_names_only_options_that_exist,
}

/// Expects one line on stderr that contains `message`, nothing on stdout, and nothing left of the jail.
#[track_caller]
fn refused(id: &str, outcome: Outcome, message: &str) {
    let outcome = outcome.expect_status(2).expect_stderr(message).expect_stderr("jailer: ");
    assert!(outcome.stdout.is_empty(), "{outcome}");
    expect_no_traces(id);
}

/// Refused with these flags, and with such before them that something is made already.
#[track_caller]
fn check_undone(before: &[&str], flags: &[&str], message: &str) {
    let (id, base) = (new_id(), temp_dir());
    let below = base.path().join("made");
    let root = ["--chroot-base-dir", below.to_str().unwrap(), "--bind", "/dev/null"];
    let flags = [before, &root, flags].concat();
    refused(&id, run_probe(&id, &flags, &["exit", "0"]), message);
    assert!(contents(base.path()).is_empty(), "{flags:?} left {:?}", contents(base.path()));
}

fn check_all_undone(before: &[&str]) {
    let check = |flags: &[&str], message: &str| check_undone(before, flags, message);
    check(&["--uid", "no-such-user"], "user \"no-such-user\" does not exist in /etc/passwd");
    check(&["--uid", "4000000000"], "user \"4000000000\" does not exist");
    check(&["--uid", "root", "--gid", "no-such-group"], "group \"no-such-group\" does not exist");
    check(&["--cgroup", "pids.nothing=1"], "set pids.nothing of the control group");
    // The group that is named is that of the file's controller.
    let version_1 = Path::new("/sys/fs/cgroup/memory").exists();
    let place = if version_1 { "/sys/fs/cgroup/memory" } else { "/sys/fs/cgroup" };
    let message = format!("set memory.nothing of the control group: \"{place}/");
    check(&["--cgroup", "memory.nothing=1", "--cgroup", "pids.max=9"], &message);
    check(&["--cgroup", "nothing.max=1"], "control group");
    check(&["--cgroup", "pids.max=many"], "set pids.max of the control group to \"many\"");
    let parent = ["--parent-cgroup", "no/such/group", "--cgroup", "pids.max=9"];
    check(&parent, "make control group");
    check(&parent, "/no/such/group");
    let parent = ["--parent-cgroup", "x/../..", "--cgroup", "pids.max=9"];
    check(&parent, "has no ..");
    check(
        &["--netns", "/no/such/netns"],
        "open network namespace \"/no/such/netns\": No such file",
    );
    check(&["--netns", "/etc/passwd"], "\"/etc/passwd\" is no network namespace");
    check(&["--netns", "/proc/self/ns/uts"], "\"/proc/self/ns/uts\" is no network namespace");
    let limit = "no-file=18446744073709551614";
    check(&["--resource-limit", limit], &format!("limit {limit}: Operation not permitted"));
    check(&["--bind", "/no/such/file"], "show \"/no/such/file\": No such file");
    // The kernel knows no user of this number: it means "unchanged".
    check(&["--uid", "+4294967295", "--gid", "+1"], "user \"+4294967295\" does not exist");
}

fn a_jail_that_cannot_be_made_is_refused_and_undone() {
    check_all_undone(&["--cgroup", "pids.max=20"]);
    check_all_undone(&["--new-pid-ns"]);
    let check = |base: &str, message: &str| {
        let (id, flags) = (new_id(), ["--cgroup", "pids.max=20", "--chroot-base-dir", base]);
        refused(&id, run_probe(&id, &flags, &["exit", "0"]), message);
    };
    check("/proc/made", "make directory \"/proc/made\"");
    check("/etc/passwd", "make directory \"/etc/passwd\": File exists");
    let base = temp_dir();
    symlink("/no/such/directory", base.path().join("dangling")).unwrap();
    let dangling = base.path().join("dangling");
    check(dangling.to_str().unwrap(), "make directory");
}

fn a_jail_that_cannot_be_made_in_the_background_is_refused_and_undone() {
    check_all_undone(&["--daemonize", "--cgroup", "pids.max=20"]);
}

fn check_nobody(before: &[&str]) {
    let check = |flags: &[&str], message: &str| check_undone(before, flags, message);
    check(&["--uid", "daemon"], "becoming another user needs root");
    check(&["--netns", "/proc/self/ns/net"], "join the network namespace: Operation not permitted");
    check(&["--cgroup", "pids.max=9"], "make control group");
    check(&["--bind", "/no/such/file"], "show \"/no/such/file\": No such file");
    let id = new_id();
    let flags = [before, &["--chroot-base-dir", "/root-of-nobody"]].concat();
    let outcome = run_probe(&id, &flags, &["exit", "0"]);
    refused(&id, outcome, "make directory \"/root-of-nobody\": Permission denied");
    assert!(!Path::new("/root-of-nobody").exists());
}

fn what_only_root_can_do_is_refused_to_nobody() {
    check_nobody(&[]);
}

fn what_only_root_can_do_is_refused_to_nobody_in_the_background() {
    check_nobody(&["--daemonize"]);
}

fn an_id_in_use_is_refused_and_its_jail_left_alone() {
    let id = new_id();
    let flags = ["--cgroup", "pids.max=20"];
    let mut jail = Started::new(jail_probe(&id, &flags, &["wait"]));
    let before = traces(&id);
    let outcome = run_probe(&id, &flags, &["exit", "0"]);
    outcome.expect_status(2).expect_stderr("it exists; another jail has this id");
    assert_eq!(traces(&id), before);
    jail.signal(rustix::process::Signal::TERM);
    jail.read_to_end();
    jail.wait();
    expect_no_traces(&id);
}

fn wrong_usage_is_refused_in_one_line() {
    let probe = this_program();
    let command = ["--", probe.to_str().unwrap(), "probe", "x", "exit", "0"];
    let check = |flags: &[&str], message: &str| {
        let outcome = run(&[flags, &command].concat());
        refused("no such id", outcome, message);
    };
    let long = "x".repeat(65);
    for id in ["", "a/b", "..", "a b", &long] {
        check(&["--id", id], "an id has 1 to 64 letters, digits or hyphens");
    }
    check(&[], "--id <ID>");
    check(&["--id", "a", "--gid", "root"], "--uid <USER>");
    check(&["--id", "a", "--id", "b"], "'--id <ID>' cannot be used multiple times");
    check(&["--id", "a", "--walk"], "unexpected argument '--walk'");
    check(&["--id", "a", "walk"], "unexpected argument 'walk'");
    for bad in ["x", "x=1", ".max=1", "pids.max=", "../pids.max=1", "pids/max=1"] {
        check(&["--id", "a", "--cgroup", bad], "a setting is FILE=VALUE");
    }
    check(&["--id", "a", "--parent-cgroup", "x"], "--cgroup <FILE=VALUE>");
    for bad in ["no-file", "no-file=x", "no-file=-1", "core=1", "="] {
        check(&["--id", "a", "--resource-limit", bad], "a limit is no-file=NUMBER");
    }
    for bad in ["dev/null", "/", "/a/../b", ""] {
        check(&["--id", "a", "--bind", bad], "'--bind <PATH>'");
    }
    for none in [&["--id", "a"][..], &["--id", "a", "--"]] {
        refused("no such id", run(none), "<COMMAND>");
    }
}

fn a_command_that_cannot_be_run_is_refused() {
    let dir = temp_dir();
    let file = |name: &str, mode: u32, bytes: &[u8]| {
        let path = dir.path().join(name);
        fs::write(&path, bytes).unwrap();
        fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let elf = fs::read(this_program()).unwrap();
    let (id, base) = (new_id(), temp_dir());
    let base = base.path().to_str().unwrap();
    let check = |command: &str, message: &str| {
        for flags in [&[][..], &["--daemonize"], &["--chroot-base-dir", base]] {
            let outcome = run(&[&["--id", &id], flags, &["--", command]].concat());
            assert!(outcome.stderr.contains(command), "it is not named: {outcome}");
            refused(&id, outcome, message);
            assert!(contents(Path::new(base)).is_empty());
        }
    };
    check("no-such-command", "no directory of PATH has it");
    check("/no/such/command", "open command \"/no/such/command\": No such file");
    check(dir.path().to_str().unwrap(), "is not a regular file");
    check("/dev/null", "is not a regular file");
    check(&file("plain", 0o644, &elf), "may not be executed");
    check(&file("script", 0o755, b"#!/bin/sh\nexit 0\n"), "is a script");
    check(&file("text", 0o755, b"exit 0\n"), "is no 64-bit ELF program");
    check(&file("empty", 0o755, b""), "is no 64-bit ELF program");
    check(&file("cut", 0o755, &elf[..70]), "read the headers of command");
    check("/bin/sh", "needs the loader");
    // What only the kernel finds out: the program is one of another machine.
    let mut other = elf;
    other[18..20].copy_from_slice(&183_u16.to_le_bytes());
    let other = file("other", 0o755, &other);
    let outcome = run(&["--id", &id, "--", &other]);
    refused(&id, outcome, "execute");
}

fn a_command_that_only_root_may_run_is_refused_inside() {
    let dir = temp_dir();
    let program = dir.path().join("private");
    fs::copy(this_program(), &program).unwrap();
    fs::set_permissions(&program, PermissionsExt::from_mode(0o700)).unwrap();
    let id = new_id();
    let run = |more: &[&str]| {
        let program = program.to_str().unwrap();
        let flags = [&["--id", &id, "--cgroup", "pids.max=9"], more].concat();
        run(&[&flags[..], &["--", program, "probe", &id, "exit", "7"]].concat())
    };
    refused(&id, run(&[]), "in the jail: Permission denied");
    refused(&id, run(&["--daemonize"]), "in the jail: Permission denied");
    run(&["--uid", "root"]).expect_status(7);
}

fn a_daemon_that_dies_before_its_command_runs_is_refused() {
    // Killed on its way into the jail, where nobody could say why but the supervisor.
    let id = new_id();
    let memory = memory_setting(4096);
    let flags = ["--daemonize", "--cgroup", &memory, "--cgroup", swap_setting()];
    let outcome = run_probe(&id, &flags, &["exit", "0"]);
    refused(&id, outcome, "used more memory than its control group may");
}

fn a_daemon_is_waited_for_by_those_who_ignore_their_children() {
    let id = new_id();
    // Who is started so cannot wait for its children, unless it changes that.
    let mut command = Command::new(this_program());
    command.args(["probe", &id, "ignore-children"]).arg(program());
    command.args(["--id", &id, "--daemonize", "--bind", "/no/such/file", "--"]);
    command.arg(this_program()).args(["probe", &id, "exit", "0"]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    refused(&id, finish(command), "show \"/no/such/file\": No such file");
}

fn help_and_version_are_no_failures() {
    run(&["--help"]).expect_status(0).expect_stdout("Exit status:").expect_stderr("");
    run(&["--version"]).expect_status(0).expect_stdout("jailer 0").expect_stderr("");
}

fn the_readme_names_only_options_that_exist() {
    let help = run(&["--help"]).stdout;
    let readme = include_str!("../../../README.md");
    let lines = readme.lines().filter(|line| line.contains("$ jailer "));
    let options = lines.flat_map(str::split_whitespace).filter(|word| word.starts_with("--"));
    let named: Vec<_> = options.filter(|word| *word != "--").collect();
    assert!(named.len() > 3, "no options found: {named:?}");
    for option in named {
        assert!(help.contains(option), "README.md names {option}");
    }
}
