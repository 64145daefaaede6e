//! The end of a poisoned life: registers that the agent needs until then get their marks, and the reset comes (leave.s).

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
