//! `cleanslate snapshot`: a machine as files, and machines made of them.

mod create;
mod restore;
mod show;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::{Args, Subcommand};

use super::Error;
use crate::kvm::host::Module;
use crate::kvm::identity::HostIdentity;
use crate::kvm::pmu::PmuPolicy;
use crate::kvm::{self, cpuid};
use crate::machine::{MachineState, host_identity};
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

    /// The state of a machine that is to go on at the host `here`.
    fn read(&self, here: &HostIdentity) -> Result<Snapshot<MachineState>, DirectoryError> {
        snapshot::read_state(&self.open(&self.state())?, here).map_err(self.unreadable())
    }
}

/// This host, as far as it can be known without a machine.
fn this_host() -> Result<HostIdentity, Error> {
    let (cpuid, kind) = cpuid::supported(&kvm::open()?, Module::read(), PmuPolicy::Off)?;
    Ok(host_identity(&cpuid, kind))
}
