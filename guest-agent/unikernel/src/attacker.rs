//! Carries out attacks (`agent::attack`) on every virtio device that the command line names.

use core::ops::Range;

use agent::attack::{Random, Victim, attack};
use agent::params::Params;

use crate::arch::mmio::{Access, Registers};
use crate::arch::{gate, ram};
use crate::dma::arena;

/// A device at its registers.
struct Device {
    registers: Registers,
    free_ram: Range<u64>,
}

impl Victim for Device {
    fn read(&mut self, offset: u32) -> u32 {
        let mut access = [Access::read(self.registers.address(offset.into()))];
        gate::access_registers(&mut access);
        access[0].value()
    }

    fn write(&mut self, offset: u32, value: u32) {
        let register = self.registers.address(offset.into());
        gate::access_registers(&mut [Access::write(register, value)]);
    }

    fn put(&mut self, at: u32, bytes: &[u8]) {
        arena::put(at, bytes);
    }

    fn arena(&self) -> u64 {
        arena::start()
    }

    fn free_ram(&self) -> Range<u64> {
        self.free_ram.clone()
    }
}

/// Attacks all devices in turn. Their drivers are of no use afterwards.
pub fn attack_devices(params: &Params) {
    let mut random = Random::new(params.attack.seed, params.life);
    for device in params.devices() {
        if let Some(registers) = Registers::at(device.base, device.size) {
            let mut device = Device { registers, free_ram: ram::free() };
            attack(&mut device, &mut random, params.attack.rounds);
        }
    }
}
