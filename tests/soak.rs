//! `soak`: many machines, resets at random moments, whatever happens to their processes.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::harness::{
    Outcome, Started, cleanslate, eventually, machine_of_process, run, signal, temp_dir,
};

/// Lines of JSON.
#[track_caller]
fn lines(outcome: &Outcome) -> Vec<Value> {
    let parse =
        |line: &str| serde_json::from_str(line).unwrap_or_else(|_| panic!("{line}: {outcome}"));
    outcome.stdout.lines().map(parse).collect()
}

/// The part of a plan that each life shows, without what differs from run to run.
fn plan_of(outcome: &Outcome, vm: u64) -> Vec<(Value, Value)> {
    let lives = lines(outcome).into_iter().filter(|line| line["vm"] == vm && line["life"] != 1);
    lives.map(|line| (line["moment"].clone(), line["vm_seed"].clone())).collect()
}

/// All processes whose arguments have `mark`.
fn processes(mark: &str) -> Vec<i32> {
    let numbers = fs::read_dir("/proc").unwrap().filter_map(|entry| {
        entry.unwrap().file_name().to_str().and_then(|name| name.parse::<i32>().ok())
    });
    let is_marked = |pid: &i32| {
        let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        command.split(|byte| *byte == 0).any(|word| word == mark.as_bytes())
    };
    numbers.filter(is_marked).collect()
}

/// The processes that `soak` with this process number has started, of which the machines' own processes are children.
fn callers(soak: u32) -> Vec<i32> {
    let parent = soak.to_string();
    let mut callers = processes(&parent);
    callers.retain(|pid| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        status.lines().any(|line| line.split_whitespace().eq(["PPid:", parent.as_str()]))
    });
    callers
}

fn kill(pid: i32, signal: Signal) {
    kill_process(Pid::from_raw(pid).unwrap(), signal).unwrap();
}

/// The jailed process that `caller` has started.
#[track_caller]
fn machine_of(caller: i32) -> i32 {
    machine_of_process(caller as u32) as i32
}

/// A soak that runs until something ends it, after each of its machines has had a few lives.
struct Running {
    program: Started,
    dir: tempfile::TempDir,
    stdout: BufReader<std::process::ChildStdout>,
    seen: String,
}

impl Running {
    #[track_caller]
    fn start(arguments: &[&str], vms: usize) -> Self {
        let dir = temp_dir();
        let mut command =
            cleanslate(&["soak", "--json", "--duration", "1h", "--vms", &vms.to_string()]);
        command.args(arguments).current_dir(dir.path());
        let mut program = Started::new(command);
        let stdout = BufReader::new(program.child.stdout.take().unwrap());
        let mut running = Self { program, dir, stdout, seen: String::new() };
        for vm in 1..=vms {
            running.read_until(|line| line["vm"] == vm && line["life"].as_u64() > Some(3));
        }
        running
    }

    /// Reads on to a line of this kind.
    #[track_caller]
    fn read_until(&mut self, is_wanted: impl Fn(&Value) -> bool) {
        loop {
            let before = self.seen.len();
            let count = self.stdout.read_line(&mut self.seen).unwrap();
            assert!(count > 0, "the soak ended: {}", self.seen);
            if is_wanted(&serde_json::from_str(&self.seen[before..]).unwrap()) {
                return;
            }
        }
    }

    fn callers(&self) -> Vec<i32> {
        callers(self.program.child.id())
    }

    #[track_caller]
    fn finish(mut self) -> (Outcome, tempfile::TempDir) {
        std::io::Read::read_to_string(&mut self.stdout, &mut self.seen).unwrap();
        let mark = self.program.child.id().to_string();
        let mut outcome = self.program.finish("cleanslate soak --json --duration 1h …");
        outcome.stdout = self.seen;
        eventually("no process of the soak is left", || processes(&mark).is_empty());
        (outcome, self.dir)
    }
}

/// The last line, and the names of all findings in it.
#[track_caller]
fn verdict(outcome: &Outcome) -> (Value, Vec<String>) {
    let last = lines(outcome).pop().unwrap_or_default();
    let names = last["names"].as_object().unwrap_or_else(|| panic!("no verdict: {outcome}"));
    let names = names.keys().cloned().collect();
    (last, names)
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
fn each_line_of_json_says_where_it_comes_from() {
    let outcome = run(&["soak", "--json", "--resets", "5", "--seed", "9"]).expect_status(0);
    let lines = lines(&outcome);
    assert_eq!(lines.len(), 7, "{outcome}");
    for line in &lines[..6] {
        assert!(line["host"].is_string() && line["vm_seed"].is_u64(), "{outcome}");
        assert_eq!((&line["seed"], &line["vm"]), (&9.into(), &1.into()), "{outcome}");
        assert!(line["hello_us"].as_u64() > Some(0), "{outcome}");
        assert_eq!(line["findings"], Value::Array(Vec::new()), "{outcome}");
    }
    let last = &lines[6];
    assert_eq!((&last["verdict"], &last["lives"]), (&"clean".into(), &6.into()), "{outcome}");
    assert_eq!((&last["ending"], &last["resets"]), (&"complete".into(), &5.into()), "{outcome}");
    assert!(last["machine"]["host"]["kernel"].is_string(), "{outcome}");
}

#[test]
fn a_finding_ends_the_soak_and_its_bundle_replays_it() {
    let dir = temp_dir();
    let mut command =
        cleanslate(&["soak", "--json", "--vms", "2", "--resets", "1000", "--seed", "11"]);
    command.args(["--inject", "nmi-queued"]).current_dir(dir.path());
    let outcome =
        Started::new(command).finish("cleanslate soak --inject nmi-queued").expect_status(1);
    let (last, names) = verdict(&outcome);
    assert_eq!(last["ending"], "finding", "{outcome}");
    assert_eq!(names, ["nmi-queued", "unknown-nmi"], "{outcome}");
    let all = lines(&outcome);
    let found = all.iter().find(|line| line["bundle"].is_string()).expect("a bundle");
    let bundle = dir.path().join(found["bundle"].as_str().unwrap());
    assert!(bundle.starts_with(dir.path().join("cleanslate-soak-11")), "{outcome}");
    let read = |name: &str| {
        fs::read_to_string(bundle.join(name)).unwrap_or_else(|_| panic!("{name}: {outcome}"))
    };
    let json = |name: &str| serde_json::from_str::<Value>(&read(name)).unwrap();
    let facts = json("finding.json");
    assert_eq!((&facts["seed"], &facts["life"]), (&11.into(), &found["life"]), "{facts}");
    assert_eq!(json("before.json")["life"], 1, "{outcome}");
    assert_eq!(json("life.json")["report"]["life"], found["life"], "{outcome}");
    assert!(json("life.json")["residue"].is_array(), "{outcome}");
    let trace = read("trace.txt");
    assert!(trace.contains("hello of life 1") && trace.contains("poisoned"), "{trace}");
    assert!(bundle.join("console.txt").exists(), "{outcome}");

    // The same command, with this program.
    let script = read("replay.sh");
    assert_eq!(script, format!("#!/bin/sh\nexec {}\n", facts["replay"].as_str().unwrap()));
    let words: Vec<_> = facts["replay"].as_str().unwrap().split(' ').collect();
    assert_eq!(words[0], "cleanslate");
    let replay = run(&[&words[1..], &["--json"]].concat()).expect_status(1);
    let replayed = replay.json();
    let again: Vec<_> = replayed["findings"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|f| f["life"] == found["life"])
        .collect();
    for finding in found["findings"].as_array().unwrap() {
        assert!(again.iter().any(|f| f["name"] == finding["name"]), "{finding}: {replay}");
    }
}

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
        kill(if whom == "machine" { machine_of(callers[0]) } else { callers[0] }, Signal::KILL);
        soak.read_until(|line| line["findings"][0]["name"] == "vm-killed");
        // It goes on: a new process for that machine, after the first life of which it is the second.
        let mut new = Vec::new();
        eventually("there are two processes again", || {
            new = soak.callers();
            new.len() == 2 && new != callers
        });
        signal(&soak.program.child, Signal::INT);
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
    let soak = Running::start(&[], 2);
    kill(machine_of(soak.callers()[0]), Signal::KILL);
    let (outcome, _dir) = soak.finish();
    let outcome = outcome.expect_status(1);
    assert_eq!(verdict(&outcome).1, ["vm-killed"], "{outcome}");
    assert!(outcome.stdout.contains("killed by signal 9"), "{outcome}");
}

#[test]
fn a_machines_process_that_hangs_is_a_finding() {
    // It may say nothing for ten times that.
    let soak = Running::start(&["--timeout", "1"], 2);
    kill(machine_of(soak.callers()[0]), Signal::STOP);
    let (outcome, _dir) = soak.finish();
    let outcome = outcome.expect_status(1);
    assert_eq!(verdict(&outcome).1, ["vm-hung"], "{outcome}");
}

#[test]
fn a_machines_process_that_runs_out_of_memory_is_a_finding() {
    let soak = Running::start(&[], 2);
    let caller = soak.callers()[0];
    let group = control_group(machine_of(caller));
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
        soak.callers().first() != Some(&caller)
    });
    let (outcome, _dir) = soak.finish();
    let outcome = outcome.expect_status(1);
    assert_eq!(verdict(&outcome).1, ["vm-out-of-memory"], "{outcome}");
}

/// The control group that limits a process's memory.
fn control_group(pid: i32) -> PathBuf {
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
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
    let soak = Running::start(&[], 3);
    signal(&soak.program.child, Signal::INT);
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
    let soak = Running::start(&[], 2);
    let groups: Vec<_> =
        soak.callers().into_iter().map(|pid| control_group(machine_of(pid))).collect();
    assert!(groups.iter().all(|group| group.exists()));
    signal(&soak.program.child, Signal::KILL);
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
fn the_report_for_test_runners_has_a_case_for_each_machine() {
    let dir = temp_dir();
    let file = dir.path().join("soak.xml");
    let arguments =
        ["soak", "--vms", "2", "--resets", "3", "--keep-going", "--inject", "fpu-kept", "--junit"];
    let bundle = dir.path().join("bundle");
    let end = [file.to_str().unwrap(), "--bundle", bundle.to_str().unwrap()];
    run(&[&arguments[..], &end].concat()).expect_status(1);
    let xml = fs::read_to_string(&file).unwrap();
    assert!(xml.contains("<testsuite name=\"soak\" tests=\"2\" failures=\"2\""), "{xml}");
    assert_eq!(xml.matches("<failure type=\"fpu-kept\"").count(), 2, "{xml}");
    // A reader that somebody else wrote.
    let script = "import sys, xml.etree.ElementTree as tree\n\
                  print(len(tree.parse(sys.argv[1]).getroot().findall('./testsuite/testcase')))";
    let read = Command::new("python3").args(["-c", script]).arg(&file).output();
    match read {
        Ok(read) => assert_eq!(String::from_utf8_lossy(&read.stdout), "2\n", "{xml}"),
        Err(error) => crate::harness::skipped(&format!("python3: {error}")),
    }
}

/// Added to a copy of the page: says in its title what a reader would see.
const MEASURE: &str = "<script>
const box = e => e.getBoundingClientRect();
const shown = [...document.querySelectorAll('svg')].map(svg => {
  const inside = [...svg.querySelectorAll('rect,circle,polyline,text')].every(e => {
    const a = box(e), b = box(svg);
    return a.left >= b.left - 1 && a.right <= b.right + 1 && a.top >= b.top - 1 && a.bottom <= b.bottom + 1; });
  const count = what => [...svg.querySelectorAll(what)].filter(e => box(e).width + box(e).height > 0).length;
  return [svg.id, inside, count('rect'), count('circle'), count('polyline'), count('text') > 8].join(' '); });
const wide = document.documentElement.scrollWidth > document.documentElement.clientWidth;
const high = Math.max(...[...document.querySelectorAll('#histogram rect')].map(e => box(e).height));
document.title = JSON.stringify({shown, wide, high, size: innerWidth});
</script>";

#[test]
fn the_page_shows_its_figures_in_a_browser() {
    let dir = temp_dir();
    let file = dir.path().join("soak.html");
    let bundle = dir.path().join("bundle");
    let options = [
        "--keep-going",
        "--inject",
        "fpu-kept",
        "--seed",
        "8",
        "--bundle",
        bundle.to_str().unwrap(),
    ];
    let arguments = ["soak", "--vms", "2", "--resets", "25", "--html", file.to_str().unwrap()];
    run(&[&arguments[..], &options].concat()).expect_status(1);
    let page = fs::read_to_string(&file).unwrap();
    for word in ["<script", "http:", "https:", "src=", "url("] {
        assert!(!page.contains(word), "the page is not self-contained: {word}");
    }
    fs::write(&file, page.replace("</body>", &format!("{MEASURE}</body>"))).unwrap();
    for width in [1100, 600] {
        let mut chromium = Command::new("chromium");
        chromium.args(["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]);
        chromium.arg(format!("--window-size={width},900"));
        chromium.arg(format!("--user-data-dir={}", dir.path().join("profile").display()));
        let Ok(output) = chromium.arg(format!("file://{}", file.display())).output() else {
            return crate::harness::skipped("chromium is not installed");
        };
        let dom = String::from_utf8_lossy(&output.stdout);
        let title = dom.split("<title>").nth(1).and_then(|rest| rest.split("</title>").next());
        let seen: Value = serde_json::from_str(title.unwrap_or_default()).unwrap_or_else(|error| {
            panic!("{error}: {title:?} {}", String::from_utf8_lossy(&output.stderr))
        });
        let plots: Vec<_> =
            seen["shown"].as_array().unwrap().iter().map(|p| p.as_str().unwrap()).collect();
        // One line a machine, some bars, one mark for each of the fifty findings; all labelled, and nothing sticks out.
        assert_eq!(plots[0], "series true 0 0 2 true", "{seen}");
        let bars = plots[1].strip_prefix("histogram true ").and_then(|rest| rest.split(' ').next());
        assert!(bars.unwrap().parse::<u32>().unwrap() > 3, "{seen}");
        assert_eq!(plots[2], "findings true 0 50 0 true", "{seen}");
        assert_eq!(seen["wide"], false, "{seen}");
        assert!(seen["high"].as_f64() > Some(50.0), "{seen}");
        assert!(dom.contains("2 machines, 52 lives, 50 findings"), "{dom}");
    }
}

#[test]
fn a_soak_that_cannot_be_is_refused_in_one_line() {
    let check = |arguments: &[&str], message: &str| {
        let outcome = run(&[&["soak"], arguments].concat()).expect_status(2).expect_stderr(message);
        let outcome = outcome.expect_one_line_of_stderr();
        assert!(outcome.stdout.is_empty(), "{outcome}");
    };
    check(&["--vms", "0"], "--vms");
    check(&["--resets", "0"], "--resets");
    check(&["--causes", "kexec"], "known are host, i8042, cf9, acpi, triple");
    check(&["--causes", ""], "known are host, i8042, cf9, acpi, triple");
    check(&["--moments", "loud"], "known are quiet, mid-transfer, mid-connect");
    check(&["--duration", "5"], "a time is a number with s, m, h or d");
    check(&["--mem", "0"], "--mem 0 MiB is not between");
    check(&["--vcpus", "9999", "--vms", "3"], "--vcpus 9999 is not between 1 and");
    check(&["--inject", "pmu-not-reset"], "add --pmu emulated");
    check(&["--no-poison", "--inject", "fpu-kept"], "add --poison");
    check(&["--bundle", "/no/such/place/bundle"], "/no/such/place/bundle");
    check(&["--html", "/no/such/page"], "write \"/no/such/page\"");
    check(&["--junit", "/no/such/page"], "write \"/no/such/page\"");
    check(&["--cgroup", "memory"], "a setting is FILE=VALUE");
    check(&["--cgroup", "memory.no_such_file=1"], "has no such file");
    let outcome = run(&["run", "--child-of", "1"]).expect_status(2);
    outcome.expect_stderr("is not the number of the parent process").expect_one_line_of_stderr();
}

#[test]
fn a_result_that_cannot_be_printed_is_a_failure() {
    let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let mut command = cleanslate(&["soak", "--resets", "3"]);
    command.stdout(full);
    Started::new(command)
        .finish("cleanslate soak > /dev/full")
        .expect_status(2)
        .expect_stderr("print the result: No space left on device");
}
