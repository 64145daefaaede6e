//! The ring-0 nucleus, assembled from the `.s` files beside this one.

use core::arch::global_asm;

/// Interrupt vector of every device (edge-triggered, through the I/O APIC).
pub const DEVICE_VECTOR: u8 = 0x41;
/// The local APIC's spurious vector; the low four bits are ones, as old APICs demand.
const SPURIOUS_VECTOR: u8 = 0x4f;
/// How many NMIs are recorded in detail.
pub const NMI_RECORDS: usize = 32;

global_asm!(
    ".set DEVICE_VECTOR, {device_vector}",
    ".set SPURIOUS_VECTOR, {spurious_vector}",
    ".set NMI_RECORDS, {nmi_records}",
    include_str!("entry.s"),
    include_str!("gate.s"),
    include_str!("traps.s"),
    include_str!("tables.s"),
    ".text",
    device_vector = const DEVICE_VECTOR,
    spurious_vector = const SPURIOUS_VECTOR,
    nmi_records = const NMI_RECORDS,
    agent = sym crate::agent_start,
    fatal = sym super::fatal::exception,
    options(att_syntax)
);
