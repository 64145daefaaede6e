//! Attacks by vsock packets (virtio 1.2, section 5.10.6): every operation with wrong addresses, types and lengths, lies about
//! credit, floods.

use core::ops::Range;

use super::registers::QUEUE_NOTIFY;
use super::{
    BUFFER_BYTES, BUFFERS, Random, Victim, announce, descriptor_at, offer, put_descriptor,
};
use crate::vsock::{HEADER_LEN, HOST_CID};

const TO_GUEST: u32 = 0;
const TO_HOST: u32 = 1;
const WRITE: u16 = 2;
/// Room for a packet of the attack's.
const SLOT: u32 = 128;
const SLOTS: u32 = BUFFER_BYTES / SLOT / 2;

const REQUEST: u16 = 1;
const READ_WRITE: u16 = 5;
const STREAM: u16 = 1;

/// A port of the host where a test may listen, and others where nobody does.
const HOST_PORTS: [u32; 6] = [1234, 1234, 0, 5005, 1 << 30, u32::MAX];

/// A header as it is written, whatever it says.
#[derive(Clone, Copy, Default)]
struct Header {
    source_cid: u64,
    destination_cid: u64,
    source_port: u32,
    destination_port: u32,
    len: u32,
    socket_type: u16,
    operation: u16,
    flags: u32,
    buf_alloc: u32,
    fwd_cnt: u32,
}

impl Header {
    /// From a port of the guest's to the host, otherwise in order.
    fn new(guest_cid: u64, guest_port: u32, host_port: u32, operation: u16) -> Self {
        Self {
            source_cid: guest_cid,
            destination_cid: HOST_CID,
            source_port: guest_port,
            destination_port: host_port,
            socket_type: STREAM,
            operation,
            buf_alloc: 0x1_0000,
            ..Self::default()
        }
    }

    /// With anything wrong, or nothing.
    fn spoiled(mut self, random: &mut Random) -> Self {
        match random.below(8) {
            0 => self.source_cid = random.one_of(&[0, 1, 2, 4, 3 << 32, u64::MAX]),
            1 => self.destination_cid = random.one_of(&[0, 1, 3, 4, 2 << 32, u64::MAX]),
            2 => self.socket_type = random.one_of(&[0, 2, 3, 0xffff]),
            3 => self.operation = random.one_of(&[0, 8, 9, 0x100, 0xffff]),
            4 => self.len = random.one_of(&[1, SLOT, 0x1_0000, 0x7fff_ffff, u32::MAX]),
            5 => self.buf_alloc = random.edge(),
            6 => self.fwd_cnt = random.edge(),
            _ => {}
        }
        self
    }

    fn bytes(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[0..8].copy_from_slice(&self.source_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.destination_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.source_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.destination_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.socket_type.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.operation.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }
}

/// Bad packets among the agent's own, of connections that nobody has: those that there are must not notice.
#[derive(Debug)]
pub struct Noise {
    random: Random,
    guest_cid: u64,
    guest_ports: Range<u32>,
    /// How many follow each of the agent's packets.
    each: u32,
    left: u32,
}

impl Noise {
    /// So many bad packets after each good one, from these ports.
    pub fn new(random: Random, guest_cid: u64, guest_ports: Range<u32>, each: u32) -> Self {
        Self { random, guest_cid, guest_ports, each, left: 0 }
    }

    /// Writes the next packet into `buffer`, a bad one or one that `good` writes, and returns its length; `None` if there is none.
    pub fn among(
        &mut self,
        buffer: &mut [u8],
        good: impl FnOnce(&mut [u8]) -> Option<usize>,
    ) -> Option<usize> {
        if self.left == 0 {
            let len = good(buffer)?;
            self.left = self.each;
            return Some(len);
        }
        self.left -= 1;
        let random = &mut self.random;
        let guest_port = self.guest_ports.start + random.below(self.guest_ports.len() as u32);
        let header = Header {
            len: random.below(SLOT),
            flags: random.below(4),
            ..Header::new(
                self.guest_cid,
                guest_port,
                random.one_of(&HOST_PORTS),
                random.below(9) as u16,
            )
        };
        let header = header.spoiled(random);
        let payload = random.below(SLOT) as usize;
        let (start, rest) = buffer.split_first_chunk_mut::<HEADER_LEN>()?;
        *start = header.bytes();
        let payload = payload.min(rest.len());
        rest[..payload].fill(0xa5);
        Some(HEADER_LEN + payload)
    }
}

/// The queue to the host as one that sends packets, and what was sent so far.
struct Sender {
    guest_cid: u64,
    sent: u16,
}

impl Sender {
    /// With some buffers for answers, or none, so that the host has no way to be rid of them.
    fn new(victim: &mut impl Victim, random: &mut Random) -> Self {
        const CONFIG: u32 = 0x100;
        let guest_cid = victim.read(CONFIG).into();
        let buffers = random.one_of(&[0, 0, 1, 16]);
        for index in 0..buffers {
            let buffer = victim.arena() + u64::from(BUFFERS + BUFFER_BYTES / 2 + SLOT * index);
            let len = random.one_of(&[44, 45, SLOT]);
            put_descriptor(victim, descriptor_at(TO_GUEST, index), (buffer, len, WRITE, 0));
            offer(victim, TO_GUEST, index as u16, index as u16);
        }
        announce(victim, TO_GUEST, buffers as u16);
        victim.write(QUEUE_NOTIFY, TO_GUEST);
        Self { guest_cid, sent: 0 }
    }

    fn send(&mut self, victim: &mut impl Victim, header: &Header, payload: u32) {
        let slot = u32::from(self.sent) % SLOTS;
        let at = BUFFERS + SLOT * slot;
        victim.put(at, &header.bytes());
        let buffer = victim.arena() + u64::from(at);
        let descriptor = (buffer, HEADER_LEN as u32 + payload, 0, 0);
        put_descriptor(victim, descriptor_at(TO_HOST, slot), descriptor);
        offer(victim, TO_HOST, self.sent, slot as u16);
        self.sent = self.sent.wrapping_add(1);
        announce(victim, TO_HOST, self.sent);
    }

    fn kick(&self, victim: &mut impl Victim) {
        victim.write(QUEUE_NOTIFY, TO_HOST);
    }
}

/// Packets of a few connections in any order, right ones and wrong ones, with lies about credit. `then` is done whenever the
/// device may be at them.
pub fn conversation<V: Victim>(
    victim: &mut V,
    random: &mut Random,
    then: impl Fn(&mut V, &mut Random),
) {
    let mut sender = Sender::new(victim, random);
    for _ in 0..1 + random.below(200) {
        // Often a connection that there is: it takes a request first.
        let operation = random.one_of(&[REQUEST, READ_WRITE, READ_WRITE, 2, 3, 4, 5, 6, 7]);
        let guest_port = 700 + random.below(3);
        let header = Header {
            flags: random.below(4),
            ..Header::new(sender.guest_cid, guest_port, random.one_of(&HOST_PORTS), operation)
        };
        // As much as there is of it, more than that, or far more than was allowed.
        let payload = random.one_of(&[0, 1, 80, 0x1000]);
        let header = Header { len: if operation == READ_WRITE { payload } else { 0 }, ..header };
        let header = if random.once_in(3) { header.spoiled(random) } else { header };
        sender.send(victim, &header, payload);
        if random.once_in(3) {
            sender.kick(victim);
            then(victim, random);
        }
    }
    sender.kick(victim);
}

/// Very many of the same kind: requests from ports that count up, more payload than was ever allowed, or anything that the host
/// has to answer.
pub fn flood(victim: &mut impl Victim, random: &mut Random) {
    let mut sender = Sender::new(victim, random);
    let operation = random.one_of(&[REQUEST, REQUEST, READ_WRITE, 7, 2]);
    let host_port = random.one_of(&HOST_PORTS);
    if operation == READ_WRITE {
        sender.send(victim, &Header::new(sender.guest_cid, 1000, host_port, REQUEST), 0);
    }
    for number in 0..random.one_of(&[64, 300, 1000]) {
        let guest_port = if operation == READ_WRITE { 1000 } else { 1000 + number };
        let header = Header::new(sender.guest_cid, guest_port, host_port, operation);
        let payload = if operation == READ_WRITE { 0x1000 } else { 0 };
        sender.send(victim, &Header { len: payload, ..header }, payload);
        if number % 16 == 0 {
            sender.kick(victim);
        }
    }
    sender.kick(victim);
}
