//! All connections, whoever opened them: which packet belongs to which, and who sends next.

use alloc::collections::{BTreeMap, VecDeque};
use alloc::format;
use alloc::vec::Vec;

use agent_protocol::frame::FrameError;
use agent_protocol::{AGENT_PORT, ConnectError, Reply, frame};

use super::connection::{Connection, Outgoing, Ports, Verdict};
use super::memory::Claims;
use super::packet::{HEADER_LEN, HOST_CID, Header, Operation, PacketError};
use super::session::{Answer, Served};

/// Connections at a time; more are refused.
pub const MAX_CONNECTIONS: usize = 4096;
/// Refusals waiting to be sent; more are forgotten, as if lost on the way.
const MAX_REFUSALS: usize = 64;
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
    claims: Claims,
    /// Connections that wait for memory which others have.
    waiting: VecDeque<Ports>,
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
            claims: Claims::default(),
            waiting: VecDeque::new(),
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
        self.waiting.clear();
        (self.claims, self.earliest) = (Claims::default(), None);
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
        let Some(verdict) = self.change(ports, |_, it| it.receive(header, payload)) else { return };
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
                let served = self.change(ports, |_, it| it.serve_without_answers(agent));
                if let Some(Err(error)) = served {
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
                let share = self.claims.next_share(self.table.len());
                self.insert(ports, Connection::accept(greeting, header, share));
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
                let share = self.claims.next_share(self.table.len());
                self.insert(ports, Connection::request(greeting, asker, deadline, share));
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
        self.change(asker, |_, it| it.connected(&Reply::Connected(outcome)));
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
            let step = self.change(ports, |claims, connection| {
                let has_memory = connection.claim(claims);
                match connection.next(payload) {
                    Some(outgoing) => Step::Send(outgoing),
                    None if has_memory => {
                        Step::Served(connection.serve(claims, agent), connection.deadline)
                    }
                    None => Step::Served(Ok(Served::Waits), None),
                }
            });
            let (served, deadline) = match step {
                Some(Step::Send(outgoing)) => {
                    if outgoing.operation == Operation::Rw {
                        // Then it is the next one's turn.
                        self.ready.rotate_left(1);
                    }
                    self.header(ports, outgoing).write(header);
                    return Some(HEADER_LEN + outgoing.len as usize);
                }
                Some(Step::Served(served, deadline)) => (served, deadline),
                None => {
                    self.ready.pop_front();
                    continue;
                }
            };
            match served {
                Ok(Served::Nothing) => self.dequeue(),
                Ok(Served::Waits) => {
                    self.dequeue();
                    self.wait(ports);
                }
                Ok(Served::Connect { host_port, timeout_us }) => {
                    self.connect(ports, host_port, timeout_us, agent);
                }
                Ok(Served::Something | Served::Shutdown { .. }) => {
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
        self.claims.replace(Claims::default(), connection.claims());
        self.note_deadline(connection.deadline);
        self.table.insert(ports, connection);
        self.enqueue(ports);
    }

    fn remove(&mut self, ports: Ports) {
        if let Some(connection) = self.table.remove(&ports) {
            if self.claims.replace(connection.claims(), Claims::default()) {
                self.stop_waiting();
            }
            if connection.waits {
                self.waiting.retain(|waiting| *waiting != ports);
            }
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

    /// Takes the first of those that may have something to do from the queue.
    fn dequeue(&mut self) {
        let first = self.ready.pop_front();
        if let Some(connection) = first.and_then(|ports| self.table.get_mut(&ports)) {
            connection.queued = false;
        }
    }

    /// Does something with a connection, told what all claim, and notes what it claims then.
    fn change<T>(
        &mut self,
        ports: Ports,
        change: impl FnOnce(&Claims, &mut Connection) -> T,
    ) -> Option<T> {
        let connection = self.table.get_mut(&ports)?;
        let before = connection.claims();
        let outcome = change(&self.claims, connection);
        if self.claims.replace(before, connection.claims()) {
            self.stop_waiting();
        }
        Some(outcome)
    }

    fn wait(&mut self, ports: Ports) {
        if let Some(connection) = self.table.get_mut(&ports)
            && !connection.waits
        {
            connection.waits = true;
            self.waiting.push_back(ports);
        }
    }

    /// There is memory again. Whoever finds too little waits on, and there are never more who wait than connections.
    fn stop_waiting(&mut self) {
        for ports in core::mem::take(&mut self.waiting) {
            if let Some(connection) = self.table.get_mut(&ports) {
                connection.waits = false;
            }
            self.enqueue(ports);
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

/// What a connection does when it is its turn.
enum Step {
    Send(Outgoing),
    /// It has carried out what has come in, and has this deadline.
    Served(Result<Served, FrameError>, Option<u64>),
}

const RST: Outgoing =
    Outgoing { operation: Operation::Rst, len: 0, flags: 0, buf_alloc: 0, fwd_cnt: 0 };

#[cfg(test)]
mod tests;
