//! Setting up a virtio-mmio device (virtio 1.3, sections 4.2.3 and 3.1.1) in one call of the gate.

use super::mmio::Registers;
use super::{gate, tsc};

/// Queues of the largest device that the agent drives.
const MAX_QUEUES: usize = 3;

/// What a device has to know of a queue. Only `dma` makes them, of memory that is the queue's for good. The layout is that
/// of gate.s.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct QueueSetUp {
    /// Number of entries.
    pub size: u32,
    /// Descriptor table.
    pub descriptors: u32,
    /// Available ring.
    pub driver_area: u32,
    /// Used ring.
    pub device_area: u32,
}

/// Why a device does not run.
#[derive(Clone, Copy, Debug)]
pub enum Refusal {
    /// It is not a modern device of the type, and was left alone.
    NotSuch,
    /// It does not accept the features.
    Features,
    /// It lacks a queue, or has a smaller one.
    Queue,
}

/// What to tell a device from reset to DRIVER_OK. The layout is that of gate.s.
#[repr(C)]
pub struct VirtioSetUp {
    progress: u32,
    device_type: u32,
    features_high: u32,
    queue_count: u32,
    config: u32,
    features_low: u32,
    queues: [QueueSetUp; MAX_QUEUES],
}

impl VirtioSetUp {
    /// A set-up for devices of this type with these feature bits and these queues.
    ///
    /// # Panics
    /// If there are no queues or too many.
    pub fn new(device_type: u32, features: u64, queues: &[QueueSetUp]) -> Self {
        assert!((1..=MAX_QUEUES).contains(&queues.len()));
        let mut all = [QueueSetUp::default(); MAX_QUEUES];
        all[..queues.len()].copy_from_slice(queues);
        Self {
            progress: 0,
            device_type,
            features_high: (features >> 32) as u32,
            queue_count: queues.len() as u32,
            config: 0,
            features_low: features as u32,
            queues: all,
        }
    }

    /// Carries it out and returns the first word of the configuration space.
    ///
    /// # Errors
    /// If the device does not play along.
    pub fn run(&mut self, registers: &Registers) -> Result<u32, Refusal> {
        const CONFIG: u64 = 0x100;
        if !registers.contain(CONFIG) {
            return Err(Refusal::NotSuch);
        }
        self.progress = 0;
        tsc::compare(gate::set_up_virtio(registers.address(0), self));
        match self.progress {
            0 => Err(Refusal::NotSuch),
            1 => Err(Refusal::Features),
            2 => Err(Refusal::Queue),
            _ => Ok(self.config),
        }
    }
}
