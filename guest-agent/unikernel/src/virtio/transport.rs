//! The virtio-mmio transport (virtio 1.3, section 4.2) with as few register accesses as the rules allow, and all of them
//! in batches (see `arch::mmio`).
//!
//! It is for a device that has just been reset: it neither asks whether a queue is in use nor writes the upper address
//! halves, which a reset has cleared, since all memory lies below 4 GiB.

use alloc::vec::Vec;

use virtio_drivers::transport::{DeviceStatus, DeviceType};

use crate::arch::mmio::{Batch, RegisterAddress, Registers};
use crate::dma::RingPlaces;
use crate::io_apic;

const MAGIC: u32 = 0x7472_6976;
const MODERN: u32 = 2;
/// What a set-up takes at most: three queues.
const SETUP_ACCESSES: usize = 40;

/// Register offsets, section 4.2.2.
mod offset {
    pub const MAGIC: u64 = 0x000;
    pub const VERSION: u64 = 0x004;
    pub const DEVICE_ID: u64 = 0x008;
    pub const DRIVER_FEATURES: u64 = 0x020;
    pub const DRIVER_FEATURES_SELECT: u64 = 0x024;
    pub const QUEUE_SELECT: u64 = 0x030;
    pub const QUEUE_SIZE_MAX: u64 = 0x034;
    pub const QUEUE_SIZE: u64 = 0x038;
    pub const QUEUE_READY: u64 = 0x044;
    pub const QUEUE_NOTIFY: u64 = 0x050;
    pub const INTERRUPT_ACK: u64 = 0x064;
    pub const STATUS: u64 = 0x070;
    pub const QUEUE_DESCRIPTORS: u64 = 0x080;
    pub const QUEUE_DRIVER: u64 = 0x090;
    pub const QUEUE_DEVICE: u64 = 0x0a0;
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

    /// Sets the device up (section 3.1.1), one status bit at a time as strict monitors want it, and its interrupts.
    /// Returns the first word of its configuration space.
    ///
    /// All is written in one batch, and what the device answered is checked after it. A device that has refused
    /// something finds FAILED in its status before it was ever told of a buffer by a notification.
    ///
    /// # Errors
    /// If the device does not play along.
    pub fn set_up(
        &mut self,
        features: u64,
        irq: u8,
        queues: &[RingPlaces],
    ) -> Result<u32, SetupError> {
        let mut batch = Batch::with_capacity(SETUP_ACCESSES);
        let at = |offset| self.registers.address(offset);
        let mut status = DeviceStatus::empty();
        batch.write(at(offset::STATUS), status.bits());
        for bit in [DeviceStatus::ACKNOWLEDGE, DeviceStatus::DRIVER] {
            status |= bit;
            batch.write(at(offset::STATUS), status.bits());
        }
        for (select, word) in [(0, features as u32), (1, (features >> 32) as u32)] {
            // A word is zero after a reset.
            if word != 0 {
                batch.write(at(offset::DRIVER_FEATURES_SELECT), select);
                batch.write(at(offset::DRIVER_FEATURES), word);
            }
        }
        status |= DeviceStatus::FEATURES_OK;
        batch.write(at(offset::STATUS), status.bits());
        let accepted = batch.read(at(offset::STATUS));
        let set_queue = |places: &RingPlaces| {
            batch.write(at(offset::QUEUE_SELECT), places.index.into());
            let size_max = batch.read(at(offset::QUEUE_SIZE_MAX));
            batch.write(at(offset::QUEUE_SIZE), places.size);
            batch.write(at(offset::QUEUE_DESCRIPTORS), places.descriptors);
            batch.write(at(offset::QUEUE_DRIVER), places.driver_area);
            batch.write(at(offset::QUEUE_DEVICE), places.device_area);
            batch.write(at(offset::QUEUE_READY), 1);
            (size_max, places.size)
        };
        let sizes: Vec<_> = queues.iter().map(set_queue).collect();
        let config = batch.read(at(offset::CONFIG));
        io_apic::route(irq, &mut batch);
        batch.write(at(offset::STATUS), (status | DeviceStatus::DRIVER_OK).bits());
        let done = batch.run();
        self.accesses += done.len();

        let accepted = DeviceStatus::from_bits_retain(done.value(accepted));
        let result = if !accepted.contains(DeviceStatus::FEATURES_OK) {
            Err(SetupError::Features)
        } else if sizes.iter().any(|(size_max, size)| done.value(*size_max) < *size) {
            Err(SetupError::Queue)
        } else {
            Ok(done.value(config))
        };
        if result.is_err() {
            let mut batch = Batch::with_capacity(1);
            batch.write(at(offset::STATUS), (status | DeviceStatus::FAILED).bits());
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
