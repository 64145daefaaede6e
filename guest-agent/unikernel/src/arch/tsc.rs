//! The time-stamp counter of ring 0, read cheaply from ring 3.
//!
//! On hardware both rings read the same counter. A software KVM runs ring 3 natively, where RDTSC may show the host's
//! counter while ring 0 sees the guest's; both run at the same rate, so one comparison at boot is enough.

use core::arch::x86_64::_rdtsc;
use core::sync::atomic::{AtomicU64, Ordering};

use super::{gate, records};

/// From ring 0's last reading at boot to ring 3's first: less than this (a second at least) if it is one counter.
const SAME_COUNTER: u64 = 1 << 32;

static RING0_AHEAD: AtomicU64 = AtomicU64::new(0);

/// Compares the counters. To be called first thing in ring 3.
pub fn init() {
    let first = native();
    if first.wrapping_sub(records::boot().tsc_ring3) > SAME_COUNTER {
        let before = native();
        let ring0 = gate::ring0_tsc();
        let middle = before.midpoint(native());
        RING0_AHEAD.store(ring0.wrapping_sub(middle), Ordering::Relaxed);
    }
}

/// Now.
pub fn now() -> u64 {
    native().wrapping_add(RING0_AHEAD.load(Ordering::Relaxed))
}

fn native() -> u64 {
    // SAFETY: RDTSC exists on every x86-64 and the entry code leaves CR4.TSD clear.
    unsafe { _rdtsc() }
}
