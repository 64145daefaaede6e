//! Cleanslate: a microVM monitor that resets its machine in place and proves that nothing was left behind.
//!
//! Dependencies point down: `cli` → `machine` → `device` → `bus`, `memory` → `kvm`. Unsafe code is allowed in the
//! modules named below and nowhere else; that list is the audit.

#![deny(unsafe_code)]

pub mod device;
pub mod memory;
