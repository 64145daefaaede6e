//! Every machine runs in a jail, and the jail is what it should be, seen from outside. What a process in a jail can and
//! cannot do is tried from inside in the jailer's own tests.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::harness::held::Held;
use crate::harness::{
    Outcome, Started, cleanslate, eventually, machine_of, run, signal, skipped, temp_dir,
};
use crate::leftovers::marked_groups;

const NAMESPACES: [&str; 5] = ["mnt", "pid", "net", "ipc", "uts"];

fn namespace(process: impl std::fmt::Display, kind: &str) -> PathBuf {
    fs::read_link(format!("/proc/{process}/ns/{kind}")).unwrap()
}

/// The values of a line of `/proc/PID/status`.
fn status(process: u32, name: &str) -> Vec<String> {
    let text = fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(&format!("{name}:"))).unwrap();
    line.split_whitespace().map(str::to_owned).collect()
}

/// Where the kernel shows the group that a process is in, for each controller of a jail.
fn groups(process: u32) -> Vec<(&'static str, PathBuf)> {
    let own = fs::read_to_string(format!("/proc/{process}/cgroup")).unwrap();
    let path = |controller: &str| {
        own.lines().find_map(|line| {
            let mut parts = line.splitn(3, ':').skip(1);
            let (names, path) = (parts.next()?, parts.next()?);
            names.split(',').any(|name| name == controller).then(|| path.trim_start_matches('/'))
        })
    };
    let find = |controller: &'static str| match path(controller) {
        Some(path) => Path::new("/sys/fs/cgroup").join(controller).join(path),
        None => Path::new("/sys/fs/cgroup").join(path("").unwrap()),
    };
    ["cpu", "memory", "pids"].map(|controller| (controller, find(controller))).into()
}

/// What a file of the group says, by its name in version 1 or in version 2.
fn limit(group: &Path, v1: &str, v2: &str) -> String {
    let text = fs::read_to_string(group.join(v1)).or_else(|_| fs::read_to_string(group.join(v2)));
    text.unwrap_or_else(|error| panic!("{}: {error}", group.display())).trim().to_owned()
}

#[test]
fn the_machines_process_is_confined() {
    let machine = Held::start_with(&["--id", "jail-test-confined"]);
    let process = machine.process();
    for kind in NAMESPACES {
        assert_ne!(namespace(process, kind), namespace("self", kind), "{kind}");
    }
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(status(process, set), ["0000000000000000"], "{set}");
    }
    assert_eq!(status(process, "Uid"), ["65534"; 4]);
    assert_eq!(status(process, "Gid"), ["65534"; 4]);
    assert_eq!(status(process, "Groups"), [""; 0]);
    assert_eq!(status(process, "NoNewPrivs"), ["1"]);
    let root = format!("/proc/{process}/root");
    let names = fs::read_dir(&root).unwrap().map(|entry| entry.unwrap().file_name());
    assert_eq!(names.collect::<Vec<_>>(), ["sockets"]);
    let mounts = fs::read_to_string(format!("/proc/{process}/mountinfo")).unwrap();
    assert_eq!(mounts.lines().count(), 2, "{mounts}");
    let of_root = mounts.lines().find(|line| line.split(' ').nth(4) == Some("/")).unwrap();
    let of_sockets =
        mounts.lines().find(|line| line.split(' ').nth(4) == Some("/sockets")).unwrap();
    for mount in [of_root, of_sockets] {
        assert!(mount.contains(" ro,nosuid,nodev,noexec"), "{mount}");
    }
    let environment = fs::read(format!("/proc/{process}/environ")).unwrap();
    assert!(environment.iter().all(|byte| *byte == 0), "the environment is there");
    let limits = fs::read_to_string(format!("/proc/{process}/limits")).unwrap();
    let limit_of = |name: &str| {
        let line = limits.lines().find(|line| line.starts_with(name)).unwrap();
        line[name.len()..].split_whitespace().take(2).collect::<Vec<_>>().join(" ")
    };
    assert_eq!(limit_of("Max core file size"), "0 0");
    assert_eq!(limit_of("Max open files"), "8192 8192");
    let session = |process: u32| rustix::process::Pid::from_raw(process as i32);
    assert_ne!(
        rustix::process::getsid(session(process)).unwrap(),
        rustix::process::getsid(None).unwrap()
    );
    machine.end();
}

#[test]
fn the_control_group_limits_memory_processes_and_processors() {
    if !rustix::process::geteuid().is_root() {
        return skipped("control groups can only be made by root on most machines");
    }
    let machine = Held::start_with(&["--id", "jail-test-limits", "--vcpus", "2"]);
    let groups = groups(machine.process());
    for (controller, group) in &groups {
        assert!(group.ends_with("jail-test-limits"), "{}", group.display());
        let found = match *controller {
            "memory" => {
                assert_eq!(limit(group, "memory.swappiness", "memory.swap.max"), "0");
                limit(group, "memory.limit_in_bytes", "memory.max")
            }
            "pids" => limit(group, "pids.max", "pids.max"),
            _ => limit(group, "cpu.cfs_quota_us", "cpu.max"),
        };
        let expected = match *controller {
            "memory" => ((128 + 256) << 20).to_string(),
            "pids" => "10".to_string(),
            _ => "300000".to_string(),
        };
        assert_eq!(found.split(' ').next(), Some(expected.as_str()), "{controller}");
    }
    machine.end();
    for (_, group) in groups {
        assert!(!group.exists(), "{} was left behind", group.display());
    }
}

/// Where the machine's standard descriptors lead if a shell starts the program with these redirections.
fn standard_descriptors(redirections: &str) -> [PathBuf; 3] {
    let dir = temp_dir();
    let socket = dir.path().join("vsock");
    let mut command = Command::new("sh");
    command.args(["-c", &format!("exec \"$@\" {redirections}"), "sh"]);
    command.arg(cleanslate(&[]).get_program());
    command.args(["run", "--hold", "--uds", socket.to_str().unwrap()]);
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let program = Started::new(command);
    eventually("the machine is in its jail", || machine_is_restricted(&program.child));
    let machine = machine_of(&program.child);
    let descriptors =
        [0, 1, 2].map(|number| fs::read_link(format!("/proc/{machine}/fd/{number}")).unwrap());
    signal(&program.child, rustix::process::Signal::TERM);
    program.finish("cleanslate run --hold");
    descriptors
}

/// Whether the jailed process is there and has its filters.
fn machine_is_restricted(program: &Child) -> bool {
    let pid = program.id();
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    children.split_whitespace().any(|child| {
        let status = fs::read_to_string(format!("/proc/{child}/status")).unwrap_or_default();
        status.contains("\nSeccomp:\t2")
    })
}

#[test]
fn standard_descriptors_that_are_closed_lead_nowhere_in_the_jail() {
    let descriptors = standard_descriptors("<&- >&- 2>&-");
    assert_eq!(descriptors, ["/dev/null"; 3].map(PathBuf::from));
}

#[test]
fn a_machine_cannot_read_standard_input() {
    let [stdin, ..] = standard_descriptors("</etc/passwd");
    assert_eq!(stdin, Path::new("/dev/null"));
}

#[test]
fn no_jail_has_to_be_asked_for_and_says_so() {
    run(&["run", "--no-jail"])
        .expect_status(0)
        .expect_stderr("--no-jail: the machine runs in this process, with all its rights")
        .expect_one_line_of_stderr();
    run(&["run", "--no-jail", "--id", "x"]).expect_status(2).expect_stderr("--no-jail");
}

#[test]
fn whoever_is_not_root_gets_a_jail_too_and_hears_what_is_missing() {
    if !rustix::process::geteuid().is_root() {
        return skipped(
            "it gives up root's rights, so it needs them; all the other tests run without",
        );
    }
    use std::os::unix::fs::MetadataExt;
    let group = fs::metadata("/dev/kvm").unwrap().gid();
    let dir = temp_dir();
    let program = dir.path().join("cleanslate");
    fs::copy(env!("CARGO_BIN_EXE_cleanslate"), &program).unwrap();
    fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let mut command = Command::new(&program);
    command.args(["run", "--resets", "3"]).uid(12345).gid(group);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    Started::new(command)
        .finish("cleanslate run as a user who may open /dev/kvm")
        .expect_status(0)
        .expect_stdout("clean: 4 lives, no findings")
        .expect_stderr("the jail is weaker than it should be: no control group")
        .expect_one_line_of_stderr();
}

#[test]
fn the_machine_dies_with_its_caller() {
    let machine = Held::start();
    let process = machine.process();
    signal(machine.child(), rustix::process::Signal::KILL);
    let path = machine.path.clone();
    eventually("the machine's process is gone", || {
        !Path::new(&format!("/proc/{process}")).exists()
    });
    eventually("the socket is gone", || !path.exists());
}

#[test]
fn the_machine_dies_with_its_caller_without_the_janitor_too() {
    let machine = Held::start();
    let (process, path) = (machine.process(), machine.path.clone());
    let janitor = janitor_of(machine.child());
    rustix::process::kill_process(janitor, rustix::process::Signal::STOP).unwrap();
    signal(machine.child(), rustix::process::Signal::KILL);
    eventually("the machine's process is gone", || {
        !Path::new(&format!("/proc/{process}")).exists()
    });
    assert!(path.exists(), "somebody else did the janitor's work");
    rustix::process::kill_process(janitor, rustix::process::Signal::CONT).unwrap();
    eventually("the socket is gone", || !path.exists());
}

fn janitor_of(program: &Child) -> rustix::process::Pid {
    let pid = program.id();
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    let is_janitor = |child: &&str| {
        fs::read_to_string(format!("/proc/{child}/comm")).is_ok_and(|n| n == "jail-janitor\n")
    };
    let number = children.split_whitespace().find(is_janitor).unwrap().parse().unwrap();
    rustix::process::Pid::from_raw(number).unwrap()
}

#[test]
fn a_machine_that_is_killed_is_told_about() {
    let machine = Held::start();
    let process = rustix::process::Pid::from_raw(machine.process() as i32).unwrap();
    rustix::process::kill_process(process, rustix::process::Signal::KILL).unwrap();
    machine
        .outcome()
        .expect_status(2)
        .expect_stderr("the machine's process was killed by signal 9");
}

#[test]
fn a_machine_that_does_not_end_is_killed_at_the_third_signal() {
    let machine = Held::start();
    let process = rustix::process::Pid::from_raw(machine.process() as i32).unwrap();
    // It cannot hear anything but SIGKILL.
    rustix::process::kill_process(process, rustix::process::Signal::STOP).unwrap();
    eventually("it is stopped", || status(machine.process(), "State")[0] == "T");
    for _ in 0..3 {
        signal(machine.child(), rustix::process::Signal::INT);
        // Two at once would be one.
        eventually("the signal is taken", || {
            status(machine.child().id(), "ShdPnd") == ["0000000000000000"]
        });
    }
    machine.outcome().expect_status(2).expect_stderr("was killed by signal 9");
}

#[test]
fn a_machine_that_takes_too_much_memory_is_told_about() {
    if !rustix::process::geteuid().is_root() {
        return skipped("control groups can only be made by root on most machines");
    }
    let small = if Path::new("/sys/fs/cgroup/memory/memory.limit_in_bytes").exists() {
        "memory.limit_in_bytes=262144"
    } else {
        "memory.max=262144"
    };
    refused(
        run(&["run", "--cgroup", small]),
        "it used more memory than its control group may; allow it more with --cgroup memory.max=BYTES",
    );
}

/// Expects one line on stderr that contains `message`, and nothing on stdout.
#[track_caller]
fn refused(outcome: Outcome, message: &str) {
    let outcome = outcome.expect_status(2).expect_stderr(message).expect_one_line_of_stderr();
    assert!(outcome.stdout.is_empty(), "{outcome}");
}

#[test]
fn jails_that_cannot_be_are_refused_in_one_line_that_names_the_step_and_undone() {
    let dir = temp_dir();
    let socket = dir.path().join("vsock");
    let check = |arguments: &[&str], message: &str| {
        let basic = ["run", "--uds", socket.to_str().unwrap()];
        let id = if arguments.contains(&"--id") { &[][..] } else { &["--id", "jail-test-refused"] };
        refused(run(&[&basic[..], id, arguments].concat()), message);
        assert!(!socket.exists(), "the socket was left behind");
        let groups = marked_groups("jail-test-refused");
        assert!(groups.is_empty(), "{groups:?} were left behind");
    };
    check(&["--id", "a/b"], "an id has 1 to 64 letters, digits or hyphens");
    check(&["--uid", "no-such-user"], "user \"no-such-user\" does not exist in /etc/passwd");
    check(&["--uid", "123456"], "user \"123456\" does not exist");
    check(
        &["--uid", "nobody", "--gid", "no-such-group"],
        "group \"no-such-group\" does not exist in /etc/group",
    );
    check(&["--cgroup", "memory.no_such_file=1"], "has no such file");
    check(&["--cgroup", "no_such_controller.x=1"], "no_such_controller");
    check(&["--cgroup", "pids.max=many"], "set pids.max of the control group to \"many\"");
    check(&["--cgroup", "nonsense"], "a setting is FILE=VALUE");
    check(&["--parent-cgroup", "/no/such/group"], "make control group");
    check(&["--netns", "/no/such/netns"], "open network namespace \"/no/such/netns\"");
    check(&["--netns", "/proc/self/ns/uts"], "is no network namespace");
    check(&["--netns", "/etc/passwd"], "is no network namespace");
    check(&["--resource-limit", "no-file=x"], "a limit is no-file=NUMBER");
    // More than the hard limit, which only a process with CAP_SYS_RESOURCE may raise, and above what the kernel has at all.
    check(&["--resource-limit", "no-file=99999999999"], "jail: limit no-file=99999999999");
    // Enough for the jail, not for the machine.
    check(&["--resource-limit", "no-file=8"], "Too many open files");
}

#[test]
fn a_network_namespace_can_be_joined() {
    let machine = Held::start_with(&["--netns", "/proc/self/ns/net"]);
    assert_eq!(namespace(machine.process(), "net"), namespace("self", "net"));
    assert_ne!(namespace(machine.process(), "ipc"), namespace("self", "ipc"));
    machine.end();
}

#[test]
fn a_stopped_program_stops_its_machine_and_goes_on_with_it() {
    let machine = Held::start();
    let process = machine.process();
    signal(machine.child(), rustix::process::Signal::TSTP);
    eventually("the machine's process is stopped", || status(process, "State")[0] == "T");
    eventually("the program is stopped", || status(machine.child().id(), "State")[0] == "T");
    signal(machine.child(), rustix::process::Signal::CONT);
    eventually("the machine's process goes on", || status(process, "State")[0] != "T");
    machine.end();
}

#[test]
fn an_id_that_is_in_use_is_refused_and_its_owner_undisturbed() {
    if !rustix::process::geteuid().is_root() {
        return skipped("without root there is no control group that could be in use");
    }
    let machine = Held::start_with(&["--id", "jail-test-twice"]);
    refused(run(&["run", "--id", "jail-test-twice"]), "another jail has this id");
    assert!(groups(machine.process()).iter().all(|(_, group)| group.exists()));
    machine.end();
}
