//! Many jails of one process, which share a janitor.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::rc::Rc;

use jailer::seccomp::{ThreadKind, catch_violations, restrict};
use jailer::{CgroupPlan, End, Inside, Jail, Janitor, Running};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal};

use crate::escape::{machine, status_of};
use crate::harness::runner::tests;
use crate::harness::{eventually, expect_no_traces, pause, probe, raw, traces};

tests! {
    Root jails_start_and_end_one_by_one,
    Nobody jails_start_and_end_one_by_one_for_nobody,
    Root each_jail_is_in_namespaces_of_its_own,
    Nobody each_jail_of_somebody_who_is_nobody_is_in_namespaces_of_its_own,
    Root ends_are_told_apart,
    Root what_is_dropped_is_killed,
    Root whatever_runs_dies_with_the_caller,
    Nobody whatever_runs_dies_with_a_caller_who_is_nobody,
    Root a_caller_cleans_whose_janitor_was_killed,
    Root nothing_is_remembered_of_jails_that_are_gone,
    Root signals_are_the_callers_own,
}

/// A jail that runs, and the other end of what it was given.
struct Started {
    id: String,
    running: Running,
    socket: UnixStream,
}

/// Starts a jail with a group that does `work` with a socket.
#[track_caller]
fn start(janitor: &Rc<Janitor>, work: impl FnOnce(Inside, UnixStream) -> u8) -> Started {
    let cgroup = CgroupPlan { pids: Some(20), ..CgroupPlan::default() };
    start_in(Jail { cgroup, ..machine() }, janitor, work)
}

#[track_caller]
fn start_in(
    jail: Jail,
    janitor: &Rc<Janitor>,
    work: impl FnOnce(Inside, UnixStream) -> u8,
) -> Started {
    let id = jail.id.to_string();
    let (socket, theirs) = UnixStream::pair().unwrap();
    let prepared = jail.prepare_with(janitor).expect("prepare a jail");
    let running = prepared.start(
        theirs,
        |theirs| vec![theirs.as_fd()],
        |theirs, entered| work(entered.expect("enter a jail"), theirs),
    );
    Started { id, running: running.expect("start a jail"), socket }
}

/// Says that it is in, waits for a byte, and gives that back as its status. At the end of the socket it is 255.
fn obey(_inside: Inside, mut socket: UnixStream) -> u8 {
    socket.write_all(b"x").unwrap();
    let mut status = [255];
    let _ = socket.read(&mut status);
    status[0]
}

fn janitor() -> Rc<Janitor> {
    Rc::new(Janitor::start().expect("start a janitor"))
}

impl Started {
    /// Waits until it is in its jail.
    #[track_caller]
    fn wait_until_in(&mut self) {
        self.socket.read_exact(&mut [0]).expect("a jailed process says that it is in");
    }

    fn is_ended(&self) -> bool {
        let pidfd = self.running.pidfd();
        let mut end = [PollFd::new(&pidfd, PollFlags::IN)];
        poll(&mut end, Some(&Timespec::default())).expect("poll") == 1
    }
}

fn check_one_by_one() {
    const COUNT: u8 = 12;
    let janitor = janitor();
    let mut all: Vec<_> = (0..COUNT).map(|_| start(&janitor, obey)).collect();
    all.iter_mut().for_each(Started::wait_until_in);
    let has_groups = rustix::process::geteuid().is_root();
    // The last one first, and each goes at once while the others stay.
    for status in (0..COUNT).rev() {
        let mut one = all.pop().unwrap();
        assert!(!one.is_ended() && one.running.try_end().unwrap().is_none());
        assert_eq!(!traces(&one.id).is_empty(), has_groups);
        one.socket.write_all(&[status]).unwrap();
        eventually("the process has ended", || one.is_ended());
        let end = one.running.try_end().unwrap();
        assert!(matches!(end, Some(End::Exited(got)) if got == status), "{end:?}");
        drop(one.running);
        eventually("the group is gone", || traces(&one.id).is_empty());
        for other in &all {
            assert!(!other.is_ended(), "it ended with another one");
            assert_eq!(!traces(&other.id).is_empty(), has_groups);
        }
    }
}

fn jails_start_and_end_one_by_one() {
    check_one_by_one();
}

fn jails_start_and_end_one_by_one_for_nobody() {
    check_one_by_one();
}

fn check_namespaces() {
    let janitor = janitor();
    let mut both = [start(&janitor, obey), start(&janitor, obey)];
    both.iter_mut().for_each(Started::wait_until_in);
    let namespace = |process: &str, kind: &str| {
        // Who is nobody may not look into his own jails, whose processes give no dumps.
        fs::read_link(format!("/proc/{process}/ns/{kind}"))
    };
    let numbers = both.each_ref().map(|one| one.running.pid().as_raw_pid().to_string());
    for kind in ["net", "ipc", "uts", "mnt", "pid"] {
        let outside = namespace("self", kind).unwrap();
        let [first, second] = numbers.each_ref().map(|number| namespace(number, kind));
        match (first, second) {
            (Ok(first), Ok(second)) => {
                assert!(first != outside && second != outside && first != second, "{kind}");
            }
            (first, second) => {
                let is_nobody = !rustix::process::geteuid().is_root();
                assert!(is_nobody, "{kind}: {first:?}, {second:?}");
            }
        }
    }
    let [mut first, mut second] = both;
    for one in [&mut first, &mut second] {
        one.socket.write_all(&[0]).unwrap();
    }
    assert!(matches!(first.running.end().unwrap(), End::Exited(0)));
    assert!(matches!(second.running.end().unwrap(), End::Exited(0)));
    // What each sees of itself: its name is that of its jail, and not its neighbour's.
    let say_name = |_: Inside, mut socket: UnixStream| {
        socket.write_all(rustix::system::uname().nodename().to_bytes()).unwrap();
        0
    };
    for _ in 0..2 {
        let mut one = start(&janitor, say_name);
        let mut name = String::new();
        one.socket.read_to_string(&mut name).unwrap();
        assert_eq!(name, one.id);
    }
}

fn each_jail_is_in_namespaces_of_its_own() {
    check_namespaces();
}

fn each_jail_of_somebody_who_is_nobody_is_in_namespaces_of_its_own() {
    check_namespaces();
}

fn ends_are_told_apart() {
    const LIMIT: u64 = 32 << 20;
    let janitor = janitor();
    let cgroup = CgroupPlan { memory_bytes: Some(LIMIT), ..CgroupPlan::default() };
    let eats = start_in(Jail { cgroup, ..machine() }, &janitor, |_, _socket| {
        drop(probe::eat(128));
        0
    });
    let breaks_rules = start(&janitor, |inside, _socket| {
        catch_violations(inside.report).unwrap();
        restrict(ThreadKind::Main).unwrap();
        // Its number is forbidden knowledge.
        u8::from(rustix::process::getppid().is_some())
    });
    let mut waits = start(&janitor, obey);
    waits.wait_until_in();
    waits.running.kill();
    let ends = [eats, breaks_rules, waits].map(|one| one.running.end().unwrap());
    let [End::OutOfMemory, End::Forbidden(call), End::Killed(9)] = ends else { panic!("{ends:?}") };
    assert!(call.to_string().contains("getppid"), "{call}");
}

fn what_is_dropped_is_killed() {
    let janitor = janitor();
    let mut one = start(&janitor, obey);
    one.wait_until_in();
    let Started { id, running, mut socket } = one;
    drop(running);
    // Its end of the socket is closed: it is dead.
    assert_eq!(socket.read(&mut [0]).unwrap(), 0);
    eventually("the group is gone", || traces(&id).is_empty());
}

fn check_death_of_caller() {
    let (mut ours, mut theirs) = UnixStream::pair().unwrap();
    let caller = raw::fork(|| {
        let janitor = janitor();
        let all: Vec<_> = (0..8).map(|_| start(&janitor, obey)).collect();
        for one in &all {
            // Not waited for until it is in: some are still on their way into their jail when the caller dies.
            writeln!(theirs, "{} {}", one.id, one.running.pid().as_raw_pid()).unwrap();
        }
        theirs.write_all(b"\n").unwrap();
        pause()
    })
    .expect("fork");
    drop(theirs);
    let mut text = Vec::new();
    while !text.ends_with(b"\n\n") {
        let mut byte = [0];
        ours.read_exact(&mut byte).unwrap();
        text.push(byte[0]);
    }
    rustix::process::kill_process(caller, Signal::KILL).unwrap();
    status_of(caller);
    let text = String::from_utf8(text).unwrap();
    for line in text.lines().filter(|line| !line.is_empty()) {
        let (id, number) = line.split_once(' ').unwrap();
        let pid = Pid::from_raw(number.parse().unwrap()).unwrap();
        let is_dead = || {
            let state = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_pid()));
            // An orphan that nobody waits for stays as a zombie.
            state.is_err() || state.is_ok_and(|state| state.contains(") Z "))
        };
        eventually("the jailed process is dead", is_dead);
        eventually("the group is gone", || traces(id).is_empty());
    }
}

fn whatever_runs_dies_with_the_caller() {
    check_death_of_caller();
}

fn whatever_runs_dies_with_a_caller_who_is_nobody() {
    check_death_of_caller();
}

/// The children of this process, by the name that they have given themselves.
fn children(name: &str) -> Vec<Pid> {
    let own = std::process::id().to_string();
    let numbers = fs::read_dir("/proc").unwrap().filter_map(|entry| {
        entry.unwrap().file_name().to_str().and_then(|name| name.parse::<i32>().ok())
    });
    let is_one = |pid: &i32| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let value = |key| status.lines().find_map(|line| line.strip_prefix(key)).map(str::trim);
        value("PPid:") == Some(own.as_str()) && value("Name:") == Some(name)
    };
    numbers.filter(is_one).filter_map(Pid::from_raw).collect()
}

fn a_caller_cleans_whose_janitor_was_killed() {
    let shared = janitor();
    let mut all: Vec<_> = (0..3).map(|_| start(&shared, obey)).collect();
    all.iter_mut().for_each(Started::wait_until_in);
    eventually("there is a janitor", || children("jail-janitor").len() == 1);
    let [process] = children("jail-janitor")[..] else { panic!("more than one janitor") };
    rustix::process::kill_process(process, Signal::KILL).unwrap();
    eventually("the janitor is dead", || {
        let state = fs::read_to_string(format!("/proc/{}/stat", process.as_raw_pid())).unwrap();
        state.contains(") Z ")
    });
    for Started { id, running, .. } in all {
        drop(running);
        expect_no_traces(&id);
    }
}

fn nothing_is_remembered_of_jails_that_are_gone() {
    let janitor = janitor();
    let mut kept = start(&janitor, obey);
    kept.wait_until_in();
    let is_remembered = |id: &str| format!("{janitor:?}").contains(&format!("{id}\""));
    for _ in 0..50 {
        let Started { id, running, .. } = start(&janitor, |_, _| 0);
        assert!(is_remembered(&id));
        running.end().unwrap();
        eventually("the group is gone", || traces(&id).is_empty());
        // The next one hears of it.
        eventually("it is forgotten", || {
            let _ = start(&janitor, |_, _| 0);
            !is_remembered(&id)
        });
    }
    assert!(is_remembered(&kept.id));
}

fn signals_are_the_callers_own() {
    let caller = raw::fork(|| {
        let janitor = janitor();
        let mut one = start(&janitor, obey);
        one.wait_until_in();
        rustix::process::kill_process(rustix::process::getpid(), Signal::TERM).unwrap();
        // It has died of it.
        1
    });
    let ended = rustix::process::waitpid(caller.ok(), rustix::process::WaitOptions::empty());
    let status = ended.unwrap().unwrap().1;
    assert_eq!(status.terminating_signal(), Some(Signal::TERM.as_raw()));
}
