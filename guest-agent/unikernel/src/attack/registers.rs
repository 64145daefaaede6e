//! Attacks by registers (virtio 1.2, section 4.2.2): the wrong ones, at the wrong time, with the wrong values.

use super::{AVAILABLE, QUEUE_BYTES, QUEUE_SIZE, QUEUES, Random, USED, Victim, address};

const DEVICE_FEATURES: u32 = 0x010;
const DEVICE_FEATURES_SEL: u32 = 0x014;
const DRIVER_FEATURES: u32 = 0x020;
const DRIVER_FEATURES_SEL: u32 = 0x024;
const QUEUE_SEL: u32 = 0x030;
const QUEUE_SIZE_MAX: u32 = 0x034;
const QUEUE_SIZE_NOW: u32 = 0x038;
const QUEUE_READY: u32 = 0x044;
pub const QUEUE_NOTIFY: u32 = 0x050;
pub const STATUS: u32 = 0x070;
const QUEUE_DESC: u32 = 0x080;
const QUEUE_DRIVER: u32 = 0x090;
const QUEUE_DEVICE: u32 = 0x0a0;
/// End of what noise is written to: behind the configuration space of any device.
const END: u32 = 0x180;

const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;
/// The bit of the upper word without which there is no device.
const VERSION_1: u32 = 1;

/// Any value into any register.
pub fn noise(victim: &mut impl Victim, random: &mut Random) {
    for _ in 0..1 + random.below(64) {
        let offset = random.below(END / 4) * 4;
        if random.once_in(4) {
            victim.read(offset);
        } else {
            victim.write(offset, random.edge());
        }
    }
}

/// What a correct driver does, with rings in the arena, empty ones, and any of the features on offer.
pub fn start(victim: &mut impl Victim, random: &mut Random) {
    negotiate(victim, random, None);
    for queue in 0..QUEUES {
        set_up_queue(victim, queue, QUEUE_SIZE, None);
    }
    victim.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
}

/// The same with one or the other mistake, or with steps left out.
pub fn broken_start(victim: &mut impl Victim, random: &mut Random) {
    let features = random.once_in(4).then(|| (random.word() as u32, random.edge()));
    negotiate(victim, random, features);
    for queue in 0..QUEUES {
        let size = if random.once_in(3) { random.edge() } else { QUEUE_SIZE };
        let places = random.once_in(2).then(|| {
            let mut place = || address(victim, random);
            [place(), place(), place()]
        });
        set_up_queue(victim, queue, size, places);
    }
    if random.once_in(3) {
        // On top of each other, in use all the same.
        let place = Some([victim.arena(); 3]);
        set_up_queue(victim, random.below(QUEUES), QUEUE_SIZE, place);
    }
    let status = if random.once_in(4) { random.word() as u32 & 0xff } else { 15 };
    victim.write(STATUS, status);
    for queue in 0..QUEUES {
        victim.write(QUEUE_NOTIFY, queue);
    }
}

/// What is to stay as it is while a device runs: rings moved, sizes, features and readiness rewritten, steps taken back; and
/// queues notified that do not exist.
pub fn change_while_live(victim: &mut impl Victim, random: &mut Random) {
    for _ in 0..1 + random.below(16) {
        victim.write(QUEUE_SEL, random.one_of(&[0, 1, 2, 3, 64, u32::MAX]));
        match random.below(8) {
            0 => victim.write(QUEUE_READY, random.below(3)),
            1 => victim.write(QUEUE_SIZE_NOW, random.edge()),
            2 => {
                let register = random.one_of(&[QUEUE_DESC, QUEUE_DRIVER, QUEUE_DEVICE]);
                let place = address(victim, random);
                victim.write(register, place as u32);
                victim.write(register + 4, (place >> 32) as u32);
            }
            3 => {
                victim.write(DRIVER_FEATURES_SEL, random.below(4));
                victim.write(DRIVER_FEATURES, random.word() as u32);
            }
            4 => move_queue(victim, random),
            5 => victim.write(STATUS, random.one_of(&[1, 3, 7, 11, 0x40, 0x80, 0x8f, u32::MAX])),
            _ => victim.write(QUEUE_NOTIFY, random.edge()),
        }
    }
}

/// Takes the selected queue back and sets it up on some queue's rings, as if it were not in use.
fn move_queue(victim: &mut impl Victim, random: &mut Random) {
    victim.write(QUEUE_READY, 0);
    place_queue(victim, rings(victim, random.below(QUEUES)));
    victim.write(QUEUE_READY, 1);
}

/// From reset to FEATURES_OK. Without `features` the driver takes some of those on offer, as it should.
fn negotiate(victim: &mut impl Victim, random: &mut Random, features: Option<(u32, u32)>) {
    victim.write(STATUS, 0);
    victim.write(STATUS, ACKNOWLEDGE);
    victim.write(STATUS, ACKNOWLEDGE | DRIVER);
    let mut offered = |half| {
        victim.write(DEVICE_FEATURES_SEL, half);
        victim.read(DEVICE_FEATURES) & random.word() as u32
    };
    let (low, high) = features.unwrap_or((offered(0), offered(1) | VERSION_1));
    for (half, value) in [(0, low), (1, high)] {
        victim.write(DRIVER_FEATURES_SEL, half);
        victim.write(DRIVER_FEATURES, value);
    }
    victim.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
}

/// Sets a queue up, with empty rings at `places` (table, available, used) or in the arena. A size above the device's most is
/// taken down to that only for a queue in the arena.
fn set_up_queue(victim: &mut impl Victim, queue: u32, size: u32, places: Option<[u64; 3]>) {
    let base = queue * QUEUE_BYTES;
    victim.write(QUEUE_SEL, queue);
    let size = match places {
        Some(_) => size,
        None => size.min(victim.read(QUEUE_SIZE_MAX)),
    };
    victim.write(QUEUE_SIZE_NOW, size);
    for ring in [AVAILABLE, USED] {
        victim.put(base + ring, &[0; 4]);
    }
    place_queue(victim, places.unwrap_or(rings(victim, queue)));
    victim.write(QUEUE_READY, 1);
}

/// Where a queue's rings are in the arena: table, available, used.
fn rings(victim: &impl Victim, queue: u32) -> [u64; 3] {
    let start = victim.arena() + u64::from(queue * QUEUE_BYTES);
    [start, start + u64::from(AVAILABLE), start + u64::from(USED)]
}

/// Says where the selected queue's rings are.
fn place_queue(victim: &mut impl Victim, places: [u64; 3]) {
    for (register, place) in [QUEUE_DESC, QUEUE_DRIVER, QUEUE_DEVICE].into_iter().zip(places) {
        victim.write(register, place as u32);
        victim.write(register + 4, (place >> 32) as u32);
    }
}
