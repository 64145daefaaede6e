//! Transport and ring tell the audit what happens: set-up, notifications, chains taken and given back, resets.

use super::*;
use crate::bus::Device as _;
use crate::device::ioapic::{IoApic, Msi, MsiSink, Pin};
use crate::device::virtio::chain::{Chain, Direction};
use crate::device::virtio::mmio::{Mmio, QUEUE_NOTIFY};
use crate::device::virtio::ring::Ring;
use crate::device::virtio::{
    Driver, F_VERSION_1, RestoreError, RingPosition, SavedDevice, VirtioDevice,
};

/// A device with vsock's type and one queue, from which it takes a chain when `takes` says so.
#[derive(Default)]
struct Taker {
    ring: Option<(Ring, GuestRam)>,
    takes: bool,
}

impl VirtioDevice for Taker {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }
    fn queue_max_sizes(&self) -> &'static [u16] {
        &[SIZE]
    }
    fn features(&self) -> u64 {
        F_VERSION_1
    }
    fn read_config(&self, _: u64, _: &mut [u8]) {}
    fn activate(&mut self, driver: Driver) {
        let queue = driver.queues.into_iter().next().unwrap();
        let ring = Ring::new(queue, Direction::ToGuest, &driver.ram, false).unwrap();
        self.ring = ring.map(|ring| (ring, driver.ram));
    }
    fn handle_queue(&mut self, _: u16) {
        if self.takes {
            self.take();
        }
    }
    fn positions(&self) -> Vec<Option<RingPosition>> {
        vec![self.ring.as_ref().map(|(ring, _)| ring.position())]
    }
    fn save(&self) -> SavedDevice {
        SavedDevice::Rng
    }
    fn restore(
        &mut self,
        _: &SavedDevice,
        driver: Option<Driver>,
        _: bool,
    ) -> Result<(), RestoreError> {
        driver.into_iter().for_each(|driver| self.activate(driver));
        Ok(())
    }
    fn reset(&mut self) {
        self.ring = None;
    }
}

impl Taker {
    fn take(&mut self) {
        let (ring, ram) = self.ring.as_mut().unwrap();
        assert!(ring.take(ram, 1, &mut 0).unwrap());
        ring.complete(ram, 1).unwrap();
    }

    /// As devices do that take several at a time.
    fn take_out(&mut self) {
        let (ring, ram) = self.ring.as_mut().unwrap();
        assert!(ring.take_sound(ram, 1).unwrap());
        let chain = ring.take_out(Chain::new(Direction::ToGuest, SIZE));
        ring.complete_chain(ram, &chain, 1).unwrap();
    }
}

#[derive(Debug)]
struct Nowhere;

impl MsiSink for Nowhere {
    fn send(&self, _: usize, _: Msi) {}
}

struct Machine {
    ram: GuestRam,
    audit: DmaAudit,
    mmio: Mmio<Taker>,
}

impl Machine {
    fn new() -> Self {
        let ram = ram();
        let audit = DmaAudit::new(ram.clone());
        let ioapic = std::sync::Arc::new(IoApic::new(Box::new(Nowhere)));
        let mmio = Mmio::new(Taker::default(), ram.clone(), Pin::new(&ioapic, 5), false);
        let mmio = mmio.with_audit(Some(audit.add_device(VIRTIO_ID_VSOCK)));
        let mut machine = Self { ram, audit, mmio };
        machine.start();
        machine
    }

    fn write(&mut self, offset: u64, value: u32) {
        self.mmio.write(offset, &value.to_le_bytes());
    }

    fn start(&mut self) {
        for (offset, value) in [
            (0x70, 1),
            (0x70, 3),
            (0x24, 1),
            (0x20, 1),
            (0x70, 11),
            (0x80, 0x1_0000),
            (0x90, 0x1_1000),
            (0xa0, 0x1_2000),
            (0x44, 1),
            (0x70, 15),
        ] {
            self.write(offset, value);
        }
    }

    /// Posts a buffer of four bytes as chain number `count`.
    fn post(&mut self, count: u16, at: u64) {
        let head = (count - 1) % SIZE;
        write_descriptor(&self.ram, 0x1_0000, head, (at, 4, WRITE, 0));
        self.ram.write_obj(head, GuestAddress(0x1_1004 + 2 * u64::from(head))).unwrap();
        self.ram.write_obj(count, GuestAddress(0x1_1002)).unwrap();
    }

    fn kinds(&self) -> Vec<Kind> {
        self.audit.take_all().iter().map(|violation| violation.name).collect()
    }
}

#[test]
fn a_chain_is_looked_at_when_its_queue_is_notified_and_watched_until_it_is_given_back() {
    let mut machine = Machine::new();
    machine.post(1, 0x2_0000);
    assert_eq!(machine.audit.summary().chains, 0);
    machine.write(QUEUE_NOTIFY, 0);
    assert_eq!(machine.audit.summary().chains, 1);
    // The device has its line.
    machine.ram.write_obj(1_u8, GuestAddress(0x2_0020)).unwrap();
    machine.mmio.device.takes = true;
    machine.write(QUEUE_NOTIFY, 0);
    assert_eq!(machine.kinds(), [Kind::DirtiedLine]);
    // Now the driver has.
    machine.ram.write_obj(2_u8, GuestAddress(0x2_0020)).unwrap();
    assert_eq!(machine.kinds(), []);
}

#[test]
fn a_chain_that_was_posted_without_a_word_is_looked_at_when_it_is_taken() {
    for take in [Taker::take, Taker::take_out] {
        let mut machine = Machine::new();
        machine.post(1, 0x2_0001);
        take(&mut machine.mmio.device);
        assert_eq!(machine.kinds(), [Kind::Unaligned]);
        machine.post(2, 0x2_0001);
        take(&mut machine.mmio.device);
        assert_eq!(machine.kinds(), [Kind::Unaligned], "it was not posted twice");
    }
}

#[test]
fn a_reset_lets_go_of_everything() {
    let mut machine = Machine::new();
    machine.post(1, 0x2_0000);
    machine.write(QUEUE_NOTIFY, 0);
    machine.write(0x70, 0);
    machine.ram.write_obj(1_u8, GuestAddress(0x2_0020)).unwrap();
    machine.post(1, 0x2_0000);
    machine.start();
    assert_eq!(machine.audit.summary().chains, 2);
    assert_eq!(machine.kinds(), []);
}

#[test]
fn without_an_audit_nothing_is_audited() {
    let mut machine = Machine::new();
    let audit = machine.audit.clone();
    machine.mmio = machine.mmio.with_audit(None);
    machine.write(0x70, 0);
    machine.start();
    machine.post(1, 1 << 20);
    machine.write(QUEUE_NOTIFY, 0);
    assert_eq!(audit.summary().chains, 0);
}
