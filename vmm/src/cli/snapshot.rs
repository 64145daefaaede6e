//! `cleanslate snapshot`: a machine as files, and machines made of them.

mod create;
mod restore;
mod show;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::{Args, Subcommand};

pub(super) use restore::clone_of;

use super::Error;
use crate::machine::MachineState;
use crate::snapshot::{self, FilesError, Header, Snapshot, SnapshotError};

/// Keep a machine as files, and make machines of them
///
/// A snapshot is a directory with two files: "state", which is everything but RAM, and "memory", which is RAM. A restored machine
/// goes on where the other one stood, on a host of the same kind; its vsock connections are over, and its guest is told so.
#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Create(Box<create::Arguments>),
    Restore(Box<restore::Arguments>),
    Show(show::Arguments),
}

pub(super) fn main(arguments: Arguments, started: Instant) -> Result<u8, Error> {
    match arguments.command {
        Command::Create(arguments) => create::main(&arguments, started),
        Command::Restore(arguments) => restore::main(&arguments, started),
        Command::Show(arguments) => show::main(&arguments),
    }
}

/// A directory's snapshot cannot be used.
#[derive(Debug, thiserror::Error)]
enum DirectoryError {
    #[error("read the snapshot {0:?}")]
    Snapshot(PathBuf, #[source] SnapshotError),
    #[error("read the snapshot {0:?}")]
    Files(PathBuf, #[source] FilesError),
}

/// Where the files of a snapshot are.
struct Directory<'a>(&'a Path);

impl Directory<'_> {
    fn state(&self) -> PathBuf {
        self.0.join("state")
    }

    fn memory(&self) -> PathBuf {
        self.0.join("memory")
    }

    fn unreadable(&self) -> impl Fn(SnapshotError) -> DirectoryError {
        |error| DirectoryError::Snapshot(self.0.into(), error)
    }

    fn open(&self, path: &Path) -> Result<File, DirectoryError> {
        snapshot::open(path).map_err(|error| DirectoryError::Files(self.0.into(), error))
    }

    fn header(&self) -> Result<Header, DirectoryError> {
        snapshot::read_header(&self.open(&self.state())?).map_err(self.unreadable())
    }

    /// All that the state file says, of whatever host. A machine that is to go on looks at its own host when it has one.
    fn read(&self) -> Result<Snapshot<MachineState>, DirectoryError> {
        let file = self.open(&self.state())?;
        let read = || snapshot::read_state(&file, &snapshot::read_header(&file)?.host);
        read().map_err(self.unreadable())
    }
}
