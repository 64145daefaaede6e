//! Port I/O, open to ring 3.

use core::arch::asm;

/// Reads a byte.
pub fn read(port: u16) -> u8 {
    let value;
    // SAFETY: a port read touches no memory.
    unsafe {
        asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack, preserves_flags))
    }
    value
}

/// Writes a byte. The ports that the agent uses (serial, resets) touch no memory that the program goes on using.
pub fn write(port: u16, value: u8) {
    // SAFETY: see above; no device with port-driven DMA is ever addressed.
    unsafe {
        asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags))
    }
}
