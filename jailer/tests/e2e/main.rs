//! End-to-end tests of the jail and of the `jailer` program, in the order of a reader's questions.
//!
//! `cargo test -p jailer` runs them all, `cargo test -p jailer --test e2e WORD` those whose names contain the word. They are
//! run one after the other (in the lab some at once), each in a process of its own with one thread, as root or as nobody
//! (see `harness/runner.rs`). The same executable, which is static, is what the tests run inside of jails
//! (`harness/probe.rs`), and the first process of the machine in which they are run once more (`lab.rs`).

mod harness;

/// What does a command see, and how does it end?
mod command;

/// Does it come to the background, and does everything go away again?
mod daemon;

/// What if the command line or the host is wrong?
mod bad_input;

/// What can a process inside not do?
mod escape;

/// Can one process have many jails?
mod many;

/// Does all of this hold in another Linux as well?
mod lab;

use harness::runner::Test;

/// All but those of the lab, where they are run once more.
fn tests() -> Vec<Test> {
    let tests = [command::TESTS, daemon::TESTS, bad_input::TESTS, many::TESTS];
    [tests.concat(), escape::TESTS.concat()].concat()
}

fn main() -> std::process::ExitCode {
    match lab::inside::is_here() {
        true => lab::inside::main(),
        false => harness::runner::main(&[&tests(), lab::TESTS].concat()),
    }
}
