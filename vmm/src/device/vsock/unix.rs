//! Unix sockets in Firecracker's convention: a listener at `PATH` for clients that want to reach the guest, and
//! `PATH_N` for the host's port N. Beyond it, another listener for clients that send messages (`SOCK_SEQPACKET`).

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, accept_with, bind, connect, listen};

use super::packet::{GuestPort, HostPort, SocketType};

/// Longest path of a Unix socket in bytes: `sun_path` less its terminator (unix(7)).
const MAX_PATH_LEN: usize = 107;

/// Longest line that a client may send before it is connected, in bytes, with its line feed.
pub const MAX_LINE: usize = 32;

/// Clients that may wait to be accepted; the system's limit is lower (listen(2)).
const CLIENTS_WAITING: i32 = i32::MAX;

const FLAGS: SocketFlags = SocketFlags::CLOEXEC.union(SocketFlags::NONBLOCK);

/// Why a vsock device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// Something is at the socket's path.
    #[error(
        "create vsock socket {path:?}: the path exists; end the process that uses it, or remove the file if none does"
    )]
    PathInUse {
        /// The path.
        path: PathBuf,
    },
    /// The path does not fit into a socket address.
    #[error(
        "create vsock socket {path:?}: the path has {len} bytes and may have at most {MAX_PATH_LEN}; use a shorter one"
    )]
    PathTooLong {
        /// The path.
        path: PathBuf,
        /// Its length in bytes.
        len: usize,
    },
    /// The system refused the socket.
    #[error("create vsock socket {path:?}")]
    Listen {
        /// The path.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The system refused a descriptor that the device needs.
    #[error("create vsock event descriptors")]
    Events(#[source] io::Error),
}

/// The file of a listening socket. Removed on drop, unless somebody has put another in its place. Apart from the
/// [`Listener`], since a confined process has the one but must leave the other to whoever started it.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    /// Device and inode, to remove that one and no other.
    identity: (u64, u64),
}

impl SocketFile {
    /// The file at `path`, where a socket has just been bound.
    ///
    /// # Errors
    /// That it is gone already.
    pub fn of(path: &Path) -> io::Result<Self> {
        let metadata = path.symlink_metadata()?;
        Ok(Self { path: path.into(), identity: (metadata.dev(), metadata.ino()) })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Device and inode.
    pub fn identity(&self) -> (u64, u64) {
        self.identity
    }
}

/// The listening sockets, and the path next to which host ports have theirs.
#[derive(Debug)]
pub struct Listener {
    streams: OwnedFd,
    messages: Option<OwnedFd>,
    path: PathBuf,
}

impl Listener {
    /// Listens for streams at `path`, which must not exist.
    ///
    /// # Errors
    /// [`VsockError`] but for the last one.
    pub fn bind(path: &Path) -> Result<(Self, SocketFile), VsockError> {
        let (streams, file) = listen_at(path, SocketType::Stream)?;
        Ok((Self { streams, messages: None, path: path.into() }, file))
    }

    /// Listens for messages too, at `path`, which must not exist.
    ///
    /// # Errors
    /// As [`Listener::bind`].
    pub fn bind_messages(&mut self, path: &Path) -> Result<SocketFile, VsockError> {
        let (messages, file) = listen_at(path, SocketType::Seqpacket)?;
        self.messages = Some(messages);
        Ok(file)
    }

    /// The same listener in a process that sees the socket's directory as `directory`.
    pub fn seen_in(self, directory: &Path) -> Self {
        let name = self.path.file_name().unwrap_or_default();
        Self { path: directory.join(name), ..self }
    }

    /// The sockets that clients connect to, each with what its clients send.
    pub fn sockets(&self) -> impl Iterator<Item = (SocketType, BorrowedFd<'_>)> {
        let messages = self.messages.iter().map(|socket| (SocketType::Seqpacket, socket.as_fd()));
        std::iter::once((SocketType::Stream, self.streams.as_fd())).chain(messages)
    }

    /// Takes the next client of a type, if one waits. Its socket does not block.
    pub fn accept(&self, socket_type: SocketType) -> io::Result<OwnedFd> {
        let socket = match socket_type {
            SocketType::Stream => &self.streams,
            SocketType::Seqpacket => self.messages.as_ref().ok_or(io::ErrorKind::WouldBlock)?,
        };
        Ok(accept_with(socket, FLAGS)?)
    }

    /// Connects to whoever listens for the host's port `port`, which is a socket of the same type. Does not wait: a listener
    /// whose backlog is full counts as absent.
    pub fn dial(&self, port: HostPort, socket_type: SocketType) -> io::Result<OwnedFd> {
        let socket = new_socket(socket_type)?;
        connect(&socket, &SocketAddrUnix::new(path_of(&self.path, port))?)?;
        Ok(socket)
    }
}

/// Where the host's port `port` is for the machine whose socket is at `path`.
fn path_of(path: &Path, port: HostPort) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(format!("_{}", port.0));
    name.into()
}

/// Listens on the host's port `port` for the machine whose socket is at `path`, in place of a service that the guest reaches. The
/// listening socket does not block.
///
/// # Errors
/// [`VsockError`] but for the last one.
pub fn listen_on_host_port(
    path: &Path,
    port: HostPort,
    socket_type: SocketType,
) -> Result<(OwnedFd, SocketFile), VsockError> {
    listen_at(&path_of(path, port), socket_type)
}

fn listen_at(path: &Path, socket_type: SocketType) -> Result<(OwnedFd, SocketFile), VsockError> {
    let len = path.as_os_str().len();
    if len > MAX_PATH_LEN {
        return Err(VsockError::PathTooLong { path: path.into(), len });
    }
    let failed = |source: io::Error| match source.kind() {
        // Whether somebody listens there or did so in the past: removing what another process may be about to use
        // is the user's decision.
        io::ErrorKind::AddrInUse => VsockError::PathInUse { path: path.into() },
        _ => VsockError::Listen { path: path.into(), source },
    };
    let bound = || {
        let socket = new_socket(socket_type)?;
        bind(&socket, &SocketAddrUnix::new(path)?)?;
        Ok(socket)
    };
    let socket = bound().map_err(failed)?;
    let file = SocketFile::of(path).map_err(failed)?;
    listen(&socket, CLIENTS_WAITING).map_err(|errno| failed(errno.into()))?;
    Ok((socket, file))
}

fn new_socket(socket_type: SocketType) -> io::Result<OwnedFd> {
    let socket_type = match socket_type {
        SocketType::Stream => rustix::net::SocketType::STREAM,
        SocketType::Seqpacket => rustix::net::SocketType::SEQPACKET,
    };
    Ok(rustix::net::socket_with(AddressFamily::UNIX, socket_type, FLAGS, None)?)
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let ours = self
            .path
            .symlink_metadata()
            .is_ok_and(|metadata| (metadata.dev(), metadata.ino()) == self.identity);
        if ours {
            // Somebody may have removed it just now: then there is nothing left to do.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Parses the line with which a client says where it wants to go, `CONNECT <port>`, without its line feed.
pub fn parse_connect(line: &[u8]) -> Option<GuestPort> {
    let mut words = std::str::from_utf8(line).ok()?.split_ascii_whitespace();
    let port = match (words.next()?, words.next()?, words.next()) {
        (verb, port, None) if verb.eq_ignore_ascii_case("connect") => port,
        _ => return None,
    };
    // `u32::from_str` would take a sign.
    if !port.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    port.parse().ok().filter(|&port| port != super::poll::PORT_ANY).map(GuestPort)
}

/// The line that tells a client that the guest has accepted.
pub fn accepted_line(port: HostPort) -> String {
    format!("OK {}\n", port.0)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::device::vsock::testing::TempDir;

    #[test]
    fn connect_lines_name_a_port_and_nothing_else() {
        for (line, port) in [
            ("CONNECT 1024", Some(1024)),
            ("connect 0", Some(0)),
            ("CONNECT  52 \r", Some(52)),
            ("CONNECT 4294967294", Some(4_294_967_294)),
            ("CONNECT 4294967295", None),
            ("CONNECT 4294967296", None),
            ("CONNECT -1", None),
            ("CONNECT +1", None),
            ("CONNECT 0x10", None),
            ("CONNECT", None),
            ("CONNECT 1 2", None),
            ("CONNECTED 1", None),
            ("", None),
        ] {
            assert_eq!(parse_connect(line.as_bytes()), port.map(GuestPort), "{line:?}");
        }
        assert_eq!(parse_connect(b"CONNECT \xff"), None);
    }

    #[test]
    fn a_path_that_exists_is_refused_and_left_alone() {
        let dir = TempDir::new();
        let path = dir.path("taken");
        let (first, _file) = Listener::bind(&path).unwrap();
        let error = Listener::bind(&path).unwrap_err();
        assert!(matches!(error, VsockError::PathInUse { .. }));
        assert!(error.to_string().contains("taken") && error.to_string().contains("remove"));
        UnixStream::connect(&path).expect("the first listener still listens");
        drop(first);

        // A socket that nobody listens on, and an ordinary file.
        assert!(matches!(Listener::bind(&path).unwrap_err(), VsockError::PathInUse { .. }));
        let file = dir.path("file");
        std::fs::write(&file, "precious").unwrap();
        assert!(matches!(Listener::bind(&file).unwrap_err(), VsockError::PathInUse { .. }));
        assert_eq!(std::fs::read(&file).unwrap(), b"precious");
    }

    #[test]
    fn a_path_that_does_not_fit_is_refused_by_name_and_length() {
        let dir = TempDir::new();
        let fill = |len: usize| dir.path(&"x".repeat(len - dir.path("").as_os_str().len()));
        Listener::bind(&fill(107)).expect("the longest path");
        let error = Listener::bind(&fill(108)).unwrap_err();
        assert!(error.to_string().contains("108 bytes"), "{error}");
    }

    #[test]
    fn a_directory_that_is_missing_is_the_systems_reason() {
        let dir = TempDir::new();
        let error = Listener::bind(&dir.path("missing/socket")).unwrap_err();
        assert!(matches!(error, VsockError::Listen { .. }));
    }

    #[test]
    fn the_socket_file_is_removed_unless_somebody_replaced_it() {
        let dir = TempDir::new();
        let path = dir.path("socket");
        drop(Listener::bind(&path).unwrap());
        assert!(!path.exists());
        let (_listener, socket_file) = Listener::bind(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "another's").unwrap();
        drop(socket_file);
        assert_eq!(std::fs::read(&path).unwrap(), b"another's");
    }
}
