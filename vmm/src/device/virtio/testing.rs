//! A driver's side of a device with one queue, for tests: it takes what is used only after an interrupt, and notifies only
//! where the device asked for it, so that a notification that is missing makes a test fail.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::{Driver, F_EVENT_IDX, Interrupt, VirtioDevice};
use crate::memory::GuestRam;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// Bytes of RAM; two regions meet in the middle.
pub const RAM_LEN: u64 = 0x80_0000;
const DESCRIPTORS: u64 = 0;
pub const AVAILABLE: u64 = 0x2000;
pub const USED: u64 = 0x3000;

#[derive(Debug, Default)]
pub struct Interrupts {
    pub used: AtomicU32,
    pub config: AtomicU32,
}

impl Interrupt for Interrupts {
    fn signal_used(&self) {
        self.used.fetch_add(1, Ordering::SeqCst);
    }

    fn signal_config(&self) {
        self.config.fetch_add(1, Ordering::SeqCst);
    }
}

/// A descriptor: address, length, flags, next.
pub type Descriptor = (u64, u32, u16, u16);

/// The device `D` with its driver.
pub struct TestDriver<D> {
    pub device: D,
    pub ram: GuestRam,
    pub interrupts: Arc<Interrupts>,
    size: u16,
    event_idx: bool,
    /// Index of the next entry in the available ring.
    pub added: u16,
    /// What `added` was when the device was last notified or found not to want it.
    notified: u16,
    /// Index of the next entry in the used ring.
    seen: u16,
    /// Interrupts that the driver has reacted to, and whether it has emptied the ring since.
    interrupts_seen: u32,
    awake: bool,
}

/// What the event loop waits for, as a descriptor that lives as long as the device.
pub trait Events {
    fn events(&self) -> BorrowedFd<'_>;
}

impl<D: VirtioDevice + Events> TestDriver<D> {
    /// Sets up `device` with a queue of its largest size, its features `features` and RAM of its own.
    pub fn new(device: D, features: u64) -> Self {
        let half = (RAM_LEN / 2) as usize;
        let ranges = [(GuestAddress(0), half), (GuestAddress(RAM_LEN / 2), half)];
        let ram = GuestRam::from_ranges(&ranges).unwrap();
        let size = device.queue_max_sizes()[0];
        let mut driver = Self {
            device,
            ram,
            interrupts: Arc::default(),
            size,
            event_idx: features & F_EVENT_IDX != 0,
            added: 0,
            notified: 0,
            seen: 0,
            interrupts_seen: 0,
            awake: false,
        };
        driver.activate(features, Self::queue(size));
        driver
    }

    /// What a driver sets up.
    pub fn queue(size: u16) -> Queue {
        let mut queue = Queue::new(size).unwrap();
        queue.set_desc_table_address(Some(DESCRIPTORS as u32), None);
        queue.set_avail_ring_address(Some(AVAILABLE as u32), None);
        queue.set_used_ring_address(Some(USED as u32), None);
        queue.set_ready(true);
        queue
    }

    /// Says `DRIVER_OK` with `queue`, and lets the event loop's turn pass.
    pub fn activate(&mut self, features: u64, queue: Queue) {
        assert_eq!(features & !self.device.features(), 0);
        self.device.activate(Driver {
            ram: self.ram.clone(),
            features,
            queues: vec![queue.into()],
            interrupt: self.interrupts.clone(),
        });
        self.run();
    }

    /// Writes descriptor `id`.
    pub fn describe(&self, id: u16, (addr, len, flags, next): Descriptor) {
        self.describe_at(DESCRIPTORS + 16 * u64::from(id), (addr, len, flags, next));
    }

    /// Writes a descriptor into an indirect table.
    pub fn describe_at(&self, at: u64, (addr, len, flags, next): Descriptor) {
        self.ram.write_obj(addr, GuestAddress(at)).unwrap();
        self.ram.write_obj(len, GuestAddress(at + 8)).unwrap();
        self.ram.write_obj(flags, GuestAddress(at + 12)).unwrap();
        self.ram.write_obj(next, GuestAddress(at + 14)).unwrap();
    }

    /// Writes a chain of `(address, length, flags)` from descriptor `head` on.
    pub fn describe_chain(&self, head: u16, buffers: &[(u64, u32, u16)]) {
        for (id, &(addr, len, flags)) in (head..).zip(buffers) {
            let is_last = usize::from(id - head) + 1 == buffers.len();
            let flags = if is_last { flags } else { flags | NEXT };
            self.describe(id, (addr, len, flags, id + 1));
        }
    }

    /// Makes the chain at `head` available.
    pub fn add(&mut self, head: u16) {
        let at = AVAILABLE + 4 + 2 * u64::from(self.added % self.size);
        self.ram.write_obj(head, GuestAddress(at)).unwrap();
        self.added = self.added.wrapping_add(1);
        self.ram.write_obj(self.added, GuestAddress(AVAILABLE + 2)).unwrap();
    }

    /// Notifies the device if it wants to hear of what was added (virtio 1.2, section 2.7.10).
    pub fn notify(&mut self) {
        let old = std::mem::replace(&mut self.notified, self.added);
        let wanted = if self.event_idx {
            let at = USED + 4 + 8 * u64::from(self.size);
            let event: u16 = self.ram.read_obj(GuestAddress(at)).unwrap();
            self.added.wrapping_sub(event).wrapping_sub(1) < self.added.wrapping_sub(old)
        } else {
            old != self.added && self.ram.read_obj::<u16>(GuestAddress(USED)).unwrap() & 1 == 0
        };
        if wanted {
            self.device.handle_queue(0);
        }
    }

    /// True if the event loop would wake up for the device within `patience`.
    fn is_ready(&self, patience: Duration) -> bool {
        let fd = self.device.events();
        let time = Timespec { tv_sec: 0, tv_nsec: patience.as_nanos() as i64 };
        poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], Some(&time)).unwrap() > 0
    }

    /// Calls the back end as long as it has something to do, as an event loop would. How often it did.
    pub fn run(&mut self) -> u32 {
        for calls in 0..10_000 {
            if !self.is_ready(Duration::ZERO) {
                return calls;
            }
            self.device.handle_backend();
        }
        panic!("the device never comes to rest");
    }

    /// Takes the next used element if there is one: first descriptor and length.
    pub fn try_take(&mut self) -> Option<(u16, u32)> {
        let interrupts = self.interrupts.used.load(Ordering::SeqCst);
        self.awake |= interrupts != std::mem::replace(&mut self.interrupts_seen, interrupts);
        let index: u16 = self.ram.read_obj(GuestAddress(USED + 2)).unwrap();
        if !self.awake || index == self.seen {
            self.awake = false;
            return None;
        }
        let at = USED + 4 + 8 * u64::from(self.seen % self.size);
        self.seen = self.seen.wrapping_add(1);
        // Ask for the next interrupt (`used_event`).
        let used_event = AVAILABLE + 4 + 2 * u64::from(self.size);
        self.ram.write_obj(self.seen, GuestAddress(used_event)).unwrap();
        let id: u32 = self.ram.read_obj(GuestAddress(at)).unwrap();
        Some((id as u16, self.ram.read_obj(GuestAddress(at + 4)).unwrap()))
    }

    /// Waits for the next used element.
    pub fn take(&mut self) -> (u16, u32) {
        let start = Instant::now();
        loop {
            self.run();
            if let Some(used) = self.try_take() {
                return used;
            }
            assert!(start.elapsed() < Duration::from_secs(20), "nothing is used");
            self.is_ready(Duration::from_millis(100));
        }
    }

    /// Makes the chain at `head` available, and waits until it is used.
    pub fn submit(&mut self, head: u16) -> u32 {
        self.add(head);
        self.notify();
        let (id, len) = self.take();
        assert_eq!(id, head);
        len
    }

    pub fn bytes(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.ram.read_slice(&mut bytes, GuestAddress(addr)).unwrap();
        bytes
    }

    pub fn put(&self, addr: u64, bytes: &[u8]) {
        self.ram.write_slice(bytes, GuestAddress(addr)).unwrap();
    }
}
