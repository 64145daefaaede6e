//! `doctor`: what a host is, and which known faults its KVM has.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::harness::lab::Lab;
use crate::harness::process::Process;
use crate::harness::{Outcome, Started, cleanslate, run, skipped, temp_dir};

const NAMES: [&str; 8] = [
    "vmcs-fields",
    "vmrun-exit-code",
    "pv-msrs",
    "cpuid-in-l2",
    "cpuid-after-run",
    "pmu-off",
    "nmi-cancel",
    "mdev",
];

/// The behaviour of this name in what `doctor --json` prints.
#[track_caller]
fn behaviour<'a>(json: &'a Value, name: &str) -> &'a Value {
    let all = json["behaviours"].as_array().expect("behaviours");
    all.iter().find(|b| b["name"] == name).unwrap_or_else(|| panic!("no {name} in {json}"))
}

/// Those with this verdict.
fn with_verdict(json: &Value, verdict: &str) -> usize {
    let all = json["behaviours"].as_array().expect("behaviours");
    all.iter().filter(|behaviour| behaviour["verdict"] == verdict).count()
}

/// Checks what holds on every host with KVM: the shape, and that the parts agree.
#[track_caller]
fn check_shape(json: &Value, status: Option<i32>) {
    let all = json["behaviours"].as_array().expect("behaviours");
    let names: Vec<_> = all.iter().map(|b| b["name"].as_str().unwrap()).collect();
    assert_eq!(names, NAMES, "{json}");
    for behaviour in all {
        for text in ["why", "explanation", "fixed_in"] {
            assert!(behaviour[text].as_str().is_some_and(|text| !text.is_empty()), "{behaviour}");
        }
        match behaviour["verdict"].as_str() {
            Some("fixed" | "affected") => assert!(behaviour["observed"].is_object(), "{behaviour}"),
            Some("cannot-tell") => {}
            other => panic!("{other:?} is no verdict: {behaviour}"),
        }
    }
    let (verdict, expected) = match with_verdict(json, "affected") {
        0 => ("not-affected", 0),
        _ => ("affected", 1),
    };
    assert_eq!((&json["verdict"], status), (&Value::from(verdict), Some(expected)), "{json}");
    let floor = &json["launch_floor"];
    let us = |name: &str| floor[name].as_u64().unwrap_or_else(|| panic!("no {name} in {floor}"));
    assert!(us("launches") > 0 && us("shortest_us") > 0, "{floor}");
    assert!(us("shortest_us") <= us("median_us"), "{floor}");
    for capability in json["host"]["kvm"]["capabilities"].as_array().expect("capabilities") {
        assert!(capability["name"].is_string() && capability["without"].is_string());
        assert!(capability["number"].is_u64() && capability["value"].is_i64(), "{capability}");
    }
}

#[test]
fn the_json_object_has_the_documented_shape() {
    let outcome = run(&["doctor", "--json"]);
    let json = outcome.json();
    check_shape(&json, outcome.status);
    assert!(outcome.stderr.is_empty(), "{outcome}");
}

#[test]
fn the_host_is_described_as_the_kernel_describes_it() {
    let outcome = run(&["doctor", "--json"]);
    let json = outcome.json();
    let host = &json["host"];
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default().trim().to_owned();
    assert_eq!(host["kernel"], read("/proc/sys/kernel/osrelease"), "{outcome}");
    let flag = |name| match &*read(&format!("/sys/module/kvm/parameters/{name}")) {
        "Y" | "1" => Value::from(true),
        "N" | "0" => Value::from(false),
        _ => Value::Null,
    };
    assert_eq!(host["enable_pmu"], flag("enable_pmu"), "{outcome}");
    assert_eq!(host["ignore_msrs"], flag("ignore_msrs"), "{outcome}");
    let kvm = std::fs::metadata("/dev/kvm").unwrap();
    assert_eq!(host["dev_kvm"]["mode"], kvm.permissions().mode() & 0o7777, "{outcome}");
    assert_eq!(host["dev_kvm"]["problem"], Value::Null, "{outcome}");
    // As another command has it, which asks in its own way.
    let run = run(&["run", "--json"]).expect_status(0).json();
    assert_eq!(host["kvm"]["kind"], run["host"]["kvm"], "{outcome}");
    let capabilities = host["kvm"]["capabilities"].as_array().unwrap();
    let of_pmu = capabilities.iter().find(|capability| capability["number"] == 212).unwrap();
    assert_eq!(of_pmu["value"], run["host"]["cap_212"], "{outcome}");
    // A machine ran: what it needs is there.
    for number in [121, 32, 36, 136, 127] {
        let needed = capabilities.iter().find(|capability| capability["number"] == number);
        assert!(needed.unwrap()["value"].as_i64() > Some(0), "{outcome}");
    }
}

#[test]
fn every_kvm_decides_what_takes_no_hardware() {
    let outcome = run(&["doctor", "--json"]);
    let json = outcome.json();
    // Right in every Linux on which this program runs.
    assert!(decided(&json, "cpuid-after-run"), "{outcome}");
    assert!(decided(&json, "nmi-cancel"), "{outcome}");
    if json["host"]["ignore_msrs"] == false {
        decided(&json, "pv-msrs");
    }
    // What a host does not have, it says.
    let why = |name| behaviour(&json, name)["why"].as_str().unwrap();
    if json["host"]["kvm"]["kind"] == "software" {
        assert_eq!(why("vmrun-exit-code"), "the guest's CPUID has no SVM", "{outcome}");
        assert_eq!(why("cpuid-in-l2"), "guests have no SVM, by which it is tried", "{outcome}");
        assert!(why("vmcs-fields").starts_with("guests have no VMX"), "{outcome}");
    }
    if json["host"]["enable_pmu"] == false {
        assert!(why("pmu-off").ends_with("kvm.enable_pmu is off"), "{outcome}");
        assert_eq!(behaviour(&json, "pmu-off")["verdict"], "cannot-tell", "{outcome}");
    }
}

/// That a behaviour was decided, and in agreement with what was observed. Says which it is: fixed or not.
#[track_caller]
fn decided(json: &Value, name: &str) -> bool {
    let behaviour = behaviour(json, name);
    let observed = &behaviour["observed"];
    let is_accepted = |value: &Value| match value {
        Value::String(word) if word == "accepted" => true,
        Value::Object(refused) if refused.contains_key("refused") => false,
        other => panic!("{other} is no answer: {behaviour}"),
    };
    let fixed = match name {
        "vmrun-exit-code" => {
            let after = observed["after"].as_u64().expect("an exit code");
            assert_eq!(after as u32, u32::MAX, "a VMRUN that did not fail: {behaviour}");
            after == u64::MAX
        }
        "pv-msrs" => {
            let registers = observed["registers"].as_array().expect("registers");
            for known in [0x11, 0x12, 0x4b56_4d00, 0x4b56_4d01] {
                assert!(registers.iter().any(|register| register["index"] == known), "{behaviour}");
            }
            registers.iter().all(|register| {
                assert!(!is_accepted(&register["write_1"]), "{behaviour}");
                assert_eq!(register["guest"], "fault", "{behaviour}");
                is_accepted(&register["write_0"]) && is_accepted(&register["read"])
            })
        }
        "cpuid-in-l2" => {
            assert_eq!(observed["in_l2"], true, "{behaviour}");
            assert!(is_accepted(&observed["cpuid_before"]), "{behaviour}");
            assert!(is_accepted(&observed["same_cpuid"]), "{behaviour}");
            let feature = &observed["feature"];
            assert!(is_accepted(&feature["same_in_l2"]), "{behaviour}");
            !is_accepted(&observed["cpuid_in_l2"]) && !is_accepted(&feature["change_in_l2"])
        }
        "cpuid-after-run" => {
            assert!(is_accepted(&observed["before"]), "{behaviour}");
            !is_accepted(&observed["after"]) && is_accepted(&observed["same"])
        }
        "nmi-cancel" => {
            assert_eq!(observed["waiting"], "nmi", "{behaviour}");
            observed["left"] == 0 && observed["cancelled"]["done"].is_u64()
        }
        other => panic!("nobody knows {other}"),
    };
    let expected = if fixed { "fixed" } else { "affected" };
    assert_eq!(behaviour["verdict"], expected, "{behaviour}");
    fixed
}

#[test]
fn a_real_kvm_amd_decides_what_hardware_shows() {
    let lab = match Lab::find() {
        Ok(lab) => lab,
        Err(missing) => return skipped(missing),
    };
    let outcome = lab.run(&[], "/cleanslate doctor --no-jail --json; echo the status is $?");
    let line = outcome.stdout.lines().find(|line| line.starts_with('{'));
    let json: Value = serde_json::from_str(line.expect("an object")).expect("JSON");
    let mut lines = outcome.stdout.lines();
    let status = lines.find_map(|line| line.strip_prefix("the status is ")?.parse().ok());
    check_shape(&json, status);
    let host = &json["host"];
    assert_eq!((&host["kvm"]["kind"], &host["nested"]), (&"svm".into(), &true.into()), "{outcome}");
    // Which of these are fixed depends on Debian's kernel.
    for name in ["vmrun-exit-code", "pv-msrs", "cpuid-in-l2"] {
        decided(&json, name);
    }
    assert!(decided(&json, "cpuid-after-run") && decided(&json, "nmi-cancel"), "{outcome}");
}

#[test]
fn the_table_says_the_same_for_people() {
    let outcome = run(&["doctor"]);
    let json = run(&["doctor", "--json"]).json();
    let host = &json["host"];
    let kernel = host["kernel"].as_str().unwrap();
    let outcome = outcome.expect_stdout(&format!("kernel            Linux {kernel}\n"));
    let outcome = outcome.expect_stdout("/dev/kvm          may be opened (mode ");
    let outcome = outcome.expect_stdout("launch floor      ");
    for name in NAMES {
        let behaviour = behaviour(&json, name);
        let word = match behaviour["verdict"].as_str().unwrap() {
            "fixed" => "fixed",
            "affected" => "AFFECTED",
            _ => "cannot tell here",
        };
        let text = |name: &str| behaviour[name].as_str().unwrap();
        let (right, since) = (text("explanation"), text("fixed_in"));
        let rows = format!("{name:<18}{word}: {}\n{:<18}{right} ({since})\n", text("why"), "");
        assert!(outcome.stdout.contains(&rows), "{outcome} lacks\n{rows}");
    }
    for capability in host["kvm"]["capabilities"].as_array().unwrap() {
        let (name, number) = (capability["name"].as_str().unwrap(), &capability["number"]);
        let row = format!("lacks KVM_CAP_{name} ({number}): ");
        let is_missing = capability["value"].as_i64() <= Some(0);
        assert_eq!(outcome.stdout.contains(&row), is_missing, "{row}: {outcome}");
    }
    let [affected, fixed, unknown] =
        ["affected", "fixed", "cannot-tell"].map(|verdict| with_verdict(&json, verdict));
    let sums = format!("\n{affected} affected, {fixed} fixed, {unknown} cannot be told here\n");
    assert!(outcome.stdout.ends_with(&sums), "{outcome}");
}

/// Sends `signal` to a check's process; gives that and what `doctor --json` says. Often a process is gone before it is found.
fn with_a_check_that_gets(signal: Signal) -> (Process, Outcome) {
    const ATTEMPTS: usize = 50;
    for _ in 0..ATTEMPTS {
        let program = Started::new(cleanslate(&["doctor", "--json", "--timeout", "1"]));
        let doctor = Process::new(program.child.id()).expect("the program");
        let mut hit = None;
        while hit.is_none() && doctor.is_there() {
            hit = doctor.children().into_iter().find(|check| {
                // Before it is a program of its own, its parent can only wait for it.
                let arguments = std::fs::read(format!("/proc/{}/cmdline", check.pid));
                let is_check =
                    String::from_utf8_lossy(&arguments.unwrap_or_default()).contains("--check");
                let pid = Pid::from_raw(check.pid as i32).expect("a number");
                is_check && kill_process(pid, signal).is_ok()
            });
        }
        let outcome = program.finish("cleanslate doctor --json --timeout 1");
        // The signal may have found one that had ended.
        if let Some(check) = hit
            && outcome.stdout.contains("its process ")
        {
            return (check, outcome);
        }
    }
    panic!("no check was found in {ATTEMPTS} runs");
}

/// Checks that one of the processes came to nothing, which is told in these words, and all others did as ever.
#[track_caller]
fn one_came_to_nothing(outcome: &Outcome, words: &str) {
    let json = outcome.json();
    assert_eq!(outcome.stdout.matches(words).count(), 1, "{outcome}");
    let unimpaired = run(&["doctor", "--json"]).json();
    let floor = &json["launch_floor"];
    assert!(floor["median_us"].is_u64() || floor["unmeasured"] == words, "{outcome}");
    for name in NAMES {
        let (now, ever) = (behaviour(&json, name), behaviour(&unimpaired, name));
        match now["why"] == words {
            true => assert_eq!(now["verdict"], "cannot-tell", "{outcome}"),
            false => assert_eq!(now["verdict"], ever["verdict"], "{name}: {outcome}"),
        }
    }
    let expected = i32::from(with_verdict(&json, "affected") > 0);
    assert_eq!(outcome.status, Some(expected), "{outcome}");
}

#[test]
fn a_check_that_hangs_is_ended_and_tells_nothing() {
    let (check, outcome) = with_a_check_that_gets(Signal::STOP);
    one_came_to_nothing(&outcome, "its process did not end within 1s, and was killed");
    assert!(!check.is_there(), "{outcome}");
}

#[test]
fn a_check_that_dies_tells_nothing() {
    let (_, outcome) = with_a_check_that_gets(Signal::KILL);
    one_came_to_nothing(&outcome, "its process was killed by signal 9");
}

/// `doctor` says what is wrong in one line, with this remedy, and prints what is known without KVM.
#[track_caller]
fn without_kvm(outcome: Outcome, remedy: &str) {
    let outcome = outcome.expect_status(2).expect_stderr(remedy).expect_one_line_of_stderr();
    let outcome =
        outcome.expect_stdout("kernel            Linux ").expect_stdout("/dev/kvm          ");
    let outcome = outcome.expect_stdout("\n0 affected, 0 fixed, 8 cannot be told here\n");
    assert_eq!(outcome.stdout.matches("cannot tell here: ").count(), 8, "{outcome}");
    // In the host's row, for the launch floor, and for all that need a machine.
    assert_eq!(outcome.stdout.matches(remedy).count(), 9, "{outcome}");
}

#[test]
fn without_dev_kvm_all_else_is_told() {
    // An empty /dev in a mount namespace of its own.
    let script =
        format!("mount -t tmpfs none /dev && exec {} doctor", env!("CARGO_BIN_EXE_cleanslate"));
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "--mount", "sh", "-c", &script]);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    without_kvm(Started::new(command).finish("cleanslate doctor without /dev"), "modprobe kvm");
}

#[test]
fn without_the_right_to_dev_kvm_all_else_is_told() {
    if std::fs::metadata("/dev/kvm").unwrap().permissions().mode() & 0o006 != 0 {
        return skipped("everybody may open /dev/kvm on this machine");
    }
    if !rustix::process::geteuid().is_root() {
        return skipped("it gives up root's rights, so it needs them");
    }
    let dir = temp_dir();
    std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let program = dir.path().join("cleanslate");
    std::fs::copy(env!("CARGO_BIN_EXE_cleanslate"), &program).unwrap();
    let mut command = Command::new(&program);
    command.arg("doctor").uid(65534).gid(65534);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    without_kvm(Started::new(command).finish("cleanslate doctor as nobody"), "usermod -aG kvm");
}

#[test]
fn wrong_usage_is_one_line() {
    let check = |arguments: &[&str], message: &str| {
        let outcome = run(&[&["doctor"], arguments].concat()).expect_status(2);
        let outcome = outcome.expect_stderr(message).expect_one_line_of_stderr();
        assert!(outcome.stdout.is_empty(), "{outcome}");
    };
    check(&["--timeout", "0"], "0 is not in 1..=86400");
    check(&["--timeout", "soon"], "invalid digit");
    check(&["everything"], "unexpected argument 'everything'");
    check(&["--check", "weather", "--child-of", "1"], "there is no such check");
    check(&["--check", "mdev"], "--child-of");
    check(&["--check", "mdev", "--child-of", "1"], "is not the number of the parent process");
}
