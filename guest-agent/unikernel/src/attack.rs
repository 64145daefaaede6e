//! What a guest would do that is after its monitor, drawn from a seed: registers in any order, rings that move, chains that loop,
//! packets that lie. For tests of monitors (`--features attacks`); the ordinary agent has none of it.
//!
//! Pure: what an attack does to the machine goes through [`Victim`].

mod chains;
mod packets;
mod registers;

use core::ops::Range;

pub use packets::Noise;

/// What the command line orders.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Orders {
    /// `attack.seed=`: the same attacks for the same seed in the same life.
    pub seed: u64,
    /// `attack.rounds=`: how many on each device before each reset that the guest knows of.
    pub rounds: u32,
    /// `attack.packets=`: how many bad packets after each of the agent's own.
    pub packets: u32,
}

impl Orders {
    /// Takes a word of the command line, if it is one of these.
    pub fn add(&mut self, key: &str, value: &str) {
        match key {
            "attack.seed" => self.seed = value.parse().unwrap_or(0),
            "attack.rounds" => self.rounds = value.parse().unwrap_or(0),
            "attack.packets" => self.packets = value.parse().unwrap_or(0),
            _ => {}
        }
    }

    /// The bad packets, if there are to be any.
    pub fn noise(&self, life: u32, guest_cid: u64) -> Option<Noise> {
        (self.packets > 0).then(|| {
            Noise::new(Random::new(self.seed, life), guest_cid, noise_ports(life), self.packets)
        })
    }

    /// Whether the bad packets of this life ask the host for packets to this port of the guest. Other attacks have rings of their
    /// own, which the agent does not read, and end with their life: what comes of those is stale.
    pub fn ask_for_packets_to(&self, guest_port: u32, life: u32) -> bool {
        self.packets > 0 && noise_ports(life).contains(&guest_port)
    }
}

/// The ports from which bad packets come, below all that the agent and other attacks use: the next life's are others.
fn noise_ports(life: u32) -> Range<u32> {
    const FIRST: u32 = 100;
    const EACH: u32 = 4;
    const LIVES: u32 = 128;
    let first = FIRST + life % LIVES * EACH;
    first..first + EACH
}

/// Random numbers that are the same for the same seed (SplitMix64).
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// Numbers for this seed in this life of the machine.
    pub fn new(seed: u64, life: u32) -> Self {
        Self(seed ^ u64::from(life).wrapping_mul(0xd134_2543_de82_ef95))
    }

    /// Any number.
    pub fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    /// A number below `end`, which is not 0.
    pub fn below(&mut self, end: u32) -> u32 {
        (self.word() % u64::from(end)) as u32
    }

    /// True once in so many times.
    pub fn once_in(&mut self, times: u32) -> bool {
        self.below(times) == 0
    }

    /// One of `choices`, which are not none.
    pub fn one_of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u32) as usize]
    }

    /// A number that is at the edge of something, or any.
    fn edge(&mut self) -> u32 {
        const EDGES: [u32; 12] =
            [0, 1, 2, 3, 15, 16, 0x7fff, 0x8000, 0xffff, 0x7fff_ffff, 0x8000_0000, u32::MAX];
        if self.once_in(4) { self.word() as u32 } else { self.one_of(&EDGES) }
    }
}

/// A device under attack, and memory to attack it with.
pub trait Victim {
    /// Reads a register.
    fn read(&mut self, offset: u32) -> u32;

    /// Writes a register.
    fn write(&mut self, offset: u32, value: u32);

    /// Writes into the arena, `at` bytes from its start.
    fn put(&mut self, at: u32, bytes: &[u8]);

    /// Where the arena is: [`ARENA_LEN`] bytes that nobody else uses.
    fn arena(&self) -> u64;

    /// RAM that nobody uses, and where it ends, there is no more: devices may write there what they like.
    fn free_ram(&self) -> Range<u64>;
}

/// Bytes of the arena: rings of [`QUEUES`] queues, and buffers.
pub const ARENA_LEN: u32 = QUEUES * QUEUE_BYTES + BUFFER_BYTES;
/// More queues than any device has that is attacked.
const QUEUES: u32 = 4;
/// The most entries of a queue.
const QUEUE_SIZE: u32 = 256;
/// A table, an available and a used ring, a page each.
const QUEUE_BYTES: u32 = 0x3000;
const AVAILABLE: u32 = 0x1000;
const USED: u32 = 0x2000;
/// Where buffers begin, and how much room there is for them.
const BUFFERS: u32 = QUEUES * QUEUE_BYTES;
const BUFFER_BYTES: u32 = 0x4000;

/// Attacks one device `rounds` times, and leaves it as it is.
pub fn attack(victim: &mut impl Victim, random: &mut Random, rounds: u32) {
    for _ in 0..rounds {
        match random.below(12) {
            0 => registers::noise(victim, random),
            1 | 2 => registers::broken_start(victim, random),
            3 => change_in_flight(victim, random),
            4..7 => {
                registers::start(victim, random);
                chains::junk(victim, random);
            }
            7 => {
                registers::start(victim, random);
                chains::jump(victim, random);
            }
            8 => {
                registers::start(victim, random);
                chains::requests(victim, random, leave);
            }
            9 => {
                registers::start(victim, random);
                packets::flood(victim, random);
            }
            _ => {
                registers::start(victim, random);
                packets::conversation(victim, random, leave);
            }
        }
        // In the middle of whatever the device is doing.
        if random.once_in(8) {
            victim.write(registers::STATUS, 0);
        }
    }
}

/// Changes what is to stay as it is while a device runs, with chains in flight: buffers that stay with the device, requests that it
/// may be at, packets that want answers.
fn change_in_flight(victim: &mut impl Victim, random: &mut Random) {
    registers::start(victim, random);
    match random.below(3) {
        0 => {
            chains::buffers(victim);
            registers::change_while_live(victim, random);
        }
        1 => chains::requests(victim, random, registers::change_while_live),
        _ => packets::conversation(victim, random, registers::change_while_live),
    }
}

/// Nothing more, where something could be done with chains in flight.
fn leave<V: Victim>(_: &mut V, _: &mut Random) {}

/// Where a queue's entry of its table is, in the arena.
fn descriptor_at(queue: u32, index: u32) -> u32 {
    queue * QUEUE_BYTES + 16 * (index % QUEUE_SIZE)
}

/// Writes a descriptor (virtio 1.2, section 2.7.5).
fn put_descriptor(
    victim: &mut impl Victim,
    at: u32,
    (address, len, flags, next): (u64, u32, u16, u16),
) {
    let mut bytes = [0; 16];
    bytes[0..8].copy_from_slice(&address.to_le_bytes());
    bytes[8..12].copy_from_slice(&len.to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes());
    bytes[14..16].copy_from_slice(&next.to_le_bytes());
    victim.put(at, &bytes);
}

/// Makes a chain available as number `index` of its queue, which may or may not be the next.
fn offer(victim: &mut impl Victim, queue: u32, index: u16, head: u16) {
    let ring = queue * QUEUE_BYTES + AVAILABLE;
    victim.put(ring + 4 + 2 * (u32::from(index) % QUEUE_SIZE), &head.to_le_bytes());
}

/// Says that so many chains were made available (virtio 1.2, section 2.7.6).
fn announce(victim: &mut impl Victim, queue: u32, index: u16) {
    victim.put(queue * QUEUE_BYTES + AVAILABLE + 2, &index.to_le_bytes());
}

/// An address where something may happen: in the arena, in RAM that nobody uses, at the end of RAM, among devices, nowhere.
fn address(victim: &impl Victim, random: &mut Random) -> u64 {
    let free = victim.free_ram();
    let len = free.end - free.start;
    match random.below(10) {
        0..4 => victim.arena() + u64::from(random.below(ARENA_LEN)),
        4 | 5 => free.start + random.word() % len.max(1),
        // Across the end, if what is there is long enough.
        6 => free.end - u64::from(random.below(64)),
        7 => free.end + u64::from(random.below(1 << 20)),
        8 => random.one_of(&[0xd000_0000, 0xfee0_0000, 0xfec0_0000, 0xffff_ffff, 1 << 32, 1 << 47]),
        _ => u64::MAX - u64::from(random.below(4096)),
    }
}

#[cfg(test)]
mod tests;
