//! Standard input and output tied to a socket, each direction with an end of its own.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, read, retry_on_intr, write};
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown};

use crate::machine::Interrupts;

/// Bytes of one call. The kernel gives and takes no more of a Unix socket at a time by far.
const CHUNK: usize = 256 * 1024;

/// How a pipe ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    /// Both directions are at their end, or nobody is interested in what comes.
    Complete,
    /// A signal came.
    Interrupted,
}

/// Why a pipe broke.
#[derive(Debug, thiserror::Error)]
pub(super) enum PipeError {
    #[error("read standard input")]
    Input(#[source] io::Error),
    #[error("write standard output")]
    Output(#[source] io::Error),
    #[error("send to the guest, which did not take all of standard input")]
    Send(#[source] io::Error),
    #[error("receive from the guest")]
    Receive(#[source] io::Error),
    #[error("start a thread for standard input")]
    Thread(#[source] io::Error),
}

/// Moves bytes both ways until both directions are at their end. What the guest does not let go on while the other direction
/// waits must not stop that one, so each has a thread.
pub(super) fn run(socket: OwnedFd, interrupts: Option<&Interrupts>) -> Result<Ending, PipeError> {
    let failed = |errno: Errno| PipeError::Thread(errno.into());
    let socket = Arc::new(socket);
    // The writing end closes with the thread.
    let (done, doing) =
        rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(failed)?;
    let sending = Arc::new(Mutex::new(()));
    let theirs = (socket.clone(), sending.clone());
    let sender = std::thread::Builder::new()
        .spawn(move || {
            let result = send_input(&theirs.0, &theirs.1);
            drop(doing);
            result
        })
        .map_err(PipeError::Thread)?;

    if let Some(ending) = receive_output(&socket, interrupts)? {
        return Ok(ending);
    }
    // The guest sends no more. It may still receive; if the whole connection is over, nobody waits for standard input.
    let mut ready =
        vec![PollFd::new(&*socket, PollFlags::empty()), PollFd::new(&done, PollFlags::empty())];
    ready.extend(interrupts.map(|signals| PollFd::new(signals, PollFlags::IN)));
    retry_on_intr(|| poll(&mut ready, None)).map_err(|errno| PipeError::Receive(errno.into()))?;
    if ready.get(2).is_some_and(|fd| !fd.revents().is_empty()) {
        return Ok(Ending::Interrupted);
    }
    if ready[1].revents().is_empty() && !has_input(&sending)? {
        return Ok(Ending::Complete);
    }
    // It is done, or finds out that it cannot go on.
    sender.join().expect("the thread has not panicked")?;
    Ok(Ending::Complete)
}

/// True if there is something on standard input that was not sent, perhaps its end. `sending` is held from the moment that
/// bytes are read until they are sent.
fn has_input(sending: &Mutex<()>) -> Result<bool, PipeError> {
    let _sent = sending.lock().unwrap_or_else(PoisonError::into_inner);
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let mut ready = [PollFd::from_borrowed_fd(rustix::stdio::stdin(), PollFlags::IN)];
    let count = retry_on_intr(|| poll(&mut ready, Some(&now)));
    Ok(count.map_err(|errno| PipeError::Input(errno.into()))? > 0)
}

/// Standard input to the socket; its end closes the direction.
fn send_input(socket: &OwnedFd, sending: &Mutex<()>) -> Result<(), PipeError> {
    let result = send_all_input(socket, sending);
    // It fails if the connection is over, which the other direction finds out.
    let _ = shutdown(socket, Shutdown::Write);
    result
}

fn send_all_input(socket: &OwnedFd, sending: &Mutex<()>) -> Result<(), PipeError> {
    let mut buffer = vec![0; CHUNK];
    let failed = |errno: Errno| PipeError::Input(errno.into());
    loop {
        let mut ready = [PollFd::from_borrowed_fd(rustix::stdio::stdin(), PollFlags::IN)];
        retry_on_intr(|| poll(&mut ready, None)).map_err(failed)?;
        let _sending = sending.lock().unwrap_or_else(PoisonError::into_inner);
        match retry_on_intr(|| read(rustix::stdio::stdin(), &mut buffer[..])) {
            Ok(0) => return Ok(()),
            Ok(len) => {
                send_all(socket, &buffer[..len]).map_err(|errno| PipeError::Send(errno.into()))?;
            }
            // Somebody else has it open so, and took what there was.
            Err(Errno::AGAIN) => {}
            Err(errno) => return Err(failed(errno)),
        }
    }
}

/// Sends all of `bytes`. Without a reader that is an error and no signal.
pub(super) fn send_all(socket: &OwnedFd, bytes: &[u8]) -> rustix::io::Result<()> {
    let mut rest = bytes;
    while !rest.is_empty() {
        let sent = retry_on_intr(|| send(socket, rest, SendFlags::NOSIGNAL))?;
        rest = &rest[sent..];
    }
    Ok(())
}

/// The socket to standard output, until the guest's end. If there is a reason to go no further at all, that.
fn receive_output(
    socket: &OwnedFd,
    interrupts: Option<&Interrupts>,
) -> Result<Option<Ending>, PipeError> {
    let mut buffer = vec![0; CHUNK];
    loop {
        if let Some(interrupts) = interrupts {
            let mut ready =
                [PollFd::new(socket, PollFlags::IN), PollFd::new(interrupts, PollFlags::IN)];
            retry_on_intr(|| poll(&mut ready, None))
                .map_err(|errno| PipeError::Receive(errno.into()))?;
            if !ready[1].revents().is_empty() {
                return Ok(Some(Ending::Interrupted));
            }
        }
        let (len, _) = retry_on_intr(|| recv(socket, &mut buffer[..], RecvFlags::empty()))
            .map_err(|errno| PipeError::Receive(errno.into()))?;
        let mut rest = &buffer[..len];
        if rest.is_empty() {
            return Ok(None);
        }
        while !rest.is_empty() {
            match retry_on_intr(|| write(rustix::stdio::stdout(), rest)) {
                Ok(written) => rest = &rest[written..],
                Err(Errno::PIPE) => return Ok(Some(Ending::Complete)),
                Err(errno) => return Err(PipeError::Output(errno.into())),
            }
        }
    }
}
