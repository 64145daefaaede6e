//! `--inject`: each step that a reset leaves out on purpose is found under its name.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::counters::processor_is_amds;
use crate::harness::{Outcome, run};

/// Each fault, and what else a verdict says of it.
pub const FAULTS: [(&str, &[&str]); 16] = [
    ("pmu-not-reset", &["pmu-corrupted", "unknown-nmi"]),
    ("pmu-k7-only", &[]),
    ("globals-left", &[]),
    ("nmi-after-reset", &["unknown-nmi"]),
    ("nmi-queued", &["unknown-nmi"]),
    ("ram-kept", &[]),
    ("registers-kept", &[]),
    ("msrs-kept", &[]),
    ("lapic-kept", &[]),
    ("ioapic-kept", &[]),
    ("fpu-kept", &[]),
    ("debugregs-kept", &[]),
    ("lapic-timer-left", &[]),
    ("event-buffers-stale", &[]),
    ("vsock-kept", &[]),
    ("pv-clock-left", &[]),
];

/// What one leaves the other clears.
const CONTRADICTION: [&str; 2] = ["pmu-not-reset", "pmu-k7-only"];

fn run_with(faults: &[&str], options: &[&str]) -> Outcome {
    let injected = faults.iter().flat_map(|fault| ["--inject", fault]);
    let arguments: Vec<_> =
        ["run", "--json", "--pmu", "emulated", "--poison"].into_iter().chain(injected).collect();
    run(&[&arguments, options].concat())
}

/// The names of all findings of a life.
fn found(json: &Value, life: u64) -> BTreeSet<&str> {
    let findings = json["findings"].as_array().unwrap().iter();
    findings.filter(|f| f["life"] == life).map(|f| f["name"].as_str().unwrap()).collect()
}

/// Expects exactly these faults, with what else each shows, in each life after the first.
fn expect_found(faults: &[&str], outcome: &Outcome) {
    let json = outcome.json();
    let expected: BTreeSet<_> = FAULTS
        .iter()
        .filter(|(name, _)| faults.contains(name))
        .flat_map(|(name, others)| others.iter().chain([name]))
        .copied()
        .collect();
    let lives = json["lives"].as_array().unwrap().len() as u64;
    assert!(found(&json, 1).is_empty(), "the first life has no reset before it: {outcome}");
    for life in 2..=lives {
        assert_eq!(found(&json, life), expected, "life {life} with {faults:?}: {outcome}");
    }
}

#[test]
fn each_fault_is_found_under_its_name_whatever_the_cause_of_the_reset() {
    if !processor_is_amds() {
        return;
    }
    let via = ["--resets", "5", "--reset-via", "host,i8042,cf9,acpi,triple"];
    for (fault, _) in FAULTS {
        let outcome = run_with(&[fault], &via).expect_status(1);
        assert_eq!(outcome.json()["injected"][0], fault, "{outcome}");
        assert_eq!(outcome.json()["lives"].as_array().unwrap().len(), 6, "{outcome}");
        expect_found(&[fault], &outcome);
    }
    let clean = run_with(&[], &via).expect_status(0);
    assert_eq!(clean.json()["verdict"], "clean", "{clean}");
    assert_eq!(clean.json()["injected"], Value::Null, "{clean}");
}

#[test]
fn faults_together_give_all_their_findings() {
    if !processor_is_amds() {
        return;
    }
    let names = FAULTS.map(|(name, _)| name);
    let pairs = names.iter().enumerate().flat_map(|(i, a)| names[..i].iter().map(|b| vec![*b, *a]));
    let contradictory =
        |faults: &Vec<&str>| CONTRADICTION.iter().all(|fault| faults.contains(fault));
    for faults in pairs.filter(|pair| !contradictory(pair)) {
        expect_found(&faults, &run_with(&faults, &["--resets", "1"]).expect_status(1));
    }
    for without in CONTRADICTION {
        let faults: Vec<_> = names.into_iter().filter(|name| *name != without).collect();
        expect_found(&faults, &run_with(&faults, &["--resets", "3"]).expect_status(1));
    }
}

#[test]
fn each_item_that_is_called_reset_is_called_left_with_some_fault() {
    let items = |faults: &[&str], outcome: &str| -> BTreeSet<String> {
        let injected = faults.iter().flat_map(|fault| ["--inject", fault]);
        // With the processor in either ring at the end.
        let via = ["--resets", "2", "--reset-via", "i8042,host"];
        let arguments: Vec<_> =
            ["run", "--json", "--poison"].into_iter().chain(via).chain(injected).collect();
        let run = run(&arguments).expect_status(if faults.is_empty() { 0 } else { 1 });
        let json = run.json();
        let lives = json["lives"].as_array().unwrap()[1..].iter();
        let residue = lives.flat_map(|life| life["residue"].as_array().unwrap());
        let those = residue.filter(|item| item["outcome"] == outcome);
        those.map(|item| item["item"].as_str().unwrap().into()).collect()
    };
    let faults = FAULTS.iter().map(|(fault, _)| *fault).filter(|fault| needs_poison(fault));
    let left: BTreeSet<_> = faults.flat_map(|fault| items(&[fault], "left")).collect();
    let reset = items(&[], "reset");
    assert!(reset.len() > 120, "{reset:?}");
    let never: Vec<_> = reset.difference(&left).collect();
    assert!(never.is_empty(), "nobody has seen that the check can find {never:?}");
}

#[test]
fn counters_that_are_not_reset_show_both_faces_of_the_bug() {
    if !processor_is_amds() {
        return;
    }
    let outcome = run_with(&["pmu-not-reset"], &["--resets", "1"]).expect_status(1);
    let json = outcome.json();
    let report = &json["lives"][1]["report"];
    let log: Vec<_> =
        report["dmesg"].as_array().unwrap().iter().map(|l| l["text"].as_str().unwrap()).collect();
    let has = |text: &str| log.iter().any(|line| line.contains(text));
    let corrupted =
        "[Firmware Bug]: the BIOS has corrupted hw-PMU resources (MSR c0010200 is 530076)";
    assert!(has("Broken BIOS detected, complain to your hardware vendor."), "{log:#?}");
    assert!(log.contains(&corrupted), "{log:#?}");
    assert!(log.contains(&"AMD PMU driver."), "the driver loads all the same: {log:#?}");
    // And then the counter overflows, and nobody knows whose NMI that is.
    assert!(has("Uhhuh. NMI received for unknown reason"), "{log:#?}");
    assert!(has("Dazed and confused, but trying to continue"), "{log:#?}");
    assert_eq!(report["nmi"]["unknown"], 1, "{outcome}");
}

#[test]
fn faults_of_nmis_need_no_counters() {
    for (fault, others) in FAULTS.iter().filter(|(fault, _)| fault.starts_with("nmi-")) {
        let outcome = run(&["run", "--json", "--resets", "2", "--inject", fault]).expect_status(1);
        let expected: BTreeSet<_> = others.iter().chain([fault]).copied().collect();
        assert_eq!(found(&outcome.json(), 2), expected, "{outcome}");
        assert_eq!(found(&outcome.json(), 3), expected, "{outcome}");
    }
}

/// For each life after the first, the packets that its agent could not explain.
fn stale_packets(moment: &str, resets: u32, options: &[&str], status: i32) -> Vec<Vec<String>> {
    let resets = resets.to_string();
    let moments = ["run", "--json", "--seed", "5", "--moments", moment, "--resets", &resets];
    let outcome = run(&[&moments, options].concat()).expect_status(status);
    let json = outcome.json();
    let lives = json["lives"].as_array().unwrap()[1..].iter();
    let packets = lives.zip(2..).map(|(life, number)| {
        let names = if status == 0 { vec![] } else { vec!["vsock-kept"] };
        assert_eq!(found(&json, number), BTreeSet::from_iter(names), "{outcome}");
        let first = life["report"]["vsock"]["first"].as_array().unwrap();
        first.iter().map(|packet| packet.as_str().unwrap().into()).collect()
    });
    packets.collect()
}

#[test]
fn connections_that_a_device_keeps_are_found_whichever_side_opened_them() {
    const OPENED_BY_GUEST: &str = " from 6006 to ";
    let inject = ["--inject", "vsock-kept"];
    let by_guest = |packets: &Vec<String>| packets.iter().any(|p| p.contains(OPENED_BY_GUEST));
    let lives = stale_packets("mid-transfer", 10, &inject, 1);
    assert!(lives.iter().all(by_guest), "{lives:?}");
    // The guest may be reset before it comes to ask the host.
    let lives = stale_packets("mid-connect", 30, &inject, 1);
    assert!(lives.iter().any(by_guest), "{lives:?}");
    assert!(lives.iter().all(|packets| packets.iter().any(|p| p.ends_with(" to 5005"))));
    for moment in ["mid-transfer", "mid-connect"] {
        assert!(stale_packets(moment, 10, &[], 0).concat().is_empty());
    }
}

#[test]
fn a_human_reads_what_was_left_out_on_purpose() {
    run(&["run", "--resets", "1", "--inject", "nmi-queued"])
        .expect_status(1)
        .expect_stdout("finding in life 2: nmi-queued: 1 NMI was waiting")
        .expect_stdout("injected: the resets left out nmi-queued")
        .expect_stdout("not clean: 2 lives, 2 findings");
}

/// All but those of counters, NMIs and connections.
fn needs_poison(fault: &str) -> bool {
    !["pmu-", "globals-", "nmi-", "vsock-"].iter().any(|prefix| fault.starts_with(prefix))
}

#[test]
fn faults_that_nothing_could_show_are_refused() {
    let check = |options: &[&str], message| {
        run(&[&["run"], options].concat())
            .expect_status(2)
            .expect_stderr(message)
            .expect_one_line_of_stderr();
    };
    let reset = ["--resets", "1"];
    check(&["--inject", "nmi-queued"], "add --resets N");
    check(&["--poison"], "--poison shows after a reset: add --resets N");
    for (fault, _) in FAULTS.iter().filter(|(fault, _)| needs_poison(fault)) {
        check(&[&reset[..], &["--inject", fault]].concat(), "add --poison");
    }
    let small = ["--poison", "--mem", "12", "--inject", "ram-kept"];
    check(&[&reset[..], &small].concat(), "--inject ram-kept needs more RAM than --mem 12");
    for fault in ["pmu-not-reset", "pmu-k7-only", "globals-left"] {
        check(&[&reset[..], &["--inject", fault]].concat(), "add --pmu emulated");
    }
    let emulated = [&reset[..], &["--pmu", "emulated"]].concat();
    let contradiction = ["--inject", CONTRADICTION[0], "--inject", CONTRADICTION[1]];
    check(&[&emulated[..], &contradiction].concat(), "exclude each other");
    if processor_is_amds() {
        let old = ["--pmu-version", "1", "--inject", "globals-left"];
        check(&[&emulated[..], &old].concat(), "needs global registers: --pmu-version 2");
        let four = ["--pmu-counters", "4", "--inject", "pmu-k7-only"];
        check(&[&emulated[..], &four].concat(), "needs AMD's fifth counter");
    }
    run(&["run", "--resets", "1", "--inject", "everything"])
        .expect_status(2)
        .expect_stderr("pmu-not-reset, pmu-k7-only, globals-left, nmi-after-reset, nmi-queued")
        .expect_stderr("ram-kept, registers-kept, msrs-kept, lapic-kept, ioapic-kept, fpu-kept")
        .expect_stderr("debugregs-kept, lapic-timer-left, event-buffers-stale, vsock-kept");
}
