//! The socket at which clients are served.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use jailer::Janitor;

use crate::device::vsock::SocketFile;

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Something is at its path.
    #[error(
        "open the API socket {0:?}: the path exists; end the process that uses it, or remove the file if none does"
    )]
    PathInUse(PathBuf),
    /// The system refused it.
    #[error("open the API socket {path:?}")]
    Bind {
        /// The path.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
}

/// Listens at `path`, where nothing may be. The janitor removes the file, whoever is killed.
///
/// # Errors
/// [`SocketError`].
pub fn bind(path: &Path, janitor: &Janitor) -> Result<(OwnedFd, SocketFile), SocketError> {
    janitor.remove_socket(path);
    let bound = UnixListener::bind(path).and_then(|socket| Ok((socket, SocketFile::of(path)?)));
    match bound {
        Ok((socket, file)) => {
            janitor.identify_socket(path, file.identity());
            Ok((socket.into(), file))
        }
        Err(source) => {
            // What is there is somebody else's.
            janitor.forget(path);
            Err(match source.kind() {
                io::ErrorKind::AddrInUse => SocketError::PathInUse(path.into()),
                _ => SocketError::Bind { path: path.into(), source },
            })
        }
    }
}
