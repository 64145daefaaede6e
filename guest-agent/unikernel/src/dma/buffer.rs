//! Buffers that share no cache line with anything else.

use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicU8, Ordering};

use agent::dma_tracker::LINE;

/// `LEN` bytes that may be given to a device, which may write them.
pub trait Buffer<const LEN: usize>: Sized + 'static {
    /// Zeroed.
    const EMPTY: Self;

    /// The bytes, for whoever owns the buffer at the moment.
    fn bytes_mut(&mut self) -> &mut [u8];
}

/// One buffer of `LEN` bytes in whole cache lines.
#[repr(C, align(64))]
pub struct DmaBuffer<const LEN: usize>([u8; LEN]);

impl<const LEN: usize> DmaBuffer<LEN> {
    const WHOLE_LINES: () = assert!(LEN > 0 && LEN.is_multiple_of(LINE as usize));
}

impl<const LEN: usize> Buffer<LEN> for DmaBuffer<LEN> {
    const EMPTY: Self = {
        let () = Self::WHOLE_LINES;
        Self([0; LEN])
    };

    fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

/// A buffer that shares its cache line with whatever is beside it, as in Linux's `struct virtio_vsock`: what the trackers on
/// both sides have to find.
#[cfg(feature = "packed-event-buffers")]
#[repr(C)]
pub struct PackedBuffer<const LEN: usize>([u8; LEN]);

#[cfg(feature = "packed-event-buffers")]
impl<const LEN: usize> Buffer<LEN> for PackedBuffer<LEN> {
    const EMPTY: Self = Self([0; LEN]);

    fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

const TAKEN: u8 = 1;

/// The buffers of one queue, in static memory, to be taken once.
#[repr(C, align(64))]
pub struct Pool<const COUNT: usize, const LEN: usize, B = DmaBuffer<LEN>> {
    /// 0 until the buffers are taken. Ahead of them, in a cache line of its own, where taking them touches no other page than
    /// the first. (Packed buffers have no other line: they begin with the next byte.)
    state: AtomicU8,
    buffers: UnsafeCell<[B; COUNT]>,
}

// SAFETY: `take` hands the buffers out once, so two threads never reach them.
unsafe impl<const COUNT: usize, const LEN: usize, B> Sync for Pool<COUNT, LEN, B> {}

impl<const COUNT: usize, const LEN: usize, B: Buffer<LEN>> Pool<COUNT, LEN, B> {
    /// All zero, so it takes no room in the image and touches no page before it is used.
    pub const fn new() -> Self {
        let buffers = UnsafeCell::new([const { B::EMPTY }; COUNT]);
        Self { buffers, state: AtomicU8::new(0) }
    }

    /// The buffers.
    ///
    /// # Panics
    /// The second time.
    #[expect(clippy::mut_from_ref, reason = "the state makes it the only one")]
    pub(super) fn take(&'static self) -> &'static mut [B; COUNT] {
        assert!(self.state.swap(TAKEN, Ordering::Relaxed) == 0, "a pool serves one queue");
        // SAFETY: the state just went from 0 to another value, which it keeps, so this is the only reference ever made.
        unsafe { &mut *self.buffers.get() }
    }

    /// Writes to the byte beside the buffers while the device has them, as Linux does with `event_run`.
    #[cfg(feature = "packed-event-buffers")]
    pub fn note_running(&'static self) {
        const RUNNING: u8 = 2;
        self.state.store(RUNNING, Ordering::Relaxed);
    }
}
