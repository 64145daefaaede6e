//! The I/O APIC (82093AA): routes a device's pin to the device vector, edge-triggered, to the boot CPU.

use alloc::vec::Vec;

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

/// So many pins go into one batch of accesses.
const BATCH: usize = 8;

/// The lower halves of the redirection entries of these pins: vector, mode and mask. None without an I/O APIC.
pub fn redirections(pins: &[u8]) -> Vec<Option<u32>> {
    let read = |(select, window, entry)| [Access::write(select, entry), Access::read(window)];
    with_last_values(pins, read)
}

/// Writes the lower halves of the redirection entries of these pins, and returns what they hold then; `half` should mask them.
pub fn set_redirections(pins: &[u8], half: u32) -> Vec<Option<u32>> {
    let write = |(select, window, entry)| {
        [Access::write(select, entry), Access::write(window, half), Access::read(window)]
    };
    with_last_values(pins, write)
}

/// Makes the same accesses for each pin, and returns the value of each pin's last.
fn with_last_values<const COUNT: usize>(
    pins: &[u8],
    accesses: impl Fn((RegisterAddress, RegisterAddress, u32)) -> [Access; COUNT],
) -> Vec<Option<u32>> {
    let mut values = Vec::new();
    for pins in pins.chunks(BATCH) {
        let mut batch: Vec<_> =
            pins.iter().filter_map(|pin| entry(*pin)).flat_map(&accesses).collect();
        gate::access_registers(&mut batch);
        let last: Vec<_> = batch.chunks(COUNT).map(|one| one[COUNT - 1].value()).collect();
        values.extend((0..pins.len()).map(|at| last.get(at).copied()));
    }
    values
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
