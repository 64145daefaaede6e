//! All connections to the agent's port: which packet belongs to which, and who sends next.

use alloc::collections::VecDeque;
use alloc::format;
use alloc::vec::Vec;

use agent_protocol::{AGENT_PORT, frame};

use super::connection::{Connection, NO_RECEIVE, NO_SEND, Outgoing};
use super::credit::BUF_ALLOC;
use super::packet::{HEADER_LEN, HOST_CID, Header, Operation, PacketError};
use super::session::Answer;

/// Connections at a time; more are refused.
pub const MAX_CONNECTIONS: usize = 64;
/// Refusals waiting to be sent; more are forgotten, as if lost on the way.
const MAX_REFUSALS: usize = 64;
/// Bytes that all connections together may hold. A connection that needs more is closed, so the heap suffices.
const MAX_HELD: usize = 4 << 20;

/// A packet to somebody who has no connection: RST from one of our ports.
struct Refusal {
    host_port: u32,
    guest_port: u32,
}

/// The listening end.
pub struct Listener {
    guest_cid: u64,
    connections: Vec<Connection>,
    refusals: VecDeque<Refusal>,
    turn: usize,
}

impl Listener {
    /// A listener without connections at this context id.
    pub fn new(guest_cid: u64) -> Self {
        Self { guest_cid, connections: Vec::new(), refusals: VecDeque::new(), turn: 0 }
    }

    /// The transport was reset (virtio 1.3, section 5.10.6.7): connections are gone, our context id may be another.
    pub fn transport_reset(&mut self, guest_cid: u64) {
        *self = Self::new(guest_cid);
    }

    /// Whether anybody is connected.
    pub fn has_connections(&self) -> bool {
        !self.connections.is_empty()
    }

    /// Handles one packet from the host.
    pub fn receive(&mut self, packet: &[u8], agent: &mut impl Answer) {
        let (header, payload) = match Header::parse(packet) {
            Ok(parts) => parts,
            Err(PacketError::Unsupported {
                source_cid: HOST_CID,
                source_port,
                destination_port,
            }) => {
                return self.refuse(source_port, destination_port);
            }
            Err(error) => return agent.warn(format!("vsock: bad packet: {error:?}")),
        };
        if header.source_cid != HOST_CID || header.destination_cid != self.guest_cid {
            return agent.warn(format!("vsock: packet from {} is not for us", header.source_cid));
        }
        let at = self.connections.iter().position(|connection| {
            connection.host_port == header.source_port && header.destination_port == AGENT_PORT
        });
        match at {
            Some(at) => self.receive_on(at, &header, payload, agent),
            None if header.operation == Operation::Rst => {}
            None if header.operation == Operation::Request => self.accept(&header, agent),
            None => self.refuse(header.source_port, header.destination_port),
        }
    }

    /// Answers one request of each connection that has no reply waiting. Returns whether there are new replies; when they
    /// are sent, pipelined requests may be next.
    pub fn serve(&mut self, agent: &mut impl Answer) -> bool {
        let mut answered = false;
        for at in (0..self.connections.len()).rev() {
            match self.connections[at].serve(agent) {
                Ok(new_reply) => answered |= new_reply,
                Err(error) => {
                    agent.warn(format!("vsock: {error}, connection closed"));
                    self.close(at);
                }
            }
        }
        answered
    }

    /// Writes the next packet for the host into `buffer`; returns its length.
    pub fn next_packet(&mut self, buffer: &mut [u8]) -> Option<usize> {
        let (header, payload) = buffer.split_first_chunk_mut::<HEADER_LEN>()?;
        if let Some(refusal) = self.refusals.pop_front() {
            let rst = Outgoing { operation: Operation::Rst, len: 0, flags: 0, fwd_cnt: 0 };
            self.header(rst, refusal.host_port, refusal.guest_port).write(header);
            return Some(HEADER_LEN);
        }
        let count = self.connections.len();
        for at in (0..count).map(|step| (self.turn + step) % count) {
            let connection = &mut self.connections[at];
            if let Some(outgoing) = connection.next(payload) {
                let host_port = connection.host_port;
                // A greeting follows its RESPONSE; after data it is the next connection's turn.
                self.turn = if outgoing.operation == Operation::Rw { at + 1 } else { at };
                self.header(outgoing, host_port, AGENT_PORT).write(header);
                return Some(HEADER_LEN + outgoing.len as usize);
            }
        }
        None
    }

    fn header(&self, outgoing: Outgoing, host_port: u32, guest_port: u32) -> Header {
        Header {
            source_cid: self.guest_cid,
            destination_cid: HOST_CID,
            source_port: guest_port,
            destination_port: host_port,
            len: outgoing.len,
            operation: outgoing.operation,
            flags: outgoing.flags,
            buf_alloc: BUF_ALLOC,
            fwd_cnt: outgoing.fwd_cnt,
        }
    }

    fn accept(&mut self, header: &Header, agent: &mut impl Answer) {
        if self.connections.len() == MAX_CONNECTIONS
            && let Some(at) = self.connections.iter().position(|connection| connection.closing)
        {
            self.close(at);
        }
        let greeting = frame::encode(&agent.hello());
        match greeting {
            Ok(greeting)
                if header.destination_port == AGENT_PORT
                    && header.len == 0
                    && self.connections.len() < MAX_CONNECTIONS =>
            {
                let Header { source_port, buf_alloc, fwd_cnt, .. } = *header;
                self.connections.push(Connection::new(source_port, buf_alloc, fwd_cnt, greeting));
            }
            _ => self.refuse(header.source_port, header.destination_port),
        }
    }

    fn receive_on(&mut self, at: usize, header: &Header, payload: &[u8], agent: &mut impl Answer) {
        let held: usize = self.connections.iter().map(Connection::held).sum();
        let connection = &mut self.connections[at];
        let in_order = connection.update_credit(header.buf_alloc, header.fwd_cnt).is_ok()
            && match header.operation {
                Operation::Rw if !connection.closing => {
                    held + payload.len() <= MAX_HELD && connection.receive(payload).is_ok()
                }
                Operation::CreditRequest if payload.is_empty() => {
                    connection.want_update();
                    true
                }
                Operation::CreditUpdate => payload.is_empty(),
                Operation::Shutdown if header.flags == NO_SEND => {
                    connection.finish();
                    true
                }
                _ => false,
            };
        match header.operation {
            // The other side's last word needs no answer.
            Operation::Rst => drop(self.connections.swap_remove(at)),
            Operation::Shutdown if header.flags & NO_RECEIVE != 0 => {
                // A request that came in just before has not been served yet.
                if let Err(error) = connection.serve_without_answers(agent) {
                    agent.warn(format!("vsock: {error}"));
                }
                self.close(at);
            }
            operation if !in_order => {
                agent.warn(format!("vsock: {operation:?} out of order, connection closed"));
                self.close(at);
            }
            _ => {}
        }
    }

    fn close(&mut self, at: usize) {
        let connection = self.connections.swap_remove(at);
        self.refuse(connection.host_port, AGENT_PORT);
    }

    fn refuse(&mut self, host_port: u32, guest_port: u32) {
        if self.refusals.len() < MAX_REFUSALS {
            self.refusals.push_back(Refusal { host_port, guest_port });
        }
    }
}

#[cfg(test)]
mod tests;
