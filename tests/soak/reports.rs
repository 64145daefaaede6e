//! What a soak leaves: lines of JSON, bundles, and the reports for others.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use super::{lines, verdict};
use crate::harness::browser::{self, Seen};
use crate::harness::{Started, cleanslate, run, temp_dir};

#[test]
fn each_line_of_json_says_where_it_comes_from() {
    let outcome = run(&["soak", "--json", "--resets", "5", "--seed", "9"]).expect_status(0);
    let lines = lines(&outcome);
    assert_eq!(lines.len(), 8, "{outcome}");
    let first = &lines[0];
    assert_eq!((&first["line"], &first["vms"]), (&"plan".into(), &1.into()), "{outcome}");
    assert_eq!((&first["seed"], &first["resets"]), (&9.into(), &5.into()), "{outcome}");
    for line in &lines[1..7] {
        assert_eq!((&line["line"], &line["process"]), (&"life".into(), &0.into()), "{outcome}");
        assert!(line["host"].is_string() && line["vm_seed"].is_u64(), "{outcome}");
        assert_eq!((&line["seed"], &line["vm"]), (&9.into(), &1.into()), "{outcome}");
        assert!(line["hello_us"].as_u64() > Some(0), "{outcome}");
        assert_eq!(line["findings"], Value::Array(Vec::new()), "{outcome}");
    }
    let last = &lines[7];
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

    // It needs nothing but the bundle: neither the directory nor a path to the program.
    let script = bundle.join("replay.sh");
    let mut command = Command::new(&script);
    command.arg("--json").current_dir("/").env_clear();
    let replay = Started::new(piped(command)).finish("replay.sh").expect_status(1);
    let words = facts["replay"].as_str().unwrap().strip_prefix("cleanslate ").unwrap();
    assert!(read("replay.sh").ends_with(&format!(" {words} \"$@\"\n")), "{}", read("replay.sh"));
    let replayed = replay.json();
    // The same lives came to that point, in the middle of the same.
    let soaked: Vec<_> = all.iter().filter(|line| line["vm"] == found["vm"]).collect();
    let lived = replayed["lives"].as_array().unwrap().iter().zip(soaked);
    let moments: Vec<_> = lived.map(|(a, b)| (&a["moment"], &b["moment"])).collect();
    assert!(moments.len() > 1 && moments.iter().all(|(a, b)| a == b), "{moments:?}");
    let of_life = |f: &&Value| f["life"] == found["life"];
    let again: Vec<_> = replayed["findings"].as_array().unwrap().iter().filter(of_life).collect();
    assert!(found["findings"].as_array().is_some_and(|all| !all.is_empty()), "{outcome}");
    for finding in found["findings"].as_array().unwrap() {
        assert!(again.iter().any(|f| f["name"] == finding["name"]), "{finding}: {replay}");
    }
}

fn piped(mut command: Command) -> Command {
    use std::process::Stdio;
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
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
    for width in [1100, 600] {
        let Some(Seen { title: seen, dom }) = browser::look(&file, width) else { return };
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
fn a_result_that_cannot_be_printed_is_a_failure_at_once() {
    let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    // With lines that nobody gets there is no sense in an hour of them.
    let mut command = cleanslate(&["soak", "--json", "--duration", "1h"]);
    command.stdout(full.try_clone().unwrap());
    Started::new(command)
        .finish("cleanslate soak --json --duration 1h > /dev/full")
        .expect_status(2)
        .expect_stderr("print the result: No space left on device");
    let mut command = cleanslate(&["soak", "--resets", "3"]);
    command.stdout(full);
    Started::new(command)
        .finish("cleanslate soak > /dev/full")
        .expect_status(2)
        .expect_stderr("print the result: No space left on device");
}

#[test]
fn one_report_that_cannot_be_written_does_not_keep_the_other() {
    let dir = temp_dir();
    let page = dir.path().join("page");
    let options = ["soak", "--resets", "2", "--junit", "/dev/full", "--html"];
    let outcome = run(&[&options[..], &[page.to_str().unwrap()]].concat()).expect_status(2);
    outcome.expect_stderr("write \"/dev/full\": No space left").expect_stdout("clean: 1 machine");
    assert!(fs::read_to_string(page).unwrap().contains("Soak: clean</h1>"));
}

#[test]
fn a_refused_soak_leaves_reports_as_they_are() {
    let dir = temp_dir();
    let (old, new) = (dir.path().join("old"), dir.path().join("new"));
    fs::write(&old, "of yesterday").unwrap();
    let check = |junit: &Path, html: &str, message: &str| {
        let options = ["soak", "--junit", junit.to_str().unwrap(), "--html", html];
        run(&options).expect_status(2).expect_stderr(message).expect_one_line_of_stderr();
    };
    check(&old, "/no/such/page", "write \"/no/such/page\"");
    check(&new, "/no/such/page", "write \"/no/such/page\"");
    check(&new, new.to_str().unwrap(), "--junit and --html name the same file");
    check(&old, old.to_str().unwrap(), "--junit and --html name the same file");
    let dots = format!("{}/../{}/old", dir.path().display(), file_name(dir.path()));
    check(&old, &dots, "--junit and --html name the same file");
    assert_eq!(fs::read_to_string(&old).unwrap(), "of yesterday");
    assert!(!new.exists());
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap().to_str().unwrap().into()
}

#[test]
fn a_longer_report_of_yesterday_is_replaced() {
    let dir = temp_dir();
    let page = dir.path().join("page");
    fs::write(&page, "x".repeat(1 << 20)).unwrap();
    run(&["soak", "--resets", "2", "--html", page.to_str().unwrap()]).expect_status(0);
    assert!(fs::read_to_string(page).unwrap().ends_with("</html>\n"));
}

#[test]
fn a_soak_goes_on_without_room_for_bundles_and_says_so() {
    let dir = temp_dir();
    let mut command = Command::new("unshare");
    // 16 KiB, which the first bundle fills.
    let script = "mount -t tmpfs -o size=16k none \"$1\" && cd \"$1\" && shift && exec \"$@\"";
    command.args(["--mount", "sh", "-c", script, "sh"]).arg(dir.path());
    let options = ["soak", "--resets", "8", "--keep-going", "--inject", "fpu-kept", "--seed", "1"];
    let program = cleanslate(&options);
    command.arg(program.get_program()).args(program.get_args());
    let outcome = Started::new(piped(command)).finish("cleanslate soak in a full directory");
    let outcome = outcome
        .expect_status(2)
        .expect_stdout("not clean: 1 machine, 9 lives, 8 findings")
        .expect_stderr("write the bundle ")
        .expect_stderr("No space left on device");
    outcome.expect_one_line_of_stderr();
}

#[test]
fn a_directory_that_takes_no_bundles_is_refused_before() {
    for bundle in [None, Some("here")] {
        let mut command = cleanslate(&["soak", "--resets", "1"]);
        command.args(bundle.map(|name| ["--bundle", name]).into_iter().flatten());
        // Nobody makes directories there, not even root.
        command.current_dir("/proc");
        let outcome = Started::new(command).finish("cleanslate soak in /proc").expect_status(2);
        let outcome =
            outcome.expect_stderr("bundles could not be kept in").expect_one_line_of_stderr();
        assert!(outcome.stdout.is_empty(), "{outcome}");
    }
}
