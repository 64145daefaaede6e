//! Virtqueues that own their buffers, so that no one else can touch a buffer that is the device's.

use alloc::boxed::Box;
use core::sync::atomic::{Ordering, fence};

use virtio_drivers::Result;
use virtio_drivers::queue::VirtQueue;

use super::buffer::{Buffer, DmaBuffer, Pool};
use super::hal::AgentHal;
use super::ring_places::RingPlaces;
use crate::arch::virtio::QueueSetUp;

/// The device broke the rules of the ring; the queue is of no more use.
#[derive(Clone, Copy, Debug)]
pub struct BrokenQueue;

/// A buffer in the device's hands.
#[derive(Clone, Copy)]
struct Posted {
    slot: u8,
    len: u32,
}

/// Buffers and ring of one queue. A buffer is the device's exactly while `posted` names its slot.
struct Slots<const SIZE: usize, const LEN: usize, B: 'static = DmaBuffer<LEN>> {
    ring: VirtQueue<AgentHal, SIZE>,
    set_up: QueueSetUp,
    buffers: &'static mut [B; SIZE],
    /// By descriptor.
    posted: [Option<Posted>; SIZE],
}

impl<const SIZE: usize, const LEN: usize, B: Buffer<LEN>> Slots<SIZE, LEN, B> {
    const SIZES_FIT: () = assert!(SIZE <= 1 << 8 && LEN <= u32::MAX as usize);

    /// Boxed and not inlined: three queues in one frame would spread the stack over pages that are never used again.
    #[inline(never)]
    fn new(index: u16, pool: &'static Pool<SIZE, LEN, B>) -> Result<Box<Self>> {
        let () = Self::SIZES_FIT;
        // No event index: `VirtQueue::should_notify` compares it without wrapping and would lose a notification once
        // in 65,536 packets. The flags do as well.
        let mut places = RingPlaces::default();
        let ring = VirtQueue::new(&mut places, index, false, false)?;
        Ok(Box::new(Self { ring, set_up: places.0, buffers: pool.take(), posted: [None; SIZE] }))
    }

    /// Gives the first `len` bytes of a buffer to the device, to be written or to be read.
    fn post(&mut self, slot: u8, len: u32, device_writes: bool) -> Result {
        let buffer = &mut self.buffers[usize::from(slot)].bytes_mut()[..len as usize];
        // SAFETY: the buffer is static and, being `posted` from here on, not touched before `pop`.
        let token = unsafe {
            if device_writes {
                self.ring.add(&[], &mut [buffer])?
            } else {
                self.ring.add(&[buffer], &mut [])?
            }
        };
        self.posted[usize::from(token)] = Some(Posted { slot, len });
        Ok(())
    }

    /// Takes the next buffer back that the device has finished with: its slot and how much the device says it wrote.
    fn pop(&mut self, device_writes: bool) -> core::result::Result<Option<Posted>, BrokenQueue> {
        let Some(token) = self.ring.peek_used() else { return Ok(None) };
        let entry = self.posted.get_mut(usize::from(token)).ok_or(BrokenQueue)?;
        let Posted { slot, len } = entry.take().ok_or(BrokenQueue)?;
        let buffer = &mut self.buffers[usize::from(slot)].bytes_mut()[..len as usize];
        // SAFETY: `posted` had these bytes under this token, so they are what `add` was given.
        let written = unsafe {
            if device_writes {
                self.ring.pop_used(token, &[], &mut [buffer])
            } else {
                self.ring.pop_used(token, &[buffer], &mut [])
            }
        };
        match written {
            Ok(written) if written <= len => Ok(Some(Posted { slot, len: written })),
            _ => Err(BrokenQueue),
        }
    }

    fn should_notify(&self) -> bool {
        // The device must see the new index before we look whether it sleeps (virtio 1.3, section 2.7.13.4.1).
        fence(Ordering::SeqCst);
        self.ring.should_notify()
    }
}

/// A queue on which the device gives data to the guest. Its buffers are always posted.
pub struct ToGuestQueue<const SIZE: usize, const LEN: usize, B: 'static = DmaBuffer<LEN>>(
    Box<Slots<SIZE, LEN, B>>,
);

impl<const SIZE: usize, const LEN: usize, B: Buffer<LEN>> ToGuestQueue<SIZE, LEN, B> {
    /// Prepares the queue and posts all buffers.
    ///
    /// # Errors
    /// If no memory is left for rings.
    pub fn new(index: u16, pool: &'static Pool<SIZE, LEN, B>) -> Result<Self> {
        let mut slots = Slots::new(index, pool)?;
        for slot in 0..SIZE {
            slots.post(slot as u8, LEN as u32, true)?;
        }
        Ok(Self(slots))
    }

    /// Lets `read` look at the next buffer that the device has filled, then posts it again. Returns what `read` did.
    ///
    /// # Errors
    /// If the device broke the rules of the ring.
    pub fn take<T>(
        &mut self,
        read: impl FnOnce(&[u8]) -> T,
    ) -> core::result::Result<Option<T>, BrokenQueue> {
        let Some(Posted { slot, len }) = self.0.pop(true)? else { return Ok(None) };
        let result = read(&self.0.buffers[usize::from(slot)].bytes_mut()[..len as usize]);
        self.0.post(slot, LEN as u32, true).map_err(|_| BrokenQueue)?;
        Ok(Some(result))
    }

    /// Whether the device has filled a buffer.
    pub fn is_ready(&self) -> bool {
        self.0.ring.can_pop()
    }

    /// Asks for interrupts, or for none.
    pub fn set_interrupts(&mut self, wanted: bool) {
        self.0.ring.set_dev_notify(wanted);
    }

    /// Whether the device wants to be told of newly posted buffers.
    pub fn should_notify(&self) -> bool {
        self.0.should_notify()
    }

    /// What the device has to know of the queue.
    pub fn set_up(&self) -> QueueSetUp {
        self.0.set_up
    }
}

/// A queue on which the guest gives data to the device.
pub struct ToHostQueue<const SIZE: usize, const LEN: usize> {
    slots: Box<Slots<SIZE, LEN>>,
    busy: [bool; SIZE],
}

impl<const SIZE: usize, const LEN: usize> ToHostQueue<SIZE, LEN> {
    /// Prepares the queue, without interrupts.
    ///
    /// # Errors
    /// If no memory is left for rings.
    pub fn new(index: u16, pool: &'static Pool<SIZE, LEN>) -> Result<Self> {
        let mut slots = Slots::new(index, pool)?;
        slots.ring.set_dev_notify(false);
        Ok(Self { slots, busy: [false; SIZE] })
    }

    /// Sends as long as there is a free buffer and `write` fills it (returning how much). Returns `None` if nothing was
    /// sent, else whether the device wants to be told.
    ///
    /// # Errors
    /// If the device broke the rules of the ring.
    pub fn send(
        &mut self,
        mut write: impl FnMut(&mut [u8]) -> Option<usize>,
    ) -> core::result::Result<Option<bool>, BrokenQueue> {
        while let Some(Posted { slot, .. }) = self.slots.pop(false)? {
            self.busy[usize::from(slot)] = false;
        }
        let mut sent = false;
        while let Some(slot) = self.busy.iter().position(|busy| !busy)
            && let Some(len) = write(self.slots.buffers[slot].bytes_mut())
        {
            self.slots.post(slot as u8, len as u32, false).map_err(|_| BrokenQueue)?;
            self.busy[slot] = true;
            sent = true;
        }
        Ok(sent.then(|| self.slots.should_notify()))
    }

    /// What the device has to know of the queue.
    pub fn set_up(&self) -> QueueSetUp {
        self.slots.set_up
    }

    /// Whether every buffer waits for the device.
    pub fn is_full(&self) -> bool {
        self.busy.iter().all(|busy| *busy)
    }

    /// Whether the device has finished with a buffer.
    pub fn is_ready(&self) -> bool {
        self.slots.ring.can_pop()
    }

    /// Asks for interrupts when buffers become free, or for none.
    pub fn set_interrupts(&mut self, wanted: bool) {
        self.slots.ring.set_dev_notify(wanted);
    }
}
