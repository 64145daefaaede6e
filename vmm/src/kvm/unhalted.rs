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
    halted: HaltedTime,
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
        Ok(Self { halted: HaltedTime::find(statistics)?, khz })
    }

    /// What the clock shows.
    ///
    /// # Errors
    /// [`KvmError::Request`] if KVM's statistics cannot be read.
    pub fn read(&self) -> Result<Reading, KvmError> {
        let halted_ns = self.halted.read_ns()?;
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

/// The numbers of [`HALTED`] in KVM's statistics of a vCPU.
#[derive(Debug)]
struct HaltedTime {
    statistics: File,
    /// Where in the file the first of them is.
    start: u64,
    /// Where each is from there, in bytes. They are neighbours in every Linux so far, so all are read at once.
    offsets: [usize; 3],
}

impl HaltedTime {
    fn find(statistics: File) -> Result<Self, KvmError> {
        let places = find(&statistics, HALTED)?;
        let start = places.into_iter().min().unwrap_or(0);
        let offsets = places.map(|place| (place - start) as usize);
        Ok(Self { statistics, start, offsets })
    }

    /// Their sum, in nanoseconds.
    fn read_ns(&self) -> Result<u64, KvmError> {
        let mut bytes = vec![0; self.offsets.into_iter().max().unwrap_or(0) + 8];
        self.statistics.read_exact_at(&mut bytes, self.start).map_err(unreadable)?;
        let words = self.offsets.map(|at| {
            let word = bytes[at..].first_chunk().copied().unwrap_or_default();
            u64::from_ne_bytes(word)
        });
        Ok(words.into_iter().fold(0, u64::wrapping_add))
    }
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

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    /// A file as KVM's: a header, descriptors of names with the offsets of their numbers, and the numbers.
    fn statistics(descriptors: &[(&str, u32)], numbers: &[u64]) -> File {
        const NAME_LEN: usize = 48;
        const HEADER: usize = size_of::<kvm_stats_header>();
        let len = size_of::<kvm_stats_desc>() + NAME_LEN;
        let data = HEADER + descriptors.len() * len;
        let header = [0, NAME_LEN, descriptors.len(), 0, HEADER, data].map(|word| word as u32);
        let mut bytes: Vec<u8> = header.into_iter().flat_map(u32::to_ne_bytes).collect();
        for (name, offset) in descriptors {
            // Flags, exponent and size; offset; bucket size.
            let fixed = [0, 1 << 16, *offset, 0].map(u32::to_ne_bytes);
            bytes.extend(fixed.into_iter().flatten());
            let mut name = name.as_bytes().to_vec();
            name.resize(NAME_LEN, 0);
            bytes.extend(name);
        }
        bytes.extend(numbers.iter().flat_map(|number| number.to_ne_bytes()));
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        file
    }

    #[test]
    fn the_time_halted_is_the_sum_of_three_numbers_wherever_they_are() {
        let check = |descriptors: &[(&str, u32)], expected| {
            let file = statistics(descriptors, &[1, 20, 300, 4000, 50_000, 600_000]);
            assert_eq!(HaltedTime::find(file).unwrap().read_ns().unwrap(), expected);
        };
        let [success, fail, wait] = ["halt_poll_success_ns", "halt_poll_fail_ns", "halt_wait_ns"];
        check(&[("exits", 0), (success, 8), (fail, 16), (wait, 24)], 4320);
        check(&[(wait, 0), ("halt_wait_ns_hist", 8), (fail, 40), (success, 24)], 604_001);
        let file = statistics(&[(success, 0), (wait, 8)], &[1, 2]);
        assert!(HaltedTime::find(file).is_err(), "one is lacking");
    }
}
