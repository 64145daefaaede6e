use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, sock_filter,
};

use super::compile::{self, Build, Libc, Rule, THREADS};
use super::{ARCHITECTURE, CALLS, PROGRAMS, RULES, Report, ThreadKind, Violation, X32_BIT};

const TEXT: &str = include_str!("rules.toml");
const BOTH: [Libc; 2] = [Libc::Gnu, Libc::Musl];
const BUILD: Build = Build { libc: Libc::Gnu, assertions: false };

fn rules(libc: Libc) -> Vec<Rule> {
    compile::parse(TEXT, CALLS, Build { libc, assertions: false }).unwrap()
}

/// The data of a call, as a filter sees it (`struct seccomp_data`).
struct Call {
    number: u32,
    architecture: u32,
    arguments: [u64; 6],
}

/// What `program` says to a call: a classic BPF machine, as far as filters need one.
fn run(program: &[sock_filter], call: &Call) -> u32 {
    let word = |offset: u32| match offset {
        0 => call.number,
        4 => call.architecture,
        _ => {
            let argument = call.arguments[(offset as usize - 16) / 8];
            if offset.is_multiple_of(8) { argument as u32 } else { (argument >> 32) as u32 }
        }
    };
    let (mut place, mut accumulator) = (0, 0);
    loop {
        let sock_filter { code, jt, jf, k } = &program[place];
        let branch = |taken| usize::from(if taken { *jt } else { *jf });
        place += 1;
        match code {
            0x20 => accumulator = word(*k),
            0x05 => place += *k as usize,
            0x15 => place += branch(accumulator == *k),
            0x35 => place += branch(accumulator >= *k),
            0x06 => return *k,
            _ => panic!("instruction {code:#x}"),
        }
    }
}

fn condition((index, value, _): &(u8, u32, String)) -> SeccompCondition {
    let width = SeccompCmpArgLen::Dword;
    SeccompCondition::new(*index, width, SeccompCmpOp::Eq, u64::from(*value)).unwrap()
}

/// The same filter as `seccompiler` alone makes it: one comparison after the other.
fn plain(rules: &[Rule], thread: usize) -> BpfProgram {
    let mut calls: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for rule in rules.iter().filter(|rule| rule.thread == thread) {
        let alternatives = calls.entry(rule.number.into()).or_default();
        if !rule.arguments.is_empty() {
            let conditions = rule.arguments.iter().map(condition).collect();
            alternatives.push(SeccompRule::new(conditions).unwrap());
        }
    }
    SeccompFilter::new(calls, SeccompAction::Trap, SeccompAction::Allow, TargetArch::x86_64)
        .unwrap()
        .try_into()
        .unwrap()
}

#[test]
fn programs_say_what_plain_filters_of_seccompiler_say() {
    const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
    for libc in BOTH {
        let rules = rules(libc);
        for thread in 0..THREADS.len() {
            let trap = libc::SECCOMP_RET_TRAP | (thread as u32 + 1);
            let (ours, theirs) = (compile::compile(&rules, thread).unwrap(), plain(&rules, thread));
            assert!(ours.len() < theirs.len(), "{} and {}", ours.len(), theirs.len());
            let mut allowed = 0;
            let mut check = |number, arguments| {
                let call = Call { number, architecture: ARCHITECTURE, arguments };
                let (ours, theirs) = (run(&ours, &call), run(&theirs, &call));
                assert_eq!(ours == ALLOW, theirs == ALLOW, "{number} {arguments:x?}");
                assert!(ours == ALLOW || ours == trap, "{ours:#x}");
                allowed += u32::from(ours == ALLOW);
            };
            // Each call with no arguments, with those of each rule, and with each argument of it wrong.
            for number in (0..1000).flat_map(|n| [n, n | X32_BIT as u32]) {
                check(number, [0; 6]);
                check(number, [u64::MAX; 6]);
                for rule in &rules {
                    let mut arguments = [0xdead_beef; 6];
                    for (index, value, _) in &rule.arguments {
                        arguments[usize::from(*index)] = u64::from(*value) | 0xffff_0000_0000_0000;
                    }
                    check(number, arguments);
                    for (index, ..) in &rule.arguments {
                        let mut wrong = arguments;
                        wrong[usize::from(*index)] ^= 0x10_0000;
                        check(number, wrong);
                    }
                }
            }
            assert!(allowed > 0);
            let call = Call { number: 1, architecture: 0x4000_0003, arguments: [0; 6] };
            assert_eq!(run(&ours, &call), trap, "a 32-bit call");
        }
    }
}

#[test]
fn the_built_programs_are_those_of_the_data_file() {
    let libc = if cfg!(target_env = "musl") { Libc::Musl } else { Libc::Gnu };
    let build = Build { libc, assertions: cfg!(debug_assertions) };
    let rules = compile::parse(TEXT, CALLS, build).unwrap();
    assert_eq!(rules.len(), RULES.len());
    for (written, built) in rules.iter().zip(RULES) {
        assert_eq!((&*written.call, &*written.why), (built.call, built.why));
        assert_eq!((written.thread, written.rare.as_deref()), (built.thread as usize, built.rare));
        assert_eq!(written.assertions, built.assertions);
        let arguments = built.arguments.iter().map(|a| (a.index, a.value, a.text.to_owned()));
        assert!(written.arguments.iter().cloned().eq(arguments), "{built:?}");
    }
    for (thread, program) in PROGRAMS.iter().enumerate() {
        assert_eq!(compile::compile(&rules, thread).unwrap(), *program);
    }
}

#[test]
fn no_thread_may_make_more_calls_than_in_firecracker() {
    // Its filters for x86_64: threads vmm, vcpu and api (resources/seccomp/x86_64-unknown-linux-musl.json).
    let check = |kind: ThreadKind, most: usize| {
        for libc in BOTH {
            let thread = kind as usize;
            let mut calls: Vec<_> =
                rules(libc).into_iter().filter(|r| r.thread == thread).map(|r| r.number).collect();
            calls.sort_unstable();
            calls.dedup();
            assert!(calls.len() <= most, "{kind}, {libc:?}: {} calls", calls.len());
        }
    };
    check(ThreadKind::EventLoop, 50);
    check(ThreadKind::Vcpu, 27);
    check(ThreadKind::Main, 31);
}

#[test]
fn a_broken_rule_breaks_the_build_and_is_named() {
    let check = |rule: &str, expected: &str| {
        let text = format!("[values]\nONE = 1\n[[rule]]\n{rule}");
        let error = compile::parse(&text, CALLS, BUILD).unwrap_err();
        assert!(error.contains(expected), "{error:?} lacks {expected:?}");
    };
    let rule = |rest: &str| format!("threads = [\"main\"]\ncall = \"read\"\n{rest}");
    check("threads = [\"main\"]\ncall = \"reed\"\nwhy = \"x\"", "\"reed\" names no system call");
    check("threads = [\"mian\"]\ncall = \"read\"\nwhy = \"x\"", "\"read\" is for \"mian\"");
    check("threads = []\ncall = \"read\"\nwhy = \"x\"", "\"read\" is for no thread");
    check(&rule("why = \" \""), "\"read\" gives no reason");
    check(&rule(""), "missing field `why`");
    check(&rule("why = \"x\"\nrare = \"\""), "\"read\" gives no reason");
    check(&rule("why = \"x\"\nlibc = \"bsd\""), "unknown variant `bsd`");
    check(&rule("why = \"x\"\nunless = \"y\""), "unknown field `unless`");
    check(&rule("why = \"x\"\narguments = { 6 = \"ONE\" }"), "restricts argument \"6\"");
    check(&rule("why = \"x\"\narguments = { 1 = \"ONE|TWO\" }"), "\"TWO\", which is none");
    let twice = format!("{}\n[[rule]]\n{}", rule("why = \"x\""), rule("why = \"y\""));
    check(&twice, "two rules for \"read\" of \"main\"");
    let shadowed = rule("why = \"x\"\narguments = { 1 = \"ONE\" }");
    check(&format!("{}\n[[rule]]\n{shadowed}", rule("why = \"y\"")), "two rules for \"read\"");
}

#[test]
fn values_are_those_of_the_c_library() {
    let text: String = TEXT
        .lines()
        .take_while(|line| !line.starts_with("# ---"))
        .map(|l| format!("{l}\n"))
        .collect();
    let values = |name: &str| {
        let line = text.lines().find(|line| line.starts_with(&format!("{name} = ")));
        let value = line.unwrap_or_else(|| panic!("no {name}")).split_once("= ").unwrap().1;
        match value.strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16).unwrap(),
            None => value.parse().unwrap(),
        }
    };
    macro_rules! check {
        ($($name:ident)*) => { $(assert_eq!(values(stringify!($name)), libc::$name as u64, stringify!($name));)* };
    }
    check!(FIONBIO TCGETS FUTEX_WAIT FUTEX_WAKE FUTEX_WAIT_BITSET FUTEX_PRIVATE_FLAG FUTEX_CLOCK_REALTIME);
    check!(PROT_NONE PROT_READ PROT_WRITE MAP_PRIVATE MAP_ANONYMOUS);
    check!(MREMAP_MAYMOVE MADV_DONTNEED MADV_FREE AF_UNIX SOCK_STREAM SOCK_NONBLOCK SOCK_CLOEXEC);
    check!(SOL_SOCKET SO_RCVTIMEO SO_SNDTIMEO MSG_PEEK MSG_DONTWAIT MSG_NOSIGNAL);
    check!(EPOLL_CTL_ADD EPOLL_CTL_DEL EPOLL_CTL_MOD SIGABRT EFD_NONBLOCK GRND_INSECURE);
}

#[test]
fn a_violation_tells_the_call_and_the_thread() {
    let check = |thread, call, architecture, expected: &str| {
        let report = Report { thread, code: 1, call, architecture, arguments: [2, 0x80001, 0] };
        assert_eq!(Violation(report).to_string(), expected);
    };
    check(2, 41, ARCHITECTURE, "socket(0x2, 0x80001, 0x0) on the event loop's thread");
    check(3, X32_BIT | 1, ARCHITECTURE, "x32 write(0x2, 0x80001, 0x0) on a vCPU's thread");
    check(1, 9999, ARCHITECTURE, "call 9999(0x2, 0x80001, 0x0) on the main thread");
    check(1, 5, 0x4000_0003, "call 5 of another architecture (0x40000003) on the main thread");
    check(0, 0, ARCHITECTURE, "read(0x2, 0x80001, 0x0)");
    check(-1, 0, ARCHITECTURE, "read(0x2, 0x80001, 0x0)");
}

#[test]
fn reports_that_are_none_are_no_violations() {
    let read = |bytes: &[u8]| {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        rustix::io::write(&writer, bytes).unwrap();
        drop(writer);
        Violation::read(&reader)
    };
    assert_eq!(read(&[]), None);
    assert_eq!(read(&[1; 39]), None);
    assert_eq!(read(&[2; 40]), None, "a signal that somebody sent");
}
