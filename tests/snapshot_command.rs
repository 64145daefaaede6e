//! `cleanslate snapshot`: a machine as files, machines made of them, and what is said of files that are none.

use std::fs::File;
use std::os::unix::net::UnixListener;
use std::path::Path;

use serde_json::Value;

use crate::counters::processor_is_amds;
use crate::harness::{Outcome, page_server, run, skipped, temp_dir};

/// Makes a snapshot in `dir` and gives its path.
fn create(dir: &tempfile::TempDir, name: &str, options: &[&str]) -> String {
    let path = dir.path().join(name).to_str().unwrap().to_owned();
    run(&[&["snapshot", "create", &path], options].concat())
        .expect_status(0)
        .expect_stdout("clean: 1 life, no findings\nsnapshot ");
    path
}

fn restore(path: &str, options: &[&str]) -> Outcome {
    run(&[&["snapshot", "restore", path], options].concat())
}

fn names(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).unwrap();
    let mut names: Vec<_> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_machine_goes_on_from_its_snapshot_and_is_clean_after_every_reset() {
    let dir = temp_dir();
    let path = create(&dir, "agent", &["--look"]);
    assert_eq!(names(Path::new(&path)), ["memory", "state"]);
    // Twice from the same files.
    for _ in 0..2 {
        let via = ["--json", "--resets", "5", "--reset-via", "host,i8042,cf9,acpi,triple"];
        let outcome = restore(&path, &via).expect_status(0);
        let json = outcome.json();
        assert_eq!(json["verdict"], "clean", "{outcome}");
        let causes: Vec<_> =
            json["lives"].as_array().unwrap().iter().map(|life| &life["cause"]).collect();
        assert_eq!(causes, ["power-on", "host", "i8042", "cf9", "acpi", "triple"], "{outcome}");
    }
}

#[test]
fn counters_are_as_they_were_and_resets_still_clear_them() {
    if !processor_is_amds() {
        return;
    }
    let dir = temp_dir();
    let path =
        create(&dir, "counters", &["--pmu", "emulated", "--pmu-counters", "5", "--vcpus", "2"]);
    let outcome = restore(&path, &["--json", "--resets", "3"]).expect_status(0);
    let json = outcome.json();
    assert_eq!(json["pmu"]["shape"]["counters"], 5, "{outcome}");
    assert_eq!(json["lives"].as_array().unwrap().len(), 4, "{outcome}");
}

#[test]
fn show_says_what_a_snapshot_is_and_whether_it_is_whole() {
    let dir = temp_dir();
    let path = create(&dir, "agent", &["--mem", "32", "--rng", "--cmdline", "some words"]);
    run(&["snapshot", "show", &path])
        .expect_status(0)
        .expect_stdout("all of RAM; state and memory are whole\n")
        .expect_stdout(
            "the embedded agent, command line \"some words\", 32 MiB, 1 vCPU, no performance counters; vsock, rng\n",
        )
        .expect_stdout("life 1, after power-on\n");
    let shown = run(&["snapshot", "show", &path, "--json"]).expect_status(0);
    let json = shown.json();
    assert_eq!(
        (&json["mem_mib"], &json["vcpus"], &json["parent"]),
        (&32.into(), &1.into(), &Value::Null)
    );

    let memory = Path::new(&path).join("memory");
    let mut bytes = std::fs::read(&memory).unwrap();
    let used = bytes.iter().position(|byte| *byte != 0).unwrap();
    bytes[used] ^= 1;
    std::fs::write(&memory, bytes).unwrap();
    let check = |outcome: Outcome, message: &str| {
        outcome.expect_status(2).expect_stderr(message).expect_one_line_of_stderr();
    };
    check(run(&["snapshot", "show", &path]), "the memory file's checksum is wrong");
    check(restore(&path, &[]), "the memory file's checksum is wrong");
    let state = Path::new(&path).join("state");
    let bytes = std::fs::read(&state).unwrap();
    std::fs::write(&state, &bytes[..bytes.len() / 2]).unwrap();
    check(restore(&path, &[]), "was cut short");
    std::fs::write(&state, b"something else").unwrap();
    check(run(&["snapshot", "show", &path]), "no state file of a snapshot");
}

#[test]
fn what_cannot_be_is_refused_and_nothing_is_left() {
    let dir = temp_dir();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let check = |arguments: &[&str], message: &str| {
        run(&[&["snapshot"], arguments].concat())
            .expect_status(2)
            .expect_stderr(message)
            .expect_one_line_of_stderr();
    };
    check(&["restore", &path("nothing")], "No such file");
    check(&["show", &path("nothing")], "No such file");
    check(&["create", &path("no/where")], "make the directory");
    check(
        &["create", &path("new"), "--kernel", "/dev/null"],
        "add --guest linux, or leave out --kernel",
    );
    check(&["create", &path("new"), "--mem", "1"], "--mem 1 MiB is not between");
    check(&["create", &path("new"), "--pmu-seed", "1"], "add --pmu emulated");
    assert_eq!(names(dir.path()), Vec::<String>::new());
    let snapshot = create(&dir, "agent", &[]);
    let disk = crate::harness::file(&dir, "disk", &[0; 512]);
    check(&["create", &snapshot], "holds a snapshot: choose another directory, or add --replace");
    check(&["restore", &snapshot, "--agent", "/dev/null"], "--agent is not for this snapshot");
    check(&["restore", &snapshot, "--kernel", "/dev/null"], "--kernel is not for this snapshot");
    check(
        &["restore", &snapshot, "--disk", disk.to_str().unwrap()],
        "the snapshot is of a machine with 0 disks",
    );
    check(&["restore", &snapshot, "--cid", "2"], "an address is a number from 3");
    check(&["restore", &snapshot, "--base", &snapshot], "leave out what was named before it");
    run(&["snapshot", "create", &snapshot, "--replace"]).expect_status(0);
    assert_eq!(names(Path::new(&snapshot)), ["memory", "state"]);
    restore(&snapshot, &[]).expect_status(0);
}

#[test]
fn a_machine_with_findings_is_kept_only_if_that_is_wanted() {
    let dir = temp_dir();
    let path = dir.path().join("odd").to_str().unwrap().to_owned();
    // An agent that says that it saw what it did not.
    let agent = crate::harness::agent::built_with("packed-event-buffers");
    let odd = ["snapshot", "create", path.as_str(), "--agent", agent, "--dma-audit", "strict"];
    run(&odd).expect_status(1).expect_stdout("not clean");
    assert!(!Path::new(&path).exists());
    run(&[&odd[..], &["--force"]].concat()).expect_status(1).expect_stdout("snapshot ");
    assert_eq!(names(Path::new(&path)), ["memory", "state"]);
}

/// A page server of this process for the snapshot at `path`, with the socket's path. It gives `most` pages.
fn serve_pages(
    dir: &tempfile::TempDir,
    path: &str,
    most: usize,
) -> (String, std::thread::JoinHandle<usize>) {
    let socket = dir.path().join("pages").to_str().unwrap().to_owned();
    let listener = UnixListener::bind(&socket).unwrap();
    let file = File::open(Path::new(path).join("memory")).unwrap();
    let server = std::thread::spawn(move || page_server::serve(&listener, &file, most));
    (socket, server)
}

#[test]
fn ram_can_come_from_a_page_server_until_the_first_reset() {
    if !Path::new("/dev/userfaultfd").exists() {
        return skipped("the kernel has no /dev/userfaultfd");
    }
    let dir = temp_dir();
    let path = create(&dir, "agent", &[]);
    let (socket, server) = serve_pages(&dir, &path, usize::MAX);
    // The machine has nothing of this file but what the server gives it.
    std::fs::remove_file(Path::new(&path).join("memory")).unwrap();
    restore(&path, &["--page-server", &socket, "--resets", "2"])
        .expect_status(0)
        .expect_stdout("clean: 3 lives, no findings");
    let served = server.join().unwrap();
    assert!((10..32_768).contains(&served), "{served} pages of 32,768");
}

#[test]
fn a_page_server_that_ends_or_is_not_there_is_told_in_a_line() {
    if !Path::new("/dev/userfaultfd").exists() {
        return skipped("the kernel has no /dev/userfaultfd");
    }
    let dir = temp_dir();
    let path = create(&dir, "agent", &[]);
    let nowhere = dir.path().join("nowhere");
    restore(&path, &["--page-server", nowhere.to_str().unwrap()])
        .expect_status(2)
        .expect_stderr("nowhere");
    let (socket, server) = serve_pages(&dir, &path, 5);
    restore(&path, &["--page-server", &socket])
        .expect_status(2)
        .expect_stderr("the page server is gone");
    assert_eq!(server.join().unwrap(), 5);
}
