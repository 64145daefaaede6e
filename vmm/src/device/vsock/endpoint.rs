//! One connection's two ends tied together: the protocol's state and the host's socket.
//!
//! Payload goes straight between the socket and guest memory; only what the socket would not take is copied.

use std::io::{self, ErrorKind, Write};
use std::net;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use vm_memory::{ReadVolatile, VolatileMemoryError, WriteVolatile};

use super::backlog::Backlog;
use super::connection::Connection;
use super::credit::BUF_ALLOC;
use super::packet::{ConnectionKey, HEADER_LEN, Op, Shutdown};
use super::poll::{Event, Interest, Poller, Token};
use super::stats::VsockStats;
use super::unix;
use crate::device::virtio::chain::Chain;
use crate::memory::GuestRam;

/// Who opened a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The guest.
    Guest,
    /// A client of the listening socket, which wants to be told when the guest has accepted.
    Client,
    /// The monitor itself.
    Monitor,
}

/// A connection with its socket.
#[derive(Debug)]
pub struct Endpoint {
    key: ConnectionKey,
    /// The protocol's state.
    pub connection: Connection,
    origin: Origin,
    /// Gone once nothing can pass in either direction.
    stream: Option<UnixStream>,
    registered: Interest,
    backlog: Backlog,
    /// The socket has bytes or an end of file, as far as is known.
    readable: bool,
    /// The other end of the socket is gone; there may be bytes left to read.
    hung_up: bool,
    /// The socket's directions that were closed after the guest's wish.
    closed: Shutdown,
    /// When patience ends, with the guest's answer to a request or to a shutdown.
    pub deadline: Option<Instant>,
    /// The endpoint stands in the queue of those that have something for the guest.
    pub queued: bool,
}

impl Endpoint {
    /// Ties `stream`, which does not block, to `connection`.
    pub fn new(
        key: ConnectionKey,
        connection: Connection,
        origin: Origin,
        stream: UnixStream,
        poller: &Poller,
    ) -> io::Result<Self> {
        let registered = Interest::default();
        poller.add(&stream, Token::Connection(key), registered)?;
        Ok(Self {
            key,
            connection,
            origin,
            stream: Some(stream),
            registered,
            backlog: Backlog::default(),
            readable: false,
            hung_up: false,
            closed: Shutdown::default(),
            deadline: None,
            queued: false,
        })
    }

    /// True once the endpoint can be forgotten.
    pub fn is_finished(&self) -> bool {
        self.connection.has_ended() && self.stream.is_none()
    }

    /// True if there is a packet for the guest, credit permitting.
    pub fn has_packet(&self) -> bool {
        self.connection.due(self.readable).is_some()
    }

    /// The host's socket has news.
    pub fn handle_event(&mut self, event: &Event, stats: &mut VsockStats) {
        self.readable |= event.readable;
        self.hung_up |= event.hung_up;
        if self.hung_up && self.connection.is_requesting() {
            // Whoever asked has gone away before the guest answered.
            stats.connections_refused += 1;
            self.end();
        } else if event.writable || event.hung_up {
            self.flush();
        }
    }

    /// The guest accepted the host's request.
    pub fn accepted(&mut self, stats: &mut VsockStats) {
        self.deadline = None;
        stats.connections_opened += 1;
        if self.origin != Origin::Client {
            return;
        }
        let line = unix::accepted_line(self.key.host);
        let written = self.stream.as_mut().map(|stream| stream.write(line.as_bytes()));
        // Nothing was written to this socket before, so it has room unless it is broken.
        if !matches!(written, Some(Ok(len)) if len == line.len()) {
            self.fail(stats);
        }
    }

    /// Passes `len` bytes of payload, which follow the header in `chain`, on to the host's socket.
    pub fn receive_payload(&mut self, ram: &GuestRam, chain: &Chain, len: u32) {
        let mut written = 0;
        let mut blocked = !self.backlog.is_empty();
        for slice in chain.slices(ram, HEADER_LEN, len as usize) {
            let mut rest = slice;
            while !blocked && !rest.is_empty() {
                let Some(stream) = self.stream.as_mut() else { return self.host_stops_reading() };
                match stream.write_volatile(&rest) {
                    Ok(count) => {
                        written += count;
                        blocked = count < rest.len();
                        // Cannot fail: no more is written than there was.
                        rest = rest.offset(count).unwrap_or(rest);
                    }
                    Err(error) if would_block(&error) => blocked = true,
                    Err(_) => return self.host_stops_reading(),
                }
            }
            if !rest.is_empty() {
                self.backlog.push(&rest);
            }
        }
        self.connection.forwarded(written as u32);
    }

    /// Writes as much of the backlog as the host's socket takes.
    fn flush(&mut self) {
        while !self.backlog.is_empty() {
            let Some(stream) = self.stream.as_mut() else { return };
            match stream.write(self.backlog.bytes()) {
                Ok(count) => {
                    self.backlog.consume(count);
                    self.connection.forwarded(count as u32);
                }
                Err(error) if is_transient(&error) => return,
                Err(_) => return self.host_stops_reading(),
            }
        }
    }

    /// What the guest has sent and still sends has no reader.
    fn host_stops_reading(&mut self) {
        self.backlog = Backlog::default();
        self.connection.discard();
        self.connection.shut(Shutdown::RECEIVE);
    }

    /// Puts the next packet for the guest into `chain`, which has room for a header and more. Gives the number of
    /// bytes written, or `None` if there is nothing to say after all.
    pub fn send(
        &mut self,
        ram: &GuestRam,
        chain: &Chain,
        patience: Duration,
        stats: &mut VsockStats,
    ) -> Option<u32> {
        loop {
            let op = self.connection.due(self.readable)?;
            let mut len = 0;
            if op == Op::ReadWrite {
                len = self.read_payload(ram, chain, stats);
                if len == 0 {
                    continue;
                }
            }
            if op == Op::Request && self.deadline.is_none() {
                self.deadline = Some(Instant::now() + patience);
            }
            let header = self.connection.packet(op, len);
            // The chain was checked for room and for being in RAM, and RAM does not go away.
            chain.write(ram, &header.to_bytes()).ok()?;
            stats.bytes_to_guest += u64::from(len);
            return Some(HEADER_LEN as u32 + len);
        }
    }

    /// Reads from the host's socket into `chain`, after the header. Unless it fills all the room there is, the socket is
    /// no longer taken to be readable.
    fn read_payload(&mut self, ram: &GuestRam, chain: &Chain, stats: &mut VsockStats) -> u32 {
        let room = chain.len().saturating_sub(HEADER_LEN as u64);
        let room = room.min(self.connection.payload_room().min(BUF_ALLOC).into()) as usize;
        let mut total = 0;
        self.readable = false;
        for mut slice in chain.slices(ram, HEADER_LEN, room) {
            let Some(stream) = self.stream.as_mut() else { break };
            match stream.read_volatile(&mut slice) {
                Ok(0) => self.host_stops_sending(),
                Ok(count) => {
                    total += count;
                    if total == room {
                        self.readable = true;
                    } else if count == slice.len() {
                        continue;
                    }
                }
                Err(error) if would_block(&error) => {}
                // The bytes read before the error are still good; it will be there again at the next read.
                Err(_) if total > 0 => self.readable = true,
                Err(_) => self.fail(stats),
            }
            break;
        }
        total as u32
    }

    /// The host's socket is at its end of file.
    fn host_stops_sending(&mut self) {
        self.connection.shut(if self.hung_up { Shutdown::BOTH } else { Shutdown::SEND });
    }

    /// Draws the conclusions from what has changed: closes what is closed on the other side, gives up what is over.
    pub fn settle(&mut self, patience: Duration) {
        if self.connection.has_ended() {
            // The guest may have gone after its last byte; the host still gets it.
            if self.backlog.is_empty() {
                self.stream = None;
            }
            return;
        }
        if self.connection.is_over() {
            return;
        }
        let guest = self.connection.guest_shutdown();
        let sent_all = guest.send && self.backlog.is_empty();
        self.close(Shutdown { send: sent_all, receive: guest.receive });
        if guest == Shutdown::BOTH && sent_all {
            // The RST confirms the shutdown (virtio 1.2, section 5.10.6.6).
            return self.end();
        }
        let host = self.connection.host_shutdown();
        if (host.send || guest.receive) && (self.hung_up || sent_all) {
            self.connection.shut(Shutdown::BOTH);
        }
        if self.connection.host_shutdown() == Shutdown::BOTH && self.stream.is_some() {
            self.drop_stream();
            self.deadline = Some(Instant::now() + patience);
        }
    }

    /// Closes the directions of the host's socket that the guest has closed on its side.
    fn close(&mut self, guest: Shutdown) {
        let Some(stream) = &self.stream else { return };
        // The only failure is a socket that is not connected any more, which is closed enough.
        if guest.send && !self.closed.send {
            let _ = stream.shutdown(net::Shutdown::Write);
        }
        if guest.receive && !self.closed.receive {
            let _ = stream.shutdown(net::Shutdown::Read);
            self.readable = false;
        }
        self.closed = guest;
    }

    /// Ends the connection because something about it failed.
    pub fn fail(&mut self, stats: &mut VsockStats) {
        stats.connections_reset += 1;
        self.end();
    }

    /// Ends the connection: the host's socket closes, and the guest gets an RST.
    pub fn end(&mut self) {
        self.connection.end();
        self.drop_stream();
    }

    /// The guest has ended the connection. What it sent before it said that it was done still goes to the host.
    pub fn ended_by_guest(&mut self, stats: &mut VsockStats) {
        let orderly = self.connection.host_shutdown() == Shutdown::BOTH;
        if !self.connection.guest_shutdown().send {
            self.drop_stream();
        }
        if !orderly && self.connection.guest_shutdown() != Shutdown::BOTH {
            stats.connections_reset += 1;
        }
    }

    /// Closes the host's socket, with what is in flight to it.
    pub fn drop_stream(&mut self) {
        self.stream = None;
        self.readable = false;
        self.deadline = None;
        if !self.backlog.is_empty() {
            self.backlog = Backlog::default();
            self.connection.discard();
        }
    }

    /// Brings the epoll registration in line with what can be done. A socket that is known to be readable stays
    /// registered for that unless it has to wait (`park`), since the next packet may empty it.
    pub fn update_interest(&mut self, poller: &Poller, park: bool) -> io::Result<()> {
        let Some(stream) = &self.stream else { return Ok(()) };
        let known = self.readable && (park || !self.registered.readable);
        let wanted = Interest {
            readable: self.connection.payload_room() > 0 && !known,
            writable: !self.backlog.is_empty(),
        };
        if wanted != self.registered {
            poller.change(stream, Token::Connection(self.key), wanted)?;
            self.registered = wanted;
        }
        Ok(())
    }
}

fn would_block(error: &VolatileMemoryError) -> bool {
    match error {
        VolatileMemoryError::IOError(error) => is_transient(error),
        _ => false,
    }
}

/// True if the socket is in order and will say when to try again.
fn is_transient(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}
