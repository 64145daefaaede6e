//! What `virtio-drivers` asks of the platform, with the tracker listening.

use core::cell::{RefCell, UnsafeCell};
use core::ptr::NonNull;
use core::sync::atomic::{AtomicUsize, Ordering};

use agent::dma_tracker::{DmaTracker, LINE, Span};
use agent_protocol::DmaReport;
use virtio_drivers::{BufferDirection, Hal, PAGE_SIZE, PhysAddr};

/// Six queues with two rings each, none of them larger than a page.
const RING_PAGES: usize = 12;

#[repr(C, align(4096))]
struct RingPages(UnsafeCell<[[u8; PAGE_SIZE]; RING_PAGES]>);

// SAFETY: `dma_alloc` alone touches the pages, each once, before it gives it to one queue.
unsafe impl Sync for RingPages {}

#[unsafe(link_section = ".bss.large.rings")]
static RINGS: RingPages = RingPages(UnsafeCell::new([[0; PAGE_SIZE]; RING_PAGES]));
static RINGS_USED: AtomicUsize = AtomicUsize::new(0);

struct Tracker(RefCell<DmaTracker>);

// SAFETY: the agent has one CPU and one thread, and ring 0's handlers know nothing of the tracker.
unsafe impl Sync for Tracker {}

static TRACKER: Tracker = Tracker(RefCell::new(DmaTracker::new()));

/// What the tracker saw so far.
pub fn report() -> DmaReport {
    TRACKER.0.borrow().report()
}

/// The platform.
pub(super) struct AgentHal;

fn span(buffer: NonNull<[u8]>, direction: BufferDirection) -> Span {
    let device_writes = direction != BufferDirection::DriverToDevice;
    let (start, len) = (buffer.cast::<u8>().as_ptr() as u64, buffer.len() as u64);
    // All that a device writes is the front of a `DmaBuffer` or its last line, whose lines belong to the device as a whole. What
    // begins in the middle of a line is none of these.
    let owns_lines = device_writes && start.is_multiple_of(LINE);
    let len = if owns_lines { len.next_multiple_of(LINE) } else { len };
    Span { start, len, device_writes }
}

// SAFETY: pages come zeroed from the image's bss, aligned, each given out once; physical and virtual addresses are the
// same by the identity map of tables.s.
unsafe impl Hal for AgentHal {
    fn dma_alloc(pages: usize, direction: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        let first = RINGS_USED.fetch_add(pages, Ordering::Relaxed);
        if first + pages > RING_PAGES {
            // Zero means failure.
            return (0, NonNull::dangling());
        }
        let rings = NonNull::from(&RINGS.0).cast::<u8>();
        // SAFETY: `first` is below RING_PAGES, so the result lies in the same static.
        let start = unsafe { rings.add(first * PAGE_SIZE) };
        for page in 0..pages {
            // SAFETY: these pages are still nobody's. They are zero already; but where a page is read before the host
            // writes it, it comes into the guest twice, at 10 us each.
            unsafe { start.add(page * PAGE_SIZE).write_volatile(0) };
        }
        let bytes = NonNull::slice_from_raw_parts(start, pages * PAGE_SIZE);
        TRACKER.0.borrow_mut().share_ring(span(bytes, direction));
        (start.as_ptr() as PhysAddr, start)
    }

    // SAFETY: asks nothing of its caller, since nothing is given back.
    unsafe fn dma_dealloc(_: PhysAddr, _: NonNull<u8>, _: usize) -> i32 {
        // Queues live as long as the machine; a dropped one (failed setup) only wastes its pages.
        0
    }

    // SAFETY: asks nothing of its caller, since it never returns.
    unsafe fn mmio_phys_to_virt(address: PhysAddr, _: usize) -> NonNull<u8> {
        // For PCI alone, which the agent does not drive.
        unreachable!("no PCI device, but {address:#x}")
    }

    // SAFETY: the caller keeps the buffer valid until `unshare`; nothing here looks into it.
    unsafe fn share(buffer: NonNull<[u8]>, direction: BufferDirection) -> PhysAddr {
        let in_order = TRACKER.0.borrow_mut().hand_over(span(buffer, direction));
        debug_assert!(in_order, "{:?}", report().violations);
        buffer.cast::<u8>().as_ptr() as PhysAddr
    }

    // SAFETY: as for `share`.
    unsafe fn unshare(_: PhysAddr, buffer: NonNull<[u8]>, direction: BufferDirection) {
        TRACKER.0.borrow_mut().hand_back(span(buffer, direction));
    }
}
