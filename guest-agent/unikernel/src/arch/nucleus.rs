//! The ring-0 nucleus, assembled from the `.s` files beside this one.

use core::arch::global_asm;

/// Interrupt vector of every device (edge-triggered, through the I/O APIC).
pub const DEVICE_VECTOR: u8 = 0x41;
/// The local APIC's spurious vector; the low four bits are ones, as old APICs demand.
const SPURIOUS_VECTOR: u8 = 0x4f;
/// How many NMIs are recorded in detail.
pub const NMI_RECORDS: usize = 32;
/// A command line that begins with this (`look=first`) asks for a look at the registers before anything else.
const LOOK_FIRST: u32 = u32::from_le_bytes(*b"look");
/// What every general register holds when a poisoned life ends, plus its number.
pub const MARK: u64 = 0x1eaf_1eaf_1eaf_0000;
/// Where the host is told that a poisoned life has come to its end.
const REST_PORT: u8 = 0x80;

global_asm!(
    ".set DEVICE_VECTOR, {device_vector}",
    ".set SPURIOUS_VECTOR, {spurious_vector}",
    ".set NMI_RECORDS, {nmi_records}",
    ".set LOOK_FIRST, {look_first}",
    ".set MARK, {mark}",
    ".set REST_PORT, {rest_port}",
    ".set ACCESSES, {accesses}",
    ".set MSRS, {msrs}",
    ".set SERVICE_TRIPLE, {triple}",
    ".set SERVICE_STOP, {stop}",
    include_str!("entry.s"),
    include_str!("gate.s"),
    include_str!("leave.s"),
    include_str!("traps.s"),
    include_str!("tables.s"),
    ".text",
    device_vector = const DEVICE_VECTOR,
    spurious_vector = const SPURIOUS_VECTOR,
    nmi_records = const NMI_RECORDS,
    look_first = const LOOK_FIRST,
    mark = const MARK,
    rest_port = const REST_PORT,
    accesses = const super::gate::MAX_ACCESSES,
    msrs = const super::gate::MAX_MSRS,
    triple = const super::gate::TRIPLE,
    stop = const super::gate::STOP,
    agent = sym crate::agent_start,
    fatal = sym super::fatal::exception,
    options(att_syntax)
);
