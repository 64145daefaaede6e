//! The I/O APIC (82093AA): routes a device's pin to the device vector, edge-triggered, to the boot CPU.

use crate::arch::gate;
use crate::arch::mmio::{Access, Registers};
use crate::arch::nucleus::DEVICE_VECTOR;

const BASE: u64 = 0xfec0_0000;
const SELECT: u64 = 0x00;
const WINDOW: u64 = 0x10;
/// First redirection entry, two registers each.
const REDIRECTION: u32 = 0x10;
const PINS: u8 = 24;

/// Routes a pin. Without an I/O APIC or such a pin, nothing happens and the agent only polls when it is awake anyway.
pub fn route(pin: u8) {
    let Some(registers) = Registers::at(BASE, 0x20).filter(|_| pin < PINS) else { return };
    let entry = REDIRECTION + 2 * u32::from(pin);
    let (select, window) = (registers.address(SELECT), registers.address(WINDOW));
    // Upper half first: the lower one unmasks. Physical destination 0; fixed delivery, edge, active high.
    gate::access_registers(&mut [
        Access::write(select, entry + 1),
        Access::write(window, 0),
        Access::write(select, entry),
        Access::write(window, DEVICE_VECTOR.into()),
    ]);
}
