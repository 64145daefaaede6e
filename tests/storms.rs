//! `launch` when somebody is killed, stops, or never ends: failures are named, the rest goes on, and nothing is left behind.

use std::fs;
use std::process::Stdio;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;

use crate::harness::process::Process;
use crate::harness::{Outcome, PATIENCE, Started, cleanslate, eventually, file, signal, temp_dir};
use crate::leftovers::{Random, marked_groups, processes};

/// Launches that somebody disturbs.
struct Storm {
    id: String,
    program: Started,
    coordinator: Process,
}

impl Storm {
    /// `name` is no other test's.
    #[track_caller]
    fn start(name: &str, arguments: &[&str]) -> Self {
        let id = format!("storm-{name}-{}", std::process::id());
        let mut command = cleanslate(&["launch", "--json", "--id", &id]);
        command.args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped());
        let program = Started::new(command);
        let coordinator = Process::new(program.child.id()).expect("it runs");
        Self { id, program, coordinator }
    }

    /// Its sandboxes' processes: those that are the first of a process namespace.
    fn sandboxes(&self) -> Vec<Process> {
        let is_sandbox = |process: &Process| {
            let status = fs::read_to_string(format!("/proc/{}/status", process.pid));
            let status = status.unwrap_or_default();
            let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
            numbers.is_some_and(|numbers| numbers.split_whitespace().count() == 2)
        };
        self.coordinator.children().into_iter().filter(is_sandbox).collect()
    }

    #[track_caller]
    fn janitor(&self) -> Process {
        let is_janitor = |process: &Process| {
            let name = fs::read_to_string(format!("/proc/{}/comm", process.pid));
            name.is_ok_and(|name| name.trim() == "jail-janitor")
        };
        let mut found = None;
        eventually("there is a janitor", || {
            found = self.coordinator.children().into_iter().find(is_janitor);
            found.is_some()
        });
        found.unwrap()
    }

    /// Waits for the end; nothing is left then.
    #[track_caller]
    fn finish(self) -> (Outcome, Value) {
        let Self { id, program, .. } = self;
        let outcome = program.finish_within(3 * PATIENCE, &format!("cleanslate launch --id {id}"));
        expect_nothing_of(&id);
        let json = outcome.json();
        (outcome, json)
    }
}

#[track_caller]
fn expect_nothing_of(id: &str) {
    let found = (processes(id), marked_groups(id));
    assert!(found.0.is_empty() && found.1.is_empty(), "left behind: {found:?}");
}

/// Signals one of the sandboxes once there are any.
#[track_caller]
fn signal_one(storm: &Storm, what: Signal) {
    eventually("there is a sandbox", || !storm.sandboxes().is_empty());
    storm.sandboxes()[0].signal(what);
}

#[test]
fn a_sandbox_that_is_killed_is_named_and_the_others_go_on() {
    let dir = temp_dir();
    let input = file(&dir, "ms", b"300");
    let input = input.to_str().unwrap();
    let storm = Storm::start("killed", &["--count", "12", "--job", "spin", "--input", input]);
    signal_one(&storm, Signal::KILL);
    let (outcome, json) = storm.finish();
    outcome.expect_status(1);
    assert_eq!((&json["done"], &json["failed"]), (&11.into(), &1.into()), "{json}");
    assert_eq!(json["failures"]["killed"]["count"], 1, "{json}");
}

#[test]
fn one_that_is_stopped_or_never_ends_its_job_is_out_of_time() {
    let dir = temp_dir();
    let forever = file(&dir, "ms", b"3600000");
    let forever = forever.to_str().unwrap();
    let arguments = ["--count", "3", "--job", "spin", "--input", forever, "--timeout", "1"];
    let (outcome, json) = Storm::start("endless", &arguments).finish();
    outcome.expect_status(1);
    assert_eq!(json["failures"]["timed-out"]["count"], 3, "{json}");
    // Stopped in a job that would end.
    let short = file(&dir, "short", b"200");
    let arguments =
        ["--count", "8", "--job", "spin", "--input", short.to_str().unwrap(), "--timeout", "3"];
    let storm = Storm::start("stopped", &arguments);
    signal_one(&storm, Signal::STOP);
    let (outcome, json) = storm.finish();
    outcome.expect_status(1);
    assert_eq!(json["failures"]["timed-out"]["count"], 1, "{json}");
    assert_eq!(json["done"], 7, "{json}");
}

#[test]
fn one_that_uses_too_much_memory_is_named_so() {
    let version_2 = fs::exists("/sys/fs/cgroup/cgroup.controllers").unwrap();
    let setting = if version_2 { "memory.max" } else { "memory.limit_in_bytes" };
    let little = format!("{setting}=400000");
    let (outcome, json) = Storm::start("memory", &["--count", "3", "--cgroup", &little]).finish();
    outcome.expect_status(1);
    assert_eq!(json["failures"]["out-of-memory"]["count"], 3, "{json}");
}

#[test]
fn ctrl_c_ends_everything_and_tells_what_was_done() {
    for from in ["cold", "recycle"] {
        let storm = Storm::start("interrupted", &["--count", "1000000", "--from", from]);
        eventually("there are sandboxes", || storm.sandboxes().len() > 1);
        signal(&storm.program.child, Signal::INT);
        let (outcome, json) = storm.finish();
        outcome.expect_status(130);
        assert_eq!(json["verdict"], "interrupted");
        assert_eq!(json["failed"], 0, "{json}");
    }
}

#[test]
fn whoever_kills_the_coordinator_kills_all() {
    let mut random = Random(0xc0de);
    for round in 0..20 {
        let from = ["cold", "recycle"][round % 2];
        let mut storm =
            Storm::start("orphans", &["--count", "1000000", "--from", from, "--warm", "2"]);
        std::thread::sleep(Duration::from_micros(random.below(60_000)));
        signal(&storm.program.child, Signal::KILL);
        storm.program.child.wait().unwrap();
        eventually("all processes are gone", || processes(&storm.id).is_empty());
        eventually("all groups are gone", || marked_groups(&storm.id).is_empty());
    }
}

#[test]
fn two_thousand_launches_of_which_many_are_killed_leave_nothing() {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    for (from, launches) in [("cold", 1000), ("recycle", 1000)] {
        let count = launches.to_string();
        let storm = Storm::start(from, &["--count", &count, "--concurrency", "6", "--from", from]);
        let mut random = Random(0x5eed);
        let mut killed = 0;
        while storm.coordinator.is_there() {
            std::thread::sleep(Duration::from_micros(random.below(40_000)));
            let sandboxes = storm.sandboxes();
            if !sandboxes.is_empty() {
                let one = sandboxes[random.below(sandboxes.len() as u64) as usize];
                // It may be gone by now.
                let pid = rustix::process::Pid::from_raw(one.pid as i32).unwrap();
                if one.is_there() && rustix::process::kill_process(pid, Signal::KILL).is_ok() {
                    killed += 1;
                }
            }
        }
        let (outcome, json) = storm.finish();
        outcome.expect_status(1);
        let number = |name: &str| json[name].as_u64().unwrap();
        assert_eq!(number("done") + number("failed"), launches, "{json}");
        assert!(killed > 20 && number("done") > launches / 2, "{killed} killed: {json}");
        let names: Vec<_> = json["failures"].as_object().unwrap().keys().collect();
        assert_eq!(names, ["killed"], "{json}");
    }
    assert_eq!(fs::read_to_string("/proc/self/mountinfo").unwrap(), mounts);
}

#[test]
fn without_its_janitor_the_coordinator_cleans() {
    let storm = Storm::start("alone", &["--count", "200", "--from", "cold"]);
    storm.janitor().signal(Signal::KILL);
    let (outcome, json) = storm.finish();
    outcome.expect_status(0);
    assert_eq!(json["done"], 200);
}

#[test]
fn a_storm_that_is_told_to_stop_and_go_on_loses_nobody() {
    let storm = Storm::start("paused", &["--count", "300", "--timeout", "1", "--from", "recycle"]);
    eventually("there are sandboxes", || storm.sandboxes().len() > 1);
    storm.coordinator.signal(Signal::STOP);
    std::thread::sleep(Duration::from_millis(1500));
    storm.coordinator.signal(Signal::CONT);
    let (outcome, json) = storm.finish();
    outcome.expect_status(0);
    assert_eq!(json["done"], 300);
}
