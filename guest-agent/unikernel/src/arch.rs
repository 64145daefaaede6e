//! The machine: everything that needs `unsafe` because of what x86 is, behind functions that do not.

mod fatal;
pub mod first_look;
pub mod fpu;
pub mod gate;
pub mod heap;
pub mod leave;
mod memory_functions;
pub mod mmio;
pub mod nucleus;
pub mod port;
pub mod pvh;
pub mod ram;
pub mod records;
pub mod svm;
pub mod tsc;
pub mod virtio;
pub mod vmx;
