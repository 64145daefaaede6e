//! `launch`: jailed sandboxes do jobs, are recycled if they prove to be clean, and thrown away if not.

use std::io::Write;
use std::process::Stdio;

use serde_json::Value;

use crate::harness::{Outcome, Started, browser, cleanslate, file, run, temp_dir};
use crate::leftovers::marked_groups;

/// FIPS 180-2, appendix B.1.
const DIGEST_OF_ABC: [u8; 4] = [0xba, 0x78, 0x16, 0xbf];

/// Runs launches to their end; gives the outcome and its JSON.
#[track_caller]
fn launch(arguments: &[&str]) -> (Outcome, Value) {
    let outcome = run(&[&["launch", "--json"], arguments].concat());
    let json = outcome.json();
    (outcome, json)
}

#[test]
fn each_launch_is_a_process_of_its_own_and_leaves_what_its_job_came_to() {
    let dir = temp_dir();
    let input = file(&dir, "input", b"abc");
    let output = dir.path().join("output");
    let id = format!("launches-{}", std::process::id());
    let (outcome, json) = launch(&[
        "--count",
        "12",
        "--concurrency",
        "3",
        "--job",
        "sha256",
        "--input",
        input.to_str().unwrap(),
        "--output",
        output.to_str().unwrap(),
        "--id",
        &id,
    ]);
    outcome.expect_status(0).expect_stderr("");
    assert_eq!(
        (&json["done"], &json["failed"], &json["processes"]),
        (&12.into(), &0.into(), &12.into())
    );
    assert_eq!(json["verdict"], "clean");
    for launch in 0..12 {
        let digest = std::fs::read(output.join(launch.to_string())).unwrap();
        assert_eq!((digest.len(), &digest[..4]), (32, &DIGEST_OF_ABC[..]));
    }
    let hello = json["start_to_hello_us"]["p50"].as_u64().unwrap();
    assert!(hello > 0 && json["start_to_done_us"]["p50"].as_u64().unwrap() >= hello, "{json}");
    assert!(json["memory_kib"]["p50"].as_u64() > Some(100), "{json}");
    let groups = marked_groups(&id);
    assert!(groups.is_empty(), "{groups:?}");
}

#[test]
fn a_recycled_sandbox_takes_job_after_job() {
    let (outcome, json) = launch(&["--count", "40", "--concurrency", "2", "--from", "recycle"]);
    outcome.expect_status(0);
    assert_eq!((&json["done"], &json["processes"]), (&40.into(), &2.into()));
    assert_eq!(json["recycled"], 38, "the last job of each is its last: {json}");
    assert!(json["reset_to_hello_us"]["max"].as_u64() > Some(0), "{json}");
}

#[test]
fn copies_of_a_snapshot_do_jobs() {
    let dir = temp_dir();
    let snapshot = dir.path().join("agent.snapshot");
    let snapshot = snapshot.to_str().unwrap();
    run(&["snapshot", "create", snapshot, "--mem", "64"]).expect_status(0);
    let input = file(&dir, "input", &[7; 5000]);
    let (outcome, json) = launch(&[
        "--count",
        "20",
        "--from",
        "snapshot",
        "--snapshot",
        snapshot,
        "--input",
        input.to_str().unwrap(),
    ]);
    outcome.expect_status(0);
    assert_eq!((&json["done"], &json["processes"]), (&20.into(), &20.into()), "{json}");
    assert_eq!((&json["from"], &json["mem_mib"]), (&"snapshot".into(), &64.into()));
    // A file that is no snapshot is none for all of them.
    std::fs::write(dir.path().join("agent.snapshot/memory"), "short").unwrap();
    run(&["launch", "--from", "snapshot", "--snapshot", snapshot])
        .expect_status(2)
        .expect_one_line_of_stderr();
}

#[test]
fn what_waits_for_a_job_is_not_counted_into_its_time() {
    let (outcome, json) = launch(&["--count", "20", "--concurrency", "1", "--warm", "3"]);
    outcome.expect_status(0);
    assert_eq!((&json["done"], &json["processes"]), (&20.into(), &20.into()));
    let p50 = |name: &str| json[name]["p50"].as_u64().unwrap();
    assert!(p50("start_to_done_us") < p50("start_to_hello_us"), "{json}");
}

#[test]
fn a_machine_with_a_finding_is_thrown_away_and_another_takes_the_next_job() {
    for (fault, poison) in
        [("vsock-kept", false), ("ram-kept", true), ("msrs-kept", true), ("debugregs-kept", true)]
    {
        let mut arguments = vec!["--count", "4", "--concurrency", "1", "--from", "recycle"];
        arguments.extend(["--inject", fault]);
        arguments.extend(poison.then_some("--poison"));
        let (outcome, json) = launch(&arguments);
        outcome.expect_status(1);
        assert_eq!(json["verdict"], "not clean");
        // None had a second job.
        assert_eq!((&json["done"], &json["failed"]), (&4.into(), &0.into()), "{json}");
        assert_eq!((&json["processes"], &json["recycled"]), (&4.into(), &0.into()), "{json}");
        assert_eq!(json["findings"][fault]["count"], 3, "{json}");
    }
}

#[test]
fn poisoned_machines_are_clean_again() {
    let (outcome, json) =
        launch(&["--count", "10", "--from", "recycle", "--poison", "--mem", "16"]);
    outcome.expect_status(0);
    assert_eq!(json["findings"], serde_json::json!({}));
}

#[test]
fn standard_input_is_what_jobs_are_given() {
    let dir = temp_dir();
    let output = dir.path().join("output");
    let mut command = cleanslate(&["launch", "--count", "2", "--input", "-", "--output"]);
    command.arg(&output).stdin(Stdio::piped());
    let mut program = Started::new(command);
    let input = [7; 100_000];
    program.child.stdin.take().unwrap().write_all(&input).unwrap();
    program.finish("cleanslate launch --input -").expect_status(0).expect_stdout("2 launches done");
    for launch in ["0", "1"] {
        assert!(std::fs::read(output.join(launch)).unwrap() == input, "launch {launch}");
    }
}

#[test]
fn an_input_that_is_too_long_is_refused_before_anything_starts() {
    let dir = temp_dir();
    let input = file(&dir, "input", &vec![0; 300 << 10]);
    let output = dir.path().join("output");
    let outcome =
        run(&["launch", "--input", input.to_str().unwrap(), "--output", output.to_str().unwrap()]);
    outcome.expect_status(2).expect_one_line_of_stderr().expect_stderr("--input has more than");
    assert!(!output.exists());
}

#[test]
fn a_job_that_nobody_knows_fails_by_name() {
    let (outcome, json) = launch(&["--count", "3", "--job", "dance"]);
    outcome.expect_status(1);
    assert_eq!((&json["done"], &json["failed"]), (&0.into(), &3.into()));
    let refused = &json["failures"]["job-refused"];
    assert_eq!(refused["count"], 3, "{json}");
    assert!(refused["first"].as_str().unwrap().contains("no job \"dance\""), "{json}");
}

#[test]
fn what_the_host_cannot_give_is_one_line() {
    run(&["launch", "--mem", "1"])
        .expect_status(2)
        .expect_one_line_of_stderr()
        .expect_stderr("--mem 1");
    run(&["launch", "--agent", "/no/such/agent"])
        .expect_status(2)
        .expect_one_line_of_stderr()
        .expect_stderr("/no/such/agent");
    run(&["launch", "--cgroup", "memory.no_such=1"])
        .expect_status(2)
        .expect_one_line_of_stderr()
        .expect_stderr("memory.no_such");
}

#[test]
fn a_page_shows_it() {
    let dir = temp_dir();
    let page = dir.path().join("launches.html");
    run(&["launch", "--count", "30", "--from", "recycle", "--html", page.to_str().unwrap()])
        .expect_status(0);
    let Some(seen) = browser::look(&page, 900) else { return };
    let plots = seen.title["shown"].as_array().unwrap();
    assert_eq!(plots.len(), 2, "{plots:?}");
    for (plot, name) in plots.iter().zip(["hello", "done"]) {
        let words: Vec<_> = plot.as_str().unwrap().split(' ').collect();
        assert_eq!((words[0], words[1], words[5]), (name, "true", "true"), "{plot}");
        assert_ne!(words[2], "0", "{plot}");
    }
    assert_eq!(seen.title["wide"], false);
    assert!(seen.dom.contains("30 launches done"), "{}", seen.dom);
}

#[test]
fn idle_sandboxes_sleep() {
    let (outcome, json) = launch(&["--idle", "12", "--span", "1s"]);
    outcome.expect_status(0);
    assert_eq!(json["idle"]["count"], 12);
    assert_eq!(json["idle"]["wake_ups_per_second"], 0.0, "{json}");
    let pss = json["idle"]["proportional_kib"].as_u64().unwrap();
    assert!(pss / 12 < 4096, "each has its own copy of something: {json}");
}
