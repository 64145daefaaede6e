//! Runs each test in a process of its own, since whoever makes a jail has to have one thread.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use super::{Outcome, finish_within, probe, temp_dir};

/// Number of the user and the group that own nothing.
const NOBODY: u32 = 65534;

/// Longest time that most tests may take.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Tells a test's process where copies of the programs are that everybody may run.
const DIRECTORY: &str = "JAILER_E2E_DIRECTORY";

/// Who runs a test.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum As {
    Root,
    Nobody,
}

/// A test: its name, who runs it, how long it may take, and what it does.
#[derive(Clone, Copy)]
pub struct Test {
    pub name: &'static str,
    pub who: As,
    pub patience: Duration,
    pub run: fn(),
}

/// Lists functions as tests that root runs (`root`), or nobody (`nobody`).
macro_rules! tests {
    ($($who:ident $name:ident,)*) => {
        pub const TESTS: &[$crate::harness::runner::Test] =
            &[$($crate::harness::runner::Test {
                name: concat!(module_path!(), "::", stringify!($name)),
                who: $crate::harness::runner::As::$who,
                patience: $crate::harness::runner::PATIENCE,
                run: $name,
            }),*];
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
            (tests.iter().find(|test| test.name == name).expect("a test's name").run)();
            ExitCode::SUCCESS
        }
        _ => run_chosen(tests, &words),
    }
}

fn run_chosen(tests: &[Test], words: &[&str]) -> ExitCode {
    // Options of the standard harness mean nothing here, but for the list.
    let filters: Vec<&&str> = words.iter().filter(|word| !word.starts_with('-')).collect();
    let chosen: Vec<&Test> = tests
        .iter()
        .filter(|test| filters.is_empty() || filters.iter().any(|word| test.name.contains(**word)))
        .collect();
    if words.contains(&"--list") {
        chosen.iter().for_each(|test| println!("{}: test", test.name));
        return ExitCode::SUCCESS;
    }
    match run_all(&chosen, 1, Path::new(env!("CARGO_BIN_EXE_jailer"))) {
        true => ExitCode::SUCCESS,
        false => ExitCode::from(101),
    }
}

/// Runs tests of the `jailer` program that `program` is, so many at a time, and says what came of them; false if that is a
/// failure.
pub fn run_all(chosen: &[&Test], jobs: usize, program: &Path) -> bool {
    let dir = temp_dir();
    for (from, name) in [(program, "jailer"), (&own_path(), "e2e")] {
        fs::copy(from, dir.path().join(name)).expect("copy a program");
    }
    let next = AtomicUsize::new(0);
    let work = || -> Vec<(&str, End)> {
        let take = || chosen.get(next.fetch_add(1, Ordering::Relaxed));
        std::iter::from_fn(take).map(|test| (test.name, run_one(test, dir.path()))).collect()
    };
    let ends: Vec<(&str, End)> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..jobs).map(|_| scope.spawn(work)).collect();
        workers.into_iter().flat_map(|worker| worker.join().expect("a worker panicked")).collect()
    });
    let names = |end| -> Vec<_> { ends.iter().filter(|e| e.1 == end).map(|e| e.0).collect() };
    let (failed, not_run) = (names(End::Failed), names(End::NotRun));
    if !not_run.is_empty() {
        println!("\n{} of {} tests were NOT RUN: they need root", not_run.len(), chosen.len());
    }
    println!("\n{} tests, {} failed {failed:?}\n", chosen.len(), failed.len());
    let required = std::env::var_os("REQUIRE_ALL").is_some_and(|value| value == "1");
    failed.is_empty() && (not_run.is_empty() || !required)
}

/// What came of a test.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    Passed,
    Failed,
    /// It needs root, and nobody is. `REQUIRE_ALL=1` makes that a failure.
    NotRun,
}

fn run_one(Test { name, who, patience, .. }: &Test, dir: &Path) -> End {
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
    let outcome = finish_within(*patience, command);
    let Outcome { status, stdout, stderr, .. } = &outcome;
    if *status == Some(0) {
        print!("test {name} ... ok\n{stdout}");
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
