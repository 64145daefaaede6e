//! virtio-rng (virtio 1.2, section 5.4): random bytes of the host's kernel in the buffers that the guest posts.

use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;

use rustix::io::retry_on_intr;
use rustix::rand::{GetRandomFlags, getrandom};
use serde::Serialize;

use super::virtio::bell::Bell;
use super::virtio::chain::Direction;
use super::virtio::ring::{BrokenRing, Ring};
use super::virtio::{
    Driver, F_EVENT_IDX, F_IN_ORDER, Interrupt, RING_FEATURES, RestoreError, RingPosition,
    SavedDevice, VirtioDevice,
};
use crate::memory::GuestRam;

/// Device type (virtio 1.2, section 5).
const DEVICE_ID: u32 = 4;
const QUEUE_MAX_SIZES: [u16; 1] = [64];

/// The most that one buffer gets, in bytes; the specification asks for one at least (section 5.4.6.2). With the queue's size
/// it bounds what the event loop does before other devices have their turn: 16 KiB. The kernel gives that much whole.
const MOST_BYTES: usize = 256;

/// Counters since the device was made; resets do not clear them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct RngStats {
    /// Buffers filled.
    pub requests: u64,
    /// Random bytes put into them.
    pub bytes: u64,
    /// Descriptor chains that described no usable buffer.
    pub bad_chains: u64,
    /// Queues that could not be used any further, or at all.
    pub broken_rings: u64,
}

/// The device.
#[derive(Debug)]
pub struct Rng {
    guest: Option<Guest>,
    /// Readable while the event loop has to come back.
    again: Bell,
    needs_reset: bool,
    stats: RngStats,
}

/// The guest's side while its driver runs.
#[derive(Debug)]
struct Guest {
    ram: GuestRam,
    ring: Ring,
    interrupt: Arc<dyn Interrupt>,
}

impl Rng {
    /// A device without a driver.
    ///
    /// # Errors
    /// If the system refuses a descriptor.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self {
            guest: None,
            again: Bell::new()?,
            needs_reset: false,
            stats: RngStats::default(),
        })
    }

    /// What the device has counted so far.
    pub fn stats(&self) -> RngStats {
        self.stats
    }

    fn serve(&mut self) {
        match self.guest.as_mut().map(|guest| guest.serve(&mut self.stats)) {
            Some(Ok(true)) => self.again.ring(),
            Some(Ok(false)) | None => {}
            Some(Err(BrokenRing)) => self.give_up(),
        }
    }

    /// The queue cannot be used any more (`DEVICE_NEEDS_RESET`; virtio 1.2, section 2.1.2).
    fn give_up(&mut self) {
        self.needs_reset = true;
        self.stats.broken_rings += 1;
        if let Some(guest) = self.guest.take() {
            guest.interrupt.signal_config();
        }
    }
}

impl Guest {
    /// Fills buffers, at most a ring full of them. True if there is more to do, so that other devices get their turn first.
    fn serve(&mut self, stats: &mut RngStats) -> Result<bool, BrokenRing> {
        let mut more = true;
        for _ in 0..self.ring.size() {
            if self.ring.take(&self.ram, 1, &mut stats.bad_chains)? {
                let len = self.fill();
                self.ring.complete(&self.ram, len)?;
                stats.requests += 1;
                stats.bytes += u64::from(len);
            } else if !self.ring.listen(&self.ram)? {
                more = false;
                break;
            }
        }
        if self.ring.must_signal(&self.ram)? {
            self.interrupt.signal_used();
        }
        Ok(more)
    }

    /// Fills the buffer that was taken last. Gives the number of bytes.
    fn fill(&self) -> u32 {
        let mut bytes = [0; MOST_BYTES];
        let wanted = self.ring.chain().len().min(MOST_BYTES as u64) as usize;
        let bytes = &mut bytes[..wanted];
        // So few bytes come whole, whatever signals do, once the kernel has gathered entropy; until then it lets wait, for
        // a second at most (random(7)).
        let len = retry_on_intr(|| getrandom(&mut *bytes, GetRandomFlags::empty()))
            .expect("Linux has randomness");
        // The chain was found to have room.
        self.ring.chain().write(&self.ram, &bytes[..len]).map_or(0, |()| len as u32)
    }
}

impl VirtioDevice for Rng {
    fn device_id(&self) -> u32 {
        DEVICE_ID
    }

    fn queue_max_sizes(&self) -> &'static [u16] {
        &QUEUE_MAX_SIZES
    }

    fn features(&self) -> u64 {
        RING_FEATURES | F_IN_ORDER
    }

    /// There is none (section 5.4.4).
    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, driver: Driver) {
        let Driver { ram, features, queues, interrupt } = driver;
        let queue = queues.into_iter().next();
        let ring = queue
            .map(|queue| Ring::new(queue, Direction::ToGuest, &ram, features & F_EVENT_IDX != 0));
        match ring.transpose() {
            Ok(ring) => {
                self.guest = ring.flatten().map(|ring| Guest { ram, ring, interrupt });
                // Not `serve`: this may be a vCPU's thread, which must not do the event loop's work.
                self.again.ring();
            }
            Err(BrokenRing) => {
                self.give_up();
                interrupt.signal_config();
            }
        }
    }

    fn handle_queue(&mut self, _index: u16) {
        self.serve();
    }

    fn backend_fd(&self) -> Option<RawFd> {
        Some(self.again.as_fd().as_raw_fd())
    }

    fn handle_backend(&mut self) {
        self.again.clear();
        self.serve();
    }

    fn needs_reset(&self) -> bool {
        self.needs_reset
    }

    fn positions(&self) -> Vec<Option<RingPosition>> {
        vec![self.guest.as_ref().map(|guest| guest.ring.position())]
    }

    fn save(&self) -> SavedDevice {
        SavedDevice::Rng
    }

    fn restore(
        &mut self,
        _saved: &SavedDevice,
        driver: Option<Driver>,
        needs_reset: bool,
    ) -> Result<(), RestoreError> {
        self.needs_reset = needs_reset;
        driver.into_iter().for_each(|driver| self.activate(driver));
        Ok(())
    }

    fn reset(&mut self) {
        self.guest = None;
        self.needs_reset = false;
    }
}

#[cfg(test)]
mod tests;
