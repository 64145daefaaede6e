//! Attacks by rings and descriptor chains (virtio 1.2, section 2.7).

use super::registers::{QUEUE_NOTIFY, STATUS};
use super::{
    AVAILABLE, BUFFERS, QUEUE_BYTES, QUEUE_SIZE, QUEUES, Random, USED, Victim, address, announce,
    descriptor_at, offer, put_descriptor,
};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// How many descriptors get junk at a time.
const JUNK: u32 = 16;

/// Lengths around those that mean something: nothing, headers, sectors, pages, everything.
const LENGTHS: [u32; 14] =
    [0, 1, 15, 16, 17, 43, 44, 45, 512, 4096, 4140, 0x1_0000, 0x7fff_ffff, u32::MAX];

/// Tables full of junk: loops, links out of the table, wild addresses, tables within tables, lengths of zero and 4 GiB.
pub fn junk(victim: &mut impl Victim, random: &mut Random) {
    for _ in 0..1 + random.below(4) {
        let queue = random.below(QUEUES);
        for index in 0..JUNK {
            let next =
                if random.once_in(8) { random.word() as u16 } else { random.below(JUNK) as u16 };
            let flags =
                if random.once_in(8) { random.word() as u16 } else { random.below(8) as u16 };
            let place = address(victim, random);
            let descriptor = (place, random.one_of(&LENGTHS), flags, next);
            put_descriptor(victim, descriptor_at(queue, index), descriptor);
        }
        // A table within, where some descriptor may point.
        for index in 0..JUNK {
            let place = address(victim, random);
            let descriptor =
                (place, random.one_of(&LENGTHS), random.below(8) as u16, random.below(JUNK) as u16);
            put_descriptor(victim, BUFFERS + 16 * index, descriptor);
        }
        let table = victim.arena() + u64::from(BUFFERS);
        let within = (table, random.one_of(&[16, 64, 256, 17, 0]), INDIRECT, 0);
        put_descriptor(victim, descriptor_at(queue, 0), within);
        let chains = 1 + random.below(JUNK) as u16;
        for index in 0..chains {
            let head = if random.once_in(64) { random.word() as u16 } else { index };
            offer(victim, queue, index, head);
        }
        announce(victim, queue, chains);
        victim.write(QUEUE_NOTIFY, queue);
        if random.once_in(4) {
            // While the device is at it.
            victim.write(STATUS, 0);
            return;
        }
    }
}

/// Indices that jump: ahead, back, by more than the ring holds; used rings written by the guest.
pub fn jump(victim: &mut impl Victim, random: &mut Random) {
    for _ in 0..1 + random.below(8) {
        let queue = random.below(QUEUES);
        let buffer = victim.arena() + u64::from(BUFFERS);
        let flags = random.one_of(&[0, WRITE, NEXT, NEXT | WRITE]);
        put_descriptor(victim, descriptor_at(queue, 0), (buffer, 4096, flags, 0));
        for index in 0..QUEUE_SIZE as u16 {
            offer(victim, queue, index, 0);
        }
        for _ in 0..1 + random.below(3) {
            let index = random.one_of(&[0, 1, 2, 255, 256, 257, 0x7fff, 0x8000, 0xffff]);
            announce(victim, queue, index);
            victim.write(QUEUE_NOTIFY, queue);
        }
        let ring = random.one_of(&[AVAILABLE, USED]);
        victim.put(queue * QUEUE_BYTES + ring, &random.word().to_le_bytes());
        victim.write(QUEUE_NOTIFY, queue);
    }
}

/// Sound chains with requests as a disk wants them (section 5.2.6) and any other device does not: known and unknown types,
/// sectors behind any end, data of no or of too many bytes, no room for the status. The buffers of a source of entropy are
/// among them, too. `then` is done as soon as the device may be at them.
pub fn requests<V: Victim>(
    victim: &mut V,
    random: &mut Random,
    then: impl Fn(&mut V, &mut Random),
) {
    const HEADER: u32 = 16;
    let queue = random.below(2);
    let count = 1 + random.below(QUEUE_SIZE / 4);
    for number in 0..count {
        let header = BUFFERS + HEADER * number;
        let kind = random.one_of(&[0, 1, 4, 8, 11, 13, 14, u32::MAX]);
        let sector = random.one_of(&[0, 1, 7, 8, 1 << 20, 1 << 55, u64::MAX - 1, u64::MAX]);
        victim.put(header, &kind.to_le_bytes());
        victim.put(header + 8, &sector.to_le_bytes());
        let at = |offset: u32| victim.arena() + u64::from(offset);
        let (header, data, status) =
            (at(header), at(BUFFERS + 0x2000 + random.below(64)), at(BUFFERS + 0x1fff));
        let data_flags = random.one_of(&[0, WRITE]);
        let data_len = random.one_of(&[0, 1, 511, 512, 513, 4096, 0x1000_0000]);
        let status_len = random.one_of(&[0, 1, 1, 1, 2]);
        let first = 3 * number;
        let header_len = random.one_of(&[HEADER, HEADER, HEADER, 15, 0]);
        let chain = [
            (header, header_len, NEXT, first as u16 + 1),
            (data, data_len, NEXT | data_flags, first as u16 + 2),
            (status, status_len, WRITE, 0),
        ];
        for (index, descriptor) in (first..).zip(chain) {
            put_descriptor(victim, descriptor_at(queue, index), descriptor);
        }
        offer(victim, queue, number as u16, first as u16);
    }
    announce(victim, queue, count as u16);
    victim.write(QUEUE_NOTIFY, queue);
    then(victim, random);
}

/// Sound buffers for a device to write to, on every queue: for packets and events, which may be long in coming.
pub fn buffers(victim: &mut impl Victim) {
    const COUNT: u32 = 16;
    const LEN: u32 = 128;
    for queue in 0..QUEUES {
        for index in 0..COUNT {
            let buffer = victim.arena() + u64::from(BUFFERS + LEN * (COUNT * queue + index));
            put_descriptor(victim, descriptor_at(queue, index), (buffer, LEN, WRITE, 0));
            offer(victim, queue, index as u16, index as u16);
        }
        announce(victim, queue, COUNT as u16);
        victim.write(QUEUE_NOTIFY, queue);
    }
}
