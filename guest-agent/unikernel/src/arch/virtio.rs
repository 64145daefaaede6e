//! Setting up a virtio-mmio device (virtio 1.3, sections 3.1.1 and 4.2) in one call of the gate.

use super::gate;
use super::mmio::Registers;

/// Queues of the largest device that the agent drives.
const MAX_QUEUES: usize = 3;

/// What a device has to know of a queue, and what it says to it. The layout is that of gate.s.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct QueueSetUp {
    /// Answer: the largest size that the device takes, 0 if it has no such queue.
    pub size_max: u32,
    /// Number of entries.
    pub size: u32,
    /// Descriptor table.
    pub descriptors: u32,
    /// Available ring.
    pub driver_area: u32,
    /// Used ring.
    pub device_area: u32,
}

/// What to tell a device from reset to DRIVER_OK, and what it answers. The layout is that of gate.s.
#[repr(C)]
pub struct VirtioSetUp {
    features_high: u32,
    /// Answer: the device status after FEATURES_OK was set.
    pub status: u32,
    queue_count: u32,
    /// Answer: the first word of the configuration space.
    pub config: u32,
    queues: [QueueSetUp; MAX_QUEUES],
}

impl VirtioSetUp {
    /// Register accesses apart from those for queues, and those for each queue.
    const ACCESSES: (usize, usize) = (9, 7);

    /// A set-up with these feature bits, of which the lower half is zero, and these queues.
    ///
    /// # Panics
    /// If there are no queues or too many.
    pub fn new(features: u64, queues: &[QueueSetUp]) -> Self {
        assert!((1..=MAX_QUEUES).contains(&queues.len()) && features as u32 == 0);
        let mut all = [QueueSetUp::default(); MAX_QUEUES];
        all[..queues.len()].copy_from_slice(queues);
        let queue_count = queues.len() as u32;
        Self {
            features_high: (features >> 32) as u32,
            status: 0,
            queue_count,
            config: 0,
            queues: all,
        }
    }

    /// Carries it out. The device's answers are to be checked afterwards. Returns how many register accesses it took.
    ///
    /// # Panics
    /// If there are not as many registers as virtio-mmio has.
    pub fn run(&mut self, registers: &Registers) -> usize {
        const CONFIG: u64 = 0x100;
        let _last = registers.address(CONFIG);
        gate::set_up_virtio(registers.address(0), self);
        let (common, queue) = Self::ACCESSES;
        common + queue * self.queue_count as usize
    }

    /// The queues, with the device's answers.
    pub fn queues(&self) -> &[QueueSetUp] {
        &self.queues[..self.queue_count as usize]
    }
}
