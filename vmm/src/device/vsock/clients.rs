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
/// By what patience is divided when others wait.
const HURRY: u32 = 50;

/// A client, and as much of its line as has come.
#[derive(Debug)]
struct Client {
    socket: OwnedFd,
    socket_type: SocketType,
    line: Vec<u8>,
    since: Instant,
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
    /// How long a client may take for its line.
    patience: Duration,
    /// Until when no client is accepted, although there may be some: a lack of descriptors goes away when others let go of
    /// theirs, and not by asking.
    paused_until: Option<Instant>,
    /// The listening sockets are registered for clients.
    listening: bool,
}

impl Clients {
    /// Clients of `listener`; without one there are never any.
    pub fn new(
        listener: Option<Listener>,
        patience: Duration,
        poller: &Poller,
    ) -> Result<Self, VsockError> {
        for (socket_type, socket) in listener.iter().flat_map(Listener::sockets) {
            poller
                .add(socket, Token::Listener(socket_type), Interest::READABLE)
                .map_err(VsockError::Events)?;
        }
        Ok(Self { listener, slots: Vec::new(), patience, paused_until: None, listening: true })
    }

    /// Connects to the host's port `port`.
    pub fn dial(&self, port: HostPort, socket_type: SocketType) -> io::Result<OwnedFd> {
        match &self.listener {
            Some(listener) => listener.dial(port, socket_type),
            None => Err(ErrorKind::NotFound.into()),
        }
    }

    /// Takes the clients of a type that wait at the listener.
    pub fn accept(&mut self, socket_type: SocketType, poller: &Poller) {
        while let Some(slot) = self.free_slot() {
            let Some(listener) = &self.listener else { return };
            match listener.accept(socket_type) {
                Ok(socket) => self.admit(slot, socket, socket_type, poller),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == ErrorKind::ConnectionAborted => {}
                Err(_) => {
                    self.paused_until = Some(Instant::now() + self.patience / HURRY);
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

    fn admit(&mut self, slot: usize, socket: OwnedFd, socket_type: SocketType, poller: &Poller) {
        // Without a registration nobody would ever look at the client: it is closed instead.
        if poller.add(&socket, Token::Client(slot as u32), Interest::READABLE).is_ok() {
            let since = Instant::now();
            self.slots[slot] = Some(Client { socket, socket_type, line: Vec::new(), since });
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
        let patience = self.patience();
        for slot in &mut self.slots {
            slot.take_if(|client| client.since + patience <= now);
        }
        self.paused_until.take_if(|until| *until <= now);
        self.update_listener(poller);
    }

    /// Time did not run for this long.
    pub fn prolong(&mut self, by: Duration) {
        self.slots.iter_mut().flatten().for_each(|client| client.since += by);
        self.paused_until.iter_mut().for_each(|until| *until += by);
    }

    /// When [`Clients::expire`] has something to do next.
    pub fn next_deadline(&self) -> Option<Instant> {
        let patience = self.patience();
        let deadlines = self.slots.iter().flatten().map(|client| client.since + patience);
        deadlines.chain(self.paused_until).min()
    }

    /// How long a client may take now. Those that say nothing must not keep out those that would: when all places are taken, there
    /// is little time.
    fn patience(&self) -> Duration {
        if self.is_full() { self.patience / HURRY } else { self.patience }
    }

    fn is_full(&self) -> bool {
        self.slots.len() >= MAX_CLIENTS && self.slots.iter().all(Option::is_some)
    }

    /// Drops all clients.
    pub fn clear(&mut self, poller: &Poller) {
        self.slots = Vec::new();
        self.update_listener(poller);
    }

    /// A listener that cannot be served is not listened to.
    fn update_listener(&mut self, poller: &Poller) {
        let Some(listener) = &self.listener else { return };
        let listening = !self.is_full() && self.paused_until.is_none();
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

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::super::testing::TempDir;
    use super::*;

    #[test]
    fn clients_that_say_nothing_have_little_time_once_they_keep_others_out() {
        const PATIENCE: Duration = Duration::from_secs(3600);
        let dir = TempDir::new();
        let path = dir.path("vsock");
        let (listener, _file) = Listener::bind(&path).unwrap();
        let poller = Poller::new().unwrap();
        let mut clients = Clients::new(Some(listener), PATIENCE, &poller).unwrap();
        let waiting = |clients: &Clients| clients.slots.iter().flatten().count();
        let connect = |clients: &mut Clients| {
            let stream = UnixStream::connect(&path).unwrap();
            clients.accept(SocketType::Stream, &poller);
            stream
        };
        let mut streams: Vec<_> = (1..MAX_CLIENTS).map(|_| connect(&mut clients)).collect();
        let soon = || Instant::now() + PATIENCE / HURRY;
        clients.expire(soon(), &poller);
        assert_eq!(waiting(&clients), MAX_CLIENTS - 1, "there was room for one more");
        assert!(clients.next_deadline().unwrap() > soon());

        streams.push(connect(&mut clients));
        assert!(!clients.listening && clients.next_deadline().unwrap() <= soon());
        clients.expire(Instant::now(), &poller);
        assert_eq!(waiting(&clients), MAX_CLIENTS, "none had its chance yet");
        clients.expire(soon(), &poller);
        assert_eq!(waiting(&clients), 0);
        assert!(clients.listening);
    }
}
