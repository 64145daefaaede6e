//! The network that a jailed process is in: an empty one of its own, or one that the user names.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::thread::LinkNameSpaceType;

use crate::sys;

/// The network namespace of a jailed process.
#[derive(Debug)]
pub enum Network {
    /// A new one, in which there is not even a loopback that works.
    New,
    /// One that exists, such as those of `ip netns`.
    Join(OwnedFd),
}

/// A path that leads to no network namespace.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// It cannot be opened.
    #[error("open network namespace {path:?}")]
    Open {
        /// The path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It is something else.
    #[error(
        "{path:?} is no network namespace; name one of /run/netns/NAME (ip netns add NAME) or /proc/PID/ns/net"
    )]
    NotOne {
        /// The path.
        path: PathBuf,
    },
}

impl Network {
    /// The network namespace that `path` leads to.
    ///
    /// # Errors
    /// [`NetworkError`].
    pub fn open(path: &Path) -> Result<Self, NetworkError> {
        // A FIFO would wait for a writer; whatever it is, it must be a regular file to the system.
        let opened = path.metadata().and_then(|metadata| match metadata.is_file() {
            true => File::open(path).map(Some),
            false => Ok(None),
        });
        match opened {
            Ok(Some(file)) if sys::is_network_namespace(&file) => Ok(Self::Join(file.into())),
            Ok(_) => Err(NetworkError::NotOne { path: path.into() }),
            Err(source) => Err(NetworkError::Open { path: path.into(), source }),
        }
    }

    /// The namespace that is joined.
    pub(crate) fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::New => None,
            Self::Join(namespace) => Some(namespace.as_fd()),
        }
    }
}

/// Moves this process into an open namespace.
pub(crate) fn join(namespace: BorrowedFd<'_>) -> io::Result<()> {
    Ok(rustix::thread::move_into_link_name_space(namespace, Some(LinkNameSpaceType::Network))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_network_namespaces_are_taken() {
        assert!(matches!(Network::open(Path::new("/proc/self/ns/net")), Ok(Network::Join(_))));
        for other in ["/proc/self/ns/uts", "/etc/passwd", "/dev/null", "/"] {
            let error = Network::open(Path::new(other)).unwrap_err();
            assert!(matches!(error, NetworkError::NotOne { .. }), "{other}: {error}");
        }
        let error = Network::open(Path::new("/no/such/netns")).unwrap_err();
        assert!(matches!(error, NetworkError::Open { .. }), "{error}");
    }
}
