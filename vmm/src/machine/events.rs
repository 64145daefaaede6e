//! What happened to a machine, on its way from the event loop to the owner of the handle.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

use rustix::net::{RecvFlags, SendFlags};

use super::{Event, MachineError, Stop};

/// The event loop's end.
#[derive(Clone, Debug)]
pub(super) struct EventSender {
    events: Sender<Event>,
    bell: Option<Arc<UnixStream>>,
}

/// The owner's end.
#[derive(Debug)]
pub(super) struct EventReceiver {
    events: Receiver<Event>,
    bell: Option<UnixStream>,
}

/// Both ends; with `bell` a descriptor tells when there is something.
pub(super) fn events(bell: bool) -> Result<(EventSender, EventReceiver), MachineError> {
    let (sender, receiver) = channel();
    let (ringing, heard) = match bell {
        false => (None, None),
        true => {
            // A socket and no eventfd: a sandbox's main thread may receive and send, and neither reads nor writes.
            let (ringing, heard) = pair().map_err(MachineError::host("make a pair of sockets"))?;
            (Some(ringing.into()), Some(heard))
        }
    };
    Ok((
        EventSender { events: sender, bell: ringing },
        EventReceiver { events: receiver, bell: heard },
    ))
}

fn pair() -> io::Result<(UnixStream, UnixStream)> {
    let (one, other) = UnixStream::pair()?;
    one.set_nonblocking(true)?;
    other.set_nonblocking(true)?;
    Ok((one, other))
}

impl EventSender {
    /// Tells of `event`. A listener that has gone is about to stop the machine.
    pub fn send(&self, event: Event) {
        if self.events.send(event).is_ok()
            && let Some(bell) = &self.bell
        {
            // If there is no room for another byte, enough wait to be heard.
            let _ = rustix::net::send(bell, &[0], SendFlags::NOSIGNAL);
        }
    }
}

impl EventReceiver {
    /// The next event, or `None` after `timeout`.
    pub fn next(&self, timeout: Duration) -> Option<Event> {
        match self.events.recv_timeout(timeout) {
            Ok(event) => Some(event),
            Err(RecvTimeoutError::Timeout) => None,
            // The loop has sent its last event before, and somebody took it.
            Err(RecvTimeoutError::Disconnected) => Some(Event::Stopped(Stop::Requested)),
        }
    }

    /// Readable if there may be an event.
    pub fn ready(&self) -> Option<BorrowedFd<'_>> {
        self.bell.as_ref().map(AsFd::as_fd)
    }

    /// All that has happened. What happens later rings again.
    pub fn take(&self) -> Vec<Event> {
        if let Some(bell) = &self.bell {
            let mut rung = [0; 64];
            while let Ok((1.., _)) = rustix::net::recv(bell, &mut rung[..], RecvFlags::empty()) {}
        }
        self.events.try_iter().collect()
    }
}
