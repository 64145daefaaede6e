//! A virtqueue for one request at a time: bytes for the device, then bytes from it.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::sync::atomic::{Ordering, fence};

use agent::dma_tracker::LINE;
use virtio_drivers::Result;
use virtio_drivers::queue::VirtQueue;

use super::BrokenQueue;
use super::buffer::{Buffer, DmaBuffer, Pool};
use super::hal::AgentHal;
use super::ring_places::RingPlaces;
use crate::arch::virtio::QueueSetUp;

/// Descriptors: of request, answer and status, and a power of two.
const SIZE: usize = 4;

const REQUEST: usize = 0;
const ANSWER: usize = 1;

/// The buffers of one queue: for a request, and for its answer with, in the last line, the status.
pub type RequestPool<const LEN: usize> = Pool<2, LEN>;

/// How many bytes of each buffer a request has. Buffers without any are left out.
#[derive(Clone, Copy)]
pub struct Lens {
    /// For the device to read.
    pub request: usize,
    /// For the device to write.
    pub answer: usize,
    /// For the device to write behind that.
    pub status: usize,
}

/// The queue with its buffers, which are the device's only during [`RequestQueue::call`].
pub struct RequestQueue<const LEN: usize> {
    ring: Box<VirtQueue<AgentHal, SIZE>>,
    set_up: QueueSetUp,
    buffers: &'static mut [DmaBuffer<LEN>; 2],
}

impl<const LEN: usize> RequestQueue<LEN> {
    const STATUS_AT: usize = LEN - LINE as usize;

    /// Prepares queue 0 of a device, without interrupts.
    ///
    /// # Errors
    /// If no memory is left for rings.
    pub fn new(pool: &'static RequestPool<LEN>) -> Result<Self> {
        let mut places = RingPlaces::default();
        let mut ring = Box::new(VirtQueue::new(&mut places, 0, false, false)?);
        ring.set_dev_notify(false);
        Ok(Self { ring, set_up: places.0, buffers: pool.take() })
    }

    /// What the device has to know of the queue.
    pub fn set_up(&self) -> QueueSetUp {
        self.set_up
    }

    /// What the device is going to read.
    pub fn request_mut(&mut self) -> &mut [u8] {
        self.buffers[REQUEST].bytes_mut()
    }

    /// What the device has written.
    pub fn answer(&mut self) -> &[u8] {
        self.buffers[ANSWER].bytes_mut()
    }

    /// What the device has written behind that, and what is to be there before.
    pub fn status_mut(&mut self) -> &mut u8 {
        &mut self.buffers[ANSWER].bytes_mut()[Self::STATUS_AT]
    }

    /// Gives the buffers to the device, has `notify` tell it if it wants to be told, and waits until they are back. Returns
    /// how many bytes the device says it wrote.
    ///
    /// # Errors
    /// If the device broke the rules of the ring.
    pub fn call(
        &mut self,
        lens: Lens,
        notify: impl FnOnce(),
    ) -> core::result::Result<u32, BrokenQueue> {
        let [request, answer] = &mut *self.buffers;
        let request = &request.bytes_mut()[..lens.request];
        let (answer, status) = answer.bytes_mut().split_at_mut(Self::STATUS_AT);
        let inputs: Vec<&[u8]> = Some(request).filter(|r| !r.is_empty()).into_iter().collect();
        let outputs = [&mut answer[..lens.answer], &mut status[..lens.status]];
        let mut outputs: Vec<&mut [u8]> = outputs.into_iter().filter(|o| !o.is_empty()).collect();
        // SAFETY: the buffers are static and, being borrowed here, touched by nobody before they are back.
        let token = unsafe { self.ring.add(&inputs, &mut outputs) }.map_err(|_| BrokenQueue)?;
        // The device must see the new index before we look whether it sleeps (virtio 1.3, section 2.7.13.4.1).
        fence(Ordering::SeqCst);
        if self.ring.should_notify() {
            notify();
        }
        while !self.ring.can_pop() {
            core::hint::spin_loop();
        }
        // SAFETY: the same buffers as above, and the device is done with them.
        unsafe { self.ring.pop_used(token, &inputs, &mut outputs) }.map_err(|_| BrokenQueue)
    }
}
