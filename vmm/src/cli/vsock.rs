//! `cleanslate vsock`: pipes between the standard descriptors and a guest's vsock ports, of any monitor that has Firecracker's
//! socket convention. Runs no machine.

mod pipe;

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use jailer::User;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags};

use self::pipe::{Ending, PipeError};
use super::Error;
use crate::device::vsock::{HostPort, MAX_LINE, SocketType, VsockError, listen_on_host_port};
use crate::exit;
use crate::machine::Interrupts;

/// Reach a guest's vsock ports from a shell, or be reached by the guest
#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Connect standard input and output to a port of the guest
    ///
    /// The end of standard input closes that direction alone; the end of the guest's closes standard output. If PATH is a socket
    /// of type SOCK_SEQPACKET, each read of standard input becomes a message.
    #[command(after_help = "\
Exit status:
  0    both directions are at their end, or standard output has no reader any more
  2    wrong usage, the guest refused or reset the connection, or it did not take all of standard input

Examples:
  cleanslate vsock connect --uds /tmp/vm.sock 1024 < request > answer
  echo hello | cleanslate vsock connect 7")]
    Connect {
        #[command(flatten)]
        socket: Socket,

        /// Port of the guest
        #[arg(value_parser = parse_port)]
        port: u32,
    },
    /// Wait for one connection of the guest to a port of the host, and connect standard input and output to it
    ///
    /// Listens at PATH_PORT and removes that socket as soon as the guest has connected, or at the end. Whoever may write to the
    /// socket may connect; so it is given to the user that machines have when they are started by root.
    #[command(after_help = "\
Exit status:
  0    both directions are at their end, or standard output has no reader any more
  2    wrong usage, the guest reset the connection, or it did not take all of standard input
  130  interrupted

Example:
  cleanslate vsock listen --uds /tmp/vm.sock 52 > from-the-guest")]
    Listen {
        #[command(flatten)]
        socket: Socket,

        /// Port of the host
        #[arg(value_parser = parse_port)]
        port: u32,

        /// Wait for a connection of type SOCK_SEQPACKET
        #[arg(long)]
        seqpacket: bool,

        /// User of the machine: what was given to `run` or to Firecracker's jailer; only root may name another
        /// [default: nobody for root, and otherwise your own]
        #[arg(long, value_name = "USER")]
        uid: Option<String>,
    },
}

#[derive(Debug, Args)]
struct Socket {
    /// The machine's vsock socket
    #[arg(long, value_name = "PATH", default_value = "v.sock")]
    uds: PathBuf,
}

fn parse_port(text: &str) -> Result<u32, String> {
    match text.parse() {
        Ok(u32::MAX) | Err(_) => Err("a port is a number from 0 to 4294967294".into()),
        Ok(port) => Ok(port),
    }
}

#[derive(Debug, thiserror::Error)]
enum VsockCommandError {
    #[error("connect to {0:?}")]
    Connect(PathBuf, #[source] io::Error),
    #[error("ask for port {0} of the guest")]
    Ask(u32, #[source] io::Error),
    #[error(
        "the guest refused the connection to its port {0}: nobody listens there, or it is not running"
    )]
    Refused(u32),
    #[error("{0:?} answered {1:?} instead of OK: it is no vsock socket of a machine")]
    Answer(PathBuf, String),
    #[error("give {0:?} to user {1}")]
    Give(PathBuf, u32, #[source] io::Error),
    #[error("wait for the guest")]
    Wait(#[source] io::Error),
    #[error(transparent)]
    Listen(#[from] VsockError),
    #[error(transparent)]
    Pipe(#[from] PipeError),
}

pub(super) fn main(arguments: Arguments) -> Result<u8, Error> {
    let ending = match arguments.command {
        Command::Connect { socket, port } => {
            let connection = connect(&socket.uds, port)?;
            pipe::run(connection, None).map_err(VsockCommandError::Pipe)?
        }
        Command::Listen { socket, port, seqpacket, uid } => {
            let user = uid.map(|user| User::find(&user, None)).transpose()?;
            let socket_type = if seqpacket { SocketType::Seqpacket } else { SocketType::Stream };
            let interrupts = Interrupts::catch()?;
            match accept(&socket.uds, port, socket_type, user, &interrupts)? {
                Some(connection) => {
                    pipe::run(connection, Some(&interrupts)).map_err(VsockCommandError::Pipe)?
                }
                None => Ending::Interrupted,
            }
        }
    };
    Ok(match ending {
        Ending::Complete => exit::CLEAN,
        Ending::Interrupted => exit::INTERRUPTED,
    })
}

/// Connects to `port` of the guest behind the socket at `path`, of whichever type that is.
fn connect(path: &Path, port: u32) -> Result<OwnedFd, VsockCommandError> {
    let connected = |socket_type| -> rustix::io::Result<OwnedFd> {
        let flags = SocketFlags::CLOEXEC;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, socket_type, flags, None)?;
        rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
        Ok(socket)
    };
    let socket = match connected(rustix::net::SocketType::STREAM) {
        Err(rustix::io::Errno::PROTOTYPE) => connected(rustix::net::SocketType::SEQPACKET),
        result => result,
    };
    let socket = socket.map_err(|errno| VsockCommandError::Connect(path.into(), errno.into()))?;
    let failed = |errno: rustix::io::Errno| VsockCommandError::Ask(port, errno.into());
    let request = format!("CONNECT {port}\n");
    pipe::send_all(&socket, request.as_bytes()).map_err(failed)?;
    let answer = match read_line(&socket) {
        // Closed with the request unread.
        Err(rustix::io::Errno::CONNRESET) => Vec::new(),
        result => result.map_err(failed)?,
    };
    if answer.is_empty() {
        return Err(VsockCommandError::Refused(port));
    }
    if !answer.starts_with(b"OK ") || !answer.ends_with(b"\n") {
        let answer = String::from_utf8_lossy(&answer).trim_end().to_owned();
        return Err(VsockCommandError::Answer(path.into(), answer));
    }
    Ok(socket)
}

/// Reads to the first line feed and no further, or to the end. A message is no longer than a line.
fn read_line(socket: &OwnedFd) -> rustix::io::Result<Vec<u8>> {
    let mut line = Vec::new();
    while line.len() < MAX_LINE && line.last() != Some(&b'\n') {
        let mut bytes = [0; MAX_LINE];
        let flags = rustix::net::RecvFlags::PEEK;
        let (seen, _) = retry(|| rustix::net::recv(socket, &mut bytes[..], flags))?;
        if seen == 0 {
            break;
        }
        let take = bytes[..seen].iter().position(|&byte| byte == b'\n').map_or(seen, |end| end + 1);
        let (taken, _) = retry(|| {
            rustix::net::recv(socket, &mut bytes[..take], rustix::net::RecvFlags::empty())
        })?;
        line.extend_from_slice(&bytes[..taken]);
    }
    Ok(line)
}

fn retry<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> rustix::io::Result<T> {
    rustix::io::retry_on_intr(&mut call)
}

/// Listens for the guest at the host's port `port` and takes the first connection. `None` if a signal came first.
fn accept(
    path: &Path,
    port: u32,
    socket_type: SocketType,
    user: Option<User>,
    interrupts: &Interrupts,
) -> Result<Option<OwnedFd>, VsockCommandError> {
    let (socket, file) = listen_on_host_port(path, HostPort(port), socket_type)?;
    let is_root = rustix::process::geteuid().is_root();
    if let Some(user) = user.or(is_root.then_some(User::NOBODY)) {
        let owner = rustix::fs::Uid::from_raw(user.uid);
        rustix::fs::chown(file.path(), Some(owner), None)
            .map_err(|errno| VsockCommandError::Give(file.path().into(), user.uid, errno.into()))?;
    }
    loop {
        let mut ready =
            [PollFd::new(&socket, PollFlags::IN), PollFd::new(interrupts, PollFlags::IN)];
        retry(|| poll(&mut ready, None)).map_err(|errno| VsockCommandError::Wait(errno.into()))?;
        if !ready[1].revents().is_empty() {
            return Ok(None);
        }
        match rustix::net::accept_with(&socket, SocketFlags::CLOEXEC) {
            Ok(connection) => return Ok(Some(connection)),
            // It went away before.
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::CONNABORTED) => {}
            Err(errno) => return Err(VsockCommandError::Wait(errno.into())),
        }
    }
}
