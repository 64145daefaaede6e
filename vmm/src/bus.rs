//! Port and memory buses: which device answers at an address.
//!
//! A device is locked for one access and for nothing else. What an access means beyond the device (a reset, a power-off)
//! comes back as its [`Effect`]; devices call nobody.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use agent_protocol::GuestReset;

/// What a write asks of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing beyond the device.
    None,
    /// Reset the machine.
    Reset(GuestReset),
    /// Turn the machine off.
    PowerOff,
    /// Say that the guest does nothing more.
    Rest,
}

/// Something that answers on a bus. Offsets are relative to the device's base; `data` is 1 to 8 bytes long.
pub trait Device: Send {
    /// Fills `data`.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// Takes `data`.
    fn write(&mut self, offset: u64, data: &[u8]) -> Effect;
}

/// A device that several owners share.
pub type Shared<D> = Arc<Mutex<D>>;

/// Locks a device.
pub fn lock<D: ?Sized>(device: &Shared<D>) -> MutexGuard<'_, D> {
    // A device that panicked has ended the process already (`panic = "abort"`) or failed a test.
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Addresses and the devices behind them. Reads where nobody answers give all ones, as on a real bus.
#[derive(Default)]
pub struct Bus {
    devices: BTreeMap<u64, (u64, Shared<dyn Device>)>,
    unclaimed: AtomicU64,
}

impl Bus {
    /// Puts `device` at `base`, answering for `len` addresses. The layout is ours and fixed, so an overlap is a bug.
    pub fn insert(&mut self, base: u64, len: u64, device: Shared<dyn Device>) {
        assert!(
            self.find(base).is_none() && self.find(base + len - 1).is_none(),
            "{base:#x} is taken"
        );
        self.devices.insert(base, (len, device));
    }

    fn find(&self, address: u64) -> Option<(u64, &Shared<dyn Device>)> {
        let (base, (len, device)) = self.devices.range(..=address).next_back()?;
        let offset = address - base;
        (offset < *len).then_some((offset, device))
    }

    /// The guest reads at `address`.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address) {
            Some((offset, device)) => lock(device).read(offset, data),
            None => {
                data.fill(0xff);
                self.unclaimed.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// The guest writes at `address`.
    pub fn write(&self, address: u64, data: &[u8]) -> Effect {
        match self.find(address) {
            Some((offset, device)) => lock(device).write(offset, data),
            None => {
                self.unclaimed.fetch_add(1, Ordering::Relaxed);
                Effect::None
            }
        }
    }

    /// How many accesses met no device.
    pub fn unclaimed(&self) -> u64 {
        self.unclaimed.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo(u8);

    impl Device for Echo {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(self.0 + offset as u8);
        }
        fn write(&mut self, _: u64, data: &[u8]) -> Effect {
            self.0 = data[0];
            Effect::PowerOff
        }
    }

    #[test]
    fn each_address_has_its_device() {
        let mut bus = Bus::default();
        bus.insert(0x10, 4, Arc::new(Mutex::new(Echo(0x40))));
        bus.insert(0x14, 1, Arc::new(Mutex::new(Echo(0x80))));
        let check = |address, expected| {
            let mut data = [0];
            bus.read(address, &mut data);
            assert_eq!(data[0], expected, "{address:#x}");
        };
        check(0x0f, 0xff);
        check(0x10, 0x40);
        check(0x13, 0x43);
        check(0x14, 0x80);
        check(0x15, 0xff);
        assert_eq!(bus.unclaimed(), 2);
        assert_eq!(bus.write(0x13, &[1]), Effect::PowerOff);
        assert_eq!(bus.write(u64::MAX, &[1]), Effect::None);
    }

    #[test]
    #[should_panic(expected = "is taken")]
    fn devices_may_not_overlap() {
        let mut bus = Bus::default();
        bus.insert(0x10, 4, Arc::new(Mutex::new(Echo(0))));
        bus.insert(0x13, 4, Arc::new(Mutex::new(Echo(0))));
    }
}
