//! What a command in a jail sees, and how its end comes out.

use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use rustix::fs::{CWD, FileType, Mode};
use rustix::process::{Gid, Signal};
use rustix::thread::UnshareFlags;

use crate::harness::runner::{tests, this_program};
use crate::harness::{
    Started, V2_SEEN, contents, dynamic_shell, expect_no_traces, finish, groups_are_v2, jail_probe,
    jailer, memory_setting, new_id, pause, raw, run, run_probe, swap_setting, temp_dir,
};

tests! {
    Root a_command_sees_an_empty_root_and_no_rights,
    Nobody a_command_of_nobody_sees_the_same,
    Root a_command_becomes_the_user_and_group_that_are_named,
    Root a_command_gets_three_descriptors,
    Nobody a_command_of_nobody_gets_three_descriptors,
    Root the_exit_status_is_the_commands,
    Nobody the_exit_status_is_the_commands_for_nobody,
    Root a_command_that_is_killed_has_its_signal_in_the_status,
    Root a_command_without_memory_says_so,
    Root signals_reach_the_command,
    Nobody signals_reach_the_command_of_nobody,
    Root a_signal_ends_a_command_that_does_not_catch_it,
    Nobody a_signal_ends_a_command_of_nobody_that_does_not_catch_it,
    Root a_signal_that_is_ignored_is_not_handed_on,
    Root a_pid_namespace_ends_with_its_command,
    Root limits_and_settings_hold,
    Root a_group_is_made_in_the_one_that_is_named,
    Root what_is_shown_is_there,
    Nobody what_is_shown_to_nobody_is_there,
    Root a_directory_that_is_there_is_the_root_and_stays,
    Root a_directory_that_is_not_there_is_made_and_removed,
    Nobody a_directory_of_nobody_is_made_and_removed,
    Root links_in_the_root_lead_nowhere_outside,
    Root a_pipe_in_the_root_keeps_no_later_command_waiting,
    Root a_dynamic_program_runs_with_its_libraries,
    Root a_command_is_looked_for_in_path,
    Root a_named_network_is_joined,
}

/// What every command sees, whoever runs it.
#[track_caller]
fn check_sight(id: &str, flags: &[&str], stdout: &str) {
    for line in [
        &format!("host {id}"),
        "session leader true",
        "environment 0",
        "privileges false",
        "capabilities 0",
        "bounding 0",
        "core Some(0)",
        "directory /",
        "/ []",
    ] {
        assert!(stdout.lines().any(|said| said == line), "{flags:?}: no {line:?} in\n{stdout}");
    }
}

fn a_command_sees_an_empty_root_and_no_rights() {
    let id = new_id();
    let outcome = run_probe(&id, &[], &["look"]).expect_status(0).expect_stderr("");
    check_sight(&id, &[], &outcome.stdout);
    let outcome = outcome
        .expect_stdout("user 65534 65534\n")
        .expect_stdout("group 65534 65534\n")
        .expect_stdout("groups 0\n");
    assert!(!outcome.stdout.contains("pid 1\n"), "it shares the host's numbers: {outcome}");
    let flags = ["--new-pid-ns"];
    let outcome = run_probe(&id, &flags, &["look"]).expect_status(0).expect_stderr("");
    check_sight(&id, &flags, &outcome.stdout);
    outcome.expect_stdout("pid 1\n").expect_stdout("parent 0\n");
    expect_no_traces(&id);
}

fn a_command_of_nobody_sees_the_same() {
    let id = new_id();
    let outcome = run_probe(&id, &[], &["look"]).expect_status(0).expect_stderr("");
    check_sight(&id, &[], &outcome.stdout);
    outcome
        .expect_stdout("pid 1\n")
        .expect_stdout("user 65534 65534\n")
        .expect_stdout("group 65534 65534\n");
    expect_no_traces(&id);
}

fn a_command_becomes_the_user_and_group_that_are_named() {
    // Whoever starts the jailer is in some.
    rustix::thread::set_thread_groups(&[Gid::from_raw(4003)]).unwrap();
    let check = |flags: &[&str], user: &str, group: &str| {
        run_probe(&new_id(), flags, &["look"])
            .expect_status(0)
            .expect_stdout(&format!("user {user} {user}\n"))
            .expect_stdout(&format!("group {group} {group}\n"))
            .expect_stdout("groups 0\n")
            .expect_stdout("capabilities 0\n");
    };
    check(&["--uid", "+4001"], "4001", "4001");
    check(&["--uid", "+4001", "--gid", "+4002"], "4001", "4002");
    check(&["--uid", "daemon", "--gid", "root"], "1", "0");
    check(&["--uid", "root"], "0", "0");
}

fn check_descriptors() {
    // A descriptor that the jailer is started with and does not know of.
    let leaked = fs::File::open("/dev/null").unwrap();
    rustix::io::fcntl_setfd(&leaked, rustix::io::FdFlags::empty()).unwrap();
    assert!(leaked.as_raw_fd() > 2);
    for flags in [&[][..], &["--new-pid-ns"]] {
        let outcome = run_probe(&new_id(), flags, &["descriptors"]);
        assert_eq!(outcome.stdout, "[0, 1, 2]\n", "{outcome}");
    }
}

fn a_command_gets_three_descriptors() {
    check_descriptors();
}

fn a_command_of_nobody_gets_three_descriptors() {
    check_descriptors();
}

fn check_status() {
    for status in [0, 1, 2, 77, 255] {
        run_probe(&new_id(), &[], &["exit", &status.to_string()])
            .expect_status(status)
            .expect_stderr("");
    }
}

fn the_exit_status_is_the_commands() {
    check_status();
}

fn the_exit_status_is_the_commands_for_nobody() {
    check_status();
}

fn a_command_that_is_killed_has_its_signal_in_the_status() {
    // Not SIGSEGV, which the standard library handles.
    for signal in [9, 6, 8] {
        run_probe(&new_id(), &[], &["kill-self", &signal.to_string()])
            .expect_status(128 + signal)
            .expect_stderr(&format!("jailer: the command was killed by signal {signal}\n"));
    }
}

fn a_command_without_memory_says_so() {
    let id = new_id();
    let memory = memory_setting(32 << 20);
    let flags = ["--cgroup", &memory, "--cgroup", swap_setting()];
    run_probe(&id, &flags, &["eat", "8"]).expect_status(0).expect_stderr("");
    run_probe(&id, &flags, &["eat", "128"])
        .expect_status(137)
        .expect_stderr("used more memory than its control group may");
    run_probe(&id, &[], &["eat", "128"]).expect_status(0);
    expect_no_traces(&id);
}

fn check_signals(flags: &[&str]) {
    let id = new_id();
    let mut jail = Started::new(jail_probe(&id, flags, &["catch"]));
    jail.signal(Signal::HUP);
    assert_eq!(jail.next_line(), "signal 1");
    jail.signal(Signal::INT);
    assert_eq!(jail.next_line(), "signal 2");
    jail.signal(Signal::TERM);
    assert_eq!(jail.read_to_end(), "signal 15\n");
    assert_eq!(jail.wait(), Some(0));
    expect_no_traces(&id);
}

fn signals_reach_the_command() {
    check_signals(&[]);
    check_signals(&["--new-pid-ns"]);
}

fn signals_reach_the_command_of_nobody() {
    check_signals(&[]);
}

/// Returns the jailer's exit status.
fn end_by_signal(flags: &[&str], signal: Signal) -> Option<i32> {
    let id = new_id();
    let mut jail = Started::new(jail_probe(&id, flags, &["wait"]));
    jail.signal(signal);
    jail.read_to_end();
    let status = jail.wait();
    expect_no_traces(&id);
    status
}

fn a_signal_ends_a_command_that_does_not_catch_it() {
    for signal in [Signal::INT, Signal::TERM, Signal::HUP, Signal::USR1] {
        assert_eq!(end_by_signal(&[], signal), Some(128 + signal.as_raw()));
        // The kernel would have kept it from the first process of the namespace.
        assert_eq!(end_by_signal(&["--new-pid-ns"], signal), Some(128 + 9));
    }
}

fn a_signal_ends_a_command_of_nobody_that_does_not_catch_it() {
    assert_eq!(end_by_signal(&[], Signal::TERM), Some(128 + 9));
}

fn a_signal_that_is_ignored_is_not_handed_on() {
    raw::ignore(Signal::HUP);
    let mut jail = Started::new(jail_probe(&new_id(), &["--new-pid-ns"], &["catch"]));
    jail.signal(Signal::HUP);
    jail.signal(Signal::TERM);
    assert_eq!(jail.read_to_end(), "signal 15\n");
    assert_eq!(jail.wait(), Some(0));
}

fn a_pid_namespace_ends_with_its_command() {
    // The child holds the pipe that is read to its end here.
    for flags in [&["--new-pid-ns"][..], &["--cgroup", "pids.max=10"]] {
        let id = new_id();
        let mut jail = Started::new(jail_probe(&id, flags, &["wait-with-child"]));
        jail.signal(Signal::TERM);
        jail.read_to_end();
        jail.wait();
        expect_no_traces(&id);
    }
}

fn limits_and_settings_hold() {
    run_probe(&new_id(), &["--resource-limit", "no-file=77"], &["look"])
        .expect_status(0)
        .expect_stdout("files Some(77)\n");
    let id = new_id();
    let flags = ["--cgroup", "pids.max=1"];
    run_probe(&id, &flags, &["look"]).expect_status(0);
    let outcome = run_probe(&id, &flags, &["wait-with-child"]).expect_status(101);
    assert!(outcome.stderr.contains("Resource temporarily unavailable"), "{outcome}");
    expect_no_traces(&id);
    // cpuset wants processors and memory nodes before it takes a process.
    run_probe(&new_id(), &["--cgroup", "cpuset.cpus=0"], &["look"]).expect_status(0);
}

fn a_group_is_made_in_the_one_that_is_named() {
    let top = if groups_are_v2() { "/sys/fs/cgroup" } else { "/sys/fs/cgroup/pids" };
    let top = Path::new(top);
    let (id, parent) = (new_id(), new_id());
    fs::create_dir(top.join(&parent)).unwrap();
    let flags = ["--parent-cgroup", &format!("/{parent}"), "--cgroup", "pids.max=9"];
    let mut jail = Started::new(jail_probe(&id, &flags, &["wait"]));
    let group = top.join(&parent).join(&id);
    let members = fs::read_to_string(group.join("cgroup.procs"));
    jail.signal(Signal::TERM);
    jail.wait();
    let is_left = group.exists();
    fs::remove_dir(top.join(&parent)).unwrap();
    assert_eq!(members.unwrap().trim_end(), jail.first_line);
    assert!(!is_left, "the group is gone");
    if groups_are_v2() {
        println!("{V2_SEEN}");
    }
}

fn check_shown() {
    let dir = temp_dir();
    fs::write(dir.path().join("shown"), "content\n").unwrap();
    let file = dir.path().join("shown");
    let (dir_text, file_text) = (dir.path().to_str().unwrap(), file.to_str().unwrap());
    for path in [dir_text, file_text] {
        run_probe(&new_id(), &["--bind", path], &["read", file_text])
            .expect_status(0)
            .expect_stdout("content\n");
    }
    run_probe(&new_id(), &["--bind", "/dev/null"], &["write", "/dev/null"]).expect_status(0);
    run_probe(&new_id(), &[], &["read", file_text]).expect_status(101);
}

fn what_is_shown_is_there() {
    check_shown();
    // The whole of /dev is shown without its devices.
    let bind = ["--bind", "/dev"];
    run_probe(&new_id(), &bind, &["list", "/dev"]).expect_status(0).expect_stdout("\"null\"");
    run_probe(&new_id(), &bind, &["write", "/dev/null"]).expect_status(101);
}

fn what_is_shown_to_nobody_is_there() {
    check_shown();
}

fn a_directory_that_is_there_is_the_root_and_stays() {
    let (id, base) = (new_id(), temp_dir());
    let root = base.path().join("e2e").join(&id).join("root");
    fs::create_dir_all(&root).unwrap();
    fs::write(root.join("mine"), "mine\n").unwrap();
    let flags = ["--chroot-base-dir", base.path().to_str().unwrap()];
    run_probe(&id, &flags, &["read", "/mine"]).expect_status(0).expect_stdout("mine\n");
    // It is the user's, who did not give it to nobody.
    run_probe(&id, &flags, &["write", "/new"]).expect_status(101);
    fs::set_permissions(&root, PermissionsExt::from_mode(0o777)).unwrap();
    run_probe(&id, &flags, &["write", "/new"]).expect_status(0);
    let written = root.join("new").metadata().unwrap();
    assert_eq!((written.uid(), written.gid()), (65534, 65534));
    fs::remove_file(root.join("new")).unwrap();
    fs::remove_file(root.join("mine")).unwrap();
    run_probe(&id, &flags, &["exit", "0"]).expect_status(0);
    assert!(root.is_dir(), "an empty directory of the user's stays");
}

#[track_caller]
fn check_made_directory(more: &[&str]) {
    let (id, base) = (new_id(), temp_dir());
    let below = base.path().join("not/there/yet");
    let flags = [
        &["--chroot-base-dir", below.to_str().unwrap(), "--bind", "/dev/null", "--bind", "/proc"],
        more,
    ]
    .concat();
    run_probe(&id, &flags, &["list", "/"]).expect_status(0).expect_stdout(r#"/ ["dev", "proc"]"#);
    assert_eq!(contents(base.path()), <[&Path; 0]>::default(), "what was made is removed");
    // What the command wrote is not ours to remove.
    run_probe(&id, &flags, &["write", "/kept"]).expect_status(0);
    let root = below.join("e2e").join(&id).join("root");
    assert_eq!(contents(&root), [root.join("kept")]);
    expect_no_traces(&id);
}

fn a_directory_that_is_not_there_is_made_and_removed() {
    check_made_directory(&["--uid", "+4001"]);
}

fn a_directory_of_nobody_is_made_and_removed() {
    check_made_directory(&[]);
}

fn links_in_the_root_lead_nowhere_outside() {
    let (id, base, outside) = (new_id(), temp_dir(), temp_dir());
    let root = base.path().join("e2e").join(&id).join("root");
    fs::create_dir_all(&root).unwrap();
    // As a command could leave it for the next one.
    symlink(outside.path(), root.join("dev")).unwrap();
    let flags = ["--chroot-base-dir", base.path().to_str().unwrap(), "--bind", "/dev/null"];
    let outcome = run_probe(&id, &flags, &["exit", "0"]);
    assert_eq!(contents(outside.path()), <[&Path; 0]>::default(), "{outcome}");
    outcome.expect_status(2).expect_stderr("show \"/dev/null\"");
}

fn a_pipe_in_the_root_keeps_no_later_command_waiting() {
    let (id, base) = (new_id(), temp_dir());
    let dev = base.path().join("e2e").join(&id).join("root/dev");
    fs::create_dir_all(&dev).unwrap();
    // As a command could leave it for the next one.
    rustix::fs::mknodat(CWD, dev.join("null"), FileType::Fifo, Mode::RUSR, 0).unwrap();
    let flags = ["--chroot-base-dir", base.path().to_str().unwrap(), "--bind", "/dev/null"];
    run_probe(&id, &flags, &["exit", "0"]).expect_status(2).expect_stderr("show \"/dev/null\"");
}

fn a_dynamic_program_runs_with_its_libraries() {
    let (id, base) = (new_id(), temp_dir());
    let root = base.path().join("sh").join(&id).join("root");
    for file in dynamic_shell() {
        let place = root.join(file.strip_prefix("/").unwrap());
        fs::create_dir_all(place.parent().unwrap()).unwrap();
        fs::copy(file, place).unwrap();
    }
    let base = base.path().to_str().unwrap();
    let command = |script: &str| {
        run(&["--id", &id, "--chroot-base-dir", base, "--", "/bin/sh", "-c", script])
    };
    command("echo $0 $((6 * 7)); exit 3")
        .expect_status(3)
        .expect_stdout("/bin/sh 42\n")
        .expect_stderr("");
    // The standard library ignores SIGPIPE in the jailer; a shell shows whether it was ignored when it started.
    command("kill -PIPE $$; echo survived").expect_status(128 + 13);
}

fn a_command_is_looked_for_in_path() {
    let probe = this_program();
    let dir = probe.parent().unwrap();
    let mut command = jailer(&["--id", &new_id(), "--", "e2e", "probe", "x", "exit", "9"]);
    finish({
        command.env("PATH", format!("/no/such/directory:{}", dir.display()));
        command
    })
    .expect_status(9);
    let mut command = jailer(&["--id", &new_id(), "--", "./e2e", "probe", "x", "exit", "9"]);
    finish({
        command.current_dir(dir);
        command
    })
    .expect_status(9);
}

fn a_named_network_is_joined() {
    // A process in a network of its own, which is neither the one that the jailer is in nor a new one.
    let (ready, writer) = rustix::pipe::pipe().unwrap();
    let holder = raw::fork(|| {
        raw::unshare(UnshareFlags::NEWNET).expect("make a network namespace");
        rustix::io::write(&writer, b"x").expect("write into a pipe");
        pause()
    })
    .unwrap();
    assert_eq!(rustix::io::read(&ready, &mut [0]), Ok(1));
    let theirs = format!("/proc/{}/ns/net", holder.as_raw_pid());
    let name = |path: &str| fs::read_link(path).unwrap().display().to_string();
    let look = |flags: &[&str]| {
        let flags = [&["--bind", "/proc"], flags].concat();
        let outcome = run_probe(&new_id(), &flags, &["link", "/proc/self/ns/net"]);
        outcome.expect_status(0).stdout.trim_end().to_owned()
    };
    let (joined, new, expected) = (look(&["--netns", &theirs]), look(&[]), name(&theirs));
    rustix::process::kill_process(holder, Signal::KILL).unwrap();
    assert_eq!(joined, expected);
    assert_ne!(new, expected);
    assert_ne!(new, name("/proc/self/ns/net"));
}
