//! Confines a process that runs a microVM: namespaces, an empty root, a control group, limits, dropped rights, Landlock,
//! and filters of system calls ([`seccomp`]).
//!
//! A [`Jail`] says in plain data what confines; [`Jail::prepare`] starts what has to be ready before, and
//! [`Prepared::run`] runs a function of the caller's in a process that is confined. A caller of many jails uses
//! [`Jail::prepare_with`] and [`Prepared::start`] instead. Three processes take part:
//!
//! - the **caller**, which makes what only it may make, waits, and hands signals on,
//! - the **jailed** process, a copy of the caller that goes through the list in [`steps`] and then does its work,
//! - the **janitor** ([`janitor`]), which removes what was made, whichever of the others is killed, and when. Many jails may share it.
//!
//! Nothing is copied and no device node is made: what the jailed process needs of the host reaches it as open descriptors.
//! Unsafe code is allowed in `sys` and `seccomp::sys`, and nowhere else.

#![deny(unsafe_code)]

pub mod cgroup;
pub mod chroot;
pub mod daemon;
pub mod id;
pub mod jail;
pub mod janitor;
pub mod limits;
pub mod network;
pub mod program;
pub mod root;
pub mod running;
pub mod seccomp;
pub mod steps;
#[allow(unsafe_code)]
mod sys;
pub mod user;

pub use cgroup::CgroupPlan;
pub use id::Id;
pub use jail::{Inside, Jail, JailError, Prepared};
pub use janitor::Janitor;
pub use limits::ResourceLimit;
pub use network::Network;
pub use program::Program;
pub use root::{Mount, Root};
pub use running::{End, Running};
pub use sys::{SignalFd, landlock_version};
pub use user::User;
