//! A driver of the vsock device in a tiny guest: packets out and in, written down beforehand.

use super::guest::Guest;

/// Registers of the device.
const DEVICE: u32 = 0xd000_0000;
/// Descriptors of each queue.
const SIZE: u32 = 256;
/// Where the queues are: a table, a ring to the device, a ring back.
const QUEUES: u32 = 0x60_0000;
/// Where packets to the host are, and buffers for those to the guest.
const TO_HOST: u32 = 0x62_0000;
const TO_GUEST: u32 = 0x64_0000;
/// Apart by.
const STRIDE: u32 = 0x100;
const HEADER: u32 = 44;

/// Type of a socket (virtio 1.2, section 5.10.6).
pub const STREAM: u32 = 1;
pub const SEQPACKET: u32 = 2;

/// Operations of packets.
pub mod op {
    pub const REQUEST: u32 = 1;
    pub const RESPONSE: u32 = 2;
    pub const RESET: u32 = 3;
    pub const SHUTDOWN: u32 = 4;
    pub const READ_WRITE: u32 = 5;
}

/// A packet to the host.
#[derive(Clone, Copy)]
pub struct Packet<'a> {
    pub kind: u32,
    pub guest_port: u32,
    pub host_port: u32,
    pub op: u32,
    pub flags: u32,
    pub payload: &'a [u8],
}

struct Queue {
    table: u32,
    available: u32,
    used: u32,
}

fn queue(index: u32) -> Queue {
    let table = QUEUES + index * 0x3000;
    Queue { table, available: table + 0x1000, used: table + 0x2000 }
}

/// The driver, as instructions.
pub struct VsockGuest {
    guest: Guest,
    sent: u32,
    posted: u32,
}

impl VsockGuest {
    /// Starts the device with messages among its features. Nothing is posted.
    pub fn start() -> Self {
        let mut guest = Guest::new();
        // Status, features (version 1 and SEQPACKET), status.
        for (register, value) in
            [(0x70, 1), (0x70, 3), (0x24, 1), (0x20, 1), (0x24, 0), (0x20, 2), (0x70, 11)]
        {
            guest = guest.store(DEVICE + register, value);
        }
        for index in 0..3 {
            let Queue { table, available, used } = queue(index);
            for (register, value) in [
                (0x30, index),
                (0x38, SIZE),
                (0x80, table),
                (0x90, available),
                (0xa0, used),
                (0x44, 1),
            ] {
                guest = guest.store(DEVICE + register, value);
            }
        }
        Self { guest: guest.store(DEVICE + 0x70, 15), sent: 0, posted: 0 }
    }

    /// Any other instructions.
    pub fn then(self, with: impl FnOnce(Guest) -> Guest) -> Self {
        Self { guest: with(self.guest), ..self }
    }

    /// Puts descriptor `id` of queue `index` at place `place` of its ring.
    fn make_available(self, index: u32, id: u32, place: u32) -> Self {
        let available = queue(index).available;
        self.then(|guest| {
            guest
                .store16(available + 4 + 2 * (place % SIZE), id as u16)
                .store16(available + 2, (place + 1) as u16)
                .store(DEVICE + 0x50, index)
        })
    }

    /// Posts a buffer that has room for `len` bytes of payload.
    pub fn post(mut self, len: u32) -> Self {
        let id = self.posted;
        let descriptor = queue(0).table + 16 * id;
        self.guest = self
            .guest
            .store(descriptor, TO_GUEST + STRIDE * id)
            .store(descriptor + 8, HEADER + len)
            .store(descriptor + 12, 2);
        self.posted += 1;
        self.make_available(0, id, id)
    }

    /// Sends a packet; after `SIZE` packets the host must have taken the oldest.
    pub fn send(mut self, packet: Packet<'_>) -> Self {
        let id = self.sent % SIZE;
        let (at, descriptor) = (TO_HOST + STRIDE * id, queue(1).table + 16 * id);
        let Packet { kind, guest_port, host_port, op, flags, payload } = packet;
        let len = payload.len() as u32;
        let header = [3, 0, 2, 0, guest_port, host_port, len, kind | op << 16, flags, 0x1_0000, 0];
        for (place, word) in (0..).zip(header) {
            self.guest = self.guest.store(at + 4 * place, word);
        }
        for (place, bytes) in (0..).zip(payload.chunks(4)) {
            let mut word = [0; 4];
            word[..bytes.len()].copy_from_slice(bytes);
            self.guest = self.guest.store(at + HEADER + 4 * place, u32::from_le_bytes(word));
        }
        self.guest = self.guest.store(descriptor, at).store(descriptor + 8, HEADER + len);
        let place = self.sent;
        self.sent += 1;
        self.make_available(1, id, place)
    }

    /// Waits until the host has taken all packets.
    pub fn wait_taken(self) -> Self {
        let (used, sent) = (queue(1).used, self.sent);
        self.then(|guest| guest.wait_until16(used + 2, sent as u16))
    }

    /// Waits until buffer `number` holds a packet of this kind and operation.
    pub fn expect(self, number: u32, kind: u32, op: u32) -> Self {
        self.then(|guest| guest.wait_until(TO_GUEST + STRIDE * number + 28, kind | op << 16))
    }

    /// Waits until `number` buffers were used.
    pub fn wait_received(self, number: u16) -> Self {
        self.then(|guest| guest.wait_until16(queue(0).used + 2, number))
    }

    /// Waits until the word at `offset` of buffer `number` has this value: 32 are the flags, 44 the payload.
    pub fn expect_word(self, number: u32, offset: u32, value: u32) -> Self {
        self.then(|guest| guest.wait_until(TO_GUEST + STRIDE * number + offset, value))
    }

    /// The guest.
    pub fn guest(self) -> Guest {
        self.guest
    }
}
