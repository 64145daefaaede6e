//! Cleanslate: a microVM monitor that resets its machine in place and proves that nothing was left behind.
//!
//! Dependencies point down: `cli` → `soak`, `lifecycle` → `machine` → `boot`, `device` → `bus`; `machine` → `kvm` → `memory` →
//! `layout`. Unsafe code is allowed in the two modules that say so below and nowhere else; that list is the audit.

#![deny(unsafe_code)]

pub mod agent;
pub mod api;
pub mod boot;
pub mod bus;
pub mod cli;
pub mod device;
pub mod doctor;
pub mod exit;
pub mod fault;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
pub mod histogram;
#[allow(unsafe_code)]
pub mod kvm;
pub mod lab;
pub mod launch;
pub mod layout;
pub mod lifecycle;
pub mod machine;
#[allow(unsafe_code)]
pub mod memory;
pub mod page;
pub mod probe;
pub mod progress;
pub mod sandbox;
pub mod schedule;
pub mod snapshot;
pub mod soak;
pub mod verify;
pub mod vsock_client;
pub mod words;
