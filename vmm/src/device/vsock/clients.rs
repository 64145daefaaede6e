//! Clients of the listening sockets until they have said where they want to go.

use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::net::{RecvFlags, recv};

use super::packet::{GuestPort, HostPort, SocketType};
use super::poll::{Interest, Poller, Token};
use super::unix::{self, Listener, MAX_LINE, VsockError};

/// Most clients that may be on their way at once; the others wait in the listener's backlog.
const MAX_CLIENTS: usize = 128;

/// A client, and as much of its line as has come.
#[derive(Debug)]
struct Client {
    socket: OwnedFd,
    socket_type: SocketType,
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

/// A client that has said where it wants to go; its socket is registered no longer.
#[derive(Debug)]
pub struct Decided {
    /// The client's socket.
    pub socket: OwnedFd,
    /// What it carries.
    pub socket_type: SocketType,
    /// Where it wants to go.
    pub port: GuestPort,
}

/// The listener, if there is one, with its clients.
#[derive(Debug)]
pub struct Clients {
    listener: Option<Listener>,
    slots: Vec<Option<Client>>,
    /// Until when no client is accepted, although there may be some: a lack of descriptors goes away when others let go of
    /// theirs, and not by asking.
    paused_until: Option<Instant>,
    /// The listening sockets are registered for clients.
    listening: bool,
}

impl Clients {
    /// Clients of `listener`; without one there are never any.
    pub fn new(listener: Option<Listener>, poller: &Poller) -> Result<Self, VsockError> {
        for (socket_type, socket) in listener.iter().flat_map(Listener::sockets) {
            poller
                .add(socket, Token::Listener(socket_type), Interest::READABLE)
                .map_err(VsockError::Events)?;
        }
        Ok(Self { listener, slots: Vec::new(), paused_until: None, listening: true })
    }

    /// Connects to the host's port `port`.
    pub fn dial(&self, port: HostPort, socket_type: SocketType) -> io::Result<OwnedFd> {
        match &self.listener {
            Some(listener) => listener.dial(port, socket_type),
            None => Err(ErrorKind::NotFound.into()),
        }
    }

    /// Takes the clients of a type that wait at the listener.
    pub fn accept(&mut self, socket_type: SocketType, poller: &Poller, patience: Duration) {
        while let Some(slot) = self.free_slot() {
            let Some(listener) = &self.listener else { return };
            match listener.accept(socket_type) {
                Ok(socket) => self.admit(slot, socket, socket_type, poller, patience),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == ErrorKind::ConnectionAborted => {}
                Err(_) => {
                    self.paused_until = Some(Instant::now() + patience / 50);
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

    fn admit(
        &mut self,
        slot: usize,
        socket: OwnedFd,
        socket_type: SocketType,
        poller: &Poller,
        patience: Duration,
    ) {
        // Without a registration nobody would ever look at the client: it is closed instead.
        if poller.add(&socket, Token::Client(slot as u32), Interest::READABLE).is_ok() {
            let deadline = Instant::now() + patience;
            self.slots[slot] = Some(Client { socket, socket_type, line: Vec::new(), deadline });
        }
    }

    /// Reads from the client in `slot`. Gives the client once its destination is known.
    pub fn read(&mut self, slot: u32, poller: &Poller) -> Option<Decided> {
        let entry = self.slots.get_mut(slot as usize)?;
        let outcome = entry.as_mut()?.read_line();
        let port = match outcome {
            Line::Incomplete => return None,
            Line::Port(port) => Some(port),
            Line::Junk => None,
        };
        let client = entry.take()?;
        self.update_listener(poller);
        poller.remove(&client.socket).ok()?;
        Some(Decided { socket: client.socket, socket_type: client.socket_type, port: port? })
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
        if listening == self.listening {
            return;
        }
        for (socket_type, socket) in listener.sockets() {
            // Changing what is registered takes no memory, so there is nothing that could fail.
            let _ = poller.change(socket, Token::Listener(socket_type), interest);
        }
        self.listening = listening;
    }
}

impl Client {
    fn read_line(&mut self) -> Line {
        match self.socket_type {
            SocketType::Stream => self.read_bytes(),
            SocketType::Seqpacket => self.read_message(),
        }
    }

    /// Takes the bytes up to the line feed and none after it: those are for the guest.
    fn read_bytes(&mut self) -> Line {
        let mut bytes = [0; MAX_LINE];
        let window = &mut bytes[..MAX_LINE - self.line.len()];
        let seen = match recv(&self.socket, &mut *window, RecvFlags::PEEK) {
            Ok((0, _)) => return Line::Junk,
            Ok((seen, _)) => seen,
            Err(error) => return Line::without(error),
        };
        let end = window[..seen].iter().position(|&byte| byte == b'\n');
        let take = end.map_or(seen, |end| end + 1);
        match recv(&self.socket, &mut window[..take], RecvFlags::empty()) {
            Ok((taken, _)) if taken == take => {}
            _ => return Line::Junk,
        }
        self.line.extend_from_slice(&bytes[..take]);
        match end {
            None if self.line.len() == MAX_LINE => Line::Junk,
            None => Line::Incomplete,
            Some(_) => Line::complete(&self.line),
        }
    }

    /// Takes the first message: it is the line, with its line feed or without.
    fn read_message(&mut self) -> Line {
        // One byte more than a line may have: of a longer message that much comes.
        let mut bytes = [0; MAX_LINE + 1];
        match recv(&self.socket, &mut bytes[..], RecvFlags::empty()) {
            Ok((len, _)) if len <= MAX_LINE => Line::complete(&bytes[..len]),
            Ok(_) => Line::Junk,
            Err(error) => Line::without(error),
        }
    }
}

impl Line {
    fn complete(line: &[u8]) -> Self {
        match unix::parse_connect(line.strip_suffix(b"\n").unwrap_or(line)) {
            Some(port) => Self::Port(port),
            None => Self::Junk,
        }
    }

    fn without(error: rustix::io::Errno) -> Self {
        match error {
            rustix::io::Errno::AGAIN | rustix::io::Errno::INTR => Self::Incomplete,
            _ => Self::Junk,
        }
    }
}
