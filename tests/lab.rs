//! `cleanslate lab`, and in it what this project shows of our own agent, on AMD's hardware virtualization.

use serde_json::Value;

use crate::faults::FAULTS;
use crate::harness::lab::Lab;
use crate::harness::process::Process;
use crate::harness::{Started, cleanslate, eventually, file, run, signal, skipped, temp_dir};

/// The lab, or a word about why this machine has none.
fn lab() -> Option<Lab> {
    Lab::find().map_err(skipped).ok()
}

fn emulator_of(program: &Started) -> Process {
    let lab = Process::new(program.child.id()).expect("it runs");
    eventually("QEMU runs", || !lab.children().is_empty());
    lab.children()[0]
}

#[test]
fn output_files_and_exit_status_come_back_as_if_the_command_had_run_here() {
    let Some(lab) = lab() else { return };
    let dir = temp_dir();
    let page = dir.path().join("soak.html");
    let arguments =
        ["lab", "--fetch", "soak.html", "--", "soak", "--vms", "2", "--resets", "3", "--seed", "3"];
    let arguments = [&arguments[..], &["--timeout", "60", "--html", "soak.html"]].concat();
    let mut command = lab.command(&arguments);
    command.current_dir(dir.path());
    let outcome = Started::new(command).finish("cleanslate lab -- soak");
    outcome.expect_stdout("KVM on AMD-V").expect_stdout("clean: 2 machines").expect_status(0);
    let page = std::fs::read_to_string(page).expect("the page came back");
    assert!(page.starts_with("<!doctype html>"), "{page:.100}");
}

#[test]
fn findings_and_files_of_the_user_reach_the_command_and_its_status_comes_back() {
    let Some(lab) = lab() else { return };
    let dir = temp_dir();
    let agent = file(&dir, "own agent.elf", images::AGENT);
    let agent = agent.to_str().unwrap();
    let arguments = ["lab", "--file", agent, "--", "run", "--agent"];
    let outcome = lab.lab(&[&arguments[..], &["own agent.elf", "--nmi", "1"]].concat());
    outcome
        .expect_stdout("finding in life 1: unknown-nmi: 1 of 1 NMI")
        .expect_stdout("not clean: 1 life, 1 finding")
        .expect_status(1);
}

#[test]
fn each_fault_is_found_under_its_name_on_hardware_virtualization() {
    let Some(lab) = lab() else { return };
    let mut script = String::new();
    let run = "cleanslate run --json --timeout 60 --pmu emulated --poison --resets 1";
    for (fault, _) in FAULTS {
        script += &format!("{run} --inject {fault}; echo; echo \"status $?\"\n");
    }
    script += &format!("{run}; echo\n");
    let outcome = lab.run(&[], &script).expect_status(0);
    let reports: Vec<Value> = outcome
        .stdout
        .lines()
        .filter(|line| line.starts_with('{'))
        .map(|line| serde_json::from_str(line).expect("a report"))
        .collect();
    assert_eq!(reports.len(), FAULTS.len() + 1, "{outcome}");
    for (report, (fault, others)) in reports.iter().zip(FAULTS) {
        let findings = report["findings"].as_array().unwrap().iter();
        let mut names: Vec<_> = findings.map(|found| found["name"].as_str().unwrap()).collect();
        let mut expected = [&[fault], others].concat();
        names.sort_unstable();
        expected.sort_unstable();
        assert_eq!(names, expected, "{fault}: {report}");
    }
    let clean = reports.last().unwrap();
    assert_eq!(clean["verdict"], "clean", "{clean}");
    assert_eq!(clean["host"]["kvm"], "svm", "{clean}");
}

#[test]
fn a_machine_goes_on_from_its_snapshot_on_hardware_virtualization() {
    let Some(lab) = lab() else { return };
    let restore = "cleanslate snapshot restore there --timeout 60 --json --resets 5 \
                   --reset-via host,i8042,cf9,acpi,triple";
    let create = "cleanslate snapshot create there --pmu emulated --look --timeout 60 > /dev/null";
    let outcome = lab.run(&[], &format!("{create} && {restore}")).expect_status(0);
    let json = outcome.json();
    assert_eq!(
        (&json["verdict"], &json["host"]["kvm"]),
        (&"clean".into(), &"svm".into()),
        "{outcome}"
    );
    assert_eq!(json["lives"].as_array().unwrap().len(), 6, "{outcome}");
}

#[test]
fn vsock_keeps_its_rules_on_hardware_virtualization() {
    let Some(lab) = lab() else { return };
    let outcome =
        lab.lab(&["lab", "--", "probe", "--count", "20", "--mib", "1", "--timeout", "60"]);
    outcome
        .expect_stdout("pass: transfers")
        .expect_stdout("31 of 31 checks passed")
        .expect_status(0);
}

#[test]
fn a_lab_that_takes_too_long_is_ended_and_says_so() {
    let Some(lab) = lab() else { return };
    let outcome = lab.lab(&["lab", "--timeout", "1", "--", "run"]).expect_status(2);
    outcome.expect_one_line_of_stderr().expect_stderr(
        "cleanslate: the lab was not done after 1s, and was ended; give --timeout more",
    );
}

#[test]
fn an_interrupted_lab_leaves_no_emulator() {
    let Some(lab) = lab() else { return };
    for signal_number in [rustix::process::Signal::INT, rustix::process::Signal::TERM] {
        let program = Started::new(lab.command(&["lab", "--", "run"]));
        let emulator = emulator_of(&program);
        signal(&program.child, signal_number);
        let outcome = program.finish("cleanslate lab, interrupted").expect_status(130);
        assert_eq!(outcome.stderr, "cleanslate: interrupted\n");
        assert!(!emulator.is_there(), "{emulator:?} is still there");
    }
}

#[test]
fn an_emulator_dies_with_a_lab_that_is_killed() {
    let Some(lab) = lab() else { return };
    let mut program = Started::new(lab.command(&["lab", "--", "run"]));
    let emulator = emulator_of(&program);
    program.child.kill().unwrap();
    program.child.wait().unwrap();
    eventually("QEMU is gone", || !emulator.is_there());
}

#[test]
fn what_the_user_got_wrong_is_one_line() {
    let refused = |arguments: &[&str], words: &str| {
        run(arguments).expect_status(2).expect_one_line_of_stderr().expect_stderr(words);
    };
    refused(&["lab"], "COMMAND");
    refused(&["lab", "--", "run", "--resets"], "a value is required");
    refused(&["lab", "--script", "/no/such", "--timeout", "5"], "read \"/no/such\"");
    refused(&["lab", "--script", "/dev/null", "--timeout", "5"], "not a regular file");
    refused(&["lab", "--file", "/no/such", "--", "run"], "read \"/no/such\"");
    refused(&["lab", "--file", "/dev/zero", "--timeout", "5", "--", "run"], "not a regular file");
    refused(&["lab", "--fetch", "directory/", "--", "run"], "is no file's name");
    refused(&["lab", "--fetch", "", "--", "run"], "\"\" is no file's name");
    refused(&["lab", "--fetch", "a\nb", "--", "run"], "is no file's name");
    refused(&["lab", "--file", "a/x", "--file", "b/x", "--", "run"], "names two files \"x\"");
    refused(&["lab", "--mem", "1", "--", "run"], "1 is not in 256..");
    if lab().is_some() {
        refused(&["lab", "--mem", "256", "--timeout", "5", "--", "run"], "give it at least");
    }
    let mut command = cleanslate(&["lab", "--", "run"]);
    command.env("PATH", "/nowhere");
    let outcome = Started::new(command).finish("cleanslate lab without QEMU").expect_status(2);
    outcome.expect_stderr("qemu-system-x86");
}
