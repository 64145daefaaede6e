//! The end of a poisoned life: registers that the agent needs until then get their marks, and the reset comes (leave.s).

use core::arch::asm;

pub use super::nucleus::MARK;

unsafe extern "C" {
    fn leave_by_port(port: u32, value: u32) -> !;
    fn leave_by_triple_fault() -> !;
    fn leave_to_host() -> !;
}

/// Resets the machine by a write to a port.
pub fn by_port(port: u16, value: u8) -> ! {
    // SAFETY: it touches no memory and does not come back.
    unsafe { leave_by_port(port.into(), value.into()) }
}

/// Resets the machine by an exception that cannot be delivered.
pub fn by_triple_fault() -> ! {
    // SAFETY: as in `by_port`.
    unsafe { leave_by_triple_fault() }
}

/// Waits for the host to reset the machine.
pub fn to_host() -> ! {
    // SAFETY: as in `by_port`.
    unsafe { leave_to_host() }
}

/// Loads a selector of the flat data segment into the segment registers that 64-bit code has no use for. Returns it.
pub fn poison_segments() -> u64 {
    const USER_DATA: u16 = 0x28 | 3;
    // SAFETY: the descriptor is that of SS (tables.s), and no code of the agent's depends on these four in 64-bit mode.
    unsafe {
        asm!(
            "mov ds, {selector:x}", "mov es, {selector:x}", "mov fs, {selector:x}",
            "mov gs, {selector:x}",
            selector = in(reg) USER_DATA,
            options(nomem, nostack, preserves_flags),
        );
    }
    USER_DATA.into()
}
