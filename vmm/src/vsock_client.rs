//! The host's side of Firecracker's socket convention, for any monitor that has it: clients of a guest's ports, and services at
//! ports of the host. Knows no machine.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use jailer::User;
use rustix::io::{Errno, retry_on_intr};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, recv, send};

use crate::device::vsock::{
    HostPort, MAX_LINE, SocketFile, SocketType, VsockError, listen_on_host_port,
};

/// Why there is no connection, or no service.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody can be reached there.
    #[error("connect to {0:?}")]
    Connect(PathBuf, #[source] io::Error),
    /// The conversation broke.
    #[error("ask for port {0} of the guest")]
    Ask(u32, #[source] io::Error),
    /// No answer came.
    #[error("{0:?} did not answer a client within {1:?}")]
    Silent(PathBuf, Duration),
    /// The connection was closed instead of accepted.
    #[error(
        "the guest refused the connection to its port {0}: nobody listens there, or it is not running"
    )]
    Refused(u32),
    /// Somebody else is there.
    #[error("{0:?} answered {1:?} instead of OK: it is no vsock socket of a machine")]
    Answer(PathBuf, String),
    /// The machine could not be let in.
    #[error("give {0:?} to user {1}")]
    Give(PathBuf, u32, #[source] io::Error),
    /// There is no socket.
    #[error(transparent)]
    Listen(#[from] VsockError),
}

/// Connects to `port` of the guest behind the socket at `path`, of whichever type that is. With `patience`, nothing on the
/// connection waits longer than that, then or later.
///
/// # Errors
/// [`ClientError`].
pub fn connect(path: &Path, port: u32, patience: Option<Duration>) -> Result<OwnedFd, ClientError> {
    let connected = |socket_type| -> rustix::io::Result<OwnedFd> {
        let flags = SocketFlags::CLOEXEC;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, socket_type, flags, None)?;
        set_socket_timeout(&socket, Timeout::Recv, patience)?;
        set_socket_timeout(&socket, Timeout::Send, patience)?;
        rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
        Ok(socket)
    };
    let socket = match connected(rustix::net::SocketType::STREAM) {
        Err(Errno::PROTOTYPE) => connected(rustix::net::SocketType::SEQPACKET),
        result => result,
    };
    let failed = |errno: Errno| match (errno, patience) {
        (Errno::AGAIN, Some(patience)) => ClientError::Silent(path.into(), patience),
        _ => ClientError::Ask(port, errno.into()),
    };
    let socket = socket.map_err(|errno| match errno {
        Errno::AGAIN => failed(errno),
        errno => ClientError::Connect(path.into(), errno.into()),
    })?;
    let request = format!("CONNECT {port}\n");
    // A line fits into any socket that nothing was written to.
    retry_on_intr(|| send(&socket, request.as_bytes(), SendFlags::NOSIGNAL)).map_err(failed)?;
    let answer = match read_line(&socket) {
        // Closed with the request unread.
        Err(Errno::CONNRESET) => Vec::new(),
        result => result.map_err(failed)?,
    };
    if answer.is_empty() {
        return Err(ClientError::Refused(port));
    }
    if !answer.starts_with(b"OK ") || !answer.ends_with(b"\n") {
        let answer = String::from_utf8_lossy(&answer).trim_end().to_owned();
        return Err(ClientError::Answer(path.into(), answer));
    }
    Ok(socket)
}

/// Reads to the first line feed and no further, or to the end. A message is no longer than a line.
fn read_line(socket: impl AsFd) -> rustix::io::Result<Vec<u8>> {
    let mut line = Vec::new();
    while line.len() < MAX_LINE && line.last() != Some(&b'\n') {
        let mut bytes = [0; MAX_LINE];
        let (seen, _) = retry_on_intr(|| recv(&socket, &mut bytes[..], RecvFlags::PEEK))?;
        if seen == 0 {
            break;
        }
        let take = bytes[..seen].iter().position(|&byte| byte == b'\n').map_or(seen, |end| end + 1);
        let (taken, _) = retry_on_intr(|| recv(&socket, &mut bytes[..take], RecvFlags::empty()))?;
        line.extend_from_slice(&bytes[..taken]);
    }
    Ok(line)
}

/// Listens on the host's port `port` for the machine whose socket is at `path`. Whoever may write to the socket may connect; started
/// by root, it belongs to `user`, or to the one that machines have if nobody said so. The socket does not block.
///
/// # Errors
/// [`ClientError`].
pub fn listen(
    path: &Path,
    port: u32,
    socket_type: SocketType,
    user: Option<User>,
) -> Result<(OwnedFd, SocketFile), ClientError> {
    let (socket, file) = listen_on_host_port(path, HostPort(port), socket_type)?;
    let is_root = rustix::process::geteuid().is_root();
    if let Some(user) = user.or(is_root.then_some(User::NOBODY)) {
        let owner = rustix::fs::Uid::from_raw(user.uid);
        rustix::fs::chown(file.path(), Some(owner), None)
            .map_err(|errno| ClientError::Give(file.path().into(), user.uid, errno.into()))?;
    }
    Ok((socket, file))
}
