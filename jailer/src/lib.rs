//! Confines a process that runs a microVM: namespaces, an empty root, control groups, limits, dropped rights and seccomp
//! filters.
//!
//! Empty for now: nothing in this version is confined, and nothing claims to be.

#![deny(unsafe_code)]
