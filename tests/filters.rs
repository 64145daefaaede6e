//! Filters of system calls: what they forbid ends the machine, and they allow no more than is used.

use std::collections::HashSet;
use std::path::Path;
use std::process::{Command, Stdio};

use agent_protocol::DiskRequest;
use jailer::seccomp::{RULES, Rule, ThreadKind};

use crate::harness::guest::Guest;
use crate::harness::held::agent_at;
use crate::harness::{Outcome, Started, TRACES, cleanslate, eventually, file, skipped, temp_dir};

/// Test modules whose machines make every call that a rule is for, unless it says that none does.
const REPERTOIRE: [&str; 12] = [
    "api::",
    "counters::",
    "disks::",
    "faults::",
    "findings::",
    "guests::",
    "hostile::",
    "launches::",
    "lives::",
    "messages::",
    "snapshot_command::",
    "vsock::",
];

const KVM_RUN: u64 = 0xae80;

/// Runs the program with `arguments`; in each of its threads, the call of `victim` with number `nth` and all later ones
/// become another call, which no thread may make. (Where the C library blocks signals, as at a thread's end, this shows
/// nothing: the kernel does not kill the first process of a namespace while it is traced.)
fn run_with_a_wrong_call(arguments: &[&str], victim: &str, nth: u32) -> Outcome {
    let name = format!("cleanslate {} with a wrong {victim}", arguments.join(" "));
    start_with_a_wrong_call(arguments, victim, nth).finish(&name)
}

fn start_with_a_wrong_call(arguments: &[&str], victim: &str, nth: u32) -> Started {
    let inject = format!("inject={victim}:retval=0:syscall=getuid:when={nth}+");
    let mut command = Command::new("strace");
    command.args(["-D", "-f", "-qq", "-o", "/dev/null", "-e", "signal=none"]);
    command.args(["-e", &format!("trace={victim}"), "-e", &inject]);
    command.arg(cleanslate(&[]).get_program()).args(arguments);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    Started::new(command)
}

#[test]
fn a_forbidden_call_ends_the_machine_and_is_named_with_its_thread() {
    if std::env::var_os(TRACES).is_some() {
        return;
    }
    let check = |arguments: &[&str], victim, nth, thread: ThreadKind| {
        let what = "made a system call that its filter forbids, and was ended: getuid(";
        run_with_a_wrong_call(arguments, victim, nth)
            .expect_status(2)
            .expect_stderr(what)
            .expect_stderr(&format!(" on {thread}\n"))
            .expect_one_line_of_stderr();
    };
    // Calls that this thread makes first, and once it is restricted.
    check(&["run"], "recvfrom", 1, ThreadKind::Main);
    check(&["run"], "epoll_pwait", 1, ThreadKind::EventLoop);
    // No other thread makes so many before: each character leaves guest mode.
    let dir = temp_dir();
    let guest = Guest::new().print(&"x".repeat(500)).power_off();
    let kernel = file(&dir, "guest.elf", &guest.elf());
    check(&["run", "--kernel", kernel.to_str().unwrap()], "ioctl", 300, ThreadKind::Vcpu);
}

#[test]
fn a_forbidden_call_of_a_disks_thread_ends_the_machine_and_is_named() {
    if std::env::var_os(TRACES).is_some() {
        return;
    }
    let dir = temp_dir();
    let disk = file(&dir, "disk", &[0; 512]);
    let socket = dir.path().join("vsock");
    let [disk, socket] = [&disk, &socket].map(|path| path.to_str().unwrap());
    let arguments = ["run", "--hold", "--uds", socket, "--disk", disk];
    let started = start_with_a_wrong_call(&arguments, "fdatasync", 1);
    eventually("the machine has a socket", || Path::new(socket).exists());
    let ended = agent_at(Path::new(socket), 1).disk(0, DiskRequest::Flush);
    assert!(ended.is_err(), "{ended:?}");
    started
        .finish("cleanslate run --hold with a wrong fdatasync")
        .expect_status(2)
        .expect_stderr("made a system call that its filter forbids, and was ended: getuid(")
        .expect_stderr(&format!(" on {}\n", ThreadKind::Disk));
}

#[test]
fn a_forbidden_call_of_the_apis_http_thread_ends_the_instance_and_is_named() {
    if std::env::var_os(TRACES).is_some() {
        return;
    }
    let dir = temp_dir();
    let socket = dir.path().join("api.sock");
    let arguments = ["api", "--api-sock", socket.to_str().unwrap()];
    let started = start_with_a_wrong_call(&arguments, "accept4", 1);
    // Its first client is what it makes the call for.
    eventually("somebody listens", || std::os::unix::net::UnixStream::connect(&socket).is_ok());
    started
        .finish("cleanslate api with a wrong accept4")
        .expect_status(2)
        .expect_stderr(
            "the process that serves clients ended: made a system call that its filter forbids",
        )
        .expect_stderr(&format!(" on {}\n", ThreadKind::Http));
    assert!(!socket.exists());
}

/// A call in a trace: its name and its arguments, as far as they are numbers.
struct Call<'a> {
    name: &'a str,
    arguments: Vec<Option<u64>>,
}

impl<'a> Call<'a> {
    /// Parses a line of strace, which prints numbers and empty strings.
    fn parse(line: &'a str) -> Option<Self> {
        let (name, rest) = line.split_once('(')?;
        let arguments = arguments(rest).into_iter().map(number).collect();
        name.chars()
            .all(|c| c.is_ascii_alphanumeric() || c == '_')
            .then_some(Self { name, arguments })
    }

    fn is_request(&self, request: u64) -> bool {
        self.name == "ioctl" && self.arguments.get(1) == Some(&Some(request))
    }

    fn is_allowed_by(&self, rule: &Rule) -> bool {
        let fits = |index: u8, value: u32| {
            let argument = self.arguments.get(usize::from(index)).copied().flatten();
            argument.is_some_and(|argument| argument as u32 == value)
        };
        self.name == rule.call && rule.arguments.iter().all(|a| fits(a.index, a.value))
    }
}

/// The arguments at the start of `text`, to the bracket that ends them; structures and lists are one each.
fn arguments(text: &str) -> Vec<&str> {
    let (mut arguments, mut depth, mut start) = (Vec::new(), 0, 0);
    for (at, character) in text.char_indices() {
        match character {
            '{' | '[' | '(' => depth += 1,
            '}' | ']' => depth -= 1,
            ')' if depth > 0 => depth -= 1,
            ',' | ')' if depth == 0 => {
                arguments.push(text[start..at].trim());
                start = at + 1;
                if character == ')' {
                    break;
                }
            }
            _ => {}
        }
    }
    arguments
}

/// A number as strace prints it: flags may be apart.
fn number(text: &str) -> Option<u64> {
    text.split('|').try_fold(0, |sum, word| {
        let value = match word.strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16).ok()?,
            None if word == "NULL" => 0,
            None => word.parse().ok()?,
        };
        Some(sum | value)
    })
}

/// Numbers of the rules that the thread of `trace` made use of.
fn rules_used(trace: &str) -> Vec<usize> {
    let calls = trace.lines().filter_map(Call::parse);
    let restricted: Vec<_> = calls.skip_while(|call| call.name != "seccomp").skip(1).collect();
    // It makes its epoll itself; the event loop's is made for it.
    let is_alone = trace.lines().any(|line| line.starts_with("epoll_create1("));
    const OF_DISKS: [&str; 4] = ["preadv", "pwritev2", "fdatasync", "fallocate"];
    let kind = if restricted.iter().any(|call| OF_DISKS.contains(&call.name)) {
        ThreadKind::Disk
    } else if restricted.iter().any(|call| call.is_request(KVM_RUN)) {
        ThreadKind::Vcpu
    } else if is_alone && restricted.iter().any(|call| call.name == "epoll_wait") {
        ThreadKind::Http
    } else if restricted.iter().any(|call| call.name.starts_with("epoll_")) {
        ThreadKind::EventLoop
    } else {
        ThreadKind::Main
    };
    let used =
        |rule: &Rule| rule.thread == kind && restricted.iter().any(|call| call.is_allowed_by(rule));
    (0..).zip(RULES).filter(|(_, rule)| used(rule)).map(|(number, _)| number).collect()
}

/// Runs the tests of [`REPERTOIRE`] with every machine traced into `directory`.
fn trace_repertoire(directory: &Path) {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(REPERTOIRE)
        .env(TRACES, directory)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "tests fail when they are traced:\n{text}");
}

#[test]
fn every_rule_is_used_or_says_why_no_test_uses_it() {
    if std::env::var_os(TRACES).is_some() {
        return;
    }
    if Command::new("strace").arg("-V").output().is_err() {
        return skipped("strace is missing (package strace; ./test installs it)");
    }
    let directory = temp_dir();
    trace_repertoire(directory.path());
    let mut used = HashSet::new();
    for trace in std::fs::read_dir(directory.path()).unwrap() {
        used.extend(rules_used(&std::fs::read_to_string(trace.unwrap().path()).unwrap()));
    }
    let unused: Vec<_> = (0..)
        .zip(RULES)
        .filter(|(number, rule)| !used.contains(number) && rule.rare.is_none())
        .map(|(_, Rule { thread, call, arguments, .. })| {
            let arguments: Vec<_> = arguments.iter().map(|argument| argument.text).collect();
            format!("{call}({}) on {thread}", arguments.join(", "))
        })
        .collect();
    assert!(
        unused.is_empty(),
        "rules that nothing uses: remove them, or say why they are rare: {unused:#?}"
    );
}
