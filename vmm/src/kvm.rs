//! KVM behind types of our own: the only modules that name the KVM crates.
//!
//! `vm` is a machine, `vcpu` a processor, `state` what a reset puts back, `tsc` its clock, `unhalted` the same without the
//! time that it slept, `cpuid` and `pmu` what the guest may know, `template` what of that a user changes, `msr_exits` which
//! registers it has from the monitor, `irq` how devices reach it, `coalesced` which writes wait, `dirty_log` which pages are
//! written, `host` what this host is, `capability` what its KVM can. `bare` is a
//! machine to look at KVM with, `nested` what that does for hypervisors in guests.

pub mod bare;
pub mod capability;
pub mod coalesced;
pub mod cpuid;
pub mod dirty_log;
pub mod host;
pub mod identity;
pub mod irq;
pub mod msr_exits;
pub mod nested;
pub mod pmu;
pub mod state;
pub mod template;
pub mod tsc;
pub mod unhalted;
pub mod vcpu;
pub mod vm;

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

pub use kvm_bindings::CpuId;
pub use kvm_ioctls::Kvm;

/// Why KVM did not do what was asked. All are host failures.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// There is no `/dev/kvm`.
    #[error(
        "open /dev/kvm: it does not exist; load the module (modprobe kvm_intel or kvm_amd), and enable \
         virtualization in the firmware or nested virtualization in the outer hypervisor"
    )]
    Missing,
    /// `/dev/kvm` may not be opened.
    #[error(
        "open /dev/kvm: permission denied; add this user to the group that owns it (usermod -aG kvm $USER) or run as root"
    )]
    Denied,
    /// `/dev/kvm` cannot be opened for another reason.
    #[error("open /dev/kvm")]
    Open(#[source] io::Error),
    /// The kernel speaks another version of the interface.
    #[error("KVM speaks API version {0}, not 12")]
    Version(i32),
    /// KVM lacks something that nothing can replace.
    #[error("KVM lacks {0}; a newer kernel has it")]
    Capability(&'static str),
    /// A PMU for guests was asked for and there is none.
    #[error("this KVM has no PMU for guests (kvm.enable_pmu=N); use --pmu off")]
    NoPmu,
    /// The emulated PMU would not be looked for.
    #[error(
        "the emulated PMU is AMD's, and guests on this processor look for another vendor's; use --pmu off or --pmu host"
    )]
    NotAmd,
    /// A request failed.
    #[error("{action}")]
    Request {
        /// What was asked of KVM.
        action: &'static str,
        /// What it said.
        source: io::Error,
    },
    /// A user wants what this KVM does not give.
    #[error(transparent)]
    Template(template::TemplateError),
    /// A register could not be put back; the machine would carry state of its earlier life.
    #[error("put back MSR {index:#x}: KVM refused the value {value:#x} that it had")]
    Msr {
        /// Register number.
        index: u32,
        /// The value wanted.
        value: u64,
    },
    /// A register could be read when the machine was built, and cannot be any more.
    #[error("get MSR {0:#x}: KVM does not give it any more")]
    MsrGone(u32),
}

impl KvmError {
    /// For `map_err`: names the request that failed.
    fn request(action: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |errno| Self::Request { action, source: io::Error::from_raw_os_error(errno.errno()) }
    }
}

/// Opens `/dev/kvm` and checks the version of its interface.
///
/// # Errors
/// [`KvmError::Missing`], [`KvmError::Denied`], [`KvmError::Open`] or [`KvmError::Version`].
pub fn open() -> Result<Kvm, KvmError> {
    let kvm = Kvm::new().map_err(|errno| match errno.errno() {
        libc::ENOENT | libc::ENODEV | libc::ENXIO => KvmError::Missing,
        libc::EACCES | libc::EPERM => KvmError::Denied,
        other => KvmError::Open(io::Error::from_raw_os_error(other)),
    })?;
    match kvm.get_api_version() {
        12 => Ok(kvm),
        version => Err(KvmError::Version(version)),
    }
}

/// The descriptor of `/dev/kvm`.
pub fn descriptor(kvm: &Kvm) -> BorrowedFd<'_> {
    // SAFETY: `kvm` owns the descriptor and stays borrowed as long as what is returned.
    unsafe { BorrowedFd::borrow_raw(kvm.as_raw_fd()) }
}
