//! The time-stamp counter of ring 0, read cheaply from ring 3.
//!
//! On hardware both rings read the same counter. A software KVM runs ring 3 natively, where RDTSC may show the host's
//! counter while ring 0 sees the guest's; both run at the same rate, so the difference stays.

use core::arch::x86_64::_rdtsc;
use core::sync::atomic::{AtomicU64, Ordering};

use super::records;

/// From a reading of ring 0 to ring 3's next: less than this (a second at least) if it is one counter.
const SAME_COUNTER: u64 = 1 << 32;

/// How far ring 0's counter is ahead, modulo 2^64; 0 if it is one counter.
static RING0_AHEAD: AtomicU64 = AtomicU64::new(0);

/// A reading of ring 3's counter.
#[derive(Clone, Copy)]
pub struct Native(u64);

impl Native {
    fn now() -> Self {
        // SAFETY: RDTSC exists on every x86-64 and the entry code leaves CR4.TSD clear.
        Self(unsafe { _rdtsc() })
    }

    /// What ring 0's counter showed at that time, as far as is known by now.
    pub fn in_ring0(self) -> u64 {
        self.0.wrapping_add(RING0_AHEAD.load(Ordering::Relaxed))
    }
}

/// Compares the counters for the first time. To be called first thing in ring 3; returns when that was.
pub fn init() -> Native {
    let first = Native::now();
    compare_with(records::boot().tsc_ring3, first);
    first
}

/// Compares the counters once more: `ring0` is from the end of a call of the gate that has just returned.
pub fn compare(ring0: u64) {
    compare_with(ring0, Native::now());
}

/// Now.
pub fn now() -> u64 {
    Native::now().in_ring0()
}

/// `later` is known to be later than `ring0`, if not how much: the less it is, the larger and the better the difference.
fn compare_with(ring0: u64, later: Native) {
    if later.0.wrapping_sub(ring0) < SAME_COUNTER {
        return;
    }
    let ahead = ring0.wrapping_sub(later.0);
    let known = RING0_AHEAD.load(Ordering::Relaxed);
    if known == 0 || ahead.wrapping_sub(known).cast_signed() > 0 {
        RING0_AHEAD.store(ahead, Ordering::Relaxed);
    }
}
