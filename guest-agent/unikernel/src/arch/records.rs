//! What ring 0 records in plain memory; tables.s defines the layouts.

use agent::nmi::Recorded;
use agent_protocol::{ExceptionRecord, NmiRecord};

use super::nucleus::NMI_RECORDS;

/// Written once by the entry code.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct BootRecord {
    /// TSC at the first instruction.
    pub tsc_entry: u64,
    /// TSC just before ring 3.
    pub tsc_ring3: u64,
    /// Where the loader put `hvm_start_info`.
    pub start_info: u64,
}

/// One of 32.
#[derive(Clone, Copy)]
#[repr(C)]
struct RawException {
    count: u32,
    error_code: u64,
    rip: u64,
    cr2: u64,
}

/// One of [`NMI_RECORDS`].
#[derive(Clone, Copy)]
#[repr(C)]
struct RawNmi {
    reason: u32,
    tsc: u64,
    rip: u64,
}

unsafe extern "C" {
    static boot_record: BootRecord;
    // Ring 0 changes these while Rust runs, so they are not immutable.
    static mut irq_count: u32;
    static mut fatal_vector: u32;
    static mut exception_records: [RawException; 32];
    static mut nmi_total: u32;
    static mut nmi_by_reason: [u32; 4];
    static mut nmi_records: [RawNmi; NMI_RECORDS];
}

/// Reads something that an interrupt may change at any time.
fn current<T: Copy>(record: *const T) -> T {
    // SAFETY: only called here, with the records above: aligned, always initialised, every bit pattern valid. Ring 0
    // writes them between two instructions of this thread; a record read while it changes is at worst half updated.
    unsafe { record.read_volatile() }
}

/// What the entry code noted.
pub fn boot() -> BootRecord {
    current(&raw const boot_record)
}

/// Device interrupts so far.
pub fn interrupts() -> u32 {
    current(&raw const irq_count)
}

/// NMIs so far.
pub fn nmi_count() -> u32 {
    current(&raw const nmi_total)
}

/// NMIs so far, in detail.
pub fn nmis() -> Recorded {
    let total = nmi_count();
    let raw = current(&raw const nmi_records);
    let record = |raw: &RawNmi| NmiRecord { reason: raw.reason as u8, tsc: raw.tsc, rip: raw.rip };
    Recorded {
        total,
        by_reason: current(&raw const nmi_by_reason),
        records: raw.iter().take(total as usize).map(record).collect(),
    }
}

/// Exceptions so far, without the gate's and the guarded register accesses'.
pub fn exceptions() -> impl Iterator<Item = ExceptionRecord> {
    let raw = current(&raw const exception_records);
    (0..).zip(raw).filter(|(_, raw)| raw.count > 0).map(|(vector, raw)| record(vector, raw))
}

/// The exception that ended this life.
pub fn fatal_exception() -> ExceptionRecord {
    let vector = current(&raw const fatal_vector) % 32;
    record(vector as u8, current(&raw const exception_records)[vector as usize])
}

fn record(vector: u8, raw: RawException) -> ExceptionRecord {
    let RawException { count, error_code, rip, cr2 } = raw;
    ExceptionRecord { vector, count, error_code, rip, cr2 }
}
