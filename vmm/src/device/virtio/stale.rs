//! A request of a driver that is gone, completed all the same: the fault that a reset rules out by letting go of queues.

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

use crate::memory::GuestRam;

/// A buffer that a driver posted for the device to write, and where the device would say that it did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StaleRequest {
    head: u16,
    buffer: GuestAddress,
    used_ring: GuestAddress,
    used_index: u16,
    size: u16,
}

impl StaleRequest {
    /// The oldest request of `queue` that the device has not completed; none if the driver posted none.
    pub fn find(queue: &Queue, ram: &GuestRam) -> Option<Self> {
        const DESCRIPTOR_BYTES: u64 = 16;
        if !queue.ready() || !queue.is_valid(ram) {
            return None;
        }
        let word = |address: u64| ram.read_obj::<u16>(GuestAddress(address)).ok().map(u16::from_le);
        let size = queue.size();
        let used_index = word(queue.used_ring() + 2)?;
        if word(queue.avail_ring() + 2)? == used_index {
            return None;
        }
        let head = word(queue.avail_ring() + 4 + 2 * u64::from(used_index % size))?;
        if head >= size {
            return None;
        }
        let descriptor = GuestAddress(queue.desc_table() + DESCRIPTOR_BYTES * u64::from(head));
        let buffer = GuestAddress(u64::from_le(ram.read_obj(descriptor).ok()?));
        let used_ring = GuestAddress(queue.used_ring());
        Some(Self { head, buffer, used_ring, used_index, size })
    }

    /// Writes `bytes` into the buffer and tells the driver so, whoever has the memory now. Addresses outside RAM take nothing.
    pub fn complete(&self, ram: &GuestRam, bytes: &[u8]) {
        let GuestAddress(ring) = self.used_ring;
        let element = ring + 4 + 8 * u64::from(self.used_index % self.size);
        let words = [u32::from(self.head), bytes.len() as u32].map(u32::to_le_bytes);
        let next = self.used_index.wrapping_add(1).to_le_bytes();
        let writes = [
            (self.buffer.0, bytes),
            (element, words.as_flattened()),
            // Last, as virtio 1.2, section 2.7.8 has it.
            (ring + 2, &next),
        ];
        for (address, bytes) in writes {
            let _ = ram.write_slice(bytes, GuestAddress(address));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DESCRIPTORS: u64 = 0x1000;
    const AVAILABLE: u64 = 0x2000;
    const USED: u64 = 0x3000;
    const BUFFER: u64 = 0x4000;

    fn ram() -> GuestRam {
        GuestRam::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap()
    }

    /// A queue of 8 with one buffer posted by descriptor `head`.
    fn queue_with(ram: &GuestRam, head: u16) -> Queue {
        let mut queue = Queue::new(8).unwrap();
        queue.set_size(8);
        queue.set_desc_table_address(Some(DESCRIPTORS as u32), Some(0));
        queue.set_avail_ring_address(Some(AVAILABLE as u32), Some(0));
        queue.set_used_ring_address(Some(USED as u32), Some(0));
        queue.set_ready(true);
        ram.write_obj(BUFFER, GuestAddress(DESCRIPTORS + 16 * u64::from(head % 8))).unwrap();
        ram.write_obj(head, GuestAddress(AVAILABLE + 4)).unwrap();
        ram.write_obj(1_u16, GuestAddress(AVAILABLE + 2)).unwrap();
        queue
    }

    #[test]
    fn a_request_of_the_earlier_life_is_completed_in_the_memory_of_the_next() {
        let before = ram();
        let request = StaleRequest::find(&queue_with(&before, 3), &before).unwrap();
        let after = ram();
        request.complete(&after, b"late");
        let read = |at| after.read_obj::<u32>(GuestAddress(at)).unwrap();
        assert_eq!(read(BUFFER).to_le_bytes(), *b"late");
        assert_eq!((read(USED + 4), read(USED + 8)), (3, 4));
        assert_eq!(after.read_obj::<u16>(GuestAddress(USED + 2)).unwrap(), 1);
    }

    #[test]
    fn there_is_none_in_a_queue_that_is_not_ready_or_empty_or_broken() {
        let ram = ram();
        assert_eq!(StaleRequest::find(&Queue::new(8).unwrap(), &ram), None);
        assert_eq!(StaleRequest::find(&queue_with(&ram, 8), &ram), None);
        let queue = queue_with(&ram, 3);
        ram.write_obj(1_u16, GuestAddress(USED + 2)).unwrap();
        assert_eq!(StaleRequest::find(&queue, &ram), None);
    }
}
