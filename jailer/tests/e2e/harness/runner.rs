//! Runs each test in a process of its own, since whoever makes a jail has to have one thread.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use super::{Outcome, finish_within, probe, temp_dir};

/// Number of the user and the group that own nothing.
const NOBODY: u32 = 65534;

/// Longest time that a test may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// Tells a test's process where copies of the programs are that everybody may run.
const DIRECTORY: &str = "JAILER_E2E_DIRECTORY";

/// Who runs a test.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum As {
    Root,
    Nobody,
}

/// A test: its name, who runs it, and what it does.
pub type Test = (&'static str, As, fn());

/// Lists functions as tests that root runs (`root`), or nobody (`nobody`).
macro_rules! tests {
    ($($who:ident $name:ident,)*) => {
        pub const TESTS: &[$crate::harness::runner::Test] =
            &[$((concat!(module_path!(), "::", stringify!($name)), $crate::harness::runner::As::$who, $name)),*];
    };
}
pub(crate) use tests;

/// Does what the command line says: is a probe, runs one test, or runs those whose names contain one of the words.
pub fn main(tests: &[Test]) -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        ["probe", id, ref what @ ..] => probe::main(id, what),
        [word] if word.as_bytes() == probe::AM_I_ROOT.to_bytes() => probe::am_i_root(),
        [word] if word.as_bytes() == probe::NOTHING.to_bytes() => ExitCode::SUCCESS,
        ["--one", name] => {
            let (_, _, test) = tests.iter().find(|test| test.0 == name).expect("a test's name");
            test();
            ExitCode::SUCCESS
        }
        _ => run_all(tests, &words),
    }
}

fn run_all(tests: &[Test], words: &[&str]) -> ExitCode {
    // Options of the standard harness mean nothing here, but for the list.
    let filters: Vec<&&str> = words.iter().filter(|word| !word.starts_with('-')).collect();
    let chosen: Vec<&Test> = tests
        .iter()
        .filter(|test| filters.is_empty() || filters.iter().any(|word| test.0.contains(**word)))
        .collect();
    if words.contains(&"--list") {
        chosen.iter().for_each(|(name, ..)| println!("{name}: test"));
        return ExitCode::SUCCESS;
    }
    let dir = temp_dir();
    for (from, name) in [(Path::new(env!("CARGO_BIN_EXE_jailer")), "jailer"), (&own_path(), "e2e")]
    {
        fs::copy(from, dir.path().join(name)).expect("copy a program");
    }
    let ends: Vec<(&str, End)> =
        chosen.iter().map(|test| (test.0, run_one(test, dir.path()))).collect();
    let names = |end| -> Vec<_> { ends.iter().filter(|e| e.1 == end).map(|e| e.0).collect() };
    let (failed, not_run) = (names(End::Failed), names(End::NotRun));
    if !not_run.is_empty() {
        println!("\n{} of {} tests were NOT RUN: they need root", not_run.len(), chosen.len());
    }
    println!("\n{} tests, {} failed {failed:?}\n", chosen.len(), failed.len());
    let required = std::env::var_os("REQUIRE_ALL").is_some_and(|value| value == "1");
    match failed.is_empty() && (not_run.is_empty() || !required) {
        true => ExitCode::SUCCESS,
        false => ExitCode::from(101),
    }
}

/// What came of a test.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    Passed,
    Failed,
    /// It needs root, and nobody is. `REQUIRE_ALL=1` makes that a failure.
    NotRun,
}

fn run_one((name, who, _): &Test, dir: &Path) -> End {
    let is_root = rustix::process::geteuid().is_root();
    if *who == As::Root && !is_root {
        println!("test {name} ... NOT RUN: it needs root");
        return End::NotRun;
    }
    let mut command = Command::new(dir.join("e2e"));
    command.args(["--one", name]).env(DIRECTORY, dir);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    if *who == As::Nobody && is_root {
        command.uid(NOBODY).gid(NOBODY);
    }
    let outcome = finish_within(PATIENCE, command);
    let Outcome { status, stdout, stderr, .. } = &outcome;
    if *status == Some(0) {
        println!("test {name} ... ok");
        print!("{stdout}");
        return End::Passed;
    }
    println!("test {name} ... FAILED with status {status:?}\n{stdout}{stderr}");
    End::Failed
}

fn own_path() -> PathBuf {
    std::env::current_exe().expect("find this executable")
}

/// The `jailer` program, where everybody may run it.
pub fn program() -> PathBuf {
    directory().join("jailer")
}

/// This executable, where everybody may run it.
pub fn this_program() -> PathBuf {
    directory().join("e2e")
}

fn directory() -> PathBuf {
    std::env::var_os(DIRECTORY).expect("the runner says where the programs are").into()
}
