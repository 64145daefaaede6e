//! All connections, whoever opened them: which packet belongs to which, and who sends next.

use alloc::collections::{BTreeMap, VecDeque};
use alloc::format;
use alloc::vec::Vec;

use agent_protocol::{AGENT_PORT, ConnectError, Reply, frame};

use super::connection::{Connection, Outgoing, Ports, Verdict};
use super::packet::{HEADER_LEN, HOST_CID, Header, Operation, PacketError};
use super::session::{Answer, Served};

/// Connections at a time; more are refused.
pub const MAX_CONNECTIONS: usize = 4096;
/// Refusals waiting to be sent; more are forgotten, as if lost on the way.
const MAX_REFUSALS: usize = 64;
/// Bytes that all connections together may hold. A connection that needs more is closed, so the heap suffices.
const MAX_HELD: usize = 3 << 20;
/// Connections that are over, of which packets may still be on their way; more are forgotten.
const MAX_CLOSED: usize = MAX_CONNECTIONS;
/// Ports of the guest for connections that the agent opens. Each life begins at others, so that an answer to the life before
/// is no answer to this one.
const FIRST_PORT: u32 = 1 << 30;
const PORTS_OF_A_LIFE: u32 = 1 << 12;

/// The agent's end of everything.
pub struct Connections {
    guest_cid: u64,
    table: BTreeMap<Ports, Connection>,
    /// Connections that may have something to send or to carry out, each once.
    ready: VecDeque<Ports>,
    /// RST for those who have no connection.
    refusals: VecDeque<Ports>,
    closed: VecDeque<Ports>,
    held: usize,
    next_port: u32,
    /// No deadline is earlier.
    earliest: Option<u64>,
}

impl Connections {
    /// None yet, at this context id, in this life.
    pub fn new(guest_cid: u64, life: u32) -> Self {
        let first = life.wrapping_mul(PORTS_OF_A_LIFE) % FIRST_PORT;
        Self {
            guest_cid,
            table: BTreeMap::new(),
            ready: VecDeque::new(),
            refusals: VecDeque::new(),
            closed: VecDeque::new(),
            held: 0,
            next_port: FIRST_PORT + first,
            earliest: None,
        }
    }

    /// The transport was reset (virtio 1.3, section 5.10.6.7): connections are gone, our context id may be another.
    pub fn transport_reset(&mut self, guest_cid: u64) {
        self.guest_cid = guest_cid;
        for ports in core::mem::take(&mut self.table).into_keys() {
            self.note_closed(ports);
        }
        self.ready.clear();
        self.refusals.clear();
        (self.held, self.earliest) = (0, None);
    }

    /// Whether there are any.
    pub fn exist(&self) -> bool {
        !self.table.is_empty()
    }

    /// Whether nothing is to be sent or carried out before the host or the clock goes on.
    pub fn are_quiet(&self) -> bool {
        self.ready.is_empty() && self.refusals.is_empty()
    }

    /// When [`Self::expire`] has something to do, in the agent's microseconds.
    pub fn next_deadline(&self) -> Option<u64> {
        self.earliest
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
                return self.refuse(Ports { guest: destination_port, host: source_port });
            }
            Err(error) => return agent.warn(format!("vsock: bad packet: {error:?}")),
        };
        if header.source_cid != HOST_CID || header.destination_cid != self.guest_cid {
            return agent.warn(format!("vsock: packet from {} is not for us", header.source_cid));
        }
        let ports = Ports { guest: header.destination_port, host: header.source_port };
        match self.table.get(&ports) {
            // The host has forgotten a connection that only waited for its confirmation.
            Some(old) if header.operation == Operation::Request && old.is_closing() => {
                self.remove(ports);
                self.accept(ports, &header, agent);
            }
            Some(_) => self.receive_on(ports, &header, payload, agent),
            None if header.operation == Operation::Request => self.accept(ports, &header, agent),
            None => {
                if !self.closed.contains(&ports) {
                    let Ports { guest, host } = ports;
                    agent.note_stale(
                        guest,
                        format!("{:?} from {host} to {guest}", header.operation),
                    );
                }
                // A last word needs no answer.
                if header.operation != Operation::Rst {
                    self.refuse(ports);
                }
            }
        }
    }

    fn receive_on(
        &mut self,
        ports: Ports,
        header: &Header,
        payload: &[u8],
        agent: &mut impl Answer,
    ) {
        let Some(connection) = self.table.get_mut(&ports) else { return };
        let before = connection.held();
        let verdict = match self.held + payload.len() <= MAX_HELD {
            true => connection.receive(header, payload),
            false => Verdict::Violation,
        };
        self.held = self.held - before + connection.held();
        match verdict {
            Verdict::Fine => self.enqueue(ports),
            Verdict::Accepted => {
                self.tell_asker(ports, Ok(ports.guest));
                self.enqueue(ports);
            }
            Verdict::Gone => {
                self.tell_asker(ports, Err(ConnectError::Refused));
                self.remove(ports);
                // The host may have another last word, for what it gets of us in the meantime.
                self.note_closed(ports);
            }
            Verdict::Closed => {
                // A request that came in just before has not been served yet.
                let before = connection.held();
                let served = connection.serve_without_answers(agent);
                self.held = self.held - before + connection.held();
                if let Err(error) = served {
                    agent.warn(format!("vsock: {error}"));
                }
                self.close(ports);
            }
            Verdict::Violation => {
                let operation = header.operation;
                agent.warn(format!("vsock: {operation:?} out of order, connection closed"));
                self.tell_asker(ports, Err(ConnectError::Refused));
                self.close(ports);
            }
        }
    }

    fn accept(&mut self, ports: Ports, header: &Header, agent: &mut impl Answer) {
        match frame::encode(&agent.hello()) {
            Ok(greeting) if ports.guest == AGENT_PORT && header.len == 0 && !self.is_full() => {
                self.insert(ports, Connection::accept(greeting, header));
            }
            _ => self.refuse(ports),
        }
    }

    /// Opens a connection to a port of the host, as was asked for on the one of `asker`.
    fn connect(&mut self, asker: Ports, host: u32, timeout_us: u64, agent: &mut impl Answer) {
        match frame::encode(&agent.hello()) {
            Ok(greeting) if !self.is_full() => {
                let ports = self.free_ports(host);
                let deadline = agent.now_us().saturating_add(timeout_us);
                self.insert(ports, Connection::request(greeting, asker, deadline));
            }
            _ => self.answer(asker, Err(ConnectError::TooMany)),
        }
    }

    /// Ports that no connection has. Ends after at most [`MAX_CONNECTIONS`] that are in use.
    fn free_ports(&mut self, host: u32) -> Ports {
        loop {
            let ports = Ports { guest: self.next_port, host };
            self.next_port = FIRST_PORT + (self.next_port + 1) % FIRST_PORT;
            if !self.table.contains_key(&ports) {
                return ports;
            }
        }
    }

    /// Makes room first, if only a connection without a future takes it.
    fn is_full(&mut self) -> bool {
        if self.table.len() >= MAX_CONNECTIONS
            && let Some((ports, _)) = self.table.iter().find(|(_, old)| old.is_closing())
        {
            self.close(*ports);
        }
        self.table.len() >= MAX_CONNECTIONS
    }

    /// Tells whoever asked for this connection what became of it, once.
    fn tell_asker(&mut self, ports: Ports, outcome: Result<u32, ConnectError>) {
        let asker = self.table.get_mut(&ports).and_then(|opened| opened.asker.take());
        if let Some(asker) = asker {
            self.answer(asker, outcome);
        }
    }

    fn answer(&mut self, asker: Ports, outcome: Result<u32, ConnectError>) {
        let Some(connection) = self.table.get_mut(&asker) else { return };
        let before = connection.held();
        connection.connected(&Reply::Connected(outcome));
        self.held = self.held - before + connection.held();
        self.enqueue(asker);
    }

    /// Gives up on what has taken the host too long.
    pub fn expire(&mut self, agent: &impl Answer) {
        let Some(earliest) = self.earliest else { return };
        let now = agent.now_us();
        if now < earliest {
            return;
        }
        let is_late = |connection: &Connection| connection.deadline.is_some_and(|at| at <= now);
        let late: Vec<_> =
            self.table.iter().filter(|(_, c)| is_late(c)).map(|(ports, _)| *ports).collect();
        for ports in late {
            self.tell_asker(ports, Err(ConnectError::TimedOut));
            self.close(ports);
        }
        self.earliest = self.table.values().filter_map(|connection| connection.deadline).min();
    }

    /// Carries out what has come in, and writes the next packet for the host into `buffer`; returns its length.
    pub fn next_packet(&mut self, buffer: &mut [u8], agent: &mut impl Answer) -> Option<usize> {
        let (header, payload) = buffer.split_first_chunk_mut::<HEADER_LEN>()?;
        loop {
            if let Some(ports) = self.refusals.pop_front() {
                self.header(ports, RST).write(header);
                return Some(HEADER_LEN);
            }
            let ports = *self.ready.front()?;
            let Some(connection) = self.table.get_mut(&ports) else {
                self.ready.pop_front();
                continue;
            };
            let before = connection.held();
            let outgoing = connection.next(payload);
            let served = match outgoing {
                Some(_) => Ok(Served::Something),
                None => connection.serve(agent),
            };
            self.held = self.held - before + connection.held();
            if let Some(outgoing) = outgoing {
                if outgoing.operation == Operation::Rw {
                    // Then it is the next one's turn.
                    self.ready.rotate_left(1);
                }
                self.header(ports, outgoing).write(header);
                return Some(HEADER_LEN + outgoing.len as usize);
            }
            let deadline = connection.deadline;
            match served {
                Ok(Served::Nothing) => {
                    connection.queued = false;
                    self.ready.pop_front();
                }
                Ok(Served::Connect { host_port, timeout_us }) => {
                    self.connect(ports, host_port, timeout_us, agent);
                }
                Ok(Served::Something | Served::Transfer(_) | Served::Shutdown { .. }) => {
                    self.note_deadline(deadline);
                }
                Err(error) => {
                    agent.warn(format!("vsock: {error}, connection closed"));
                    self.close(ports);
                }
            }
        }
    }

    fn header(&self, ports: Ports, outgoing: Outgoing) -> Header {
        let Outgoing { operation, len, flags, buf_alloc, fwd_cnt } = outgoing;
        Header {
            source_cid: self.guest_cid,
            destination_cid: HOST_CID,
            source_port: ports.guest,
            destination_port: ports.host,
            len,
            operation,
            flags,
            buf_alloc,
            fwd_cnt,
        }
    }

    fn insert(&mut self, ports: Ports, connection: Connection) {
        self.held += connection.held();
        self.note_deadline(connection.deadline);
        self.table.insert(ports, connection);
        self.enqueue(ports);
    }

    fn remove(&mut self, ports: Ports) {
        if let Some(connection) = self.table.remove(&ports) {
            self.held -= connection.held();
            if connection.queued {
                self.ready.retain(|queued| *queued != ports);
            }
        }
    }

    fn enqueue(&mut self, ports: Ports) {
        if let Some(connection) = self.table.get_mut(&ports)
            && !connection.queued
        {
            connection.queued = true;
            self.ready.push_back(ports);
        }
    }

    fn note_deadline(&mut self, deadline: Option<u64>) {
        self.earliest = self.earliest.into_iter().chain(deadline).min();
    }

    fn close(&mut self, ports: Ports) {
        self.remove(ports);
        self.note_closed(ports);
        self.refuse(ports);
    }

    fn note_closed(&mut self, ports: Ports) {
        if self.closed.len() == MAX_CLOSED {
            self.closed.pop_front();
        }
        self.closed.push_back(ports);
    }

    fn refuse(&mut self, ports: Ports) {
        if self.refusals.len() < MAX_REFUSALS {
            self.refusals.push_back(ports);
        }
    }
}

const RST: Outgoing =
    Outgoing { operation: Operation::Rst, len: 0, flags: 0, buf_alloc: 0, fwd_cnt: 0 };

#[cfg(test)]
mod tests;
