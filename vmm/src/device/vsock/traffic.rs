//! Packets between the guest and the connections, one chain at a time.

use super::connection::{Verdict, Violation};
use super::host::Host;
use super::packet::{ConnectionKey, END_OF_MESSAGE, HEADER_LEN, Header, Op, Parsed, SocketType};
use super::poll::PORT_ANY;
use crate::device::virtio::chain::Chain;
use crate::memory::GuestRam;

/// Most buffers that one connection uses before others have their turn: 64 KiB of Linux's.
pub const BURST: usize = 16;

/// Most refusals that wait for the guest to post buffers. Beyond that, its packets wait instead.
pub const MAX_REFUSALS: usize = 128;

impl Host {
    /// True if no packet from the guest can be taken before it has posted buffers for what it is owed.
    pub fn must_wait(&self) -> bool {
        self.refusals.len() >= MAX_REFUSALS
    }

    /// Takes the packet in `chain`, which holds at least a header.
    pub fn receive(&mut self, ram: &GuestRam, chain: &Chain) {
        let mut bytes = [0; HEADER_LEN];
        if chain.read(ram, &mut bytes).is_err() {
            self.stats.bad_chains += 1;
            return;
        }
        self.stats.packets_to_host += 1;
        let header = Header::from_bytes(&bytes);
        match header.parse(self.cid, self.seqpacket) {
            Parsed::Packet(key, socket_type, op) => {
                self.receive_packet(key, socket_type, op, &header, ram, chain);
            }
            Parsed::Refuse(reply) => {
                self.stats.bad_packets += 1;
                self.refusals.push_back(reply);
            }
            Parsed::Ignore => self.stats.bad_packets += 1,
        }
    }

    fn receive_packet(
        &mut self,
        key: ConnectionKey,
        socket_type: SocketType,
        op: Op,
        header: &Header,
        ram: &GuestRam,
        chain: &Chain,
    ) {
        if key.host.0 == PORT_ANY {
            return self.receive_unknown(key, socket_type, op, header);
        }
        if op == Op::Request {
            self.make_way(key);
        }
        match self.table.get_mut(key).map(|endpoint| endpoint.connection.socket_type()) {
            None => self.receive_unknown(key, socket_type, op, header),
            Some(its_type) if its_type == socket_type => {
                self.receive_known(key, op, header, ram, chain);
            }
            // A pair of ports has one connection, whatever its type, and this packet is not of it.
            Some(_) => {
                self.stats.bad_packets += 1;
                if op != Op::Reset {
                    self.refusals.push_back(header.reset_reply());
                }
            }
        }
    }

    /// The guest may use a pair of ports again as soon as it is done with it, though a slow reader still has bytes to come.
    fn make_way(&mut self, key: ConnectionKey) {
        let is_over =
            self.table.get_mut(key).is_some_and(|endpoint| endpoint.connection.has_ended());
        if is_over && let Some(mut endpoint) = self.table.take(key) {
            let parted = self.table.parted_key();
            // It fails for a bad descriptor alone; without events the endpoint would never end.
            if endpoint.rename(parted, &self.poller).is_ok() {
                self.table.insert(parted, endpoint);
            }
        }
    }

    fn receive_known(
        &mut self,
        key: ConnectionKey,
        op: Op,
        header: &Header,
        ram: &GuestRam,
        chain: &Chain,
    ) {
        let Some(endpoint) = self.table.get_mut(key) else { return };
        match endpoint.connection.receive(op, header) {
            Verdict::Nothing | Verdict::Shutdown => {}
            Verdict::Accepted => endpoint.accepted(&mut self.stats),
            Verdict::Payload if chain.len() - (HEADER_LEN as u64) < header.len.into() => {
                // Bytes of the stream are missing, so what follows would be in the wrong place.
                self.stats.bad_chains += 1;
                endpoint.fail(&mut self.stats);
            }
            Verdict::Payload => {
                self.stats.bytes_to_host += u64::from(header.len);
                let ends_message = header.flags & END_OF_MESSAGE != 0;
                endpoint.receive_payload(ram, chain, header.len, ends_message, &mut self.stats);
            }
            Verdict::Refused => {
                self.stats.connections_refused += 1;
                endpoint.drop_socket();
            }
            Verdict::Reset => endpoint.ended_by_guest(&mut self.stats),
            Verdict::Violation(Violation::Credit) => {
                self.stats.credit_violations += 1;
                endpoint.fail(&mut self.stats);
            }
            Verdict::Violation(Violation::Sequence) => {
                self.stats.bad_packets += 1;
                endpoint.fail(&mut self.stats);
            }
            Verdict::Stray => {
                self.stats.bad_packets += 1;
                self.refusals.push_back(header.reset_reply());
            }
        }
        self.follow_up(key);
    }

    /// A packet for a connection that does not exist.
    fn receive_unknown(
        &mut self,
        key: ConnectionKey,
        socket_type: SocketType,
        op: Op,
        header: &Header,
    ) {
        match op {
            Op::Request => {
                if key.host.0 == PORT_ANY || self.accept(key, socket_type, header).is_none() {
                    self.stats.connections_refused += 1;
                    self.refusals.push_back(header.reset_reply());
                } else {
                    self.follow_up(key);
                }
            }
            Op::Reset => {}
            // Not counted as bad: it may have crossed with an RST from here.
            _ => self.refusals.push_back(header.reset_reply()),
        }
    }

    /// True if [`Host::send`] may have something.
    pub fn has_packet(&self) -> bool {
        !self.refusals.is_empty() || self.table.has_ready()
    }

    /// How many buffers [`Host::send`] may use, at least one.
    pub fn buffers_wanted(&mut self) -> usize {
        let wants_many =
            self.refusals.is_empty() && self.table.first_ready().is_some_and(|next| next.is_bulk);
        if wants_many { BURST } else { 1 }
    }

    /// Puts the next packets for the guest, if there are any, into the first of `chains`, of which each has room for a header
    /// and more. Gives the number of bytes written to each in `lens`.
    pub fn send(&mut self, ram: &GuestRam, chains: &[Chain], lens: &mut Vec<u32>) {
        if let Some(len) = chains.first().and_then(|chain| self.send_refusal(ram, chain)) {
            lens.push(len);
        } else {
            self.send_next(ram, chains, lens);
        }
        self.stats.packets_to_guest += lens.len() as u64;
    }

    fn send_refusal(&mut self, ram: &GuestRam, chain: &Chain) -> Option<u32> {
        let header = self.refusals.pop_front()?;
        chain.write(ram, &header.to_bytes()).ok()?;
        Some(HEADER_LEN as u32)
    }

    fn send_next(&mut self, ram: &GuestRam, chains: &[Chain], lens: &mut Vec<u32>) {
        while lens.is_empty() {
            let Some((key, endpoint)) = self.table.dequeue() else { return };
            endpoint.send(ram, chains, lens, self.patience, &mut self.stats);
            self.follow_up(key);
        }
    }
}
