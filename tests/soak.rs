//! `soak`: many machines, resets at random moments, whatever happens to their processes.

mod ends;
mod jails;
mod merge;
mod reports;

use std::io::{BufRead, BufReader};

use rustix::process::Signal;
use serde_json::Value;

use crate::harness::process::Process;
use crate::harness::{
    Outcome, PATIENCE, Started, cleanslate, eventually, machine_of_process, run, signal, temp_dir,
};

/// Lines of JSON.
#[track_caller]
fn lines(outcome: &Outcome) -> Vec<Value> {
    let parse =
        |line: &str| serde_json::from_str(line).unwrap_or_else(|_| panic!("{line}: {outcome}"));
    outcome.stdout.lines().map(parse).collect()
}

/// The last line, and the names of all findings in it.
#[track_caller]
fn verdict(outcome: &Outcome) -> (Value, Vec<String>) {
    let last = lines(outcome).pop().unwrap_or_default();
    let names = last["names"].as_object().unwrap_or_else(|| panic!("no verdict: {outcome}"));
    let names = names.keys().cloned().collect();
    (last, names)
}

/// The part of a plan that each life shows, without what differs from run to run.
fn plan_of(outcome: &Outcome, vm: u64) -> Vec<(Value, Value)> {
    let lives = lines(outcome).into_iter().filter(|line| line["vm"] == vm && line["life"] != 1);
    lives.map(|line| (line["moment"].clone(), line["vm_seed"].clone())).collect()
}

/// A soak that runs until something ends it, after each of its machines has had a few lives.
pub struct Running {
    program: Started,
    dir: tempfile::TempDir,
    stdout: BufReader<std::process::ChildStdout>,
    seen: String,
    /// Every process of it that was ever seen here.
    processes: Vec<Process>,
}

impl Running {
    #[track_caller]
    pub fn start(arguments: &[&str], vms: usize) -> Self {
        let dir = temp_dir();
        let mut command =
            cleanslate(&["soak", "--json", "--duration", "1h", "--vms", &vms.to_string()]);
        command.args(arguments).current_dir(dir.path());
        Self::new(Started::new(command), dir, vms)
    }

    #[track_caller]
    fn new(mut program: Started, dir: tempfile::TempDir, vms: usize) -> Self {
        let stdout = BufReader::new(program.child.stdout.take().unwrap());
        // Who reads from one that never says what it should would read for ever.
        let coordinator = Process::new(program.child.id()).expect("the soak runs");
        std::thread::spawn(move || {
            std::thread::sleep(PATIENCE);
            if coordinator.is_there() {
                coordinator.signal(Signal::KILL);
            }
        });
        let mut running = Self { program, dir, stdout, seen: String::new(), processes: Vec::new() };
        for vm in 1..=vms {
            running.read_until(|line| line["vm"] == vm && line["life"].as_u64() > Some(3));
        }
        running.look();
        running
    }

    /// Reads on to a line of this kind.
    #[track_caller]
    pub fn read_until(&mut self, mut is_wanted: impl FnMut(&Value) -> bool) {
        loop {
            let before = self.seen.len();
            let count = self.stdout.read_line(&mut self.seen).unwrap();
            assert!(count > 0, "the soak ended: {}", self.seen);
            if is_wanted(&serde_json::from_str(&self.seen[before..]).unwrap()) {
                return;
            }
        }
    }

    /// The coordinator.
    pub fn coordinator(&self) -> Process {
        Process::new(self.program.child.id()).expect("the soak runs")
    }

    /// Notes which processes there are.
    fn look(&mut self) {
        for process in self.coordinator().descendants() {
            if !self.processes.contains(&process) {
                self.processes.push(process);
            }
        }
    }

    /// The processes that it has started, each of which has a machine's own process for a child.
    pub fn callers(&mut self) -> Vec<Process> {
        self.look();
        self.coordinator().children()
    }

    /// The jailed process that `caller` has started.
    #[track_caller]
    pub fn machine_of(caller: Process) -> Process {
        Process::new(machine_of_process(caller.pid)).expect("the machine runs")
    }

    /// The jailed process of the first machine.
    #[track_caller]
    fn a_machine(&mut self) -> Process {
        Self::machine_of(self.callers()[0])
    }

    #[track_caller]
    pub fn signal(&mut self, which: Signal) {
        self.look();
        signal(&self.program.child, which);
    }

    #[track_caller]
    pub fn finish(mut self) -> (Outcome, tempfile::TempDir) {
        std::io::Read::read_to_string(&mut self.stdout, &mut self.seen).unwrap();
        let mut outcome = self.program.finish("cleanslate soak --json --duration 1h …");
        outcome.stdout = self.seen;
        assert!(self.processes.len() >= 3, "nobody looked: {outcome}");
        eventually("no process of the soak is left", || {
            !self.processes.iter().any(Process::is_there)
        });
        (outcome, self.dir)
    }
}

#[test]
fn machines_come_back_clean_by_every_cause_at_every_moment() {
    let outcome = run(&["soak", "--vms", "2", "--resets", "150", "--seed", "1"])
        .expect_status(0)
        .expect_stdout("clean: 2 machines, 302 lives, no findings; ")
        .expect_stdout("seed 1");
    let words = ["host", "i8042", "cf9", "acpi", "triple", "quiet", "mid-transfer", "mid-connect"];
    for word in words.into_iter().chain(["nmi-pending", "two-causes", "mid-boot"]) {
        let has_row = outcome.stdout.lines().any(|line| line.starts_with(&format!("{word} ")));
        assert!(has_row, "no row for {word}: {outcome}");
    }
    assert!(outcome.stderr.is_empty(), "{outcome}");
}

#[test]
fn emulated_counters_come_back_clean_too() {
    run(&["soak", "--resets", "40", "--seed", "2", "--pmu", "emulated"]).expect_status(0);
}

#[test]
fn the_same_seed_gives_the_same_plan() {
    let soak = |seed| {
        run(&["soak", "--json", "--resets", "30", "--vms", "2", "--seed", seed]).expect_status(0)
    };
    let (first, again, other) = (soak("5"), soak("5"), soak("6"));
    for vm in [1, 2] {
        assert_eq!(plan_of(&first, vm).len(), 30, "{first}");
        assert_eq!(plan_of(&first, vm), plan_of(&again, vm));
        assert_ne!(plan_of(&first, vm), plan_of(&other, vm));
    }
    assert_ne!(plan_of(&first, 1), plan_of(&first, 2));
    let second = run(&["soak", "--json", "--resets", "30", "--first-vm", "2", "--seed", "5"]);
    assert_eq!(
        plan_of(&second, 2),
        plan_of(&first, 2),
        "a machine's plan depends on its number alone"
    );
}

#[test]
fn a_soak_that_cannot_be_is_refused_in_one_line() {
    let check = |arguments: &[&str], message: &str| {
        let outcome = run(&[&["soak"], arguments].concat()).expect_status(2).expect_stderr(message);
        let outcome = outcome.expect_one_line_of_stderr();
        assert!(outcome.stdout.is_empty(), "{outcome}");
    };
    check(&["--vms", "0"], "--vms");
    check(&["--vms", "1025"], "1025 is not in 1..=1024");
    // If it were not refused for that, none would start all the same.
    let too_many = ["--vms", "1024", "--mem", "1024", "--parent-cgroup", "no/../where"];
    check(&too_many, "fill 1048576 MiB of RAM, and this host has");
    check(&["--vms", "2", "--first-vm", "1073741824"], "beyond the highest number");
    check(&["--resets", "0"], "--resets");
    check(&["--causes", "kexec"], "known are host, i8042, cf9, acpi, triple");
    check(&["--causes", ""], "known are host, i8042, cf9, acpi, triple");
    check(&["--moments", "loud"], "known are quiet, mid-transfer, mid-connect");
    check(&["--duration", "5"], "a time is a number with s, m, h or d");
    check(&["--duration", "0s"], "a time is a number with s, m, h or d");
    check(&["--mem", "0"], "--mem 0 MiB is not between");
    check(&["--vcpus", "9999", "--vms", "3"], "--vcpus 9999 is not between 1 and");
    check(&["--inject", "pmu-not-reset"], "add --pmu emulated");
    check(&["--no-poison", "--inject", "fpu-kept"], "leave soak's --no-poison out");
    check(&["--id", ""], "an id has 1 to 64 letters, digits or hyphens");
    check(&["--id", "a/b"], "invalid value 'a/b' for '--id <ID>'");
    check(&["--bundle", "/no/such/place/bundle"], "/no/such/place/bundle");
    check(&["--html", "/no/such/page"], "write \"/no/such/page\"");
    check(&["--junit", "/no/such/page"], "write \"/no/such/page\"");
    check(&["--cgroup", "memory"], "a setting is FILE=VALUE");
    check(&["--cgroup", "memory.no_such_file=1"], "has no such file");
    let outcome = run(&["run", "--child-of", "1"]).expect_status(2);
    outcome.expect_stderr("is not the number of the parent process").expect_one_line_of_stderr();
}
