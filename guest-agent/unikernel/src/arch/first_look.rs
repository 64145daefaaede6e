//! What registers held at the first instruction of this life: entry.s looks at those that the way to ring 3 changes if the
//! command line asks for it, and notes the others in any case.

use agent::residue;

/// The layout is that of entry.s.
#[derive(Clone, Copy)]
#[repr(C)]
struct FirstLook {
    esp: u32,
    /// EAX, ECX, EDX.
    volatile: [u32; 3],
    /// CS, SS, DS, ES, FS, GS, LDTR, TR.
    selectors: [u16; 8],
    global_table: [u8; 8],
    interrupt_table: [u8; 8],
    /// CR0, CR2, CR3, CR4.
    control: [u32; 4],
    efer: u32,
    apic_base: u32,
    spurious_vector: u32,
    in_service: u32,
    looked: u32,
    unused: u32,
    /// RBX, RBP, RSI, RDI, R8 to R15.
    general: [u64; 12],
}

unsafe extern "C" {
    // entry.s writes it once, before Rust runs.
    static first_look: FirstLook;
}

/// Names of the general registers that a look notes in any case.
pub const GENERAL: [&str; 12] = [
    "reg.rbx", "reg.rbp", "reg.rsi", "reg.rdi", "reg.r8", "reg.r9", "reg.r10", "reg.r11",
    "reg.r12", "reg.r13", "reg.r14", "reg.r15",
];
/// Names of what only a first look shows, in the order of [`early`].
pub const EARLY: [&str; 22] = [
    "reg.esp",
    "reg.eax",
    "reg.ecx",
    "reg.edx",
    "seg.cs",
    "seg.ss",
    "seg.ds",
    "seg.es",
    "seg.fs",
    "seg.gs",
    "seg.ldtr",
    "seg.tr",
    "seg.gdt_base",
    "seg.idt_base",
    "cr.cr0",
    "cr.cr2",
    "cr.cr3",
    "cr.cr4",
    "cr.efer",
    "lapic.base",
    "lapic.spurious_vector",
    residue::IN_SERVICE,
];

fn look() -> FirstLook {
    // SAFETY: plain data that nobody writes any more.
    unsafe { first_look }
}

/// What the general registers of [`GENERAL`] held.
pub fn general() -> [u64; 12] {
    look().general
}

/// What those of [`EARLY`] held; none without a first look.
pub fn early() -> Option<[u64; 22]> {
    let look = Some(look()).filter(|look| look.looked != 0)?;
    // Behind the limit of 16 bits.
    let base = |table: [u8; 8]| u32::from_le_bytes(core::array::from_fn(|i| table[2 + i]));
    let words = [look.esp]
        .into_iter()
        .chain(look.volatile)
        .chain(look.selectors.map(u32::from))
        .chain([base(look.global_table), base(look.interrupt_table)])
        .chain(look.control)
        .chain([look.efer, look.apic_base, look.spurious_vector, look.in_service]);
    let mut values = [0; 22];
    for (value, word) in values.iter_mut().zip(words) {
        *value = word.into();
    }
    Some(values)
}

/// Whether an interrupt of the earlier life is still being served, as far as a first look shows it.
pub fn something_is_in_service() -> bool {
    let look = look();
    look.looked != 0 && look.in_service != 0
}
