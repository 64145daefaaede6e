//! Each violation is found, and drivers that keep the rules are left alone: a guest by hand, and the audit behind a transport.

mod clean;
mod dirty;
mod lines;
mod wired;

use virtio_bindings::virtio_ids::{VIRTIO_ID_BLOCK, VIRTIO_ID_VSOCK};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::log::Kind;
use super::*;

const SIZE: u16 = 8;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

const TO_GUEST: u16 = 0;
const TO_HOST: u16 = 1;
const EVENT: u16 = 2;

/// A descriptor: address, length, flags, next.
type Desc = (u64, u32, u16, u16);

/// A guest with one audited device and its queues.
struct Guest {
    ram: GuestRam,
    audit: DmaAudit,
    device: DeviceAudit,
    queues: Vec<Queue>,
    added: Vec<u16>,
}

impl Guest {
    /// With a vsock device that runs.
    fn new() -> Self {
        Self::with(VIRTIO_ID_VSOCK, 3)
    }

    fn with(device_type: u32, queues: u16) -> Self {
        let ram = ram();
        let audit = DmaAudit::new(ram.clone());
        let device = audit.add_device(device_type);
        let queues: Vec<_> = (0..queues).map(|index| queue(u64::from(index) * 0x3000)).collect();
        let added = vec![0; queues.len()];
        let guest = Self { ram, audit, device, queues, added };
        guest.begin();
        guest
    }

    fn begin(&self) {
        self.device.begin(u64::MAX, &self.queues);
    }

    fn describe(&self, queue: u16, index: u16, desc: Desc) {
        let table = self.queues[usize::from(queue)].desc_table();
        write_descriptor(&self.ram, table, index, desc);
    }

    /// Makes the chain at `head` available, and does not tell anybody.
    fn add(&mut self, queue: u16, head: u16) {
        let index = usize::from(queue);
        let (ring, added) = (self.queues[index].avail_ring(), &mut self.added[index]);
        let at = ring + 4 + 2 * u64::from(*added % SIZE);
        self.ram.write_obj(head, GuestAddress(at)).unwrap();
        *added = added.wrapping_add(1);
        self.ram.write_obj(*added, GuestAddress(ring + 2)).unwrap();
    }

    /// Posts a chain of these descriptors, the first of which is `head`.
    fn post(&mut self, queue: u16, head: u16, chain: &[Desc]) {
        (head..).zip(chain).for_each(|(index, desc)| self.describe(queue, index, *desc));
        self.add(queue, head);
        self.device.look();
    }

    fn release(&self, queue: u16, head: u16) {
        self.device.queue(queue).release(head);
    }

    fn write(&self, at: u64, byte: u8) {
        self.ram.write_obj(byte, GuestAddress(at)).unwrap();
    }

    /// What was found until now, once.
    fn found(&self) -> Vec<Violation> {
        self.audit.take_all()
    }

    fn kinds(&self) -> Vec<Kind> {
        self.found().iter().map(|violation| violation.name).collect()
    }

    /// Nothing is in flight, and nothing is watched.
    #[track_caller]
    fn expect_idle(&self) {
        let spans = format!("{:?}", self.audit.lock().books.spans);
        assert!(!spans.contains("used_as: Write") && !spans.contains("used_as: Read"), "{spans}");
        assert!(!spans.contains("used_as: Table"), "{spans}");
        assert_eq!(format!("{:?}", self.audit.lock().books.lines), "Lines({})");
    }
}

fn ram() -> GuestRam {
    GuestRam::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap()
}

/// A queue that is ready, with a page for each of its rings from `base` on.
fn queue(base: u64) -> Queue {
    let mut queue = Queue::new(SIZE).unwrap();
    queue.set_desc_table_address(Some(base as u32), Some(0));
    queue.set_avail_ring_address(Some(base as u32 + 0x1000), Some(0));
    queue.set_used_ring_address(Some(base as u32 + 0x2000), Some(0));
    queue.set_ready(true);
    queue
}

fn write_descriptor(ram: &GuestRam, table: u64, index: u16, (addr, len, flags, next): Desc) {
    let at = table + 16 * u64::from(index);
    ram.write_obj(addr, GuestAddress(at)).unwrap();
    ram.write_obj(len, GuestAddress(at + 8)).unwrap();
    ram.write_obj(flags, GuestAddress(at + 12)).unwrap();
    ram.write_obj(next, GuestAddress(at + 14)).unwrap();
}
