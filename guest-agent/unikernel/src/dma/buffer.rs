//! Buffers that share no cache line with anything else.

use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicBool, Ordering};

use agent::dma_tracker::LINE;

/// One buffer of `LEN` bytes in whole cache lines.
#[repr(C, align(64))]
pub struct DmaBuffer<const LEN: usize>([u8; LEN]);

impl<const LEN: usize> DmaBuffer<LEN> {
    const WHOLE_LINES: () = assert!(LEN > 0 && LEN.is_multiple_of(LINE as usize));

    /// Zeroed.
    const fn new() -> Self {
        let () = Self::WHOLE_LINES;
        Self([0; LEN])
    }

    /// The bytes, for whoever owns the buffer at the moment.
    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

/// The buffers of one queue, in static memory, to be taken once.
#[repr(C)]
pub struct Pool<const COUNT: usize, const LEN: usize> {
    /// Ahead of the buffers, in a cache line of its own, where taking them touches no other page than the first.
    taken: AtomicBool,
    buffers: UnsafeCell<[DmaBuffer<LEN>; COUNT]>,
}

// SAFETY: `take` hands the buffers out once, so two threads never reach them.
unsafe impl<const COUNT: usize, const LEN: usize> Sync for Pool<COUNT, LEN> {}

impl<const COUNT: usize, const LEN: usize> Pool<COUNT, LEN> {
    /// All zero, so it takes no room in the image and touches no page before it is used.
    pub const fn new() -> Self {
        let buffers = UnsafeCell::new([const { DmaBuffer::new() }; COUNT]);
        Self { buffers, taken: AtomicBool::new(false) }
    }

    /// The buffers.
    ///
    /// # Panics
    /// The second time.
    #[expect(clippy::mut_from_ref, reason = "the flag makes it the only one")]
    pub(super) fn take(&'static self) -> &'static mut [DmaBuffer<LEN>; COUNT] {
        assert!(!self.taken.swap(true, Ordering::Relaxed), "a pool serves one queue");
        // SAFETY: the flag just went from false to true, so this is the only reference ever made.
        unsafe { &mut *self.buffers.get() }
    }
}
