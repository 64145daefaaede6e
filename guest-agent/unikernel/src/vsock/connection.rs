//! The protocol of one connection (virtio 1.3, section 5.10.6): what the host may send in which state, and what is due to it.
//! Who asked for it matters until it is accepted, and no longer.

use alloc::vec::Vec;

use agent_protocol::Reply;
use agent_protocol::frame::FrameError;

use super::credit::Credit;
use super::memory::Claims;
use super::packet::{Header, Operation};
use super::session::{Answer, Served, Session};

/// Flags of a SHUTDOWN packet: the sender will not receive, will not send.
pub(super) const NO_RECEIVE: u32 = 1;
pub(super) const NO_SEND: u32 = 2;
pub(super) const BOTH: u32 = NO_RECEIVE | NO_SEND;

/// How long the host may take to confirm a shutdown.
pub(super) const SHUTDOWN_TIMEOUT_US: u64 = 5_000_000;

/// Bytes of a transfer that the host may send before it hears of credit again. They are looked at and are gone.
pub(super) const TRANSFER_ALLOC: u32 = 1024 * 1024;

/// The ports of a connection, by which packets find it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Ports {
    pub guest: u32,
    pub host: u32,
}

/// A packet that a connection wants to send; whoever has all connections adds the addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Outgoing {
    pub operation: Operation,
    pub len: u32,
    pub flags: u32,
    pub buf_alloc: u32,
    pub fwd_cnt: u32,
}

/// What a packet from the host means for the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It goes on.
    Fine,
    /// The host has accepted the agent's request.
    Accepted,
    /// The host has said its last word.
    Gone,
    /// The host has closed both directions and wants that confirmed.
    Closed,
    /// The packet has no place here.
    Violation,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The agent asks; the host has not answered.
    Requesting { sent: bool },
    /// The host has asked, and is to be answered.
    Accepting,
    /// Both know.
    Established,
}

/// A connection.
pub(super) struct Connection {
    phase: Phase,
    credit: Credit,
    session: Session,
    share: u32,
    /// Length of a request that may come in although it is longer than the share, or 0.
    long_request: u32,
    update_wanted: bool,
    credit_requested: bool,
    /// Directions that the host has closed, that the agent wants closed, and that it has told the host of.
    host_closed: u32,
    closing: u32,
    told: u32,
    /// When patience with the host ends.
    pub deadline: Option<u64>,
    /// Whose request it is that the agent opened it.
    pub asker: Option<Ports>,
    /// It stands in the queue of those that may have something to do.
    pub queued: bool,
    /// It stands in that of those that wait for memory.
    pub waits: bool,
}

impl Connection {
    /// A connection that the agent asks for, with so much room for what the host sends.
    pub fn request(greeting: Vec<u8>, asker: Ports, deadline: u64, share: u32) -> Self {
        Self {
            phase: Phase::Requesting { sent: false },
            credit: Credit::default(),
            session: Session::new(greeting),
            share,
            long_request: 0,
            update_wanted: false,
            credit_requested: false,
            host_closed: 0,
            closing: 0,
            told: 0,
            deadline: Some(deadline),
            asker: Some(asker),
            queued: false,
            waits: false,
        }
    }

    /// A connection that the host asks for with `request`, and gets.
    pub fn accept(greeting: Vec<u8>, request: &Header, share: u32) -> Self {
        let ports = Ports { guest: request.destination_port, host: request.source_port };
        let mut connection = Self::request(greeting, ports, 0, share);
        (connection.phase, connection.deadline, connection.asker) = (Phase::Accepting, None, None);
        // Nothing was sent yet. A host that says otherwise loses the connection with its next packet.
        let _ = connection.credit.update(request.buf_alloc, request.fwd_cnt);
        connection
    }

    /// Whether the host has not answered the agent's request.
    pub fn is_requesting(&self) -> bool {
        matches!(self.phase, Phase::Requesting { .. })
    }

    /// Whether only the host's confirmation of a shutdown is awaited.
    pub fn is_closing(&self) -> bool {
        self.told == BOTH
    }

    /// Memory that the connection's data may take.
    pub fn claims(&self) -> Claims {
        Claims {
            share: self.share as usize,
            long_request: self.long_request as usize,
            answer: self.session.answer(),
        }
    }

    /// Claims memory for a request that is longer than the share, beside what `all` have. False if it has to wait for that.
    pub fn claim(&mut self, all: &Claims) -> bool {
        let Some(len) = self.session.next_request().filter(|_| !self.session.is_busy()) else {
            return true;
        };
        let waiting = self.session.waiting();
        // Whoever announced a long request may send no more of it for long.
        let is_coming = waiting >= self.share as usize / 2 && waiting < len;
        let is_long = len > self.share as usize && self.long_request == 0;
        if is_long && is_coming && self.host_closed & NO_SEND == 0 {
            if !all.has_room_for(len) {
                return false;
            }
            // Frames have at most some KiB, so the length fits.
            self.long_request = len as u32;
        }
        true
    }

    /// Bytes that may come in beyond what was forwarded.
    fn room(&self) -> u32 {
        let passing = self.session.passing().min(TRANSFER_ALLOC.into());
        self.share + self.long_request + passing as u32
    }

    /// Takes a packet.
    pub fn receive(&mut self, header: &Header, payload: &[u8]) -> Verdict {
        use Operation::{CreditRequest, CreditUpdate, Request, Response, Rst, Rw, Shutdown};
        let operation = header.operation;
        if operation == Rst {
            return Verdict::Gone;
        }
        let requested = self.phase == Phase::Requesting { sent: true };
        if self.is_requesting() && !(requested && operation == Response) {
            return Verdict::Violation;
        }
        if self.credit.update(header.buf_alloc, header.fwd_cnt).is_err() {
            return Verdict::Violation;
        }
        // A host without room will say so when it has some; asking on would never end.
        if self.credit.peer_free() > 0 {
            self.credit_requested = false;
        }
        match operation {
            Rw => return self.receive_payload(payload),
            _ if !payload.is_empty() => return Verdict::Violation,
            Response if requested => {
                self.phase = Phase::Established;
                self.deadline = None;
                return Verdict::Accepted;
            }
            CreditRequest => self.update_wanted = true,
            CreditUpdate => {}
            Shutdown => return self.receive_shutdown(header.flags),
            Request | Response | Rst => return Verdict::Violation,
        }
        Verdict::Fine
    }

    fn receive_payload(&mut self, payload: &[u8]) -> Verdict {
        // Packets have at most some KiB, so the length fits.
        let len = payload.len() as u32;
        if self.host_closed & NO_SEND != 0 || self.credit.receive(len).is_err() {
            return Verdict::Violation;
        }
        // What was on its way when the agent stopped listening is dropped.
        let dropped = self.told & NO_RECEIVE != 0;
        if !dropped {
            self.session.receive(payload, (self.share + self.long_request) as usize);
        }
        self.forward();
        Verdict::Fine
    }

    /// Whatever does not wait in the session needs no room any more.
    fn forward(&mut self) {
        // No more than there was credit for.
        self.credit.keep(self.session.waiting() as u32);
    }

    fn receive_shutdown(&mut self, flags: u32) -> Verdict {
        let flags = flags & BOTH;
        self.host_closed |= flags;
        match (flags, self.host_closed) {
            (0, _) => return Verdict::Violation,
            (_, BOTH) => return Verdict::Closed,
            (_, NO_RECEIVE) => self.session.mute(),
            _ => self.session.end_input(),
        }
        Verdict::Fine
    }

    /// Carries out what has come in, beside what `all` claim. `Nothing` means that it is for the host to go on.
    ///
    /// # Errors
    /// If the host's bytes can never become a request.
    pub fn serve(&mut self, all: &Claims, agent: &mut impl Answer) -> Result<Served, FrameError> {
        if self.phase != Phase::Established {
            return Ok(Served::Nothing);
        }
        let before = self.session.waiting();
        let served = self.session.serve(all.has_room_for_answer(), agent)?;
        if self.session.waiting() < before {
            self.long_request = 0;
            self.forward();
        }
        match served {
            Served::Shutdown { send, receive } => {
                let flag = |wanted, flag| if wanted { flag } else { 0 };
                self.close(flag(send, NO_SEND) | flag(receive, NO_RECEIVE), agent);
            }
            // Whatever is left in the inbox can no longer become a request.
            Served::Nothing
                if self.host_closed & NO_SEND != 0
                    && self.closing != BOTH
                    && !self.session.is_busy() =>
            {
                self.close(BOTH, agent);
                return Ok(Served::Something);
            }
            Served::Nothing if self.has_news() => return Ok(Served::Something),
            Served::Nothing | Served::Waits | Served::Something | Served::Connect { .. } => {}
        }
        Ok(served)
    }

    fn close(&mut self, flags: u32, agent: &impl Answer) {
        self.closing |= flags;
        if self.closing == BOTH {
            self.deadline = Some(agent.now_us() + SHUTDOWN_TIMEOUT_US);
        }
    }

    /// Carries out the last requests of a host that has closed both directions.
    ///
    /// # Errors
    /// As for [`Self::serve`].
    pub fn serve_without_answers(&mut self, agent: &mut impl Answer) -> Result<(), FrameError> {
        self.session.serve_without_answers(agent)
    }

    /// The outcome of a connection that was asked for on this one.
    pub fn connected(&mut self, reply: &Reply) {
        // So short a reply always becomes a frame.
        let _ = self.session.connected(reply);
    }

    /// The next packet to send, its payload already in `buffer`.
    pub fn next(&mut self, buffer: &mut [u8]) -> Option<Outgoing> {
        match self.phase {
            Phase::Requesting { sent: true } => return None,
            Phase::Requesting { sent: false } => {
                self.phase = Phase::Requesting { sent: true };
                return Some(self.packet(Operation::Request, 0, 0));
            }
            Phase::Accepting => {
                self.phase = Phase::Established;
                return Some(self.packet(Operation::Response, 0, 0));
            }
            Phase::Established => {}
        }
        let has_output = self.session.has_output();
        let room = buffer.len().min(self.credit.peer_free() as usize);
        if has_output && room > 0 {
            let len = self.session.fill(&mut buffer[..room]) as u32;
            self.credit.send(len);
            return Some(self.packet(Operation::Rw, len, 0));
        }
        if self.update_wanted || self.has_news() {
            return Some(self.packet(Operation::CreditUpdate, 0, 0));
        }
        if has_output && !self.credit_requested {
            self.credit_requested = true;
            self.session.stall();
            return Some(self.packet(Operation::CreditRequest, 0, 0));
        }
        if !has_output && self.closing != self.told {
            self.told = self.closing;
            if self.told & NO_SEND != 0 {
                self.session.mute();
            }
            return Some(self.packet(Operation::Shutdown, 0, self.told));
        }
        None
    }

    /// Whether the host should hear of its credit.
    fn has_news(&self) -> bool {
        self.host_closed & NO_SEND == 0 && self.credit.should_announce(self.room())
    }

    /// Every packet announces our credit.
    fn packet(&mut self, operation: Operation, len: u32, flags: u32) -> Outgoing {
        self.update_wanted = false;
        let (buf_alloc, fwd_cnt) = self.credit.announce(self.room());
        Outgoing { operation, len, flags, buf_alloc, fwd_cnt }
    }

    /// As if so many bytes had gone both ways already.
    #[cfg(test)]
    pub fn start_counters_at(&mut self, start: u32, buf_alloc: u32) {
        self.credit = Credit::starting_at(start);
        self.credit.announce(self.share);
        self.credit.update(buf_alloc, start).unwrap();
    }
}
