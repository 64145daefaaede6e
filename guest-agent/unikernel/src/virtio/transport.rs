//! The virtio-mmio transport (virtio 1.3, section 4.2) with as few register accesses as the rules allow, and all but
//! notifications from ring 0 (see `arch::mmio` and `arch::virtio`).
//!
//! It is for a device that has just been reset: it neither asks whether a queue is in use nor writes the upper address
//! halves, which a reset has cleared, since all memory lies below 4 GiB.

use virtio_drivers::transport::DeviceStatus;

use crate::arch::gate;
use crate::arch::mmio::{Access, RegisterAddress, Registers};
use crate::arch::virtio::{Refusal, VirtioSetUp};

/// "virt".
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;

/// Register offsets, section 4.2.2.
mod offset {
    pub const MAGIC: u64 = 0x000;
    pub const VERSION: u64 = 0x004;
    pub const DEVICE_TYPE: u64 = 0x008;
    pub const FEATURES: u64 = 0x010;
    pub const FEATURES_SELECT: u64 = 0x014;
    pub const QUEUE_NOTIFY: u64 = 0x050;
    pub const INTERRUPT_ACK: u64 = 0x064;
    pub const STATUS: u64 = 0x070;
    pub const CONFIG: u64 = 0x100;
}

/// Whether this is a modern device of the type.
pub fn is_of_type(registers: &Registers, device_type: u32) -> bool {
    if !registers.contain(offset::CONFIG) {
        return false;
    }
    let read = |offset| Access::read(registers.address(offset));
    let mut reads = [read(offset::MAGIC), read(offset::VERSION), read(offset::DEVICE_TYPE)];
    gate::access_registers(&mut reads);
    reads.map(|read| read.value()) == [MAGIC, VERSION, device_type]
}

/// The feature bits that a device offers.
pub fn offered_features(registers: &Registers) -> u64 {
    let [select, features] =
        [offset::FEATURES_SELECT, offset::FEATURES].map(|offset| registers.address(offset));
    let mut accesses = [
        Access::write(select, 0),
        Access::read(features),
        Access::write(select, 1),
        Access::read(features),
    ];
    gate::access_registers(&mut accesses);
    u64::from(accesses[3].value()) << 32 | u64::from(accesses[1].value())
}

/// A running device.
pub struct MmioTransport {
    registers: Registers,
}

impl MmioTransport {
    /// Sets the device at these registers up. Returns the first word of its configuration space as well.
    ///
    /// # Errors
    /// If the device does not play along; then it knows that the driver has given up.
    pub fn start(registers: Registers, set_up: &mut VirtioSetUp) -> Result<(Self, u32), Refusal> {
        match set_up.run(&registers) {
            Ok(config) => Ok((Self { registers }, config)),
            Err(refusal) => {
                if !matches!(refusal, Refusal::NotSuch) {
                    let tried = DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER;
                    let status = (tried | DeviceStatus::FAILED).bits();
                    let register = registers.address(offset::STATUS);
                    gate::access_registers(&mut [Access::write(register, status)]);
                }
                Err(refusal)
            }
        }
    }

    /// Tells the device to look at a queue.
    pub fn notify(&self, queue: u16) {
        self.registers.write_now(offset::QUEUE_NOTIFY, queue.into());
    }

    /// The register that takes the causes of interrupts that were handled.
    pub fn interrupt_ack(&self) -> RegisterAddress {
        self.registers.address(offset::INTERRUPT_ACK)
    }

    /// The feature bits on offer.
    pub fn offered_features(&self) -> u64 {
        offered_features(&self.registers)
    }

    /// The first 32-bit word of the configuration space.
    pub fn config_word(&self) -> u32 {
        self.config_word_at(0)
    }

    /// The 32-bit word of the configuration space at `offset`.
    pub fn config_word_at(&self, offset: u64) -> u32 {
        let mut read = [Access::read(self.registers.address(offset::CONFIG + offset))];
        gate::access_registers(&mut read);
        read[0].value()
    }
}
