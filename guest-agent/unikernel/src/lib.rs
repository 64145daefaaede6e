//! What the guest agent knows and decides, apart from the machine it runs on: nothing here touches a port, a register
//! or a queue, so all of it is tested on the host. The binary (`main.rs`) supplies the machine.

#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

extern crate alloc;

#[cfg(feature = "attacks")]
pub mod attack;
pub mod dma_tracker;
pub mod jobs;
pub mod json;
pub mod kernel_log;
pub mod nmi;
pub mod params;
pub mod pmu;
pub mod random;
pub mod residue;
pub mod vsock;
