//! The functions that the compiler calls for memory. String instructions keep them short; ring 3 runs natively even
//! where ring 0 is emulated, so they are fast as well.

use core::arch::asm;

/// C's `memcpy`.
///
/// # Safety
/// As in C: both ranges valid and disjoint.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    // SAFETY: the caller vouches for the ranges; the direction flag is clear by the calling convention.
    unsafe {
        asm!("rep movsb", inout("rdi") to => _, inout("rsi") from => _, inout("rcx") len => _,
             options(nostack, preserves_flags));
    }
    to
}

/// C's `memmove`.
///
/// # Safety
/// As in C: both ranges valid; they may overlap.
#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    if (to as usize).wrapping_sub(from as usize) >= len {
        // SAFETY: the destination does not start within the source, so copying upwards reads each byte before it is
        // overwritten; the caller vouches for the ranges.
        return unsafe { memcpy(to, from, len) };
    }
    // SAFETY: as above, downwards from the last byte; `len` is at least 1 here. The flag is cleared again.
    unsafe {
        asm!("std", "rep movsb", "cld", inout("rdi") to.add(len - 1) => _,
             inout("rsi") from.add(len - 1) => _, inout("rcx") len => _, options(nostack));
    }
    to
}

/// C's `memset`.
///
/// # Safety
/// As in C: the range valid.
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, byte: i32, len: usize) -> *mut u8 {
    // SAFETY: the caller vouches for the range; the direction flag is clear by the calling convention.
    unsafe {
        asm!("rep stosb", inout("rdi") to => _, in("al") byte as u8, inout("rcx") len => _,
             options(nostack, preserves_flags));
    }
    to
}

/// C's `memcmp`.
///
/// # Safety
/// As in C: both ranges valid.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(left: *const u8, right: *const u8, len: usize) -> i32 {
    for at in 0..len {
        // SAFETY: `at` is below the length that the caller vouches for. Volatile, or the compiler would make this loop
        // a call of memcmp.
        let (l, r) = unsafe { (left.add(at).read_volatile(), right.add(at).read_volatile()) };
        if l != r {
            return i32::from(l) - i32::from(r);
        }
    }
    0
}

/// `memcmp` for equality alone.
///
/// # Safety
/// As for [`memcmp`].
#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(left: *const u8, right: *const u8, len: usize) -> i32 {
    // SAFETY: the caller's promise is the one that memcmp asks for.
    unsafe { memcmp(left, right, len) }
}
