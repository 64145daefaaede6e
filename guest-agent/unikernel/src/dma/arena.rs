//! Memory to attack devices with. No Rust object is made of it: a device that was told to may write to it at any time.

use core::cell::UnsafeCell;

use agent::attack::ARENA_LEN;

#[repr(C, align(4096))]
struct Arena(UnsafeCell<[u8; ARENA_LEN as usize]>);

// SAFETY: `put` alone accesses it, byte by byte, and makes no reference.
unsafe impl Sync for Arena {}

#[unsafe(link_section = ".bss.large.arena")]
static ARENA: Arena = Arena(UnsafeCell::new([0; ARENA_LEN as usize]));

/// Its address.
pub fn start() -> u64 {
    ARENA.0.get() as u64
}

/// Writes `bytes`, `at` bytes from its start.
///
/// # Panics
/// If they do not fit.
pub fn put(at: u32, bytes: &[u8]) {
    assert!(at as usize + bytes.len() <= ARENA_LEN as usize, "{at:#x} is not in the arena");
    for (index, byte) in bytes.iter().enumerate() {
        let place = ARENA.0.get().cast::<u8>().wrapping_add(at as usize + index);
        // SAFETY: in the arena, as was just checked, where there is only raw memory.
        unsafe { place.write_volatile(*byte) }
    }
}
