//! How a probe ends before its time: by what the user gave it, by a signal, by its machine's death.

use std::io::Write;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;

use agent_protocol::PROTOCOL_VERSION;
use rustix::process::Signal;

use super::peer::{self, Flaw};
use super::{SMALL, a_report, checks};
use crate::harness::process::Process;
use crate::harness::{Outcome, Started, cleanslate, eventually, file, run, signal, temp_dir};

#[track_caller]
fn refused(outcome: Outcome, message: &str) {
    let outcome = outcome.expect_status(2).expect_stderr(message).expect_one_line_of_stderr();
    assert!(outcome.stdout.is_empty(), "{outcome}");
}

#[test]
fn wrong_flags_are_refused_in_one_line() {
    let check = |arguments: &[&str], message: &str| {
        refused(run(&[&["probe"], arguments].concat()), message);
    };
    check(&["--count", "0"], "0 is not in 1..");
    check(&["--mib", "0"], "0 is not in 1..");
    check(&["--connections", "0"], "0 is not in 1..");
    check(&["--timeout", "0"], "0 is not in 1..");
    check(&["--uid", "root"], "--uds");
    check(&["--uds", "x", "--agent", "y"], "cannot be used with");
    check(&["--uds", "x", "--no-jail"], "cannot be used with");
    check(&["--uds", "x", "--uid", "nobody-of-that-name"], "nobody-of-that-name");
    check(&["--agent", "/no/such/agent"], "/no/such/agent");
    let mut command = cleanslate(&["probe"]);
    command.env("TMPDIR", "/no/such/place");
    refused(Started::new(command).finish("cleanslate probe"), "/no/such/place");
}

#[test]
fn sockets_without_an_agent_behind_them_are_refused_in_one_line() {
    let dir = temp_dir();
    let check = |path: &Path, message: &str| {
        let more = ["--timeout", "1", "--uds", path.to_str().unwrap()];
        refused(run(&[&SMALL[..], &more].concat()), message);
    };
    check(&dir.path().join("missing"), "missing\": No such file");
    check(&file(&dir, "plain", b"text"), "plain\": Connection refused");
    check(dir.path(), "Connection refused");
    check(Path::new(&format!("/tmp/{}", "x".repeat(200))), "connect to ");
    let abandoned = dir.path().join("abandoned");
    drop(UnixListener::bind(&abandoned).unwrap());
    check(&abandoned, "abandoned\": Connection refused");
    let answers = |name: &str, answer: &[u8], message: &str, closes: bool| {
        let path = dir.path().join(name);
        let (listener, answer) = (UnixListener::bind(&path).unwrap(), answer.to_vec());
        std::thread::spawn(move || {
            let mut kept: Vec<UnixStream> = Vec::new();
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                peer::read_line(&mut stream);
                let _ = stream.write_all(&answer);
                if !closes {
                    kept.push(stream);
                }
            }
        });
        check(&path, message);
    };
    let ok = |more: &[u8]| [b"OK 1073741824\n", more].concat();
    let version = PROTOCOL_VERSION + 1;
    let words = format!("the agent speaks protocol version {version}, not {PROTOCOL_VERSION}");
    answers("silent", b"", "did not answer a client within 1s", false);
    answers("closing", b"", "refused the connection to its port 5005", true);
    answers("other", b"HELLO\n", "answered \"HELLO\" instead of OK", true);
    answers("long", &[b'x'; 100], "instead of OK", false);
    answers("mute", &ok(b""), "port 5005: the agent did not answer within 1s", false);
    answers("gone", &ok(b""), "port 5005: the agent closed the connection", true);
    answers("nonsense", &ok(&[0xff; 64]), "port 5005: the agent sent a broken frame", false);
    answers("web", &ok(b"HTTP/1.1 200 OK\r\n"), "the agent sent a broken frame", false);
    answers("later", &ok(&peer::hello(version)), &words, false);
}

#[test]
fn an_interrupted_probe_tells_what_it_has_measured() {
    let (dir, report) = (temp_dir(), a_report());
    let path = dir.path().join("v.sock");
    let connections = peer::start(&path, Flaw::Nothing, report);
    let mut command = cleanslate(&["probe", "--json", "--count", "2", "--mib", "1"]);
    command.args(["--connections", "10000000", "--uds", path.to_str().unwrap()]);
    let program = Started::new(command);
    // 70 of them are for other figures.
    eventually("it opens connections", || connections() > 200);
    signal(&program.child, Signal::INT);
    let outcome = program.finish("cleanslate probe").expect_status(130);
    let json = outcome.json();
    assert_eq!((&json["ending"], &json["verdict"]), (&"interrupted".into(), &().into()));
    assert_eq!(json["round_trips"].as_array().unwrap().len(), 6, "{outcome}");
    assert_eq!(json["throughput"].as_array().unwrap().len(), 9, "{outcome}");
    assert_eq!(json["connections"].as_array().unwrap().len(), 0, "{outcome}");
    assert_eq!(checks(&json, "pass").len(), 2, "{outcome}");
}

/// A probe of a machine of its own that is at work, with a directory that has nothing else in it.
struct Working {
    program: Started,
    dir: tempfile::TempDir,
    processes: Vec<Process>,
}

impl Working {
    #[track_caller]
    fn start() -> Self {
        let dir = temp_dir();
        let mut command: Command = cleanslate(&["probe", "--json", "--count", "10000000"]);
        command.env("TMPDIR", dir.path());
        let program = Started::new(command);
        let process = Process::new(program.child.id()).unwrap();
        let mut processes = Vec::new();
        // Its janitor; the machine's caller with its own janitor and the jailed process.
        eventually("the machine runs", || {
            processes = process.descendants();
            processes.len() >= 4
        });
        let working = Self { program, dir, processes };
        working.wait_for_work();
        working
    }

    /// Until it is at work: its machine has been judged by then.
    fn wait_for_work(&self) {
        let threads = format!("/proc/{}/task", self.program.child.id());
        eventually("the probe is at work", || {
            let mut threads = std::fs::read_dir(&threads).unwrap().flatten();
            threads.any(|thread| {
                std::fs::read_to_string(thread.path().join("comm")).is_ok_and(|n| n == "probe\n")
            })
        });
    }

    #[track_caller]
    fn expect_nothing_left(self) {
        eventually("no process is left", || !self.processes.iter().any(Process::is_there));
        eventually("no directory is left", || {
            std::fs::read_dir(self.dir.path()).unwrap().next().is_none()
        });
    }
}

#[test]
fn an_interrupted_probe_leaves_nothing_of_its_machine() {
    for which in [Signal::INT, Signal::TERM] {
        let Working { program, dir, processes } = Working::start();
        signal(&program.child, which);
        let outcome = program.finish("cleanslate probe").expect_status(130);
        assert_eq!(outcome.json()["ending"], "interrupted", "{outcome}");
        // Its machine could still say what it has seen.
        assert_eq!(checks(&outcome.json(), "pass").len(), 3, "{outcome}");
        let program = Started::new(cleanslate(&["--version"]));
        Working { program, dir, processes }.expect_nothing_left();
    }
}

#[test]
fn a_killed_probe_leaves_nothing_of_its_machine() {
    let working = Working::start();
    signal(&working.program.child, Signal::KILL);
    working.expect_nothing_left();
}

#[test]
fn a_machine_that_dies_ends_the_probe_with_its_last_words() {
    let Working { program, dir, processes } = Working::start();
    let child = Process::new(program.child.id()).unwrap().children();
    let caller = child.into_iter().find(|process| process.children().len() == 2);
    let caller = caller.expect("the caller of the machine's process");
    super::super::soak::Running::machine_of(caller).signal(Signal::KILL);
    let outcome = program.finish("cleanslate probe").expect_status(2);
    let json = outcome.json();
    assert_eq!((&json["ending"], &json["verdict"]), (&"failed".into(), &().into()), "{outcome}");
    let why = json["failure"].as_str().unwrap();
    assert!(why.contains("the machine's process was killed by signal 9"), "{outcome}");
    let program = Started::new(cleanslate(&["--version"]));
    Working { program, dir, processes }.expect_nothing_left();
}

#[test]
fn a_result_that_cannot_be_printed_is_a_failure() {
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let mut command = cleanslate(&SMALL);
    command.stdout(full);
    Started::new(command)
        .finish("cleanslate probe > /dev/full")
        .expect_status(2)
        .expect_stderr("print the result: No space left on device");
}
