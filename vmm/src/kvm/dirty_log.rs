//! Which pages of RAM were written: KVM's log of what the guest and KVM itself write, together with what the host notes.

use kvm_ioctls::VmFd;

use super::KvmError;
use crate::memory::{Memory, PageSet};

const PAGE: u64 = 4096;

/// Takes both logs, which begin anew.
pub(super) fn take(vm: &VmFd, memory: &Memory) -> Result<PageSet, KvmError> {
    let ranges: Vec<_> = memory.ranges().collect();
    let mut pages = PageSet::new(ranges.iter().map(|range| range.bytes / PAGE).sum());
    let mut first = 0;
    // A range's slot is its number: see `Vm::new`.
    for (slot, (range, by_host)) in ranges.iter().zip(memory.take_host_writes()).enumerate() {
        let by_guest = vm
            .get_dirty_log(slot as u32, range.bytes as usize)
            .map_err(KvmError::request("get the log of written pages"))?;
        let count = range.bytes / PAGE;
        for words in [by_guest, by_host] {
            let bits = words.iter().enumerate().flat_map(|(at, word)| {
                (0..64).filter(move |bit| word >> bit & 1 != 0).map(move |bit| 64 * at as u64 + bit)
            });
            // There are bits for no more pages than there are; what KVM says is still not believed blindly.
            bits.filter(|page| *page < count).for_each(|page| pages.insert(first + page));
        }
        first += count;
    }
    Ok(pages)
}

#[cfg(test)]
pub(crate) mod tests;
