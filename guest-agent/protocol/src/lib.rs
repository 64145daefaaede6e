//! What the monitor and the guest agent say to each other.
//!
//! The host connects to the agent's vsock port [`AGENT_PORT`], or has the agent connect to a port of its own; the agent greets
//! with [`Hello`] and then answers one [`Request`] at a time with one [`Reply`]. On the stream each message is a length-prefixed frame
//! (see [`frame`]). This crate does no I/O, and anything malformed is an error value, never a panic.

#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

mod device;
pub mod frame;
mod message;
mod pattern;
mod report;
mod residue;

pub use device::{DiskAnswer, DiskDescription, DiskRequest, MAX_DISK_BYTES, Sweep};
pub use message::{
    Cause, ConnectError, GuestReset, Hello, Identity, MAX_JOB_BYTES, ParseCauseError, Probe,
    Probed, Reply, Request, Transfer, Transferred, VmcsFields,
};
pub use pattern::Pattern;
pub use report::{
    DmaReport, ExceptionRecord, LinuxReport, LogLine, MsrReading, NmiRecord, NmiReport, PmuCpuid,
    PmuReport, PmuStatus, Report, Timings, VsockReport,
};
pub use residue::{CheckTicks, Poisoning, StateReading};

/// Version of everything in this crate; the host refuses an agent whose [`Hello`] names another.
pub const PROTOCOL_VERSION: u16 = 6;

/// The vsock port on which the agent listens for the host.
pub const AGENT_PORT: u32 = 5005;

/// Bytes of a machine's generation. They are random, and others after each power-on, reset and restore: what is in memory was
/// perhaps in that of a clone, too. Where they are says the word `agent.generation=ADDRESS` of the command line.
pub const GENERATION_LEN: usize = 16;
