//! A virtqueue that a guest has filled with whatever it liked: rings, descriptors, tables within.

#![no_main]

use libfuzzer_sys::fuzz_target;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm::fuzzing::{BrokenRing, Chain, Direction, GuestRam, Ring};

/// RAM is two regions that meet, so that buffers can span them, and a gap behind.
const REGION: usize = 0x1_0000;
const RAM_END: u64 = 2 * REGION as u64;
const SIZE: u16 = 8;
const TABLE: u64 = 0x1000;
const AVAIL: u64 = 0x2000;
const USED: u64 = 0x3000;
/// Descriptors of indirect tables lie here; buffers may as well.
const INDIRECT: u64 = 0x4000;
/// How much of that a fuzzer may write.
const MOST_REST: usize = 0x400;

/// What the guest has written, from a fuzzer's bytes: a direction, the available ring, the table, and RAM from [`INDIRECT`] on.
struct Written<'a> {
    direction: Direction,
    event_idx: bool,
    available: &'a [u8],
    table: &'a [u8],
    rest: &'a [u8],
}

impl<'a> Written<'a> {
    fn parse(bytes: &'a [u8]) -> Option<Self> {
        let (mode, bytes) = bytes.split_first()?;
        let (available, bytes) = bytes.split_at_checked(4 + 2 * usize::from(SIZE))?;
        let (table, rest) = bytes.split_at_checked(16 * usize::from(SIZE))?;
        let direction = match mode & 3 {
            0 => Direction::ToGuest,
            1 => Direction::ToHost,
            _ => Direction::Both,
        };
        (rest.len() <= MOST_REST).then_some(Self {
            direction,
            event_idx: mode & 4 != 0,
            available,
            table,
            rest,
        })
    }

    /// Puts it into RAM, in which nothing else is.
    fn write(&self, ram: &GuestRam) {
        let clean = [0; (INDIRECT + MOST_REST as u64) as usize];
        ram.write_slice(&clean, GuestAddress(0)).expect("it is RAM");
        for (at, bytes) in [(AVAIL, self.available), (TABLE, self.table), (INDIRECT, self.rest)] {
            ram.write_slice(bytes, GuestAddress(at)).expect("it is RAM");
        }
    }
}

thread_local! {
    static RAM: GuestRam = {
        let regions = [(GuestAddress(0), REGION), (GuestAddress(REGION as u64), REGION)];
        GuestRam::from_ranges(&regions).expect("memory for two small regions")
    };
}

fn queue() -> Queue {
    let mut queue = Queue::new(SIZE).expect("a power of two");
    queue.set_size(SIZE);
    queue.set_desc_table_address(Some(TABLE as u32), Some(0));
    queue.set_avail_ring_address(Some(AVAIL as u32), Some(0));
    queue.set_used_ring_address(Some(USED as u32), Some(0));
    queue.set_ready(true);
    queue
}

fuzz_target!(|bytes: &[u8]| {
    let Some(written) = Written::parse(bytes) else { return };
    RAM.with(|ram| {
        written.write(ram);
        take_all(ram, &written);
    });
});

/// Takes every chain that the guest has made available.
fn take_all(ram: &GuestRam, written: &Written) {
    let ring = Ring::new(queue(), written.direction, ram, written.event_idx);
    let mut ring = ring.expect("its rings are in RAM").expect("it is ready");
    let mut bad = 0;
    let mut sound = 0;
    // A guest that adds nothing while the device works has at most a ring full of chains.
    while let Ok(true) = ring.take(ram, 0, &mut bad) {
        sound += 1;
        check(ram, ring.chain(), written.direction);
        if ring.complete(ram, 0).is_err() {
            return;
        }
        assert!(sound + bad <= u64::from(SIZE), "more chains than the queue has entries");
    }
    let _: Result<bool, BrokenRing> = ring.must_signal(ram);
}

/// A chain that was found to be sound is a string of bytes in RAM.
fn check(ram: &GuestRam, chain: &Chain, direction: Direction) {
    assert!(chain.head() < SIZE);
    let total: u64 = chain.len();
    match direction {
        Direction::ToGuest => assert_eq!(chain.readable_len(), 0),
        Direction::ToHost => assert_eq!(chain.readable_len(), total),
        Direction::Both => {}
    }
    assert_eq!(chain.readable_len() + chain.writable_len(), total);
    // No more descriptors than the queue has, each inside RAM.
    assert!(total <= u64::from(SIZE) * RAM_END, "{total} bytes");
    let slices: Vec<_> = chain.slices(ram, 0, total as usize).collect();
    assert_eq!(slices.iter().map(|slice| slice.len() as u64).sum::<u64>(), total);
    assert!(slices.len() <= 2 * usize::from(SIZE), "{} slices", slices.len());
}
