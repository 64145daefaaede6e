//! One virtqueue as the device sees it: chains in, completions out, notifications only where they help.

use std::sync::atomic::{Ordering, fence};

use virtio_bindings::bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::audit::QueueAudit;
use super::chain::{Chain, Direction};
use super::{DriverQueue, RingPosition};
use crate::memory::GuestRam;

/// The guest has broken the queue itself: rings outside RAM, or an index that jumped by more than the queue's size.
/// Only a reset helps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BrokenRing;

impl From<virtio_queue::Error> for BrokenRing {
    fn from(_: virtio_queue::Error) -> Self {
        Self
    }
}

/// A queue, and the chain that was taken from it last.
#[derive(Debug)]
pub struct Ring {
    queue: Queue,
    chain: Chain,
    /// Driver notifications are wanted.
    listening: bool,
    /// There are completions that the driver may want to hear of.
    unsignalled: bool,
    /// Whoever looks at the driver's buffers.
    audit: Option<QueueAudit>,
}

impl Ring {
    /// Takes a queue that the driver has set up; `None` if it left the queue alone.
    pub fn new(
        queue: impl Into<DriverQueue>,
        direction: Direction,
        ram: &GuestRam,
        event_idx: bool,
    ) -> Result<Option<Self>, BrokenRing> {
        let DriverQueue { mut queue, audit } = queue.into();
        if !queue.ready() {
            return Ok(None);
        }
        if !queue.is_valid(ram) {
            return Err(BrokenRing);
        }
        queue.set_event_idx(event_idx);
        let chain = Chain::new(direction, queue.size());
        Ok(Some(Self { queue, chain, listening: true, unsignalled: false, audit }))
    }

    /// How far the device has come, with all that it has taken given back.
    pub fn position(&self) -> RingPosition {
        RingPosition { next_available: self.queue.next_avail(), next_used: self.queue.next_used() }
    }

    /// The driver's index of the available ring: another one when it has posted something.
    pub fn posted(&self, ram: &GuestRam) -> Result<u16, BrokenRing> {
        Ok(self.queue.avail_idx(ram, Ordering::Acquire)?.0)
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Takes the next sound chain that holds at least `min_len` bytes in all; it is then [`Ring::chain`]. Others are
    /// completed unused and counted in `bad_chains`.
    pub fn take(
        &mut self,
        ram: &GuestRam,
        min_len: usize,
        bad_chains: &mut u64,
    ) -> Result<bool, BrokenRing> {
        // A driver on another CPU may add as fast as this takes; what it adds beyond one round waits for the next call.
        for _ in 0..self.queue.size() {
            let Some(descriptors) = self.queue.iter(ram)?.next() else { return Ok(false) };
            if self.listening {
                self.queue.disable_notification(ram)?;
                self.listening = false;
            }
            self.look();
            let walked = self.chain.walk(ram, descriptors);
            if walked.is_ok() && self.chain.len() >= min_len as u64 {
                return Ok(true);
            }
            *bad_chains += 1;
            self.complete(ram, 0)?;
        }
        Ok(false)
    }

    /// Takes the next chain if there is one and it is such as [`Ring::take`] gives; any other stays where it is. All that were
    /// taken since the last completion can then be put back.
    pub fn take_sound(&mut self, ram: &GuestRam, min_len: usize) -> Result<bool, BrokenRing> {
        let Some(descriptors) = self.queue.iter(ram)?.next() else { return Ok(false) };
        self.look();
        let walked = self.chain.walk(ram, descriptors);
        let is_sound = walked.is_ok() && self.chain.len() >= min_len as u64;
        if !is_sound {
            self.put_back();
        }
        Ok(is_sound)
    }

    /// Whatever the device takes is audited by then, however it came.
    fn look(&self) {
        if let Some(audit) = &self.audit {
            audit.look();
        }
    }

    /// The chain that was taken last.
    pub fn chain(&self) -> &Chain {
        &self.chain
    }

    /// Gives the chain that was taken last back to the driver, with `len` bytes written into it.
    pub fn complete(&mut self, ram: &GuestRam, len: u32) -> Result<(), BrokenRing> {
        self.add_used(ram, self.chain.head(), len)
    }

    /// Hands the chain that was taken last over, for [`Ring::complete_chain`] later; `spare` takes its place.
    pub fn take_out(&mut self, spare: Chain) -> Chain {
        std::mem::replace(&mut self.chain, spare)
    }

    /// Gives `chain`, which was taken out, back to the driver, with `len` bytes written into it.
    pub fn complete_chain(
        &mut self,
        ram: &GuestRam,
        chain: &Chain,
        len: u32,
    ) -> Result<(), BrokenRing> {
        self.add_used(ram, chain.head(), len)
    }

    fn add_used(&mut self, ram: &GuestRam, head: u16, len: u32) -> Result<(), BrokenRing> {
        // Before the driver can know of it, and post it again.
        if let Some(audit) = &self.audit {
            audit.release(head);
        }
        self.queue.add_used(ram, head, len)?;
        self.unsignalled = true;
        Ok(())
    }

    /// Puts the chain that was taken last back to the front of the queue.
    pub fn put_back(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Asks the driver for a notification when it adds a chain. True if it has added some already: then take them.
    pub fn listen(&mut self, ram: &GuestRam) -> Result<bool, BrokenRing> {
        self.listening = true;
        Ok(self.queue.enable_notification(ram)?)
    }

    /// Asks the driver for a notification when it has posted more than `posted`, however much of that was taken. True if it has
    /// done so already.
    pub fn listen_beyond(&mut self, ram: &GuestRam, posted: u16) -> Result<bool, BrokenRing> {
        self.listen(ram)?;
        if self.queue.event_idx_enabled() {
            // `avail_event`, behind the used ring's entries (virtio 1.2, section 2.7.10); virtio-queue has the next entry there.
            let at = self.queue.used_ring() + 4 + 8 * u64::from(self.queue.size());
            ram.store(posted.to_le(), GuestAddress(at), Ordering::Relaxed)
                .map_err(|_| BrokenRing)?;
            // As with flags: one of the two sides sees the other.
            fence(Ordering::SeqCst);
        }
        Ok(self.posted(ram)? != posted)
    }

    /// True if the driver wants to hear of completions since the last call.
    pub fn must_signal(&mut self, ram: &GuestRam) -> Result<bool, BrokenRing> {
        if !std::mem::take(&mut self.unsignalled) {
            return Ok(false);
        }
        // virtio-queue knows only the event index (virtio 1.2, section 2.7.7).
        if !self.queue.event_idx_enabled() {
            // The driver clears the flag, then looks for completions; this side completes, then looks at the flag. With
            // the fence at least one of the two sees the other.
            fence(Ordering::SeqCst);
            let flags: u16 = ram
                .load(GuestAddress(self.queue.avail_ring()), Ordering::Relaxed)
                .map_err(|_| BrokenRing)?;
            if u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT != 0 {
                return Ok(false);
            }
        }
        Ok(self.queue.needs_notification(ram)?)
    }
}
