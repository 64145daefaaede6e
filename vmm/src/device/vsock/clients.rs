//! Clients of the listening socket until they have said where they want to go.

use std::io::{self, ErrorKind};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::net::{RecvFlags, recv};

use super::packet::{GuestPort, HostPort};
use super::poll::{Interest, Poller, Token};
use super::unix::{self, Listener, MAX_LINE, VsockError};

/// Most clients that may be on their way at once; the others wait in the listener's backlog.
const MAX_CLIENTS: usize = 128;

/// A client, and as much of its line as has come.
#[derive(Debug)]
struct Client {
    stream: UnixStream,
    line: Vec<u8>,
    deadline: Instant,
}

/// What a client's bytes amount to.
enum Line {
    Incomplete,
    Port(GuestPort),
    /// Not a line that anybody should send, or the end of the stream.
    Junk,
}

/// The listener, if there is one, with its clients.
#[derive(Debug)]
pub struct Clients {
    listener: Option<Listener>,
    slots: Vec<Option<Client>>,
    /// Until when no client is accepted, although there may be some: a lack of descriptors does not go away by asking.
    paused_until: Option<Instant>,
    /// The listener is registered for clients.
    listening: bool,
}

impl Clients {
    /// Clients of `listener`; without one there are never any.
    pub fn new(listener: Option<Listener>, poller: &Poller) -> Result<Self, VsockError> {
        if let Some(listener) = &listener {
            poller
                .add(listener, Token::Listener, Interest::READABLE)
                .map_err(VsockError::Events)?;
        }
        Ok(Self { listener, slots: Vec::new(), paused_until: None, listening: true })
    }

    /// Connects to the host's port `port`.
    pub fn dial(&self, port: HostPort) -> io::Result<UnixStream> {
        match &self.listener {
            Some(listener) => listener.dial(port),
            None => Err(ErrorKind::NotFound.into()),
        }
    }

    /// Takes the clients that wait at the listener.
    pub fn accept(&mut self, poller: &Poller, patience: Duration) {
        while let Some(slot) = self.free_slot() {
            let Some(listener) = &self.listener else { return };
            match listener.accept() {
                Ok(stream) => self.admit(slot, stream, poller, patience),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == ErrorKind::ConnectionAborted => {}
                Err(_) => {
                    self.paused_until = Some(Instant::now() + patience);
                    break;
                }
            }
        }
        self.update_listener(poller);
    }

    fn free_slot(&mut self) -> Option<usize> {
        if let Some(slot) = self.slots.iter().position(Option::is_none) {
            return Some(slot);
        }
        (self.slots.len() < MAX_CLIENTS).then(|| {
            self.slots.push(None);
            self.slots.len() - 1
        })
    }

    fn admit(&mut self, slot: usize, stream: UnixStream, poller: &Poller, patience: Duration) {
        // Without a registration nobody would ever look at the client: it is closed instead.
        if poller.add(&stream, Token::Client(slot as u32), Interest::READABLE).is_ok() {
            let deadline = Instant::now() + patience;
            self.slots[slot] = Some(Client { stream, line: Vec::new(), deadline });
        }
    }

    /// Reads from the client in `slot`. Gives its stream, no longer registered, and its destination once that is known.
    pub fn read(&mut self, slot: u32, poller: &Poller) -> Option<(UnixStream, GuestPort)> {
        let entry = self.slots.get_mut(slot as usize)?;
        let outcome = entry.as_mut()?.read_line();
        let port = match outcome {
            Line::Incomplete => return None,
            Line::Port(port) => Some(port),
            Line::Junk => None,
        };
        let client = entry.take()?;
        self.update_listener(poller);
        poller.remove(&client.stream).ok()?;
        Some((client.stream, port?))
    }

    /// Drops those whose time is up, and tries the listener again if it was left alone for long enough.
    pub fn expire(&mut self, now: Instant, poller: &Poller) {
        for slot in &mut self.slots {
            slot.take_if(|client| client.deadline <= now);
        }
        self.paused_until.take_if(|until| *until <= now);
        self.update_listener(poller);
    }

    /// When [`Clients::expire`] has something to do next.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.slots.iter().flatten().map(|client| client.deadline).chain(self.paused_until).min()
    }

    /// Drops all clients.
    pub fn clear(&mut self, poller: &Poller) {
        self.slots = Vec::new();
        self.update_listener(poller);
    }

    /// A listener that cannot be served is not listened to.
    fn update_listener(&mut self, poller: &Poller) {
        let Some(listener) = &self.listener else { return };
        let full = self.slots.len() >= MAX_CLIENTS && self.slots.iter().all(Option::is_some);
        let listening = !full && self.paused_until.is_none();
        let interest = Interest { readable: listening, writable: false };
        // Changing what is registered takes no memory, so there is nothing that could fail.
        if listening != self.listening && poller.change(listener, Token::Listener, interest).is_ok()
        {
            self.listening = listening;
        }
    }
}

impl Client {
    /// Takes the bytes up to the line feed and none after it: those are for the guest.
    fn read_line(&mut self) -> Line {
        let mut bytes = [0; MAX_LINE];
        let window = &mut bytes[..MAX_LINE - self.line.len()];
        let seen = match recv(&self.stream, &mut *window, RecvFlags::PEEK) {
            Ok((0, _)) => return Line::Junk,
            Ok((seen, _)) => seen,
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Line::Incomplete,
            Err(_) => return Line::Junk,
        };
        let end = window[..seen].iter().position(|&byte| byte == b'\n');
        let take = end.map_or(seen, |end| end + 1);
        match recv(&self.stream, &mut window[..take], RecvFlags::empty()) {
            Ok((taken, _)) if taken == take => {}
            _ => return Line::Junk,
        }
        self.line.extend_from_slice(&bytes[..take]);
        match end {
            None if self.line.len() == MAX_LINE => Line::Junk,
            None => Line::Incomplete,
            Some(_) => match unix::parse_connect(&self.line[..self.line.len() - 1]) {
                Some(port) => Line::Port(port),
                None => Line::Junk,
            },
        }
    }
}
