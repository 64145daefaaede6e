//! `cleanslate vsock`: pipes between the standard descriptors and a guest's vsock ports, of any monitor that has Firecracker's
//! socket convention. Runs no machine.

mod pipe;

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use jailer::User;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::SocketFlags;

use self::pipe::{Ending, PipeError};
use super::Error;
use crate::device::vsock::SocketType;
use crate::exit;
use crate::machine::Interrupts;
use crate::vsock_client::{self, ClientError};

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
    #[error("wait for the guest")]
    Wait(#[source] io::Error),
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error(transparent)]
    Pipe(#[from] PipeError),
}

pub(super) fn main(arguments: Arguments) -> Result<u8, Error> {
    let ending = match arguments.command {
        Command::Connect { socket, port } => {
            let connection = vsock_client::connect(&socket.uds, port, None)
                .map_err(VsockCommandError::Client)?;
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

/// Listens for the guest at the host's port `port` and takes the first connection. `None` if a signal came first.
fn accept(
    path: &Path,
    port: u32,
    socket_type: SocketType,
    user: Option<User>,
    interrupts: &Interrupts,
) -> Result<Option<OwnedFd>, VsockCommandError> {
    let (socket, _file) = vsock_client::listen(path, port, socket_type, user)?;
    loop {
        let mut ready =
            [PollFd::new(&socket, PollFlags::IN), PollFd::new(interrupts, PollFlags::IN)];
        rustix::io::retry_on_intr(|| poll(&mut ready, None))
            .map_err(|errno| VsockCommandError::Wait(errno.into()))?;
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
