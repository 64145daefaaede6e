//! Which pages the host has written: KVM's log has only what the guest and KVM themselves write.

use std::num::NonZeroUsize;
use std::sync::OnceLock;

use vm_memory::bitmap::{AtomicBitmap, Bitmap, BitmapSlice, NewBitmap, RefSlice, WithBitmapSlice};

use super::PAGE;

/// What a range of RAM knows of the host's writes: nothing, until somebody wants it to.
#[derive(Debug, Default)]
pub struct WriteLog(OnceLock<AtomicBitmap>);

/// The part of it that a slice of RAM has, if anybody wants to know.
pub type WriteMark<'a> = Option<RefSlice<'a, AtomicBitmap>>;

impl WriteLog {
    /// From now on writes to this range, of `bytes`, are noted.
    pub(super) fn begin(&self, bytes: u64) {
        const SIZE: NonZeroUsize = NonZeroUsize::new(PAGE).expect("pages have a size");
        self.0.get_or_init(|| AtomicBitmap::new(bytes as usize, SIZE));
    }

    /// Whether they are.
    pub(super) fn has_begun(&self) -> bool {
        self.0.get().is_some()
    }

    /// A bit for each page that was written since the last time, 64 in a word.
    pub(super) fn take(&self) -> Vec<u64> {
        self.0.get().map_or_else(Vec::new, AtomicBitmap::get_and_reset)
    }
}

impl<'a> WithBitmapSlice<'a> for WriteLog {
    type S = WriteMark<'a>;
}

impl Bitmap for WriteLog {
    fn mark_dirty(&self, offset: usize, len: usize) {
        if let Some(bitmap) = self.0.get() {
            bitmap.mark_dirty(offset, len);
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.0.get().is_some_and(|bitmap| bitmap.dirty_at(offset))
    }

    fn slice_at(&self, offset: usize) -> WriteMark<'_> {
        self.0.get().map(|bitmap| bitmap.slice_at(offset))
    }
}

impl NewBitmap for WriteLog {
    fn with_len(_: usize) -> Self {
        Self::default()
    }
}

/// What is told of a write that goes past vm-memory.
pub trait Mark<'a>: BitmapSlice {
    /// Where it is noted, if it is.
    fn mark(&self) -> WriteMark<'a>;
}

impl<'a> Mark<'a> for WriteMark<'a> {
    fn mark(&self) -> WriteMark<'a> {
        *self
    }
}

/// The host's own memory.
impl<'a> Mark<'a> for () {
    fn mark(&self) -> WriteMark<'a> {
        None
    }
}
