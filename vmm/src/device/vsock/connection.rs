//! The protocol of one connection (virtio 1.2, section 5.10.6): what the guest may send in which state, and
//! what is due to it.
//!
//! Pure: knows no descriptor, socket or queue. What the host's socket has to do comes back as a [`Verdict`].

use super::credit::Credit;
use super::packet::{ConnectionKey, END_OF_MESSAGE, GuestCid, Header, Op, Shutdown, SocketType};

/// Where a connection is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The host asks, the guest has not answered.
    Requesting { delivered: bool },
    /// The guest asked and the host has accepted, but has not said so; or has not accepted, and will not.
    Accepting { withheld: bool },
    /// Both know.
    Established,
    /// Over; an RST is due.
    Ending,
    /// Over, and both know.
    Ended,
}

/// What a packet from the guest means for the host's side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing to do.
    Nothing,
    /// The guest accepted the host's request.
    Accepted,
    /// The packet's payload goes to the host's socket.
    Payload,
    /// The guest closed one direction or both, see [`Connection::guest_shutdown`].
    Shutdown,
    /// The guest refused the host's request.
    Refused,
    /// The guest ended the connection.
    Reset,
    /// The packet has no place here: reset the connection.
    Violation(Violation),
    /// The packet is for a connection that is over: answer it as if there had never been one.
    Stray,
}

/// How a guest can break the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Violation {
    /// Against the rules of flow control.
    Credit,
    /// Any other.
    Sequence,
}

/// State of one connection.
#[derive(Debug)]
pub struct Connection {
    guest: GuestCid,
    key: ConnectionKey,
    socket_type: SocketType,
    phase: Phase,
    credit: Credit,
    guest_shutdown: Shutdown,
    host_shutdown: Shutdown,
    told_shutdown: Shutdown,
    /// The guest asked for a credit update.
    update_asked: bool,
    /// The host asked for one, and has had no credit since.
    asked_credit: bool,
}

impl Connection {
    /// A connection that the host asks for, with `buf_alloc` bytes of buffer for what comes from the guest.
    pub fn request(
        guest: GuestCid,
        key: ConnectionKey,
        socket_type: SocketType,
        buf_alloc: u32,
    ) -> Self {
        Self {
            guest,
            key,
            socket_type,
            phase: Phase::Requesting { delivered: false },
            credit: Credit::new(buf_alloc),
            guest_shutdown: Shutdown::default(),
            host_shutdown: Shutdown::default(),
            told_shutdown: Shutdown::default(),
            update_asked: false,
            asked_credit: false,
        }
    }

    /// A connection that the guest asked for with the packet `request`, and gets.
    pub fn accept(
        guest: GuestCid,
        key: ConnectionKey,
        socket_type: SocketType,
        buf_alloc: u32,
        request: &Header,
    ) -> Self {
        let connection = Self::request(guest, key, socket_type, buf_alloc);
        let mut connection = Self { phase: Phase::Accepting { withheld: false }, ..connection };
        // Nothing was sent yet, so the only count that is not a lie is 0; a guest that says otherwise loses the
        // connection with its first packet, as any other liar.
        let _ = connection.credit.guest_says(request.buf_alloc, request.fwd_cnt);
        connection
    }

    /// Leaves the guest, which has asked, without an answer.
    pub fn withhold(&mut self) {
        self.phase = Phase::Accepting { withheld: true };
    }

    /// True if the guest gets no answer.
    pub fn is_withheld(&self) -> bool {
        self.phase == Phase::Accepting { withheld: true }
    }

    /// Takes a packet of this connection from the guest.
    pub fn receive(&mut self, op: Op, header: &Header) -> Verdict {
        match self.phase {
            Phase::Requesting { delivered: true } => match op {
                Op::Response => self.established(header),
                Op::Reset => self.ended(Verdict::Refused),
                _ => Verdict::Violation(Violation::Sequence),
            },
            Phase::Requesting { delivered: false } => Verdict::Violation(Violation::Sequence),
            Phase::Accepting { .. } | Phase::Established => self.receive_established(op, header),
            Phase::Ending if op == Op::Reset => self.ended(Verdict::Reset),
            Phase::Ending => Verdict::Nothing,
            Phase::Ended if op == Op::Reset => Verdict::Nothing,
            Phase::Ended => Verdict::Stray,
        }
    }

    fn established(&mut self, header: &Header) -> Verdict {
        if self.credit.guest_says(header.buf_alloc, header.fwd_cnt).is_err() {
            return Verdict::Violation(Violation::Credit);
        }
        self.phase = Phase::Established;
        Verdict::Accepted
    }

    fn ended(&mut self, verdict: Verdict) -> Verdict {
        self.phase = Phase::Ended;
        verdict
    }

    fn receive_established(&mut self, op: Op, header: &Header) -> Verdict {
        if op == Op::Reset {
            return self.ended(Verdict::Reset);
        }
        if self.credit.guest_says(header.buf_alloc, header.fwd_cnt).is_err() {
            return Verdict::Violation(Violation::Credit);
        }
        if self.credit.guest_room() > 0 {
            self.asked_credit = false;
        }
        match op {
            Op::Request | Op::Response => Verdict::Violation(Violation::Sequence),
            Op::ReadWrite => self.receive_payload(header.len),
            Op::Shutdown => {
                self.guest_shutdown = self.guest_shutdown.union(Shutdown::parse(header.flags));
                Verdict::Shutdown
            }
            Op::CreditRequest => {
                self.update_asked = true;
                Verdict::Nothing
            }
            Op::CreditUpdate | Op::Reset => Verdict::Nothing,
        }
    }

    fn receive_payload(&mut self, len: u32) -> Verdict {
        if self.guest_shutdown.send {
            return Verdict::Violation(Violation::Sequence);
        }
        if self.credit.received(len).is_err() {
            return Verdict::Violation(Violation::Credit);
        }
        if self.host_shutdown.receive {
            // On its way when the host stopped to listen: nobody will read it.
            self.credit.forwarded(len);
            return Verdict::Nothing;
        }
        Verdict::Payload
    }

    /// What it carries.
    pub fn socket_type(&self) -> SocketType {
        self.socket_type
    }

    /// Size of the host's buffer in bytes: the guest can have sent no more than that.
    pub fn host_alloc(&self) -> u32 {
        self.credit.host_alloc()
    }

    /// Size of the guest's buffer in bytes: a longer message would never be complete there.
    pub fn guest_alloc(&self) -> u32 {
        self.credit.guest_alloc()
    }

    /// Counts `len` bytes of payload as passed on to the host's socket.
    pub fn forwarded(&mut self, len: u32) {
        self.credit.forwarded(len);
    }

    /// Counts all payload that was not passed on as dropped.
    pub fn discard(&mut self) {
        self.credit.forwarded(self.credit.buffered());
    }

    /// Bytes of payload that the guest takes now: 0 unless the direction is open and there is credit.
    pub fn payload_room(&self) -> u32 {
        if self.wants_payload() { self.credit.guest_room() } else { 0 }
    }

    /// True if the direction to the guest is open, with or without credit.
    fn wants_payload(&self) -> bool {
        matches!(self.phase, Phase::Accepting { .. } | Phase::Established)
            && !self.guest_shutdown.receive
            && !self.host_shutdown.send
    }

    /// The directions that the guest has closed.
    pub fn guest_shutdown(&self) -> Shutdown {
        self.guest_shutdown
    }

    /// The directions that the host has closed.
    pub fn host_shutdown(&self) -> Shutdown {
        self.host_shutdown
    }

    /// True until the guest has answered the host's request.
    pub fn is_requesting(&self) -> bool {
        matches!(self.phase, Phase::Requesting { .. })
    }

    /// True once the connection is over, whether or not the guest knows.
    pub fn is_over(&self) -> bool {
        matches!(self.phase, Phase::Ending | Phase::Ended)
    }

    /// True once there is nothing more to say about this connection.
    pub fn has_ended(&self) -> bool {
        self.phase == Phase::Ended
    }

    /// The host closes directions. The guest is told with the next packet.
    pub fn shut(&mut self, directions: Shutdown) {
        self.host_shutdown = self.host_shutdown.union(directions);
    }

    /// The host ends the connection: an RST is due, unless the guest never heard of it.
    pub fn end(&mut self) {
        self.phase = match self.phase {
            Phase::Requesting { delivered: false } | Phase::Ended => Phase::Ended,
            _ => Phase::Ending,
        };
    }

    /// The operation of the packet to send next, if any is due. `payload_ready` says that the host's socket has bytes
    /// to read; [`Op::ReadWrite`] is due only then.
    pub fn due(&self, payload_ready: bool) -> Option<Op> {
        match self.phase {
            Phase::Requesting { delivered } => return (!delivered).then_some(Op::Request),
            Phase::Accepting { withheld } => return (!withheld).then_some(Op::Response),
            Phase::Ending => return Some(Op::Reset),
            Phase::Ended => return None,
            Phase::Established => {}
        }
        if self.told_shutdown != self.host_shutdown {
            return Some(Op::Shutdown);
        }
        let payload_ready = payload_ready && self.wants_payload();
        // Payload carries the credit update along.
        if payload_ready && self.credit.guest_room() > 0 {
            Some(Op::ReadWrite)
        } else if self.update_asked || self.update_helps() {
            Some(Op::CreditUpdate)
        } else if payload_ready && !self.asked_credit {
            Some(Op::CreditRequest)
        } else {
            None
        }
    }

    /// An update is news only to a guest that may still send.
    fn update_helps(&self) -> bool {
        !self.guest_shutdown.send && !self.host_shutdown.receive && self.credit.update_due()
    }

    /// Builds the packet that [`Connection::due`] named, and counts it as sent. `len` is the length of the payload in
    /// bytes, at most [`Connection::payload_room`]; `ends_message` says that a message ends with it.
    pub fn packet(&mut self, op: Op, len: u32, ends_message: bool) -> Header {
        match op {
            Op::Request => self.phase = Phase::Requesting { delivered: true },
            Op::Response => self.phase = Phase::Established,
            Op::Reset => self.phase = Phase::Ended,
            Op::Shutdown => self.told_shutdown = self.host_shutdown,
            Op::ReadWrite => self.credit.sent(len),
            Op::CreditRequest => self.asked_credit = true,
            Op::CreditUpdate => {}
        }
        self.update_asked = false;
        Header {
            len,
            flags: match op {
                Op::Shutdown => self.host_shutdown.flags(),
                Op::ReadWrite if ends_message => END_OF_MESSAGE,
                _ => 0,
            },
            buf_alloc: self.credit.host_alloc(),
            fwd_cnt: self.credit.tell(),
            ..Header::to_guest(self.guest, self.key, self.socket_type, op)
        }
    }
}

#[cfg(test)]
mod tests;
