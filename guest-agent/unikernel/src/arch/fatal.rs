//! Last words. They leave through the serial port, since nothing else can be trusted any more; then the machine halts, so
//! that whoever waits for it finds them at the end of the console.

use core::fmt::Write;
use core::panic::PanicInfo;
use core::sync::atomic::{AtomicBool, Ordering};

use super::{gate, records};
use crate::serial::Serial;

static DYING: AtomicBool = AtomicBool::new(false);

/// An exception while reporting one ends everything at once.
fn first_words() -> Serial {
    if DYING.swap(true, Ordering::Relaxed) {
        gate::stop();
    }
    Serial::new()
}

/// Where ring 0 continues after an exception that nobody expected.
pub extern "C" fn exception() -> ! {
    let mut serial = first_words();
    let fatal = records::fatal_exception();
    let name = match fatal.vector {
        0 => "divide error",
        6 => "invalid opcode",
        8 => "double fault",
        13 => "general protection fault",
        14 => "page fault",
        18 => "machine check",
        _ => "exception",
    };
    let (vector, error_code) = (fatal.vector, fatal.error_code);
    // The serial port takes everything.
    let _ = writeln!(serial, "{name}: {error_code:04x} [#{vector}]");
    let _ = writeln!(
        serial,
        "agent: fatal exception {vector} error code {error_code:#x} rip {:#x} cr2 {:#x}",
        fatal.rip, fatal.cr2
    );
    gate::stop()
}

#[panic_handler]
fn panic(info: &PanicInfo) -> ! {
    let _ = writeln!(first_words(), "Kernel panic - not syncing: agent: {info}");
    gate::stop()
}
