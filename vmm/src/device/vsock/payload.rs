//! Payload between a host's socket and guest memory: bytes of a stream, or messages.
//!
//! Payload goes straight from one to the other; only what the socket would not take is copied, and pieces of a message
//! that has not come whole. A Unix socket takes and gives messages whole, so one for the guest is read piece by piece with
//! `MSG_PEEK` and stays in the socket until the guest has had its end.
//!
//! A message of no bytes looks like the end of the stream to the readers of a Unix socket and of Linux's vsock alike, and Linux
//! does not send any: they end here.

use std::io;

use rustix::io::{Errno, ioctl_fionread, writev};
use rustix::net::{RecvFlags, recv};

use super::backlog::Backlog;
use super::credit::BUF_ALLOC;
use super::endpoint::{Endpoint, is_transient};
use super::packet::{HEADER_LEN, Op, Shutdown, SocketType};
use super::stats::VsockStats;
use crate::device::virtio::chain::Chain;
use crate::memory::{GuestRam, Pieces};

impl Endpoint {
    /// Passes `len` bytes of payload, which follow the header in `chain`, on to the host's socket. `ends_message` says that a
    /// message ends with them.
    pub fn receive_payload(
        &mut self,
        ram: &GuestRam,
        chain: &Chain,
        len: u32,
        ends_message: bool,
        stats: &mut VsockStats,
    ) {
        match self.connection.socket_type() {
            SocketType::Stream => self.receive_bytes(ram, chain, len as usize),
            SocketType::Seqpacket => {
                self.receive_message(ram, chain, len as usize, ends_message, stats);
            }
        }
    }

    fn receive_bytes(&mut self, ram: &GuestRam, chain: &Chain, len: usize) {
        let mut written = 0;
        while self.backlog.is_empty() && written < len {
            let Some(socket) = &self.socket else { return self.host_stops_reading() };
            let pieces = Pieces::new(chain.slices(ram, HEADER_LEN + written, len - written));
            match pieces.write_to(socket) {
                Ok(count) => {
                    written += count;
                    if count < pieces.len() || count == 0 {
                        break;
                    }
                }
                Err(error) if is_transient(&error) => break,
                Err(_) => return self.host_stops_reading(),
            }
        }
        self.connection.forwarded(written as u32);
        self.keep(ram, chain, HEADER_LEN + written, len - written);
    }

    fn receive_message(
        &mut self,
        ram: &GuestRam,
        chain: &Chain,
        len: usize,
        ends: bool,
        stats: &mut VsockStats,
    ) {
        if ends && len > 0 && self.backlog.is_empty() {
            let Some(socket) = &self.socket else { return self.host_stops_reading() };
            let pieces = Pieces::new(chain.slices(ram, HEADER_LEN, len));
            if pieces.len() == len {
                match pieces.write_to(socket) {
                    Ok(_) => return self.connection.forwarded(len as u32),
                    Err(error) if is_transient(&error) => {}
                    Err(error) => return self.cannot_write(&error, stats),
                }
            }
        }
        let waits = self.backlog.has_message();
        self.keep(ram, chain, HEADER_LEN, len);
        if ends {
            self.backlog.end_message();
        }
        // Otherwise the socket will say when it takes more.
        if !waits {
            self.flush(stats);
        }
    }

    /// Keeps the `len` bytes from `offset` on in `chain` for when the socket takes them.
    fn keep(&mut self, ram: &GuestRam, chain: &Chain, offset: usize, len: usize) {
        let most = self.connection.host_alloc() as usize;
        chain.slices(ram, offset, len).for_each(|slice| self.backlog.push(&slice, most));
    }

    /// True if something waits for the host's socket to take it.
    pub(super) fn has_backlog(&self) -> bool {
        match self.connection.socket_type() {
            SocketType::Stream => !self.backlog.is_empty(),
            SocketType::Seqpacket => self.backlog.has_message(),
        }
    }

    /// Writes as much of the backlog as the host's socket takes.
    pub(super) fn flush(&mut self, stats: &mut VsockStats) {
        let socket_type = self.connection.socket_type();
        while self.has_backlog() {
            let Some(socket) = &self.socket else { return };
            let written = match (socket_type, self.backlog.message()) {
                (SocketType::Seqpacket, Some(message)) => writev(socket, &message),
                _ => writev(socket, &self.backlog.bytes()),
            };
            match written.map_err(io::Error::from) {
                Ok(_) if socket_type == SocketType::Seqpacket => {
                    let len = self.backlog.consume_message();
                    self.connection.forwarded(len as u32);
                }
                Ok(count) => {
                    self.backlog.consume(count);
                    self.connection.forwarded(count as u32);
                }
                Err(error) if is_transient(&error) => return,
                Err(error) => return self.cannot_write(&error, stats),
            }
        }
    }

    fn cannot_write(&mut self, error: &io::Error, stats: &mut VsockStats) {
        // Half of a message is none, and what follows would look as if it had been there.
        if error.raw_os_error() == Some(Errno::MSGSIZE.raw_os_error()) {
            self.fail(stats);
        } else {
            self.host_stops_reading();
        }
    }

    /// What the guest has sent and still sends has no reader.
    fn host_stops_reading(&mut self) {
        self.backlog = Backlog::default();
        self.connection.discard();
        self.connection.shut(Shutdown::RECEIVE);
    }

    /// Reads from the host's socket into `chains`, after the room for headers, and makes packets of that. Without any bytes the
    /// socket is at its end, or is no longer taken to be readable.
    pub(super) fn send_bytes(
        &mut self,
        ram: &GuestRam,
        chains: &[Chain],
        lens: &mut Vec<u32>,
        stats: &mut VsockStats,
    ) {
        let mut left = match self.read_bytes(ram, chains) {
            Ok(len) => len,
            Err(error) => return self.cannot_read(&error, stats),
        };
        stats.bytes_to_guest += left as u64;
        for chain in chains {
            if left == 0 {
                return;
            }
            let len = left.min(room_in(chain));
            self.send_header(ram, chain, Op::ReadWrite, len as u32, false, lens);
            left -= len;
        }
    }

    fn read_bytes(&mut self, ram: &GuestRam, chains: &[Chain]) -> io::Result<usize> {
        let Some(socket) = &self.socket else { return Err(io::ErrorKind::WouldBlock.into()) };
        let mut room = self.connection.payload_room().min(BUF_ALLOC) as usize;
        let pieces = Pieces::new(chains.iter().flat_map(|chain| {
            let len = room_in(chain).min(room);
            room -= len;
            chain.slices(ram, HEADER_LEN, len)
        }));
        let len = pieces.read_from(socket)?;
        // Unless it fills all the room there is, the socket is empty now.
        self.readable = len == pieces.len();
        self.is_bulk = self.readable;
        if len == 0 {
            self.host_stops_sending();
        }
        Ok(len)
    }

    fn cannot_read(&mut self, error: &io::Error, stats: &mut VsockStats) {
        self.readable = false;
        self.is_bulk = false;
        if !is_transient(error) {
            self.fail(stats);
        }
    }

    /// Reads a message from the host's socket, or as much of it as there is room for, into `chain`, and makes a packet of that.
    pub(super) fn send_message(
        &mut self,
        ram: &GuestRam,
        chain: &Chain,
        lens: &mut Vec<u32>,
        stats: &mut VsockStats,
    ) {
        let room = room_in(chain).min(self.connection.payload_room() as usize);
        match self.read_message(ram, chain, room) {
            Ok((0, _)) => {}
            Ok((len, ends_message)) => {
                stats.bytes_to_guest += len as u64;
                self.send_header(ram, chain, Op::ReadWrite, len as u32, ends_message, lens);
            }
            Err(error) => self.cannot_read(&error, stats),
        }
    }

    fn read_message(
        &mut self,
        ram: &GuestRam,
        chain: &Chain,
        room: usize,
    ) -> io::Result<(usize, bool)> {
        let Some(socket) = &self.socket else { return Err(io::ErrorKind::WouldBlock.into()) };
        // As long as the message is, less what the guest has of it.
        let (_, rest) = recv(socket, &mut [0; 0], RecvFlags::PEEK | RecvFlags::TRUNC)?;
        if rest == 0 {
            self.read_nothing()?;
            return Ok((0, false));
        }
        if self.peeked == 0 && rest > self.connection.guest_alloc() as usize {
            // The guest would wait for its end for ever.
            return Err(Errno::MSGSIZE.into());
        }
        let pieces = Pieces::new(chain.slices(ram, HEADER_LEN, rest.min(room)));
        let ends = pieces.len() == rest;
        let len = if ends && self.peeked == 0 {
            pieces.read_from(socket)?
        } else {
            let len = pieces.peek_from(socket)?;
            if ends {
                recv(socket, &mut [0; 0], RecvFlags::empty())?;
            }
            len
        };
        self.peeked = if ends { 0 } else { self.peeked + len as u32 };
        self.readable = true;
        Ok((len, ends))
    }

    /// Passes over a message of no bytes, or finds that there will be none any more.
    fn read_nothing(&mut self) -> io::Result<()> {
        let Some(socket) = &self.socket else { return Ok(()) };
        if self.peer_done && ioctl_fionread(socket)? == 0 {
            self.readable = false;
            self.host_stops_sending();
        } else {
            recv(socket, &mut [0; 0], RecvFlags::empty())?;
            // If it was the end after all, the next event says so.
            self.readable = self.peer_done;
        }
        Ok(())
    }

    /// The host's socket is at its end of file.
    fn host_stops_sending(&mut self) {
        self.connection.shut(if self.hung_up { Shutdown::BOTH } else { Shutdown::SEND });
    }
}

/// Room for payload in a buffer of the guest, in bytes, as far as one packet uses it.
fn room_in(chain: &Chain) -> usize {
    chain.len().saturating_sub(HEADER_LEN as u64).min(BUF_ALLOC.into()) as usize
}
