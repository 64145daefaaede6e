//! Rules to programs. Belongs to the build script, which compiles this crate's rules with it, and to the tests.
//!
//! A program finds the call by halves instead of one comparison after the other: when a filter is installed, the kernel
//! tries it with every number that there is, and that is most of what a filter costs. What it then says about arguments is
//! `seccompiler`'s.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompRule, sock_filter,
};
use serde::Deserialize;

/// Kinds of threads as the data file spells them; a filter's place in the list is its mark.
pub const THREADS: [&str; 6] = ["main", "event-loop", "vcpu", "disk", "http", "pages"];

/// `AUDIT_ARCH_X86_64` (linux/audit.h).
const ARCHITECTURE: u32 = 0xc000_003e;
const ALLOW: u32 = 0x7fff_0000; // SECCOMP_RET_ALLOW (linux/seccomp.h)
const TRAP: u32 = 0x0003_0000; // SECCOMP_RET_TRAP

/// Which C library a program is linked with.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub enum Libc {
    Gnu,
    Musl,
}

/// What a program is built for.
#[derive(Clone, Copy, Debug)]
pub struct Build {
    pub libc: Libc,
    /// With debug assertions, in which the standard library checks descriptors.
    pub assertions: bool,
}

/// The data file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    values: BTreeMap<String, u32>,
    rule: Vec<Entry>,
}

/// A rule as it is written.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    threads: Vec<String>,
    call: String,
    #[serde(default)]
    arguments: BTreeMap<String, String>,
    why: String,
    rare: Option<String>,
    libc: Option<Libc>,
    #[serde(default)]
    assertions: bool,
}

/// A rule of one thread.
#[derive(Clone, Debug)]
pub struct Rule {
    /// Its place in [`THREADS`].
    pub thread: usize,
    pub call: String,
    pub number: u32,
    /// Index, value and how that is written.
    pub arguments: Vec<(u8, u32, String)>,
    pub why: String,
    pub rare: Option<String>,
    pub assertions: bool,
}

/// Reads rules: those that `build` needs. `calls` has a line for each system call, its number and its name.
///
/// # Errors
/// What is wrong with them, in words.
pub fn parse(rules: &str, calls: &str, build: Build) -> Result<Vec<Rule>, String> {
    let document: Document = toml::from_str(rules).map_err(|error| error.to_string())?;
    let numbers: BTreeMap<&str, u32> = calls
        .lines()
        .filter_map(|line| line.split_once(' '))
        .filter_map(|(number, name)| Some((name, number.parse().ok()?)))
        .collect();
    let mut parsed = Vec::new();
    for entry in &document.rule {
        let refuse = |what: &str| Err(format!("the rule for {:?} {what}", entry.call));
        let Some(&number) = numbers.get(entry.call.as_str()) else {
            return refuse("names no system call");
        };
        if entry.why.trim().is_empty()
            || entry.rare.as_ref().is_some_and(|why| why.trim().is_empty())
        {
            return refuse("gives no reason");
        }
        if entry.threads.is_empty() {
            return refuse("is for no thread");
        }
        let mut arguments = Vec::new();
        for (index, text) in &entry.arguments {
            let index = match index.parse() {
                Ok(index @ 0..=5) => index,
                _ => return refuse(&format!("restricts argument {index:?}; there are 0 to 5")),
            };
            let mut value = 0;
            for word in text.split('|') {
                match document.values.get(word.trim()) {
                    Some(bits) => value |= bits,
                    None => return refuse(&format!("has {word:?}, which is none of the values")),
                }
            }
            arguments.push((index, value, text.clone()));
        }
        for thread in &entry.threads {
            let Some(thread) = THREADS.iter().position(|name| name == thread) else {
                return refuse(&format!("is for {thread:?}; threads are {THREADS:?}"));
            };
            let is_needed = entry.libc.is_none_or(|only| only == build.libc);
            if is_needed && (build.assertions || !entry.assertions) {
                let (call, why, rare) = (entry.call.clone(), entry.why.clone(), entry.rare.clone());
                let (arguments, assertions) = (arguments.clone(), entry.assertions);
                parsed.push(Rule { thread, call, number, arguments, why, rare, assertions });
            }
        }
    }
    for (place, rule) in parsed.iter().enumerate() {
        let covers = |other: &Rule| {
            (other.thread, other.number) == (rule.thread, rule.number)
                && (other.arguments.is_empty()
                    || rule.arguments.is_empty()
                    || other.arguments == rule.arguments)
        };
        if parsed[..place].iter().any(covers) {
            let thread = THREADS[rule.thread];
            return Err(format!("two rules for {:?} of {thread:?} say the same", rule.call));
        }
    }
    Ok(parsed)
}

/// The program that lets one kind of thread make the calls of its rules. Any other call traps, with the number of the
/// thread's kind as data, which the handler of the signal is told: 1 for the first of [`THREADS`].
///
/// # Errors
/// What is wrong with the rules, in words.
pub fn compile(rules: &[Rule], thread: usize) -> Result<BpfProgram, String> {
    let deny = statement(RETURN, TRAP | (thread as u32 + 1));
    let mut calls: BTreeMap<u32, Vec<&Rule>> = BTreeMap::new();
    for rule in rules.iter().filter(|rule| rule.thread == thread) {
        calls.entry(rule.number).or_default().push(rule);
    }
    let mut chains = Vec::new();
    let mut leaves = Vec::new();
    for (number, rules) in calls {
        let goal = if rules[0].arguments.is_empty() {
            statement(RETURN, ALLOW)
        } else {
            // The distance from the end of the search, for now.
            let start = chains.len() as u32;
            chains.extend(chain(&rules, &deny)?);
            statement(JUMP, start)
        };
        leaves.push((number, goal));
    }
    let mut search = search(&leaves, &deny)?;
    let len = search.len() as u32;
    for (place, instruction) in (1..).zip(&mut search) {
        if instruction.code == JUMP {
            instruction.k += len - place;
        }
    }
    let head = [
        statement(LOAD, 4), // the architecture, in `struct seccomp_data`
        jump(JUMP_EQUAL, ARCHITECTURE, 1, 0),
        deny,
        statement(LOAD, 0), // the call's number
    ];
    Ok([head.to_vec(), search, chains].concat())
}

/// Finds the call's number among `leaves`, which are sorted.
fn search(leaves: &[(u32, sock_filter)], deny: &sock_filter) -> Result<BpfProgram, String> {
    /// So few are compared one after the other: that takes fewer instructions, which cost when a filter is installed.
    const FEW: usize = 4;
    if leaves.len() <= FEW {
        return Ok(compare(leaves, deny));
    }
    let (low, high) = leaves.split_at(leaves.len() / 2);
    let (below, above) = (search(low, deny)?, search(high, deny)?);
    let over = u8::try_from(below.len()).map_err(|_| "too many calls for one thread")?;
    Ok([vec![jump(JUMP_AT_LEAST, high[0].0, over, 0)], below, above].concat())
}

/// Compares the call's number with each of these few.
fn compare(leaves: &[(u32, sock_filter)], deny: &sock_filter) -> BpfProgram {
    let mut goals: BpfProgram = vec![deny.clone()];
    let mut comparisons = BpfProgram::new();
    for (left, (number, goal)) in (0..leaves.len()).rev().zip(leaves) {
        // What allows is shared; jumps are told apart by where they lead.
        let place = goals.iter().position(|known| known == goal).unwrap_or_else(|| {
            goals.push(goal.clone());
            goals.len() - 1
        });
        comparisons.push(jump(JUMP_EQUAL, *number, (left + place) as u8, 0));
    }
    [comparisons, goals].concat()
}

/// Tells whether one of the rules for a call allows its arguments.
fn chain(rules: &[&Rule], deny: &sock_filter) -> Result<BpfProgram, String> {
    let mut chain = BpfProgram::new();
    // The argument that is in the accumulator when the rule before has said no.
    let mut loaded = None;
    for rule in rules {
        // All these arguments are 32 bits wide for the kernel, or have no meaning above.
        let condition = |(index, value, _): &(u8, u32, String)| {
            let width = SeccompCmpArgLen::Dword;
            SeccompCondition::new(*index, width, SeccompCmpOp::Eq, u64::from(*value))
        };
        let conditions = rule.arguments.iter().map(condition).collect::<Result<_, _>>();
        let compiled: BpfProgram = conditions
            .and_then(SeccompRule::new)
            .map_err(|error| format!("the rule for {:?}: {error}", rule.call))?
            .into();
        // A rule begins with a jump over a jump that nothing reaches, which would lead too far here.
        let [over, _, load, rest @ ..] = &compiled[..] else { return Err(UNKNOWN.into()) };
        if *over != statement(JUMP, 1) || load.code != LOAD {
            return Err(UNKNOWN.into());
        }
        if loaded.as_ref() != Some(load) {
            chain.push(load.clone());
        }
        chain.extend_from_slice(rest);
        // Where the rule's conditions go if they hold; else they jump over it.
        chain.push(statement(RETURN, ALLOW));
        loaded = (rule.arguments.len() == 1).then(|| load.clone());
    }
    chain.push(deny.clone());
    Ok(chain)
}

const UNKNOWN: &str = "seccompiler makes programs of rules in another way than it did";

// Instructions of the classic BPF machine (linux/bpf_common.h).
const LOAD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
const JUMP: u16 = 0x05; // BPF_JMP | BPF_JA
const JUMP_EQUAL: u16 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
const JUMP_AT_LEAST: u16 = 0x35; // BPF_JMP | BPF_JGE | BPF_K
const RETURN: u16 = 0x06; // BPF_RET | BPF_K

fn statement(code: u16, k: u32) -> sock_filter {
    sock_filter { code, jt: 0, jf: 0, k }
}

fn jump(code: u16, k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter { code, jt, jf, k }
}
