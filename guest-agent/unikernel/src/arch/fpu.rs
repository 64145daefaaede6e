//! The floating-point unit, which the agent itself has no use for: what it held at first, and what it is poisoned with.

use core::arch::asm;
use core::sync::atomic::{AtomicU32, Ordering};

use super::gate;
use super::nucleus::MARK;

/// What `fxsave64` writes, as far as it is looked at (Intel SDM volume 1, table "Layout of the 64-bit Mode FXSAVE64 Map").
#[derive(Clone, Copy)]
#[repr(C, align(16))]
struct Saved {
    control: u16,
    status: u16,
    tags: u8,
    other: [u8; 19],
    mxcsr: u32,
    mxcsr_mask: u32,
    x87: [[u64; 2]; 8],
    xmm: [[u64; 2]; 16],
    unused: [u64; 12],
}

unsafe extern "C" {
    // entry.s writes it once, before Rust runs.
    static early_fpu: Saved;
}

/// The part of the unit that the residue check looks at and every processor has.
#[derive(Clone, Copy)]
pub struct Fpu {
    /// Control word of the x87 part.
    pub control: u64,
    /// Which of its data registers hold something, a bit each.
    pub tags: u64,
    /// Their significands.
    pub x87: [u64; 8],
    /// MXCSR.
    pub mxcsr: u64,
    /// Lower halves of the XMM registers.
    pub xmm: [u64; 16],
}

/// A control word, all exceptions masked, that rounds to 53 bits instead of 64.
const CONTROL: u16 = 0x27f;
/// All exceptions masked and all flags set, rounding towards zero.
const MXCSR: u32 = 0x7fbf;
/// What goes into each data register. XMM0 to XMM7 get it at the very end (leave.s).
const DATA: u64 = MARK;

/// What the unit held when ring 3 began.
pub fn early() -> Fpu {
    // SAFETY: plain data that nobody writes any more.
    let saved = unsafe { early_fpu };
    Fpu {
        control: saved.control.into(),
        tags: saved.tags.into(),
        x87: core::array::from_fn(|i| saved.x87[i][0]),
        mxcsr: saved.mxcsr.into(),
        xmm: core::array::from_fn(|i| saved.xmm[i][0]),
    }
}

/// Gives the unit other values than it has after a reset, and returns them.
pub fn poison() -> Fpu {
    // SAFETY: reads three words. The agent computes with integers alone, so no code of its depends on how floating-point
    // numbers are rounded or on what the x87 part holds; all exceptions stay masked. The compiler is told which XMM
    // registers change. It may use those again, but only code that is short of eight others ever does.
    unsafe {
        asm!(
            "fldcw word ptr [{control}]",
            "ldmxcsr dword ptr [{mxcsr}]",
            "movq mm0, {data}", "movq mm1, {data}", "movq mm2, {data}", "movq mm3, {data}",
            "movq mm4, {data}", "movq mm5, {data}", "movq mm6, {data}", "movq mm7, {data}",
            "movq xmm8, {data}", "movq xmm9, {data}", "movq xmm10, {data}", "movq xmm11, {data}",
            "movq xmm12, {data}", "movq xmm13, {data}", "movq xmm14, {data}", "movq xmm15, {data}",
            control = in(reg) &CONTROL,
            mxcsr = in(reg) &MXCSR,
            data = in(reg) DATA,
            out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
            out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
            out("mm0") _, out("mm1") _, out("mm2") _, out("mm3") _,
            out("mm4") _, out("mm5") _, out("mm6") _, out("mm7") _,
            options(nostack, preserves_flags),
        );
    }
    Fpu {
        control: CONTROL.into(),
        tags: 0xff,
        x87: [DATA; 8],
        mxcsr: MXCSR.into(),
        xmm: [DATA; 16],
    }
}

/// What XSAVE adds: XCR0, and the upper halves of the YMM registers, of which a lower half is looked at.
#[derive(Clone, Copy)]
pub struct Extended {
    /// Bytes of the state that XCR0 enables, by CPUID.
    pub enabled_bytes: u64,
    /// Bits 128 to 191 of each.
    pub ymm: [u64; 16],
}

/// XCR0 with x87, SSE and AVX.
const XCR0_AVX: u64 = 7;

/// What XCR0 enabled before [`extended`] opened it; 0 until then.
static FOUND_BYTES: AtomicU32 = AtomicU32::new(0);

/// Reads it, on a processor with AVX. The agent itself has no use for it, so this can be late. Leaves XCR0 open.
pub fn extended() -> Extended {
    let [before, _] = gate::open_xsave(XCR0_AVX);
    let found = match FOUND_BYTES.load(Ordering::Relaxed) {
        0 => before,
        found => found,
    };
    FOUND_BYTES.store(found, Ordering::Relaxed);
    let mut upper = [[0_u64; 2]; 16];
    // SAFETY: writes 256 bytes at `upper`. AVX exists and has just been enabled.
    unsafe {
        asm!(
            "vextractf128 [{at}], ymm0, 1", "vextractf128 [{at} + 16], ymm1, 1",
            "vextractf128 [{at} + 32], ymm2, 1", "vextractf128 [{at} + 48], ymm3, 1",
            "vextractf128 [{at} + 64], ymm4, 1", "vextractf128 [{at} + 80], ymm5, 1",
            "vextractf128 [{at} + 96], ymm6, 1", "vextractf128 [{at} + 112], ymm7, 1",
            "vextractf128 [{at} + 128], ymm8, 1", "vextractf128 [{at} + 144], ymm9, 1",
            "vextractf128 [{at} + 160], ymm10, 1", "vextractf128 [{at} + 176], ymm11, 1",
            "vextractf128 [{at} + 192], ymm12, 1", "vextractf128 [{at} + 208], ymm13, 1",
            "vextractf128 [{at} + 224], ymm14, 1", "vextractf128 [{at} + 240], ymm15, 1",
            at = in(reg) &mut upper,
            options(nostack, preserves_flags),
        );
    }
    Extended { enabled_bytes: found.into(), ymm: upper.map(|[low, _]| low) }
}

/// Gives it other values than it has after a reset, on a processor with AVX, and returns what it holds then.
pub fn poison_extended() -> Extended {
    let [_, enabled] = gate::open_xsave(XCR0_AVX);
    let mark = DATA;
    // SAFETY: reads eight bytes at `mark`; the compiler is told which registers change, and knows nothing of their upper
    // halves. AVX exists and has just been enabled.
    unsafe {
        asm!(
            "vbroadcastsd ymm0, [{mark}]", "vbroadcastsd ymm1, [{mark}]",
            "vbroadcastsd ymm2, [{mark}]", "vbroadcastsd ymm3, [{mark}]",
            "vbroadcastsd ymm4, [{mark}]", "vbroadcastsd ymm5, [{mark}]",
            "vbroadcastsd ymm6, [{mark}]", "vbroadcastsd ymm7, [{mark}]",
            "vbroadcastsd ymm8, [{mark}]", "vbroadcastsd ymm9, [{mark}]",
            "vbroadcastsd ymm10, [{mark}]", "vbroadcastsd ymm11, [{mark}]",
            "vbroadcastsd ymm12, [{mark}]", "vbroadcastsd ymm13, [{mark}]",
            "vbroadcastsd ymm14, [{mark}]", "vbroadcastsd ymm15, [{mark}]",
            mark = in(reg) &mark,
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
            out("xmm4") _, out("xmm5") _, out("xmm6") _, out("xmm7") _,
            out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
            out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
            options(nostack, preserves_flags),
        );
    }
    Extended { enabled_bytes: enabled.into(), ymm: [mark; 16] }
}
