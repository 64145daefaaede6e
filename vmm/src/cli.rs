//! The command line. One file for each subcommand; flags become plain data here and touch nothing.

mod agent;
mod doctor;
mod jail;
mod lab;
mod machine;
mod merge;
mod probe;
mod reports;
mod run;
mod snapshot;
mod soak;
mod vsock;

use std::io::Write;
use std::os::fd::OwnedFd;
use std::time::Instant;

use clap::{Parser, Subcommand};

use crate::exit;
use crate::lifecycle::chain;

/// A microVM monitor that resets its machine in place and proves that nothing was left behind.
#[derive(Debug, Parser)]
#[command(name = "cleanslate", version, propagate_version = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Run(Box<run::Arguments>),
    Snapshot(Box<snapshot::Arguments>),
    Soak(Box<soak::Arguments>),
    Probe(probe::Arguments),
    Merge(merge::Arguments),
    Doctor(doctor::Arguments),
    Agent(agent::Arguments),
    Vsock(vsock::Arguments),
    Lab(lab::Arguments),
}

/// A failure that ends the program with [`exit::USAGE_OR_HOST`].
pub type Error = Box<dyn std::error::Error>;

/// The exit status; an error is told in one line first.
pub fn status(result: Result<u8, Error>) -> u8 {
    result.unwrap_or_else(|error| {
        let _ = writeln!(std::io::stderr(), "cleanslate: {}", chain(&*error));
        exit::USAGE_OR_HOST
    })
}

/// Parses the command line and does what it says. `started` is when the process began; `null`, if the host has that, leads nowhere, and takes the
/// place of standard input for all who do not read it: who takes over a machine's process is not to read what the user types.
///
/// # Errors
/// Wrong usage that only shows when tried, and failures of the host.
pub fn main(started: Instant, null: Option<OwnedFd>) -> Result<u8, Error> {
    let command = Arguments::try_parse().map_err(in_one_line)?.command;
    if let Some(null) = null
        && !matches!(command, Command::Vsock(_))
    {
        rustix::stdio::dup2_stdin(&null)?;
    }
    match command {
        Command::Run(arguments) => run::main(*arguments, started),
        Command::Snapshot(arguments) => snapshot::main(*arguments, started),
        Command::Soak(arguments) => soak::main(&arguments),
        Command::Probe(arguments) => probe::main(&arguments),
        Command::Merge(arguments) => merge::main(&arguments),
        Command::Doctor(arguments) => doctor::main(&arguments),
        Command::Agent(arguments) => agent::main(arguments),
        Command::Vsock(arguments) => vsock::main(arguments),
        Command::Lab(arguments) => lab::main(arguments),
    }
}

/// Says what is wrong with a command for this program in another place.
fn check(words: &[String]) -> Result<(), Error> {
    let program = [String::from("cleanslate")];
    Arguments::try_parse_from(program.iter().chain(words)).map(|_| ()).map_err(in_one_line)
}

/// What clap says about wrong usage, without the usage itself, which `--help` shows. Help that was asked for ends the program.
fn in_one_line(error: clap::Error) -> Error {
    use clap::error::ErrorKind;
    if !error.use_stderr() || error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        error.exit();
    }
    let text = error.render().to_string();
    let words = text
        .lines()
        .take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more"))
        .flat_map(str::split_whitespace);
    let line = words.skip_while(|word| *word == "error:").collect::<Vec<_>>().join(" ");
    format!("{line}; see --help").into()
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_flags_are_consistent() {
        Arguments::command().debug_assert();
    }
}
