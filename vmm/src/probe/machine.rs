//! A machine of our own to probe: a process like those of a soak, with its socket in a directory that nobody else looks into.

use std::hash::{BuildHasher, RandomState};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::mpsc::SyncSender;

use jailer::Janitor;

use crate::soak::process::{self, Process, Said};

/// Why there is no machine.
#[derive(Debug, thiserror::Error)]
pub enum OwnError {
    /// Nowhere to put its socket.
    #[error("make a directory for the machine's socket in {0:?}")]
    Directory(PathBuf, #[source] io::Error),
    /// No process.
    #[error("start a process for {0}")]
    Start(&'static str, #[source] io::Error),
}

/// A directory for the machine's socket and for the sockets of the host's ports. It goes with all of that, whoever is killed.
#[derive(Debug)]
pub struct SocketDirectory {
    path: PathBuf,
    /// Removes it after this process.
    _janitor: Janitor,
}

impl SocketDirectory {
    /// Makes one. This process has one thread yet.
    ///
    /// # Errors
    /// [`OwnError`].
    pub fn new() -> Result<Self, OwnError> {
        let parent = std::env::temp_dir();
        let janitor = Janitor::start().map_err(|e| OwnError::Start("removing its socket", e))?;
        loop {
            let name = format!("cleanslate-probe-{:016x}", RandomState::new().hash_one(0));
            let path = parent.join(name);
            janitor.remove_directory(&path);
            // The machine's own janitor removes its socket, but perhaps later than the directory is to be removed.
            for path in sockets(&path) {
                janitor.remove_socket(&path);
            }
            let failed = |error| OwnError::Directory(parent.clone(), error);
            match std::fs::DirBuilder::new().mode(0o700).create(&path) {
                Ok(()) => {
                    // The jailed user has to find what it has the right to connect to; nobody may list it.
                    let mode = std::fs::Permissions::from_mode(0o711);
                    std::fs::set_permissions(&path, mode).map_err(failed)?;
                    return Ok(Self { path, _janitor: janitor });
                }
                Err(error) => {
                    sockets(&path).iter().for_each(|path| janitor.forget(path));
                    janitor.forget(&path);
                    if error.kind() != io::ErrorKind::AlreadyExists {
                        return Err(failed(error));
                    }
                }
            }
        }
    }

    /// Where the machine's socket is to be.
    pub fn socket(&self) -> PathBuf {
        socket_in(&self.path)
    }
}

fn socket_in(directory: &Path) -> PathBuf {
    directory.join("v.sock")
}

/// Everything that can be in the directory.
fn sockets(directory: &Path) -> Vec<PathBuf> {
    let socket = socket_in(directory);
    let ports = super::checks::HOST_PORTS.map(|port| {
        let mut name = socket.clone().into_os_string();
        name.push(format!("_{port}"));
        name.into()
    });
    std::iter::once(socket.clone()).chain(ports).collect()
}

/// The machine.
pub struct OwnMachine {
    process: Process,
}

impl OwnMachine {
    /// Starts it, with these words for `cleanslate run` besides. What it says goes to `outbox`. It dies with the thread that
    /// called this.
    ///
    /// # Errors
    /// [`OwnError`].
    pub fn start<M: From<((), Said)> + Send + 'static>(
        socket: &Path,
        words: &[String],
        outbox: SyncSender<M>,
    ) -> Result<Self, OwnError> {
        let uds = socket.to_string_lossy().into_owned();
        let basic = ["run", "--hold", "--dma-audit", "report", "--uds", &uds];
        let arguments: Vec<String> =
            basic.into_iter().map(Into::into).chain(words.iter().cloned()).collect();
        let process = Process::start(process::command(&arguments), (), outbox);
        Ok(Self { process: process.map_err(|error| OwnError::Start("the machine", error))? })
    }

    /// Tells it to end.
    pub fn ask_to_end(&self) {
        self.process.ask_to_end();
    }

    /// Waits for its end, which is near: its output is closed. Gives the last lines of its stderr too.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn wait(&mut self) -> io::Result<(ExitStatus, Vec<String>)> {
        self.process.wait()
    }
}
