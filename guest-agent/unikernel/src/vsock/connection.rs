//! One connection from the host: its bytes in both directions and what it still has to send.

use alloc::vec::Vec;

use agent_protocol::frame::FrameError;

use super::credit::{Credit, CreditError};
use super::packet::Operation;
use super::session::{Answer, answer_frames};

/// Flags of a SHUTDOWN packet: the sender will not receive, will not send.
pub(super) const NO_RECEIVE: u32 = 1;
pub(super) const NO_SEND: u32 = 2;

/// A packet that a connection wants to send; the listener adds the addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Outgoing {
    pub operation: Operation,
    pub len: u32,
    pub flags: u32,
    pub fwd_cnt: u32,
}

/// A connection.
pub(super) struct Connection {
    /// The port at the host's end.
    pub host_port: u32,
    credit: Credit,
    inbox: Vec<u8>,
    outbox: Vec<u8>,
    sent: usize,
    accepted: bool,
    update_wanted: bool,
    credit_requested: bool,
    host_done: bool,
    /// Our SHUTDOWN has left; only the host's RST is awaited.
    pub closing: bool,
}

impl Connection {
    /// A connection that the host asks for; it starts with a RESPONSE and the greeting.
    pub fn new(host_port: u32, buf_alloc: u32, fwd_cnt: u32, greeting: Vec<u8>) -> Self {
        Self {
            host_port,
            credit: Credit::new(buf_alloc, fwd_cnt),
            inbox: Vec::new(),
            outbox: greeting,
            sent: 0,
            accepted: false,
            update_wanted: false,
            credit_requested: false,
            host_done: false,
            closing: false,
        }
    }

    /// Takes over the credit that any packet of the host carries.
    pub fn update_credit(&mut self, buf_alloc: u32, fwd_cnt: u32) -> Result<(), CreditError> {
        self.credit.update(buf_alloc, fwd_cnt)?;
        // A host without room will say so when it has some; asking on would never end.
        if self.credit.peer_free() > 0 {
            self.credit_requested = false;
        }
        Ok(())
    }

    /// Takes payload.
    pub fn receive(&mut self, payload: &[u8]) -> Result<(), CreditError> {
        // Packets have at most some KiB, so the length fits.
        self.credit.receive(payload.len() as u32)?;
        self.inbox.extend_from_slice(payload);
        Ok(())
    }

    /// The host asked for our credit.
    pub fn want_update(&mut self) {
        self.update_wanted = true;
    }

    /// The host will send no more.
    pub fn finish(&mut self) {
        self.host_done = true;
    }

    /// Bytes of memory that the connection's data take, reserved ones included.
    pub fn held(&self) -> usize {
        self.inbox.capacity() + self.outbox.capacity()
    }

    /// Answers what has come in, unless a reply is still waiting for credit: then the host has to wait as well.
    /// Returns whether there is a reply now that was not there before.
    pub fn serve(&mut self, agent: &mut impl Answer) -> Result<bool, FrameError> {
        if !self.outbox.is_empty() {
            return Ok(false);
        }
        self.outbox = answer_frames(&mut self.inbox, agent)?;
        if self.outbox.is_empty() {
            self.credit.forward_all();
        }
        Ok(!self.outbox.is_empty())
    }

    /// Carries out what has come in for a host that takes no more answers: they are dropped.
    pub fn serve_without_answers(&mut self, agent: &mut impl Answer) -> Result<(), FrameError> {
        loop {
            self.outbox = Vec::new();
            if !self.serve(agent)? {
                return Ok(());
            }
        }
    }

    /// The next packet to send, its payload already in `buffer`.
    pub fn next(&mut self, buffer: &mut [u8]) -> Option<Outgoing> {
        let unsent = &self.outbox[self.sent..];
        let len = unsent.len().min(buffer.len()).min(self.credit.peer_free() as usize);
        if !self.accepted {
            self.accepted = true;
            return Some(self.packet(Operation::Response, 0, 0));
        }
        if len > 0 {
            buffer[..len].copy_from_slice(&unsent[..len]);
            self.sent += len;
            self.credit.send(len as u32);
            if self.sent == self.outbox.len() {
                self.outbox = Vec::new();
                self.sent = 0;
            }
            return Some(self.packet(Operation::Rw, len as u32, 0));
        }
        if self.update_wanted || self.credit.should_announce() {
            return Some(self.packet(Operation::CreditUpdate, 0, 0));
        }
        if !unsent.is_empty() && !self.credit_requested {
            self.credit_requested = true;
            return Some(self.packet(Operation::CreditRequest, 0, 0));
        }
        // Whatever is left in the inbox can no longer become a frame.
        if self.host_done && unsent.is_empty() && !self.closing {
            self.closing = true;
            return Some(self.packet(Operation::Shutdown, 0, NO_RECEIVE | NO_SEND));
        }
        None
    }

    /// Every packet announces our credit.
    fn packet(&mut self, operation: Operation, len: u32, flags: u32) -> Outgoing {
        self.update_wanted = false;
        Outgoing { operation, len, flags, fwd_cnt: self.credit.announce() }
    }
}
