//! A clock that runs with a vCPU's time stamp counter and stands still while the vCPU is halted.
//!
//! The guest halts inside KVM, so nobody here sees it; but KVM keeps count of the time (Linux
//! `Documentation/virt/kvm/api.rst`, section 4.134), and that is subtracted.

use std::arch::x86_64::_rdtsc;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::time::Duration;

use kvm_bindings::{kvm_stats_desc, kvm_stats_header};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::ioctl::ioctl;

use super::KvmError;
use request::KVM_GET_STATS_FD;

/// The request's number; kvm-ioctls does not have it.
mod request {
    use kvm_bindings::KVMIO;
    use vmm_sys_util::ioctl_io_nr;

    ioctl_io_nr!(KVM_GET_STATS_FD, KVMIO, 0xce);
}

/// Nanoseconds that a vCPU was halted: asleep, and in the moments before, in which KVM looks whether sleep pays.
const HALTED: [&[u8]; 3] = [b"halt_wait_ns", b"halt_poll_success_ns", b"halt_poll_fail_ns"];

/// What the clock showed at some moment, in ticks of the time stamp counter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reading {
    /// Ticks in which the vCPU was not halted, from an unknown beginning.
    pub unhalted: u64,
    /// All ticks, from another one.
    pub all: u64,
}

/// The clock of one vCPU. To be read on the thread that runs it, outside of guest mode: KVM adds up when a halt ends.
#[derive(Debug)]
pub struct UnhaltedClock {
    statistics: File,
    /// Where in the file the numbers of [`HALTED`] are.
    offsets: [u64; 3],
    khz: u32,
}

impl UnhaltedClock {
    pub(super) fn new(vcpu: &VcpuFd) -> Result<Self, KvmError> {
        let khz = vcpu.get_tsc_khz().unwrap_or(0);
        if khz == 0 {
            return Err(KvmError::Capability("the frequency of the time stamp counter"));
        }
        // SAFETY: the request takes no argument and returns a new descriptor or -1.
        let fd = unsafe { ioctl(&vcpu.as_raw_fd(), KVM_GET_STATS_FD()) };
        if fd < 0 {
            let source = io::Error::last_os_error();
            return Err(KvmError::Request { action: "open the statistics of a vCPU", source });
        }
        // SAFETY: the descriptor was just made and belongs to nobody else.
        let statistics = unsafe { File::from_raw_fd(fd) };
        let offsets = find(&statistics, HALTED)?;
        Ok(Self { statistics, offsets, khz })
    }

    /// What the clock shows.
    ///
    /// # Errors
    /// [`KvmError::Request`] if KVM's statistics cannot be read.
    pub fn read(&self) -> Result<Reading, KvmError> {
        let mut halted_ns = 0_u64;
        for offset in self.offsets {
            let mut word = [0; 8];
            self.statistics.read_exact_at(&mut word, offset).map_err(unreadable)?;
            halted_ns = halted_ns.wrapping_add(u64::from_ne_bytes(word));
        }
        // SAFETY: every x86-64 has the instruction, and Linux lets programs use it unless they asked not to.
        let all = unsafe { _rdtsc() };
        Ok(Reading { unhalted: all.wrapping_sub(self.ticks(halted_ns)), all })
    }

    /// How long so many ticks take, rounded up: no timer comes before its tick.
    pub fn duration(&self, ticks: u64) -> Duration {
        let ns = (u128::from(ticks) * 1_000_000).div_ceil(self.khz.into());
        Duration::from_nanos(u64::try_from(ns).unwrap_or(u64::MAX))
    }

    fn ticks(&self, ns: u64) -> u64 {
        (u128::from(ns) * u128::from(self.khz) / 1_000_000) as u64
    }
}

fn unreadable(source: io::Error) -> KvmError {
    KvmError::Request { action: "read the statistics of a vCPU", source }
}

/// Where in the file the single numbers of these names are.
fn find<const COUNT: usize>(
    statistics: &File,
    names: [&[u8]; COUNT],
) -> Result<[u64; COUNT], KvmError> {
    const LACKING: KvmError = KvmError::Capability("statistics of halted vCPUs");
    let word = |bytes: &[u8], at: usize| {
        bytes
            .get(at..at + 4)
            .map_or(0, |word| u32::from_ne_bytes(word.try_into().unwrap_or([0; 4])))
    };
    let mut header = [0; size_of::<kvm_stats_header>()];
    statistics.read_exact_at(&mut header, 0).map_err(unreadable)?;
    let [name_len, count, descriptors, data] =
        [4, 8, 16, 20].map(|at: usize| word(&header, at) as usize);
    let len = size_of::<kvm_stats_desc>() + name_len;
    let mut all = vec![0; len * count];
    statistics.read_exact_at(&mut all, descriptors as u64).map_err(unreadable)?;
    let mut offsets = [0; COUNT];
    for (offset, wanted) in offsets.iter_mut().zip(names) {
        let found = all.chunks_exact(len).find(|descriptor| {
            let name = &descriptor[size_of::<kvm_stats_desc>()..];
            name.split(|byte| *byte == 0).next() == Some(wanted)
        });
        *offset = (data + word(found.ok_or(LACKING)?, 8) as usize) as u64;
    }
    Ok(offsets)
}
