//! `run` boots the agent, takes its report and resets it by every cause.

use serde_json::Value;

use crate::harness::run;

fn lives(json: &Value) -> &[Value] {
    json["lives"].as_array().expect("lives is an array")
}

#[test]
fn three_resets_give_a_table_of_four_lives_and_a_clean_verdict() {
    let outcome = run(&["run", "--resets", "3"])
        .expect_status(0)
        .expect_stdout("clean: 4 lives, no findings");
    let causes: Vec<_> =
        outcome.stdout.lines().skip(1).filter_map(|line| line.split_whitespace().nth(1)).collect();
    assert_eq!(causes[..4], ["power-on", "host", "i8042", "triple"], "{outcome}");
    assert!(outcome.stderr.is_empty(), "{outcome}");
}

#[test]
fn every_cause_resets_in_place() {
    let causes = ["host", "i8042", "cf9", "acpi", "triple"];
    let via = causes.join(",");
    let outcome = run(&["run", "--json", "--resets", "10", "--reset-via", &via]).expect_status(0);
    let json = outcome.json();
    let found: Vec<_> = lives(&json).iter().map(|life| life["cause"].as_str().unwrap()).collect();
    let expected: Vec<_> = ["power-on"].into_iter().chain(causes).chain(causes).collect();
    assert_eq!(found, expected, "{outcome}");
}

#[test]
fn the_json_object_has_the_documented_shape() {
    let outcome = run(&["run", "--json", "--resets", "1"]).expect_status(0);
    let json = outcome.json();
    assert_eq!(json["verdict"], "clean", "{outcome}");
    assert_eq!(json["findings"], Value::Array(Vec::new()), "{outcome}");
    for (number, life) in (1..).zip(lives(&json)) {
        assert_eq!(life["life"], number, "{outcome}");
        assert!(life["hello_us"].as_u64().is_some_and(|us| us > 0), "{outcome}");
        assert_eq!(life["report"]["life"], number, "{outcome}");
        assert_eq!(life["report"]["cause"], life["cause"], "{outcome}");
    }
    let host = &json["host"];
    assert!(host["kernel"].is_string() && host["kvm"].is_string(), "{outcome}");
    assert!(host["cap_212"].is_i64() && host.get("enable_pmu").is_some(), "{outcome}");
    assert!(json["pmu"]["absence"].is_string(), "{outcome}");
}

#[test]
fn the_report_tells_what_linux_would_have_logged() {
    let outcome = run(&["run", "--json"]).expect_status(0);
    let json = outcome.json();
    let report = &lives(&json)[0]["report"];
    assert_eq!(report["pmu"]["status"], "absent", "{outcome}");
    let log: Vec<_> =
        report["dmesg"].as_array().unwrap().iter().map(|l| l["text"].as_str().unwrap()).collect();
    let line =
        "Performance Events: PMU not available due to virtualization, using software events only.";
    assert!(log.contains(&line), "{log:#?}");
    assert_eq!(report["nmi"]["total"], 0, "{outcome}");
    assert_eq!(report["dma"]["violation_count"], 0, "{outcome}");
    // Every register was read before anything wrote to it, and none was found enabled.
    let registers = report["pmu"]["msrs"].as_array().unwrap();
    assert!(!registers.is_empty() && registers.iter().all(|msr| msr["value"] == 0), "{outcome}");
}

#[test]
fn each_life_starts_with_a_small_time_stamp_counter() {
    let outcome = run(&["run", "--json", "--resets", "3"]).expect_status(0);
    let json = outcome.json();
    if json["host"]["kvm"] == "software" {
        // There guests read the host's counter; the program has to say that it does not look.
        assert_eq!(json["unchecked"][0][0], "tsc-not-reset", "{outcome}");
        return;
    }
    for life in lives(&json) {
        let timings = &life["report"]["timings"];
        let (entry, khz) =
            (timings["tsc_entry"].as_u64().unwrap(), timings["tsc_khz"].as_u64().unwrap());
        assert!(khz > 0 && entry / khz < 1000, "{outcome}");
    }
}

#[test]
fn many_lives_are_summed_up_by_cause() {
    let outcome = run(&["run", "--resets", "50", "--reset-via", "host,cf9"]).expect_status(0);
    let rows: Vec<_> =
        outcome.stdout.lines().map(|l| l.split_whitespace().collect::<Vec<_>>()).collect();
    assert_eq!(rows[1][..2], ["cf9", "25"], "{outcome}");
    assert_eq!(rows[2][..2], ["host", "25"], "{outcome}");
    assert_eq!(rows[3][..2], ["power-on", "1"], "{outcome}");
}

#[test]
fn more_memory_and_more_processors_work_alike() {
    run(&["run", "--resets", "2", "--mem", "16"]).expect_status(0);
    run(&["run", "--resets", "2", "--mem", "5000"]).expect_status(0);
    run(&["run", "--resets", "2", "--vcpus", "2"]).expect_status(0);
}
