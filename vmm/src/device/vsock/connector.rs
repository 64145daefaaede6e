//! Connections between the guest and the monitor itself, opened by either, from any thread and without a path on disk.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, eventfd};

use super::packet::{GuestPort, HostPort};
use super::table::MAX_CONNECTIONS;

/// What becomes of a connection that the guest asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Acceptance {
    /// It is accepted.
    AtOnce,
    /// It is not, nor refused: the guest waits.
    Never,
}

/// What the monitor wants, with the far end of its socket.
#[derive(Debug)]
pub enum Wanted {
    /// A connection to this port of the guest.
    Connect(GuestPort, OwnedFd),
    /// The next connection of the guest to this port of the host.
    Expect(HostPort, Acceptance, OwnedFd),
}

/// Opens connections to the guest and takes some of its own. Cloneable; outlives resets, and says so once the device is gone.
#[derive(Clone, Debug)]
pub struct VsockConnector {
    inbox: Arc<Inbox>,
}

impl VsockConnector {
    /// A connector that hands over to `inbox`.
    pub fn new(inbox: Arc<Inbox>) -> Self {
        Self { inbox }
    }

    /// Asks for a connection to `port` of the guest, and returns the near end of it at once, in blocking mode.
    ///
    /// The request reaches the guest as soon as it has posted buffers, which may be long after. Bytes written before
    /// that wait in the socket. If the guest refuses, does not answer, or is reset, the stream is at its end. Dropping
    /// the stream before the guest has accepted withdraws the request.
    ///
    /// # Errors
    /// No descriptors are left, too many connections wait for the event loop, or the device is gone.
    pub fn connect(&self, port: GuestPort) -> io::Result<UnixStream> {
        self.push(|far| Wanted::Connect(port, far))
    }

    /// Takes the guest's next connection to `port` of the host, before any listener at a path, and returns the near end of it at
    /// once, in blocking mode. Bytes written before the guest connects wait in the socket. If the guest is reset before or
    /// after it connects, the stream is at its end; dropping the stream refuses a connection that was not accepted.
    ///
    /// # Errors
    /// As for [`VsockConnector::connect`].
    pub fn expect(&self, port: HostPort, acceptance: Acceptance) -> io::Result<UnixStream> {
        self.push(|far| Wanted::Expect(port, acceptance, far))
    }

    fn push(&self, wanted: impl FnOnce(OwnedFd) -> Wanted) -> io::Result<UnixStream> {
        let (near, far) = UnixStream::pair()?;
        far.set_nonblocking(true)?;
        self.inbox.push(wanted(far.into()))?;
        Ok(near)
    }
}

/// What waits for the event loop.
#[derive(Debug)]
pub struct Inbox {
    /// `None` once the device is gone.
    requests: Mutex<Option<VecDeque<Wanted>>>,
    event: OwnedFd,
}

impl Inbox {
    /// An empty inbox.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            requests: Mutex::new(Some(VecDeque::new())),
            event: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        })
    }

    /// Makes the inbox's descriptor readable.
    pub fn wake(&self) {
        // It fails only when the counter is at its end, and then the descriptor is readable already.
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
    }

    /// Takes all requests that have come so far.
    pub fn take(&self) -> VecDeque<Wanted> {
        // It fails only when nobody has written, which is no reason not to look.
        let _ = rustix::io::read(&self.event, &mut [0; 8]);
        self.lock().as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// True if nothing waits.
    pub fn is_empty(&self) -> bool {
        self.lock().as_ref().is_none_or(VecDeque::is_empty)
    }

    /// Drops what waits, and refuses what comes.
    pub fn close(&self) {
        *self.lock() = None;
    }

    fn push(&self, wanted: Wanted) -> io::Result<()> {
        match self.lock().as_mut() {
            Some(requests) if requests.len() < MAX_CONNECTIONS => {
                requests.push_back(wanted);
            }
            Some(_) => return Err(io::ErrorKind::QuotaExceeded.into()),
            None => return Err(io::ErrorKind::NotConnected.into()),
        }
        self.wake();
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Option<VecDeque<Wanted>>> {
        // The queue is whole at every point where a thread could have died.
        self.requests.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AsFd for Inbox {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}
