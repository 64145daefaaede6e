//! What every virtio device offers its transport (virtio 1.2, section 2).

pub mod audit;
pub(crate) mod bell;
pub(crate) mod chain;
pub mod mmio;
pub(crate) mod ring;
mod saved;
pub mod stale;
#[cfg(test)]
pub(in crate::device) mod testing;

use std::fmt;
use std::os::fd::RawFd;
use std::sync::Arc;

use virtio_bindings::bindings::virtio_config::{VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_IN_ORDER};
use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};
use virtio_queue::Queue;

pub use saved::{RestoreError, RingPosition, SavedDevice, SavedMmio};

use crate::memory::GuestRam;

/// `VIRTIO_F_VERSION_1`: the only interface that this monitor speaks (virtio 1.2, section 6).
pub const F_VERSION_1: u64 = 1 << virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
/// `VIRTIO_F_ACCESS_PLATFORM`: drivers that take it use their system's DMA interface (section 6).
pub const F_ACCESS_PLATFORM: u64 = 1 << VIRTIO_F_ACCESS_PLATFORM;
/// `VIRTIO_F_RING_EVENT_IDX`: notifications both ways by index (section 2.7.7).
pub const F_EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;
/// `VIRTIO_F_IN_ORDER`: for devices that use buffers in the order in which the driver made them available (section 2.7.9).
pub const F_IN_ORDER: u64 = 1 << VIRTIO_F_IN_ORDER;
/// What [`ring`] and [`chain`] do for every device; indirect descriptors among it (section 2.7.5.3).
pub const RING_FEATURES: u64 = F_VERSION_1 | F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// Tells the driver that something happened. Cloneable, callable from any thread.
pub trait Interrupt: Send + Sync + fmt::Debug {
    /// Buffers were used on some queue (virtio 1.2, section 2.3: used buffer notification).
    fn signal_used(&self);
    /// The configuration space changed.
    fn signal_config(&self);
}

/// What the driver set up before it said `DRIVER_OK`.
#[derive(Debug)]
pub struct Driver {
    /// Guest RAM.
    pub ram: GuestRam,
    /// Feature bits that both sides agreed on; a subset of [`VirtioDevice::features`].
    pub features: u64,
    /// One queue for each entry of [`VirtioDevice::queue_max_sizes`], in that order. Addresses and sizes are what the
    /// guest wrote and nothing more; a queue that the driver left alone is not ready.
    pub queues: Vec<DriverQueue>,
    /// The way to the driver.
    pub interrupt: Arc<dyn Interrupt>,
}

/// One queue of a driver's.
#[derive(Debug)]
pub struct DriverQueue {
    /// Its addresses, size and positions.
    pub queue: Queue,
    /// Whoever looks at its buffers.
    pub audit: Option<audit::QueueAudit>,
}

impl From<Queue> for DriverQueue {
    fn from(queue: Queue) -> Self {
        Self { queue, audit: None }
    }
}

/// A device behind a transport. All calls come with the transport's lock held: registers from a vCPU's thread,
/// queues and back end from the event loop.
pub trait VirtioDevice: Send {
    /// Device type (virtio 1.2, section 5): 19 for vsock.
    fn device_id(&self) -> u32;

    /// The largest size of each queue, a power of two.
    fn queue_max_sizes(&self) -> &'static [u16];

    /// Feature bits on offer, [`F_VERSION_1`] included.
    fn features(&self) -> u64;

    /// Fills `data` from the configuration space at `offset`; bytes outside it read as 0.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// The driver wrote to the configuration space. Most devices have nothing writable there.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// The driver said `DRIVER_OK`. Called once between two resets.
    fn activate(&mut self, driver: Driver);

    /// The driver notified queue `index` (already checked against the number of queues). May be spurious, and may
    /// come before [`VirtioDevice::activate`].
    fn handle_queue(&mut self, index: u16);

    /// A descriptor that becomes readable when the host side has work for [`VirtioDevice::handle_backend`]; the same for
    /// the life of the device, across resets. Level-triggered.
    fn backend_fd(&self) -> Option<RawFd> {
        None
    }

    /// The back end's descriptor is readable.
    fn handle_backend(&mut self) {}

    /// True if the device has met something that only a reset can repair (`DEVICE_NEEDS_RESET`).
    fn needs_reset(&self) -> bool {
        false
    }

    /// Finishes what the device has taken of its queues and not answered, and takes nothing more. No vCPU runs.
    fn settle(&mut self) {}

    /// How far the device has come in each queue; `None` for those that it does not use.
    fn positions(&self) -> Vec<Option<RingPosition>>;

    /// What of the device is its own: all but features, queues and interrupts.
    fn save(&self) -> SavedDevice;

    /// Makes a device that no driver has used what another one was. `driver` is that of the other, with queues that have come as
    /// far; none if no driver ran. `needs_reset` says that the other had met what only a reset can repair; then there is no driver.
    ///
    /// # Errors
    /// [`RestoreError`].
    fn restore(
        &mut self,
        saved: &SavedDevice,
        driver: Option<Driver>,
        needs_reset: bool,
    ) -> Result<(), RestoreError>;

    /// Back to the state before the driver: queues forgotten, work in flight dropped, host peers told. Also called for a
    /// device that was never activated.
    fn reset(&mut self);
}
