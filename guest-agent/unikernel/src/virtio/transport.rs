//! The virtio-mmio transport (virtio 1.3, section 4.2) with as few register accesses as the rules allow.
//!
//! Every access may be an exit to the monitor (35 us under a software KVM), and `virtio_drivers`' own transport makes 55
//! to set a vsock device up. This one is for a device that has just been reset: it neither asks whether a queue is in
//! use nor writes the upper address halves, which a reset has cleared, since all memory lies below 4 GiB.

use virtio_drivers::transport::{DeviceStatus, DeviceType, InterruptStatus, Transport};
use virtio_drivers::{Error, PhysAddr, Result};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::arch::mmio::Registers;

const MAGIC: u32 = 0x7472_6976;
const MODERN: u32 = 2;

/// Register offsets, section 4.2.2.
mod offset {
    pub const MAGIC: u64 = 0x000;
    pub const VERSION: u64 = 0x004;
    pub const DEVICE_ID: u64 = 0x008;
    pub const DEVICE_FEATURES: u64 = 0x010;
    pub const DEVICE_FEATURES_SELECT: u64 = 0x014;
    pub const DRIVER_FEATURES: u64 = 0x020;
    pub const DRIVER_FEATURES_SELECT: u64 = 0x024;
    pub const QUEUE_SELECT: u64 = 0x030;
    pub const QUEUE_SIZE_MAX: u64 = 0x034;
    pub const QUEUE_SIZE: u64 = 0x038;
    pub const QUEUE_READY: u64 = 0x044;
    pub const QUEUE_NOTIFY: u64 = 0x050;
    pub const INTERRUPT_STATUS: u64 = 0x060;
    pub const INTERRUPT_ACK: u64 = 0x064;
    pub const STATUS: u64 = 0x070;
    pub const QUEUE_DESCRIPTORS: u64 = 0x080;
    pub const QUEUE_DRIVER: u64 = 0x090;
    pub const QUEUE_DEVICE: u64 = 0x0a0;
    pub const CONFIG_GENERATION: u64 = 0x0fc;
    pub const CONFIG: u64 = 0x100;
}

/// A device of one type.
pub struct MmioTransport {
    registers: Registers,
    device_type: DeviceType,
    selected_queue: Option<u16>,
}

impl MmioTransport {
    /// The device at these registers, if it is a modern one of this type.
    pub fn find(registers: Registers, device_type: DeviceType) -> Option<Self> {
        let found = registers.read(offset::MAGIC) == MAGIC
            && registers.read(offset::DEVICE_ID) == device_type as u32
            && registers.read(offset::VERSION) == MODERN;
        found.then_some(Self { registers, device_type, selected_queue: None })
    }

    /// How many register accesses there were.
    pub fn accesses(&self) -> u32 {
        self.registers.accesses()
    }

    /// Says that the cause of every interrupt so far was handled, without reading which there were.
    pub fn acknowledge_all(&self) {
        self.registers.write(offset::INTERRUPT_ACK, InterruptStatus::all().bits());
    }

    /// One 32-bit word of the configuration space.
    pub fn config_word(&self, at: u64) -> u32 {
        self.registers.read(offset::CONFIG + at)
    }

    fn select(&mut self, queue: u16) {
        if self.selected_queue != Some(queue) {
            self.registers.write(offset::QUEUE_SELECT, queue.into());
            self.selected_queue = Some(queue);
        }
    }
}

impl Transport for MmioTransport {
    fn device_type(&self) -> DeviceType {
        self.device_type
    }

    fn read_device_features(&mut self) -> u64 {
        let word = |select: u32| {
            self.registers.write(offset::DEVICE_FEATURES_SELECT, select);
            u64::from(self.registers.read(offset::DEVICE_FEATURES))
        };
        word(0) | word(1) << 32
    }

    /// The lower word is zero after a reset and stays so where nothing of it is wanted.
    fn write_driver_features(&mut self, features: u64) {
        for (select, word) in [(0, features as u32), (1, (features >> 32) as u32)] {
            if word != 0 {
                self.registers.write(offset::DRIVER_FEATURES_SELECT, select);
                self.registers.write(offset::DRIVER_FEATURES, word);
            }
        }
    }

    fn max_queue_size(&mut self, queue: u16) -> u32 {
        self.select(queue);
        self.registers.read(offset::QUEUE_SIZE_MAX)
    }

    fn notify(&mut self, queue: u16) {
        self.registers.write(offset::QUEUE_NOTIFY, queue.into());
    }

    fn get_status(&self) -> DeviceStatus {
        DeviceStatus::from_bits_retain(self.registers.read(offset::STATUS))
    }

    fn set_status(&mut self, status: DeviceStatus) {
        self.registers.write(offset::STATUS, status.bits());
    }

    fn set_guest_page_size(&mut self, _: u32) {
        // Legacy devices only.
    }

    fn requires_legacy_layout(&self) -> bool {
        false
    }

    fn queue_set(
        &mut self,
        queue: u16,
        size: u32,
        descriptors: PhysAddr,
        driver_area: PhysAddr,
        device_area: PhysAddr,
    ) {
        self.select(queue);
        self.registers.write(offset::QUEUE_SIZE, size);
        let places = [
            (offset::QUEUE_DESCRIPTORS, descriptors),
            (offset::QUEUE_DRIVER, driver_area),
            (offset::QUEUE_DEVICE, device_area),
        ];
        for (place, address) in places {
            let address = u32::try_from(address).expect("the agent's memory lies below 4 GiB");
            self.registers.write(place, address);
        }
        self.registers.write(offset::QUEUE_READY, 1);
    }

    fn queue_unset(&mut self, queue: u16) {
        self.select(queue);
        self.registers.write(offset::QUEUE_READY, 0);
    }

    fn queue_used(&mut self, _: u16) -> bool {
        // The device was just reset.
        false
    }

    fn ack_interrupt(&mut self) -> InterruptStatus {
        let status = self.registers.read(offset::INTERRUPT_STATUS);
        self.registers.write(offset::INTERRUPT_ACK, status);
        InterruptStatus::from_bits_truncate(status)
    }

    fn read_config_generation(&self) -> u32 {
        self.registers.read(offset::CONFIG_GENERATION)
    }

    fn read_config_space<T: FromBytes + IntoBytes>(&self, at: usize) -> Result<T> {
        let mut value = T::new_zeroed();
        for (word, bytes) in (0..).zip(value.as_mut_bytes().chunks_mut(4)) {
            bytes.copy_from_slice(
                &self.config_word((at + 4 * word) as u64).to_le_bytes()[..bytes.len()],
            );
        }
        Ok(value)
    }

    fn write_config_space<T: IntoBytes + Immutable>(&mut self, _: usize, _: T) -> Result<()> {
        // A vsock device has nothing to write there.
        Err(Error::Unsupported)
    }
}
