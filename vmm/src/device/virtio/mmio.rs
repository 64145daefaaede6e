//! The virtio-mmio transport (virtio 1.2, section 4.2): registers between a driver and a device.
//!
//! The driver is not trusted. A write that the specification forbids in the current state is ignored and counted; it can
//! confuse nobody but the guest.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use virtio_bindings::bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
};
use virtio_bindings::bindings::virtio_mmio::{
    VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING, VIRTIO_MMIO_QUEUE_NOTIFY,
};
use virtio_queue::{Queue, QueueT};

use super::audit::DeviceAudit;
use super::saved::{RestoreError, RingPosition, SavedMmio, SavedQueue};
use super::stale::StaleRequest;
use super::{Driver, DriverQueue, F_ACCESS_PLATFORM, F_VERSION_1, Interrupt, VirtioDevice};
use crate::bus::{self, Effect};
use crate::device::ioapic::Pin;
use crate::memory::GuestRam;

/// "virt".
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// "CLSL"; any number will do.
const VENDOR: u32 = 0x4c53_4c43;

/// Offset of the register whose writes notify a queue.
pub const QUEUE_NOTIFY: u64 = VIRTIO_MMIO_QUEUE_NOTIFY as u64;
/// Offsets of registers whose writes nobody sees before the next read or another write: features, and a queue's selection,
/// size, readiness and addresses. Not among them: the notification, the status, and the acknowledgement of interrupts,
/// which would take back an interrupt that came after it was written.
pub const WRITES_THAT_CAN_WAIT: [Range<u64>; 2] = [0x014..0x048, 0x080..0x0a8];
const CONFIG_SPACE: u64 = 0x100;

const ACKNOWLEDGE: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE;
const DRIVER: u32 = VIRTIO_CONFIG_S_DRIVER;
const FEATURES_OK: u32 = VIRTIO_CONFIG_S_FEATURES_OK;
const DRIVER_OK: u32 = VIRTIO_CONFIG_S_DRIVER_OK;
const NEEDS_RESET: u32 = VIRTIO_CONFIG_S_NEEDS_RESET;
const FAILED: u32 = VIRTIO_CONFIG_S_FAILED;

/// The interrupt status register and the pin behind it; used by the device's side without the transport's lock.
#[derive(Debug)]
struct InterruptLine {
    status: AtomicU32,
    pin: Pin,
}

impl InterruptLine {
    fn raise(&self, bit: u32) {
        self.status.fetch_or(bit, Ordering::SeqCst);
        self.pin.signal();
    }
}

impl Interrupt for InterruptLine {
    fn signal_used(&self) {
        self.raise(VIRTIO_MMIO_INT_VRING);
    }

    fn signal_config(&self) {
        self.raise(VIRTIO_MMIO_INT_CONFIG);
    }
}

/// What the driver has written so far.
#[derive(Debug)]
struct Registers {
    status: u32,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    queues: Vec<Queue>,
}

impl Registers {
    fn power_on(queue_max_sizes: &[u16]) -> Self {
        // `Queue::new` refuses sizes that are no power of two; a device that offers one is our bug.
        let queue = |size: &u16| {
            Queue::new(*size).expect("a device offers a queue size that is no power of two")
        };
        Self {
            status: 0,
            device_features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
            queue_select: 0,
            queues: queue_max_sizes.iter().map(queue).collect(),
        }
    }
}

/// A virtio device at its place in the address space.
pub struct Mmio<D: VirtioDevice + ?Sized> {
    registers: Registers,
    ram: GuestRam,
    interrupt: Arc<InterruptLine>,
    /// Feature bits on offer that are not the device's but the transport's.
    transport_features: u64,
    refused_writes: u64,
    /// Whoever looks at the driver's buffers.
    audit: Option<DeviceAudit>,
    /// The device itself. Last, so that a shared `Mmio<Vsock>` can be a shared `Mmio<dyn VirtioDevice>` too.
    pub device: D,
}

impl<D: VirtioDevice> Mmio<D> {
    /// Puts `device` behind registers; its interrupts go to `pin`. With `dma_platform` it offers
    /// [`F_ACCESS_PLATFORM`]; a driver may leave that, since the platform translates nothing.
    pub fn new(device: D, ram: GuestRam, pin: Pin, dma_platform: bool) -> Self {
        let registers = Registers::power_on(device.queue_max_sizes());
        let interrupt = Arc::new(InterruptLine { status: AtomicU32::new(0), pin });
        let transport_features = if dma_platform { F_ACCESS_PLATFORM } else { 0 };
        Self {
            registers,
            ram,
            interrupt,
            transport_features,
            refused_writes: 0,
            audit: None,
            device,
        }
    }

    /// Has `audit` look at every buffer that a driver posts.
    pub fn with_audit(self, audit: Option<DeviceAudit>) -> Self {
        Self { audit, ..self }
    }
}

impl<D: VirtioDevice + ?Sized> Mmio<D> {
    fn features(&self) -> u64 {
        self.device.features() | self.transport_features
    }

    /// Power-on state, of the device too.
    pub fn reset(&mut self) {
        self.device.reset();
        self.audit.iter().for_each(DeviceAudit::end);
        self.registers = Registers::power_on(self.device.queue_max_sizes());
        self.interrupt.status.store(0, Ordering::SeqCst);
    }

    /// What it is now, the device included. What the device was about to answer is answered before. No vCPU runs.
    pub fn save(&mut self) -> SavedMmio {
        self.device.settle();
        let registers = &self.registers;
        SavedMmio {
            status: registers.status,
            device_features_select: registers.device_features_select,
            driver_features_select: registers.driver_features_select,
            offered_features: self.features(),
            driver_features: registers.driver_features,
            queue_select: registers.queue_select,
            queues: registers.queues.iter().map(SavedQueue::of).collect(),
            interrupt: self.interrupt.status.load(Ordering::SeqCst),
            needs_reset: self.device.needs_reset(),
            positions: self.device.positions(),
            device: self.device.save(),
        }
    }

    /// Makes it what another one was; it has just been made. The device looks at its queues soon, since notifications may have
    /// been lost; and an interrupt that the driver has not acknowledged is signalled again, for the same reason.
    ///
    /// # Errors
    /// [`RestoreError`]; then it can only be dropped.
    pub fn restore(&mut self, saved: &SavedMmio) -> Result<(), RestoreError> {
        let here = self.device.save();
        if std::mem::discriminant(&saved.device) != std::mem::discriminant(&here) {
            return Err(RestoreError::Kind(saved.name(), here.name()));
        }
        if saved.offered_features != self.features() {
            return Err(RestoreError::Features(saved.offered_features, self.features()));
        }
        self.registers = self.checked(saved)?;
        self.interrupt.status.store(
            saved.interrupt & (VIRTIO_MMIO_INT_VRING | VIRTIO_MMIO_INT_CONFIG),
            Ordering::SeqCst,
        );
        let runs = self.has(DRIVER_OK) && !saved.needs_reset;
        let driver = runs.then(|| self.driver(&saved.positions));
        self.device.restore(&saved.device, driver, saved.needs_reset)?;
        if self.device.needs_reset() != saved.needs_reset {
            return Err(RestoreError::Queue);
        }
        if saved.interrupt != 0 {
            self.interrupt.pin.signal();
        }
        Ok(())
    }

    /// The registers, if a driver could have come so far.
    fn checked(&self, saved: &SavedMmio) -> Result<Registers, RestoreError> {
        const STEPS: [u32; 4] = [ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK];
        let progress = saved.status & !FAILED;
        let steps = (0..=STEPS.len()).map(|count| STEPS[..count].iter().sum::<u32>());
        let features = saved.driver_features;
        let agreed = features & !saved.offered_features == 0 && features & F_VERSION_1 != 0;
        let max_sizes = self.device.queue_max_sizes();
        if !steps.into_iter().any(|steps| steps == progress)
            || (progress & FEATURES_OK != 0 && !agreed)
            || saved.queues.len() != max_sizes.len()
        {
            return Err(RestoreError::Registers);
        }
        let queues = saved.queues.iter().zip(max_sizes).map(|(queue, max)| queue.restore(*max));
        Ok(Registers {
            status: saved.status,
            device_features_select: saved.device_features_select,
            driver_features_select: saved.driver_features_select,
            driver_features: features,
            queue_select: saved.queue_select,
            queues: queues.collect::<Result<_, _>>()?,
        })
    }

    /// The driver of another machine, whose device had come as far as `positions` say.
    fn driver(&self, positions: &[Option<RingPosition>]) -> Driver {
        let mut queues: Vec<_> = self.registers.queues.iter().map(copy_of).collect();
        for (queue, position) in queues.iter_mut().zip(positions) {
            if let Some(RingPosition { next_available, next_used }) = *position {
                queue.set_next_avail(next_available);
                queue.set_next_used(next_used);
            }
        }
        self.driver_with(queues)
    }

    /// The oldest request of queue `index` that waits for the device.
    pub fn oldest_request(&self, index: usize) -> Option<StaleRequest> {
        StaleRequest::find(self.registers.queues.get(index)?, &self.ram)
    }

    /// How many writes the driver should not have made.
    pub fn refused_writes(&self) -> u64 {
        self.refused_writes
    }

    /// The driver notified a queue, by a write or through an ioeventfd.
    pub fn notify(&mut self, queue: u32) {
        match u16::try_from(queue) {
            Ok(index) if usize::from(index) < self.registers.queues.len() => {
                self.audit.iter().for_each(DeviceAudit::look);
                self.device.handle_queue(index);
            }
            _ => self.refused_writes += 1,
        }
    }

    fn has(&self, status: u32) -> bool {
        self.registers.status & status == status
    }

    fn read_register(&mut self, offset: u64) -> u32 {
        let registers = &self.registers;
        match offset {
            0x000 => MAGIC,
            0x004 => VERSION,
            0x008 => self.device.device_id(),
            0x00c => VENDOR,
            0x010 => half(self.features(), registers.device_features_select),
            0x034 => self.queue().map_or(0, |queue| u32::from(queue.max_size())),
            0x044 => self.queue().map_or(0, |queue| u32::from(queue.ready())),
            0x060 => self.interrupt.status.load(Ordering::SeqCst),
            0x070 if self.device.needs_reset() => registers.status | NEEDS_RESET,
            0x070 => registers.status,
            // No shared memory regions: length and base of all ones (section 4.2.2).
            0x0b0..=0x0bc => u32::MAX,
            // The configuration space never changes while a driver looks at it.
            0x0fc => 0,
            _ => 0,
        }
    }

    fn queue(&self) -> Option<&Queue> {
        self.registers.queues.get(self.registers.queue_select as usize)
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        match offset {
            0x014 => self.registers.device_features_select = value,
            0x020 if self.has(DRIVER) && !self.has(FEATURES_OK) => self.select_features(value),
            0x024 => self.registers.driver_features_select = value,
            0x030 => self.registers.queue_select = value,
            0x038..=0x0a4
                if offset != QUEUE_NOTIFY && offset < 0x60 || (0x80..=0xa4).contains(&offset) =>
            {
                self.write_queue(offset, value);
            }
            QUEUE_NOTIFY => self.notify(value),
            0x064 => {
                self.interrupt.status.fetch_and(!value, Ordering::SeqCst);
            }
            0x070 => self.write_status(value),
            _ => self.refused_writes += 1,
        }
    }

    fn select_features(&mut self, value: u32) {
        let shift = match self.registers.driver_features_select {
            0 => 0,
            1 => 32,
            // Bits above 63 do not exist here; writing zeroes there is what drivers do.
            _ => return,
        };
        let features = self.registers.driver_features;
        self.registers.driver_features =
            (features & !(0xffff_ffff << shift)) | u64::from(value) << shift;
    }

    fn write_queue(&mut self, offset: u64, value: u32) {
        let configurable = self.has(FEATURES_OK) && !self.has(DRIVER_OK);
        let select = self.registers.queue_select as usize;
        let Some(queue) = self.registers.queues.get_mut(select).filter(|_| configurable) else {
            self.refused_writes += 1;
            return;
        };
        match offset {
            0x044 => queue.set_ready(value == 1),
            _ if queue.ready() => self.refused_writes += 1,
            // Sizes are 16 bits wide; `set_size` ignores those that are no power of two or too large.
            0x038 => queue.set_size(value.min(u32::from(u16::MAX)) as u16),
            0x080 => queue.set_desc_table_address(Some(value), None),
            0x084 => queue.set_desc_table_address(None, Some(value)),
            0x090 => queue.set_avail_ring_address(Some(value), None),
            0x094 => queue.set_avail_ring_address(None, Some(value)),
            0x0a0 => queue.set_used_ring_address(Some(value), None),
            0x0a4 => queue.set_used_ring_address(None, Some(value)),
            _ => self.refused_writes += 1,
        }
    }

    /// The driver's progress (virtio 1.2, section 3.1.1): bits are only added, one step after the other; 0 starts over.
    fn write_status(&mut self, value: u32) {
        let old = self.registers.status;
        if value == 0 {
            // Every driver begins so; before the first step there is nothing to take back, and host peers that wait for
            // the driver keep waiting.
            if old != 0 {
                self.reset();
            }
            return;
        }
        let added = value & !old;
        let allowed = match added & !FAILED {
            0 => true,
            ACKNOWLEDGE => old == 0,
            DRIVER => self.has(ACKNOWLEDGE),
            FEATURES_OK => self.has(ACKNOWLEDGE | DRIVER),
            DRIVER_OK => self.has(ACKNOWLEDGE | DRIVER | FEATURES_OK),
            _ => false,
        };
        if !allowed || old & !value & !NEEDS_RESET != 0 {
            self.refused_writes += 1;
            return;
        }
        let wanted = self.registers.driver_features;
        let offered = self.features();
        if added & FEATURES_OK != 0 && (wanted & !offered != 0 || wanted & F_VERSION_1 == 0) {
            // The driver reads back whether its choice was accepted (section 3.1.1, step 6).
            return;
        }
        self.registers.status = value & !NEEDS_RESET;
        if added & DRIVER_OK != 0 {
            self.activate();
        }
    }

    fn activate(&mut self) {
        let queues = self.registers.queues.iter().map(copy_of).collect();
        let driver = self.driver_with(queues);
        self.device.activate(driver);
    }

    /// What the driver has set up, with these queues; the audit begins.
    fn driver_with(&self, queues: Vec<Queue>) -> Driver {
        let audit = self.audit.as_ref();
        audit.iter().for_each(|audit| audit.begin(self.registers.driver_features, &queues));
        let queues = (0..).zip(queues).map(|(index, queue)| DriverQueue {
            queue,
            audit: audit.map(|audit| audit.queue(index)),
        });
        Driver {
            ram: self.ram.clone(),
            features: self.registers.driver_features,
            queues: queues.collect(),
            interrupt: Arc::clone(&self.interrupt) as Arc<dyn Interrupt>,
        }
    }
}

/// The queue as configured, its positions at zero: the registers keep theirs for the driver to read.
fn copy_of(queue: &Queue) -> Queue {
    // A state taken from a valid queue is valid.
    Queue::try_from(queue.state()).expect("a queue refuses its own state")
}

fn half(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

impl<D: VirtioDevice + ?Sized> bus::Device for Mmio<D> {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if offset >= CONFIG_SPACE {
            self.device.read_config(offset - CONFIG_SPACE, data);
        } else if data.len() == 4 && offset.is_multiple_of(4) {
            data.copy_from_slice(&self.read_register(offset).to_le_bytes());
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        if offset >= CONFIG_SPACE {
            self.device.write_config(offset - CONFIG_SPACE, data);
        } else if let (Ok(bytes), true) = (data.try_into(), offset.is_multiple_of(4)) {
            self.write_register(offset, u32::from_le_bytes(bytes));
        } else {
            self.refused_writes += 1;
        }
        Effect::None
    }
}

#[cfg(test)]
mod tests;
