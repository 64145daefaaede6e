use std::sync::Mutex;

use vm_memory::GuestAddress;

use super::*;
use crate::bus::Device;
use crate::device::ioapic::{IoApic, Msi, MsiSink, PINS};
use crate::device::virtio::SavedDevice;

const FEATURE: u64 = 1 << 3;

#[derive(Default)]
struct Fake {
    activations: Vec<(u64, Vec<bool>)>,
    kicks: Vec<u16>,
    resets: u32,
    broken: bool,
    positions: Vec<Option<RingPosition>>,
}

impl VirtioDevice for Fake {
    fn device_id(&self) -> u32 {
        19
    }
    fn queue_max_sizes(&self) -> &'static [u16] {
        &[128, 64]
    }
    fn features(&self) -> u64 {
        F_VERSION_1 | FEATURE
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(offset as u8);
    }
    fn activate(&mut self, driver: Driver) {
        driver.interrupt.signal_used();
        self.activations
            .push((driver.features, driver.queues.iter().map(|q| q.queue.ready()).collect()));
    }
    fn handle_queue(&mut self, index: u16) {
        self.kicks.push(index);
    }
    fn needs_reset(&self) -> bool {
        self.broken
    }
    fn positions(&self) -> Vec<Option<RingPosition>> {
        self.positions.clone()
    }
    fn save(&self) -> SavedDevice {
        SavedDevice::Rng
    }
    fn restore(
        &mut self,
        _: &SavedDevice,
        driver: Option<Driver>,
        needs_reset: bool,
    ) -> Result<(), RestoreError> {
        self.broken = needs_reset;
        if let Some(driver) = driver {
            let position = |queue: &Queue| RingPosition {
                next_available: queue.next_avail(),
                next_used: queue.next_used(),
            };
            self.positions = driver.queues.iter().map(|q| Some(position(&q.queue))).collect();
            self.activate(driver);
        }
        Ok(())
    }
    fn reset(&mut self) {
        self.resets += 1;
    }
}

#[derive(Debug, Default)]
struct Nowhere(Mutex<u32>);

impl MsiSink for Nowhere {
    fn send(&self, _: usize, _: Msi) {
        *self.0.lock().unwrap() += 1;
    }
}

fn mmio() -> Mmio<Fake> {
    mmio_with(false)
}

fn mmio_with(dma_platform: bool) -> Mmio<Fake> {
    let ram = GuestRam::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    let ioapic = Arc::new(IoApic::new(Box::<Nowhere>::default()));
    Mmio::new(Fake::default(), ram, Pin::new(&ioapic, 5), dma_platform)
}

fn write(mmio: &mut Mmio<Fake>, offset: u64, value: u32) {
    mmio.write(offset, &value.to_le_bytes());
}

fn read(mmio: &mut Mmio<Fake>, offset: u64) -> u32 {
    let mut data = [0; 4];
    mmio.read(offset, &mut data);
    u32::from_le_bytes(data)
}

fn features_ok(mmio: &mut Mmio<Fake>, features: u64) -> u32 {
    write(mmio, 0x70, ACKNOWLEDGE);
    write(mmio, 0x70, ACKNOWLEDGE | DRIVER);
    for select in [0, 1] {
        write(mmio, 0x24, select);
        write(mmio, 0x20, (features >> (32 * select)) as u32);
    }
    write(mmio, 0x70, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    read(mmio, 0x70)
}

fn driver_ok(mmio: &mut Mmio<Fake>) {
    write(mmio, 0x70, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
}

#[test]
fn a_driver_that_follows_the_steps_gets_its_device() {
    let mut mmio = mmio();
    assert_eq!((read(&mut mmio, 0), read(&mut mmio, 4), read(&mut mmio, 8)), (MAGIC, 2, 19));
    features_ok(&mut mmio, F_VERSION_1);
    write(&mut mmio, 0x30, 1);
    assert_eq!(read(&mut mmio, 0x34), 64);
    write(&mut mmio, 0x38, 64);
    write(&mut mmio, 0x80, 0x1000);
    write(&mut mmio, 0x44, 1);
    driver_ok(&mut mmio);
    assert_eq!(mmio.device.activations, [(F_VERSION_1, vec![false, true])]);
    assert_eq!(read(&mut mmio, 0x60), 1);
    write(&mut mmio, 0x64, 1);
    assert_eq!(read(&mut mmio, 0x60), 0);
    assert_eq!(mmio.refused_writes(), 0);
}

#[test]
fn features_that_are_not_on_offer_are_not_accepted() {
    let check = |features, accepted| {
        let status = features_ok(&mut mmio(), features);
        assert_eq!(status & FEATURES_OK != 0, accepted, "{features:#x}");
    };
    check(F_VERSION_1 | FEATURE, true);
    check(F_VERSION_1 | 1 << 4, false);
    check(FEATURE, false);
}

#[test]
fn the_platforms_addresses_are_on_offer_if_asked_for_and_may_be_left() {
    let check = |dma_platform, features, accepted| {
        let mut mmio = mmio_with(dma_platform);
        write(&mut mmio, 0x14, 1);
        assert_eq!(read(&mut mmio, 0x10) & 2 != 0, dma_platform);
        let status = features_ok(&mut mmio, features);
        assert_eq!(status & FEATURES_OK != 0, accepted, "{dma_platform} {features:#x}");
    };
    check(true, F_VERSION_1 | F_ACCESS_PLATFORM, true);
    check(true, F_VERSION_1, true);
    check(false, F_VERSION_1 | F_ACCESS_PLATFORM, false);
}

#[test]
fn steps_out_of_order_are_refused() {
    let check = |statuses: &[u32], activations| {
        let mut mmio = mmio();
        for status in statuses {
            write(&mut mmio, 0x70, *status);
        }
        assert_eq!(mmio.device.activations.len(), activations, "{statuses:?}");
        assert!(mmio.refused_writes() > 0, "{statuses:?}");
    };
    check(&[0xf], 0);
    check(&[1, 2, 3, 11], 0);
    check(&[1, 3, 7], 0);
    check(&[DRIVER_OK], 0);
}

#[test]
fn features_and_queues_cannot_change_under_a_live_device() {
    let mut mmio = mmio();
    features_ok(&mut mmio, F_VERSION_1);
    write(&mut mmio, 0x20, 0xff);
    driver_ok(&mut mmio);
    write(&mut mmio, 0x44, 1);
    write(&mut mmio, 0x80, 0x2000);
    driver_ok(&mut mmio);
    assert_eq!(mmio.device.activations, [(F_VERSION_1, vec![false, false])]);
    assert_eq!(mmio.refused_writes(), 3);
}

#[test]
fn writing_zero_resets_device_and_registers() {
    let mut mmio = mmio();
    features_ok(&mut mmio, F_VERSION_1);
    driver_ok(&mut mmio);
    write(&mut mmio, 0x70, 0);
    assert_eq!(mmio.device.resets, 1);
    assert_eq!((read(&mut mmio, 0x70), read(&mut mmio, 0x60)), (0, 0));
    features_ok(&mut mmio, F_VERSION_1);
    driver_ok(&mut mmio);
    assert_eq!(mmio.device.activations.len(), 2);
}

#[test]
fn the_reset_that_every_driver_begins_with_takes_nothing_back() {
    let mut mmio = mmio();
    write(&mut mmio, 0x70, 0);
    assert_eq!(mmio.device.resets, 0);
}

#[test]
fn a_broken_device_says_so_until_it_is_reset() {
    let mut mmio = mmio();
    mmio.device.broken = true;
    assert_ne!(read(&mut mmio, 0x70) & NEEDS_RESET, 0);
}

#[test]
fn writes_that_can_wait_reach_no_device() {
    let mut mmio = mmio();
    for status in [0, 1, 3, 11, 15] {
        write(&mut mmio, 0x70, status);
        let activations = mmio.device.activations.len();
        for offset in WRITES_THAT_CAN_WAIT.into_iter().flatten().step_by(4) {
            for value in [0, 1, 0x1000, u32::MAX] {
                write(&mut mmio, offset, value);
            }
        }
        assert_eq!(mmio.device.activations.len(), activations, "status {status}");
        assert_eq!((mmio.device.kicks.len(), mmio.device.resets), (0, 0), "status {status}");
    }
    for offset in [QUEUE_NOTIFY, 0x064, 0x070, CONFIG_SPACE] {
        assert!(!WRITES_THAT_CAN_WAIT.iter().any(|range| range.contains(&offset)), "{offset:#x}");
    }
}

#[test]
fn junk_in_registers_hurts_nobody() {
    let mut mmio = mmio();
    for offset in 0..0x200 {
        for value in [0, 1, 0x7fff_ffff, u32::MAX] {
            write(&mut mmio, offset, value);
            read(&mut mmio, offset);
        }
        mmio.write(offset, &[0xff]);
        mmio.write(offset, &[0xff; 8]);
        mmio.read(offset, &mut [0; 8]);
    }
    write(&mut mmio, QUEUE_NOTIFY, 0x1_0001);
    assert!(mmio.device.kicks.iter().all(|index| *index < 2));
    assert!(mmio.device.activations.is_empty());
}

/// A device whose driver runs, with two of its queues in use.
fn running() -> Mmio<Fake> {
    let mut mmio = mmio();
    features_ok(&mut mmio, F_VERSION_1 | FEATURE);
    for (queue, at) in [(0, 0x1000), (1, 0x4000)] {
        write(&mut mmio, 0x30, queue);
        write(&mut mmio, 0x38, 64);
        for (offset, at) in [(0x80, at), (0x90, at + 0x1000), (0xa0, at + 0x2000)] {
            write(&mut mmio, offset, at);
        }
        write(&mut mmio, 0x44, 1);
    }
    driver_ok(&mut mmio);
    let position = |next_available, next_used| Some(RingPosition { next_available, next_used });
    mmio.device.positions = vec![position(7, 5), position(65535, 65530)];
    mmio
}

#[test]
fn a_restored_device_has_its_driver_its_positions_and_its_interrupt() {
    let mut mmio = running();
    let saved = mmio.save();
    let sent = Arc::new(Nowhere::default());
    let ram = GuestRam::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    let ioapic = Arc::new(IoApic::new(Box::new(sent.clone())));
    let mut other = Mmio::new(Fake::default(), ram, Pin::new(&ioapic, 5), false);
    // Unmasked, so that a signal is sent on.
    let (entries, pending) = ([0x41_u64; PINS], [false; PINS]);
    let unmasked =
        serde_json::json!({"select": 0, "id": 0, "entries": entries, "pending": pending});
    ioapic.restore(&serde_json::from_value(unmasked).unwrap());
    other.restore(&saved).unwrap();
    assert_eq!(other.device.activations, [(F_VERSION_1 | FEATURE, vec![true, true])]);
    assert_eq!(other.device.positions, mmio.device.positions);
    for offset in (0..0xb0).step_by(4).filter(|offset| *offset != 0x30) {
        assert_eq!(read(&mut other, offset), read(&mut mmio, offset), "{offset:#x}");
    }
    assert_eq!(format!("{:?}", other.save()), format!("{saved:?}"));
    // By the fake's activation, and because the first interrupt was never acknowledged.
    assert_eq!(*sent.0.lock().unwrap(), 2);
    // As far as its driver had come, it may go on, and no further back.
    write(&mut other, 0x38, 32);
    assert_eq!(other.refused_writes(), 1);
}

impl MsiSink for Arc<Nowhere> {
    fn send(&self, pin: usize, msi: Msi) {
        (**self).send(pin, msi);
    }
}

#[test]
fn what_no_driver_could_have_written_is_refused() {
    let whole = serde_json::to_value(running().save()).unwrap();
    let check = |place: &str, value: serde_json::Value, expected: Option<RestoreError>| {
        let mut changed = whole.clone();
        *changed.pointer_mut(place).unwrap_or_else(|| panic!("{place}")) = value;
        let saved: SavedMmio = serde_json::from_value(changed).unwrap();
        assert_eq!(mmio().restore(&saved).err(), expected, "{place}");
    };
    let all = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;
    check("/status", all.into(), None);
    check("/status", (all | FAILED).into(), None);
    check("/status", 0.into(), None);
    for status in [DRIVER, ACKNOWLEDGE | FEATURES_OK, all | NEEDS_RESET, u32::MAX] {
        check("/status", status.into(), Some(RestoreError::Registers));
    }
    check("/driver_features", FEATURE.into(), Some(RestoreError::Registers));
    check("/driver_features", (F_VERSION_1 | 1 << 50).into(), Some(RestoreError::Registers));
    check("/queues", serde_json::json!([]), Some(RestoreError::Registers));
    for size in [0, 3, 256, 65535] {
        check("/queues/0/size", size.into(), Some(RestoreError::Queue));
    }
    for (ring, address) in [("descriptors", 8), ("available", 1), ("used", 2)] {
        check(&format!("/queues/1/{ring}"), address.into(), Some(RestoreError::Queue));
    }
    let (here, there) = (F_VERSION_1 | FEATURE, F_VERSION_1);
    check("/offered_features", there.into(), Some(RestoreError::Features(there, here)));
    let disk = serde_json::json!({"Block": {"capacity": 512}});
    check("/device", disk, Some(RestoreError::Kind("disk", "rng")));
}
