//! A machine that is kept for a bench's clients.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

/// Starts `command`, which is to hold a machine, and waits until that was found clean.
pub fn start(mut command: Command) -> Child {
    let started = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn();
    let mut program = started.expect("start a machine");
    let stdout = BufReader::new(program.stdout.take().expect("it is a pipe"));
    let is_clean = stdout.lines().map_while(Result::ok).any(|line| line.contains("clean: "));
    assert!(is_clean, "the machine is not clean");
    program
}
