//! One connection's two ends tied together: the protocol's state and the host's socket. What passes between them is in
//! `payload.rs`.

use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::net::sockopt::set_socket_send_buffer_size;
use rustix::net::{SendFlags, send, shutdown};

use super::backlog::Backlog;
use super::connection::Connection;
use super::credit::{BUF_ALLOC, SMALL_BUF_ALLOC};
use super::packet::{ConnectionKey, HEADER_LEN, Op, Shutdown, SocketType};
use super::poll::{Event, Interest, Poller, Token};
use super::stats::VsockStats;
use super::unix;
use crate::device::virtio::chain::Chain;
use crate::memory::{GuestRam, peek_goes_on};

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
    pub(super) socket: Option<OwnedFd>,
    registered: Interest,
    pub(super) backlog: Backlog,
    /// How much of the message at the front of the socket the guest has.
    pub(super) peeked: u32,
    /// The socket has bytes or an end of file, as far as is known.
    pub(super) readable: bool,
    /// The last read from it filled all the room there was: there are probably more bytes than fit into one buffer of the guest.
    pub(super) is_bulk: bool,
    /// The other end of the socket sends no more; there may be bytes left to read.
    pub(super) peer_done: bool,
    /// The other end of the socket is gone; there may be bytes left to read.
    pub(super) hung_up: bool,
    /// The socket's directions that were closed after the guest's wish.
    closed: Shutdown,
    /// When patience ends, with the guest's answer to a request or to a shutdown.
    pub deadline: Option<Instant>,
    /// The endpoint stands in the queue of those that have something for the guest.
    pub queued: bool,
}

impl Endpoint {
    /// Ties `socket`, which does not block, to `connection`.
    pub fn new(
        key: ConnectionKey,
        connection: Connection,
        origin: Origin,
        socket: OwnedFd,
        poller: &Poller,
    ) -> io::Result<Self> {
        // The kernel counts its own overhead, doubles what it is asked for, and has a default between the two.
        match connection.socket_type() {
            // The longest message has to fit.
            SocketType::Seqpacket => set_socket_send_buffer_size(&socket, BUF_ALLOC as usize)?,
            SocketType::Stream if connection.host_alloc() < BUF_ALLOC => {
                set_socket_send_buffer_size(&socket, SMALL_BUF_ALLOC as usize)?;
            }
            SocketType::Stream => {}
        }
        if connection.socket_type() == SocketType::Seqpacket {
            peek_goes_on(&socket)?;
        }
        let registered = Interest::default();
        poller.add(&socket, Token::Connection(key), registered)?;
        Ok(Self {
            key,
            connection,
            origin,
            socket: Some(socket),
            registered,
            backlog: Backlog::default(),
            peeked: 0,
            readable: false,
            is_bulk: false,
            peer_done: false,
            hung_up: false,
            closed: Shutdown::default(),
            deadline: None,
            queued: false,
        })
    }

    /// Gives the endpoint another key.
    pub fn rename(&mut self, key: ConnectionKey, poller: &Poller) -> io::Result<()> {
        if let Some(socket) = &self.socket {
            poller.change(socket, Token::Connection(key), self.registered)?;
        }
        self.key = key;
        Ok(())
    }

    /// True once the endpoint can be forgotten.
    pub fn is_finished(&self) -> bool {
        self.connection.has_ended() && self.socket.is_none()
    }

    /// True if there is a packet for the guest, credit permitting.
    pub fn has_packet(&self) -> bool {
        self.connection.due(self.readable).is_some()
    }

    /// The host's socket has news.
    pub fn handle_event(&mut self, event: &Event, stats: &mut VsockStats) {
        self.readable |= event.readable;
        self.peer_done |= event.peer_done || event.hung_up;
        self.hung_up |= event.hung_up;
        if self.hung_up && (self.connection.is_requesting() || self.connection.is_withheld()) {
            // Whoever asked, or was asked, has gone away before there was an answer.
            stats.connections_refused += 1;
            self.end();
        } else if event.writable || event.hung_up {
            self.flush(stats);
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
        let sent =
            self.socket.as_ref().map(|socket| send(socket, line.as_bytes(), SendFlags::NOSIGNAL));
        // Nothing was written to this socket before, so it has room unless it is broken.
        if !matches!(sent, Some(Ok(len)) if len == line.len()) {
            self.fail(stats);
        }
    }

    /// Puts the next packet for the guest, if there is one, into the first of `chains`, of which each has room for a header and
    /// more; bytes of a stream go on in the others. Gives the number of bytes written to each in `lens`.
    pub fn send(
        &mut self,
        ram: &GuestRam,
        chains: &[Chain],
        lens: &mut Vec<u32>,
        patience: Duration,
        stats: &mut VsockStats,
    ) {
        while lens.is_empty() {
            let Some((op, chain)) = self.connection.due(self.readable).zip(chains.first()) else {
                return;
            };
            match (op, self.connection.socket_type()) {
                (Op::ReadWrite, SocketType::Stream) => self.send_bytes(ram, chains, lens, stats),
                (Op::ReadWrite, SocketType::Seqpacket) => {
                    self.send_message(ram, chain, lens, stats);
                }
                _ => {
                    if op == Op::Request && self.deadline.is_none() {
                        self.deadline = Some(Instant::now() + patience);
                    }
                    self.send_header(ram, chain, op, 0, false, lens);
                }
            }
        }
    }

    /// Writes the header of a packet whose payload, `len` bytes, is in `chain` already.
    pub(super) fn send_header(
        &mut self,
        ram: &GuestRam,
        chain: &Chain,
        op: Op,
        len: u32,
        ends_message: bool,
        lens: &mut Vec<u32>,
    ) {
        let header = self.connection.packet(op, len, ends_message);
        // The chain was checked for room and for being in RAM, and RAM does not go away.
        let _ = chain.write(ram, &header.to_bytes());
        lens.push(HEADER_LEN as u32 + len);
    }

    /// Draws the conclusions from what has changed: closes what is closed on the other side, gives up what is over.
    pub fn settle(&mut self, patience: Duration) {
        if self.connection.has_ended() {
            // The guest may have gone after its last byte; the host still gets it.
            if !self.has_backlog() {
                self.socket = None;
            }
            return;
        }
        if self.connection.is_over() {
            return;
        }
        let guest = self.connection.guest_shutdown();
        let sent_all = guest.send && !self.has_backlog();
        self.close(Shutdown { send: sent_all, receive: guest.receive });
        if guest == Shutdown::BOTH && sent_all {
            // The RST confirms the shutdown (virtio 1.2, section 5.10.6.5).
            return self.end();
        }
        let host = self.connection.host_shutdown();
        if (host.send || guest.receive) && (self.hung_up || sent_all) {
            self.connection.shut(Shutdown::BOTH);
        }
        if self.connection.host_shutdown() == Shutdown::BOTH && self.socket.is_some() {
            self.drop_socket();
            self.deadline = Some(Instant::now() + patience);
        }
    }

    /// Closes the directions of the host's socket that the guest has closed on its side.
    fn close(&mut self, guest: Shutdown) {
        let Some(socket) = &self.socket else { return };
        // The only failure is a socket that is not connected any more, which is closed enough.
        if guest.send && !self.closed.send {
            let _ = shutdown(socket, rustix::net::Shutdown::Write);
        }
        if guest.receive && !self.closed.receive {
            let _ = shutdown(socket, rustix::net::Shutdown::Read);
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
        self.drop_socket();
    }

    /// The guest has ended the connection. What it sent before it said that it was done still goes to the host.
    pub fn ended_by_guest(&mut self, stats: &mut VsockStats) {
        let orderly = self.connection.host_shutdown() == Shutdown::BOTH;
        if !self.connection.guest_shutdown().send {
            self.drop_socket();
        }
        if !orderly && self.connection.guest_shutdown() != Shutdown::BOTH {
            stats.connections_reset += 1;
        }
    }

    /// Closes the host's socket, with what is in flight to it.
    pub fn drop_socket(&mut self) {
        self.socket = None;
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
        let Some(socket) = &self.socket else { return Ok(()) };
        let known = self.readable && (park || !self.registered.readable);
        let wanted = Interest {
            readable: self.connection.payload_room() > 0 && !known,
            writable: self.has_backlog(),
        };
        if wanted != self.registered {
            poller.change(socket, Token::Connection(self.key), wanted)?;
            self.registered = wanted;
        }
        Ok(())
    }
}

/// True if the socket is in order and will say when to try again.
pub(super) fn is_transient(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}
