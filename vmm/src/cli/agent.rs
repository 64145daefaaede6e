//! `cleanslate agent`: the embedded guest agent as a file.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};

use super::Error;
use crate::exit;

/// Get the guest agent out of this program
#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Write the agent's ELF image to a file, for any monitor that boots PVH kernels
    ///
    /// With agent.report=serial on its command line it prints its report as one line of JSON on the first serial port:
    ///
    ///   cleanslate agent export agent.elf
    ///   qemu-system-x86_64 -M microvm -accel tcg -cpu max -display none -serial stdio -kernel agent.elf -append agent.report=serial
    #[command(verbatim_doc_comment)]
    Export {
        /// Where to write it; an existing file is not overwritten
        path: PathBuf,
    },
}

#[derive(Debug, thiserror::Error)]
#[error("write agent image {path:?}")]
struct WriteError {
    path: PathBuf,
    source: io::Error,
}

pub(super) fn main(arguments: Arguments) -> Result<u8, Error> {
    let Command::Export { path } = arguments.command;
    match write_new(&path, images::AGENT) {
        Ok(()) => Ok(exit::CLEAN),
        Err(source) => Err(WriteError { path, source }.into()),
    }
}

/// Writes a file that was not there before; half of one does not stay.
fn write_new(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).open(path)?;
    file.write_all(bytes).inspect_err(|_| {
        // The first error is the one to tell.
        let _ = std::fs::remove_file(path);
    })
}
