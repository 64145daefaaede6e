//! The virtio-mmio transport (virtio 1.3, section 4.2) with as few register accesses as the rules allow, and all but
//! notifications from ring 0 (see `arch::mmio` and `arch::virtio`).
//!
//! It is for a device that has just been reset: it neither asks whether a queue is in use nor writes the upper address
//! halves, which a reset has cleared, since all memory lies below 4 GiB.

use virtio_drivers::transport::DeviceStatus;

use crate::arch::gate;
use crate::arch::mmio::{Access, RegisterAddress, Registers};
use crate::arch::virtio::{Refusal, VirtioSetUp};

/// Register offsets, section 4.2.2.
mod offset {
    pub const QUEUE_NOTIFY: u64 = 0x050;
    pub const INTERRUPT_ACK: u64 = 0x064;
    pub const STATUS: u64 = 0x070;
    pub const CONFIG: u64 = 0x100;
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

    /// The first 32-bit word of the configuration space.
    pub fn config_word(&self) -> u32 {
        let mut read = [Access::read(self.registers.address(offset::CONFIG))];
        gate::access_registers(&mut read);
        read[0].value()
    }
}
