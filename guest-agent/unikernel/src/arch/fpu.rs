//! The floating-point unit, which the agent itself has no use for: what it held at first, and what it is poisoned with.

use core::arch::asm;

/// What `fxsave64` writes, as far as it is looked at (Intel SDM volume 1, table "Layout of the 64-bit Mode FXSAVE64 Map").
#[derive(Clone, Copy)]
#[repr(C, align(16))]
struct Saved {
    control: u16,
    status: u16,
    other: [u8; 20],
    mxcsr: u32,
    mxcsr_mask: u32,
    x87: [u64; 16],
    xmm: [[u64; 2]; 16],
    unused: [u64; 12],
}

unsafe extern "C" {
    // entry.s writes it once, before Rust runs.
    static early_fpu: Saved;
}

/// The part of the unit that the residue check looks at.
#[derive(Clone, Copy)]
pub struct Fpu {
    /// Control word of the x87 part.
    pub control: u64,
    /// MXCSR.
    pub mxcsr: u64,
    /// Lower halves of XMM8 to XMM15.
    pub xmm: [u64; 8],
}

/// A control word, all exceptions masked, that rounds to 53 bits instead of 64.
const CONTROL: u16 = 0x27f;
/// All exceptions masked and all flags set, rounding towards zero.
const MXCSR: u32 = 0x7fbf;
/// What goes into each of XMM8 to XMM15.
const XMM: u64 = 0x1eaf_1eaf;

/// What the unit held when ring 3 began.
pub fn early() -> Fpu {
    // SAFETY: plain data that nobody writes any more.
    let saved = unsafe { early_fpu };
    Fpu {
        control: saved.control.into(),
        mxcsr: saved.mxcsr.into(),
        xmm: core::array::from_fn(|i| saved.xmm[8 + i][0]),
    }
}

/// Gives the unit other values than it has after a reset, and returns them.
pub fn poison() -> Fpu {
    // SAFETY: reads two words on the stack. The agent computes with integers alone, so no code of its depends on how
    // floating-point numbers are rounded; all exceptions stay masked. The compiler is told which registers change. It may
    // use those again, but only code that is short of eight others ever does.
    unsafe {
        asm!(
            "fldcw word ptr [{control}]",
            "ldmxcsr dword ptr [{mxcsr}]",
            "movq xmm8, {xmm}", "movq xmm9, {xmm}", "movq xmm10, {xmm}", "movq xmm11, {xmm}",
            "movq xmm12, {xmm}", "movq xmm13, {xmm}", "movq xmm14, {xmm}", "movq xmm15, {xmm}",
            control = in(reg) &CONTROL,
            mxcsr = in(reg) &MXCSR,
            xmm = in(reg) XMM,
            out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
            out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
            options(nostack, preserves_flags),
        );
    }
    Fpu { control: CONTROL.into(), mxcsr: MXCSR.into(), xmm: [XMM; 8] }
}
