//! The Linux personality of the guest agent: what it reads of a kernel and how it answers. The binary (`main.rs`) is the first
//! process of a Linux whose first file system `images` has made.

#![deny(unsafe_code)]

pub mod agent;
#[allow(unsafe_code)]
mod cpu;
pub mod device;
pub mod interrupts;
pub mod kernel_log;
#[allow(unsafe_code)]
mod kexec;
pub mod modules;
pub mod pmu;
pub mod serve;
