//! `cleanslate merge`: the results of many soaks as one.

use std::fs::File;
use std::io::{self, BufReader, Write};
use std::path::PathBuf;

use clap::Args;

use super::run::PrintError;
use super::{Error, reports};
use crate::soak::merge::{MergeError, Merger};
use crate::soak::record::Record;
use crate::soak::report::table;

/// Make one report of what many soaks have printed
///
/// Each file has the lines of `cleanslate soak --json`, of one soak or of several one after the other: the shards of a campaign
/// over many hosts. The result is what one soak would have printed. Shards with the same machines, or with machines of
/// other options, are refused; one whose lines end without a verdict counts as interrupted.
#[derive(Debug, Args)]
#[command(after_help = "\
Exit status:
  0    clean
  1    findings
  2    wrong usage, files that do not fit together, or a shard that its host failed
  130  a shard was interrupted

Example:
  cleanslate soak --seed 7 --vms 4 --first-vm 1 --json > a.json     # on one host
  cleanslate soak --seed 7 --vms 4 --first-vm 5 --json > b.json     # on another
  cleanslate merge a.json b.json --html soak.html")]
pub(super) struct Arguments {
    /// What the soaks have printed
    #[arg(value_name = "FILE", required = true)]
    files: Vec<PathBuf>,

    /// Print a JSON object with the verdict instead of the table
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    reports: reports::Arguments,
}

pub(super) fn main(arguments: &Arguments) -> Result<u8, Error> {
    let mut merger = Merger::default();
    for path in &arguments.files {
        let name = path.display().to_string();
        let file = File::open(path).map_err(|error| MergeError::Read(name.clone(), error))?;
        merger.read(&name, BufReader::new(file))?;
    }
    let report = merger.report();
    // Only now: a report may have the name of one that is read.
    let files = arguments.reports.open()?;
    let text = match arguments.json {
        true => serde_json::to_string(&Record::Verdict(report.record()))? + "\n",
        false => table(&report),
    };
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            return Err(PrintError(error).into());
        }
        _ => {}
    }
    files.write(&report)?;
    Ok(report.status()?)
}
