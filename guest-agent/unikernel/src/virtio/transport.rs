//! The virtio-mmio transport (virtio 1.3, section 4.2) with as few register accesses as the rules allow, and all but
//! notifications from ring 0 (see `arch::mmio` and `arch::virtio`).
//!
//! It is for a device that has just been reset: it neither asks whether a queue is in use nor writes the upper address
//! halves, which a reset has cleared, since all memory lies below 4 GiB.

use virtio_drivers::transport::{DeviceStatus, DeviceType};

use crate::arch::mmio::{Batch, RegisterAddress, Registers};
use crate::arch::virtio::{QueueSetUp, VirtioSetUp};

const MAGIC: u32 = 0x7472_6976;
const MODERN: u32 = 2;

/// Register offsets, section 4.2.2.
mod offset {
    pub const MAGIC: u64 = 0x000;
    pub const VERSION: u64 = 0x004;
    pub const DEVICE_ID: u64 = 0x008;
    pub const QUEUE_NOTIFY: u64 = 0x050;
    pub const INTERRUPT_ACK: u64 = 0x064;
    pub const STATUS: u64 = 0x070;
    pub const CONFIG: u64 = 0x100;
}

/// Why a device could not be set up.
#[derive(Clone, Copy, Debug)]
pub enum SetupError {
    /// The device refuses the features.
    Features,
    /// A queue is missing or too small.
    Queue,
}

/// A device of one type.
pub struct MmioTransport {
    registers: Registers,
    accesses: usize,
}

impl MmioTransport {
    /// The device at these registers, if it is a modern one of this type.
    pub fn find(registers: Registers, device_type: DeviceType) -> Option<Self> {
        let expected = [
            (offset::MAGIC, MAGIC),
            (offset::VERSION, MODERN),
            (offset::DEVICE_ID, device_type as u32),
        ];
        let mut batch = Batch::with_capacity(expected.len());
        let readings = expected.map(|(at, _)| batch.read(registers.address(at)));
        let done = batch.run();
        let found =
            expected.iter().zip(readings).all(|((_, value), read)| done.value(read) == *value);
        found.then_some(Self { registers, accesses: done.len() })
    }

    /// Sets the device up. Returns the first word of its configuration space.
    ///
    /// All is written before what the device answers is checked. A device that has refused something finds FAILED in its
    /// status before a notification ever told it of a buffer.
    ///
    /// # Errors
    /// If the device does not play along.
    pub fn set_up(&mut self, features: u64, queues: &[QueueSetUp]) -> Result<u32, SetupError> {
        let mut set_up = VirtioSetUp::new(features, queues);
        self.accesses += set_up.run(&self.registers);
        let status = DeviceStatus::from_bits_retain(set_up.status);
        let result = if !status.contains(DeviceStatus::FEATURES_OK) {
            Err(SetupError::Features)
        } else if set_up.queues().iter().any(|queue| queue.size_max < queue.size) {
            Err(SetupError::Queue)
        } else {
            Ok(set_up.config)
        };
        if result.is_err() {
            let mut batch = Batch::with_capacity(1);
            let failed = status | DeviceStatus::FAILED;
            batch.write(self.registers.address(offset::STATUS), failed.bits());
            batch.run();
        }
        result
    }

    /// How many register accesses there were.
    pub fn accesses(&self) -> usize {
        self.accesses
    }

    /// Tells the device to look at a queue.
    pub fn notify(&self, queue: u16) {
        self.registers.write_now(offset::QUEUE_NOTIFY, queue.into());
    }

    /// The register that takes the causes of interrupts that were handled.
    pub fn interrupt_ack(&self) -> RegisterAddress {
        self.registers.address(offset::INTERRUPT_ACK)
    }

    /// The first 32-bit word of the configuration space.
    pub fn config_word(&self) -> u32 {
        let mut batch = Batch::with_capacity(1);
        let word = batch.read(self.registers.address(offset::CONFIG));
        batch.run().value(word)
    }
}
