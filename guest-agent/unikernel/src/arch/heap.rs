//! The heap: a bounded piece of the image's zeroed memory. It has to hold what all connections together may hold
//! (5 MiB, by `vsock/memory.rs`) and one request being answered, with room for fragmentation.

use core::mem::MaybeUninit;

use linked_list_allocator::LockedHeap;

const SIZE: usize = 7 << 20;

#[global_allocator]
static HEAP: LockedHeap = LockedHeap::empty();

#[repr(C, align(64))]
struct Arena(MaybeUninit<[u8; SIZE]>);

#[unsafe(link_section = ".bss.arena")]
static mut ARENA: Arena = Arena(MaybeUninit::uninit());

/// Gives the arena to the allocator. To be called once, before the first allocation.
pub fn init() {
    let arena = (&raw mut ARENA).cast::<u8>();
    // SAFETY: the arena lives forever and nobody but the allocator uses it; `agent_start` calls this once.
    unsafe { HEAP.lock().init(arena, SIZE) }
}
