//! RAM that belongs to nobody: behind the image, to the end of what the loader says is usable and the page tables map. The
//! monitor gives it in large pages and takes nothing for what is only read, so all of it can be looked at.

use core::mem::MaybeUninit;

use agent::residue::SCRATCH_BYTES;

use super::pvh;

const PAGE: u64 = 4096;
/// The identity map of memory (tables.s).
const MAPPED: u64 = 1 << 30;
/// What a page is stamped with, plus its address.
const STAMP: u64 = 0x1eaf_0000_0000_0000;

unsafe extern "C" {
    // link.ld; only its address means anything.
    static image_end: u8;
}

/// Where usable RAM around the image ends.
fn usable_end() -> u64 {
    let start = (&raw const image_end) as u64;
    pvh::memory_map()
        .iter()
        .filter(|range| range.kind == 1 && range.start <= start)
        .map(|range| range.start.saturating_add(range.len))
        .max()
        .unwrap_or(start)
}

/// All of it.
#[cfg(feature = "attacks")]
pub fn free() -> core::ops::Range<u64> {
    let start = (&raw const image_end) as u64;
    start..usable_end().max(start)
}

/// Whether there is RAM that the page tables do not map.
pub fn reaches_beyond_map() -> bool {
    usable_end() > MAPPED
}

/// The word that is looked at of each page.
fn words() -> impl Iterator<Item = *mut u64> {
    let start = (&raw const image_end) as u64;
    let end = usable_end().min(MAPPED);
    let pages = end.saturating_sub(start) / PAGE;
    (0..pages).map(move |page| (start + page * PAGE) as *mut u64)
}

/// How many pages hold anything.
pub fn dirty_pages() -> u64 {
    // SAFETY: `words` gives aligned addresses in mapped memory behind the image, of which no Rust object is made.
    words().filter(|word| unsafe { word.read_volatile() } != 0).count() as u64
}

/// Stamps pages, and returns how many.
pub fn stamp() -> u64 {
    // SAFETY: as in `dirty_pages`; nobody else uses this memory.
    words().map(|word| unsafe { word.write_volatile(STAMP + word as u64) }).count() as u64
}

/// Memory that KVM may write to at any time, and that the agent never reads.
#[repr(C, align(64))]
struct Scratch(MaybeUninit<[u8; SCRATCH_BYTES]>);

// Behind everything else: what lies before the heap pushes its start into another page.
#[unsafe(link_section = ".bss.large.scratch")]
static mut SCRATCH: Scratch = Scratch(MaybeUninit::uninit());

/// Where that memory is: at the same place in every life.
pub fn scratch() -> u64 {
    (&raw const SCRATCH) as u64
}
