//! The time-stamp counter of ring 0, read cheaply from ring 3.
//!
//! On hardware both rings read the same counter. A software KVM runs ring 3 natively, where RDTSC may show the host's
//! counter while ring 0 sees the guest's; both run at the same rate, so one comparison is enough.

use core::arch::x86_64::_rdtsc;
use core::sync::atomic::{AtomicU64, Ordering};

use super::gate;

/// From a reading of ring 0 to ring 3's next: less than this (a second at least) if it is one counter.
const SAME_COUNTER: u64 = 1 << 32;

/// How far ring 0's counter is ahead, modulo 2^64; 1 before the first comparison.
static RING0_AHEAD: AtomicU64 = AtomicU64::new(UNKNOWN);
const UNKNOWN: u64 = 1;

/// Ring 3's counter, which `Agent` may have to convert.
#[derive(Clone, Copy)]
pub struct Native(u64);

impl Native {
    /// Now.
    pub fn now() -> Self {
        // SAFETY: RDTSC exists on every x86-64 and the entry code leaves CR4.TSD clear.
        Self(unsafe { _rdtsc() })
    }

    /// What ring 0's counter showed at that time.
    pub fn at_ring0(self) -> u64 {
        if RING0_AHEAD.load(Ordering::Relaxed) == UNKNOWN {
            calibrate(gate::ring0_tsc());
        }
        self.0.wrapping_add(RING0_AHEAD.load(Ordering::Relaxed))
    }
}

/// Compares the counters, if that was not done yet. `ring0` was read just now, at the end of a call of the gate.
pub fn calibrate(ring0: u64) {
    if RING0_AHEAD.load(Ordering::Relaxed) != UNKNOWN {
        return;
    }
    let Native(native) = Native::now();
    let one_counter = native.wrapping_sub(ring0) < SAME_COUNTER;
    let ahead = if one_counter { 0 } else { ring0.wrapping_sub(native) };
    // An odd difference would do as well as the even one next to it, which cannot be mistaken for UNKNOWN.
    RING0_AHEAD.store(ahead & !1, Ordering::Relaxed);
}

/// Now.
pub fn now() -> u64 {
    Native::now().at_ring0()
}
