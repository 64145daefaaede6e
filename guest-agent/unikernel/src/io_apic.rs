//! The I/O APIC (82093AA): routes a device's pin to the device vector, edge-triggered, to the boot CPU.

use crate::arch::gate;
use crate::arch::mmio::{Access, RegisterAddress, Registers};
use crate::arch::nucleus::DEVICE_VECTOR;

const BASE: u64 = 0xfec0_0000;
const SELECT: u64 = 0x00;
const WINDOW: u64 = 0x10;
/// First redirection entry, two registers each.
const REDIRECTION: u32 = 0x10;
/// How many there are.
pub const PINS: u8 = 24;

/// The redirection entry of a pin; `None` without an I/O APIC or such a pin.
pub fn redirection(pin: u8) -> Option<u64> {
    let (select, window, entry) = entry(pin)?;
    let mut accesses = [
        Access::write(select, entry),
        Access::read(window),
        Access::write(select, entry + 1),
        Access::read(window),
    ];
    gate::access_registers(&mut accesses);
    let [_, low, _, high] = accesses;
    Some(u64::from(high.value()) << 32 | u64::from(low.value()))
}

/// Writes the redirection entry of a pin, lower half first: it should mask the pin.
pub fn set_redirection(pin: u8, value: u64) {
    let Some((select, window, entry)) = entry(pin) else { return };
    gate::access_registers(&mut [
        Access::write(select, entry),
        Access::write(window, value as u32),
        Access::write(select, entry + 1),
        Access::write(window, (value >> 32) as u32),
    ]);
}

/// Addresses of the two registers, and the number of a pin's entry.
fn entry(pin: u8) -> Option<(RegisterAddress, RegisterAddress, u32)> {
    let registers = Registers::at(BASE, 0x20).filter(|_| pin < PINS)?;
    let entry = REDIRECTION + 2 * u32::from(pin);
    Some((registers.address(SELECT), registers.address(WINDOW), entry))
}

/// Routes a pin. Without an I/O APIC or such a pin, nothing happens and the agent only polls when it is awake anyway.
pub fn route(pin: u8) {
    let Some((select, window, entry)) = entry(pin) else { return };
    // Upper half first: the lower one unmasks. Physical destination 0; fixed delivery, edge, active high.
    gate::access_registers(&mut [
        Access::write(select, entry + 1),
        Access::write(window, 0),
        Access::write(select, entry),
        Access::write(window, DEVICE_VECTOR.into()),
    ]);
}
