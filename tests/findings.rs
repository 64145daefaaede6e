//! What must not be there is found, by name and by exit status.

use std::io::Read;

use crate::harness::{Started, cleanslate, run, signal};

fn names(json: &serde_json::Value) -> Vec<&str> {
    json["findings"]
        .as_array()
        .unwrap()
        .iter()
        .map(|finding| finding["name"].as_str().unwrap())
        .collect()
}

#[test]
fn an_injected_nmi_comes_out_as_unknown() {
    let outcome = run(&["run", "--json", "--nmi", "1", "--resets", "1"]).expect_status(1);
    let json = outcome.json();
    assert_eq!(json["verdict"], "findings", "{outcome}");
    assert_eq!(names(&json), ["unknown-nmi"], "{outcome}");
    assert_eq!(json["findings"][0]["life"], 1, "{outcome}");
    let (first, second) = (&json["lives"][0]["report"], &json["lives"][1]["report"]);
    assert_eq!(
        (&first["nmi"]["total"], &first["nmi"]["unknown"]),
        (&1.into(), &1.into()),
        "{outcome}"
    );
    assert_eq!(first["nmi"]["records"][0]["reason"].as_u64().unwrap() & 0xc0, 0, "{outcome}");
    let log = first["dmesg"].to_string();
    assert!(log.contains("Uhhuh. NMI received for unknown reason"), "{outcome}");
    assert_eq!(second["nmi"]["total"], 0, "the reset left an NMI: {outcome}");
}

#[test]
fn each_of_several_nmis_is_counted() {
    let outcome = run(&["run", "--json", "--nmi", "5"]).expect_status(1);
    let json = outcome.json();
    assert_eq!(json["lives"][0]["report"]["nmi"]["unknown"], 5, "{outcome}");
}

#[test]
fn a_human_reads_the_finding_in_words() {
    run(&["run", "--nmi", "1"])
        .expect_status(1)
        .expect_stdout("finding in life 1: unknown-nmi: 1 of 1 NMIs")
        .expect_stdout("not clean: 1 life, 1 finding");
}

#[test]
fn an_agent_that_never_says_hello_is_a_finding_with_the_end_of_the_console() {
    // In this mode the agent prints its report and listens to nobody.
    let outcome = run(&["run", "--json", "--cmdline", "agent.report=serial", "--timeout", "1"])
        .expect_status(1);
    let json = outcome.json();
    let name = names(&json)[0];
    assert!(matches!(name, "no-hello" | "guest-stopped"), "{outcome}");
    let detail = json["findings"][0]["detail"].as_str().unwrap();
    assert!(detail.contains("the console ends with") && detail.contains("tsc_entry"), "{outcome}");
    assert_eq!(json["lives"][0]["hello_us"], serde_json::Value::Null, "{outcome}");
}

#[test]
fn ctrl_c_ends_a_long_run_without_waiting_for_the_agent() {
    // With the longest timeout that there is, a run that waits for an answer would never end.
    for lives in [1, 7, 40] {
        let arguments = ["run", "--json", "--resets", "1000000", "--timeout", "86400"];
        let mut program = Started::new(cleanslate(&arguments));
        let mut stdout = program.child.stdout.take().unwrap();
        read_lives(&mut stdout, lives);
        signal(&program.child, rustix::process::Signal::INT);
        let rest = std::thread::spawn(move || std::io::read_to_string(stdout).unwrap());
        program
            .finish("cleanslate run --resets 1000000, interrupted")
            .expect_status(130)
            .expect_stderr("cleanslate: interrupted")
            .expect_one_line_of_stderr();
        let rest = rest.join().unwrap();
        assert!(rest.ends_with("],\"verdict\":null}\n"), "the object was left open");
    }
}

/// Reads until `count` lives were begun.
fn read_lives(stdout: &mut impl Read, count: usize) {
    let (mut seen, mut byte) = (Vec::new(), [0]);
    let mark = format!("{{\"life\":{count},\"cause\"");
    while !seen.ends_with(mark.as_bytes()) {
        assert_eq!(stdout.read(&mut byte).unwrap(), 1, "{}", String::from_utf8_lossy(&seen));
        seen.push(byte[0]);
    }
}

#[test]
fn an_agent_that_turns_itself_off_is_noticed_without_waiting() {
    let arguments = ["run", "--json", "--cmdline", "agent.report=serial", "--timeout", "86400"];
    let outcome = run(&arguments).expect_status(1);
    assert_eq!(names(&outcome.json()), ["guest-stopped"], "{outcome}");
}

#[test]
fn a_pmu_that_the_host_does_not_have_is_refused() {
    let enabled =
        std::fs::read_to_string("/sys/module/kvm/parameters/enable_pmu").unwrap_or_default();
    let outcome = run(&["run", "--json", "--pmu", "host"]);
    if enabled.trim() == "N" {
        outcome.expect_status(2).expect_stderr("kvm.enable_pmu=N").expect_stderr("use --pmu off");
    } else {
        let json = outcome.expect_status(0).json();
        assert!(json["lives"][0]["report"]["pmu"]["status"]["present"].is_object());
    }
}
