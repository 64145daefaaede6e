//! The command line. One file for each subcommand; flags become plain data here and touch nothing.

mod agent;
mod api;
mod doctor;
mod jail;
mod lab;
mod launch;
mod machine;
mod merge;
mod probe;
mod reports;
mod run;
mod snapshot;
mod soak;
mod vsock;

use std::ffi::{OsStr, OsString};
use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use clap::{Parser, Subcommand};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

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
    Launch(Box<launch::Arguments>),
    Probe(probe::Arguments),
    Merge(merge::Arguments),
    Doctor(doctor::Arguments),
    Agent(agent::Arguments),
    Api(Box<api::Arguments>),
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
    let command =
        Arguments::try_parse_from(words_of(std::env::args_os())).map_err(in_one_line)?.command;
    let reads_stdin = match &command {
        Command::Vsock(_) => true,
        Command::Launch(arguments) => arguments.reads_stdin(),
        _ => false,
    };
    if let Some(null) = &null
        && !reads_stdin
    {
        rustix::stdio::dup2_stdin(null)?;
    }
    match command {
        Command::Run(arguments) => run::main(*arguments, started),
        Command::Snapshot(arguments) => snapshot::main(*arguments, started),
        Command::Soak(arguments) => soak::main(&arguments),
        Command::Launch(arguments) => launch::main(&arguments, null),
        Command::Probe(arguments) => probe::main(&arguments),
        Command::Merge(arguments) => merge::main(&arguments),
        Command::Doctor(arguments) => doctor::main(&arguments),
        Command::Agent(arguments) => agent::main(arguments),
        Command::Api(arguments) => api::main(*arguments, started),
        Command::Vsock(arguments) => vsock::main(arguments),
        Command::Lab(arguments) => lab::main(arguments),
    }
}

/// The command line's words. By the name of `firecracker` the program is `cleanslate api`, so that clients which start one by
/// its path need not know.
fn words_of(mut words: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let program = words.next();
    let name = program.as_deref().map(Path::new).and_then(Path::file_name);
    let is_firecracker = name == Some(OsStr::new("firecracker"));
    let command = is_firecracker.then(|| OsString::from("api"));
    program.into_iter().chain(command).chain(words).collect()
}

/// Says what is wrong with a command for this program in another place.
fn check(words: &[String]) -> Result<(), Error> {
    let program = [String::from("cleanslate")];
    Arguments::try_parse_from(program.iter().chain(words)).map(|_| ()).map_err(in_one_line)
}

/// A time with its unit.
fn parse_duration(word: &str) -> Result<Duration, String> {
    let split = word.find(|c: char| !c.is_ascii_digit()).unwrap_or(word.len());
    let (number, unit) = word.split_at(split);
    let seconds = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 60 * 60,
        "d" => 24 * 60 * 60,
        _ => 0,
    };
    // A century; more is a slip of the hand.
    const MOST: u64 = 100 * 365 * 24 * 60 * 60;
    match number.parse::<u64>().ok().and_then(|number| number.checked_mul(seconds)) {
        Some(seconds @ 1..=MOST) => Ok(Duration::from_secs(seconds)),
        _ => Err("a time is a number with s, m, h or d, from 1s to 100 years".into()),
    }
}

/// Lets this process have as many descriptors as may be: each machine's process takes some.
fn allow_descriptors() {
    let limit = getrlimit(Resource::Nofile);
    // What does not work shows when there are too few.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
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
    fn a_program_by_the_name_of_firecracker_is_the_api() {
        let check = |words: &str, expected: &str| {
            let words = words_of(words.split(' ').map(OsString::from));
            assert_eq!(words.join(OsStr::new(" ")), OsString::from(expected));
        };
        check("/usr/bin/firecracker --id x", "/usr/bin/firecracker api --id x");
        check("firecracker", "firecracker api");
        check("/firecracker/cleanslate run", "/firecracker/cleanslate run");
    }

    #[test]
    fn times_have_units() {
        let check = |word, seconds: Option<u64>| {
            assert_eq!(parse_duration(word).ok(), seconds.map(Duration::from_secs), "{word}");
        };
        check("90s", Some(90));
        check("30m", Some(1800));
        check("1h", Some(3600));
        check("2d", Some(172_800));
        for word in
            ["", "1", "h", "0s", "-1s", "1.5h", "1w", "1hh", "99999999999999999999s", "9999999999h"]
        {
            check(word, None);
        }
    }

    #[test]
    fn the_flags_are_consistent() {
        Arguments::command().debug_assert();
    }
}
