//! What the loader left behind: `hvm_start_info` (Xen, public/arch-x86/hvm/start_info.h). All of it is copied out once
//! and believed only as far as it can be checked.

use alloc::string::String;
use alloc::vec::Vec;

use agent_protocol::GENERATION_LEN;

use super::records;

const MAGIC: u32 = 0x336e_c578;
/// Linux's own limit for x86.
const MAX_CMDLINE: u64 = 2048;
const MAX_MAP_ENTRIES: u32 = 32;
/// The identity map of memory (tables.s).
const MAPPED: u64 = 1 << 30;

#[derive(Clone, Copy)]
#[repr(C)]
struct StartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    module_count: u32,
    modules: u64,
    cmdline: u64,
    rsdp: u64,
    memory_map: u64,
    memory_map_entries: u32,
    reserved: u32,
}

/// A range of the memory map, in the terms of the e820 call.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct MemoryRange {
    /// First byte.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
    /// 1 is usable memory.
    pub kind: u32,
    reserved: u32,
}

/// Copies a plain value out of the loader's memory.
fn copy<T: Copy>(address: u64) -> Option<T> {
    let end = address.checked_add(size_of::<T>() as u64)?;
    // SAFETY: only called here with integers and structs of integers, for which every bit pattern is valid; the range
    // is mapped, and the loader wrote it before this program ran, so nothing changes it.
    (address != 0 && end <= MAPPED).then(|| unsafe { (address as *const T).read_unaligned() })
}

fn start_info() -> Option<StartInfo> {
    // Version 0 has no memory map; copying its size too much reads unrelated but mapped bytes.
    copy::<StartInfo>(records::boot().start_info).filter(|info| info.magic == MAGIC)
}

/// The machine's generation at `address`. The host may have written another since it was read last.
pub fn generation(address: u64) -> Option<[u8; GENERATION_LEN]> {
    let end = address.checked_add(GENERATION_LEN as u64)?;
    if address == 0 || end > MAPPED {
        return None;
    }
    // SAFETY: bytes of mapped memory, where every pattern is valid. The host changes them while this processor does not run, which
    // a volatile read allows for.
    Some(unsafe { (address as *const [u8; GENERATION_LEN]).read_volatile() })
}

/// The command line up to the first byte that is no text; empty if there is none.
pub fn cmdline() -> String {
    let Some(info) = start_info() else { return String::new() };
    let bytes: Vec<u8> = (0..MAX_CMDLINE)
        .map_while(|at| copy(info.cmdline.checked_add(at).filter(|_| info.cmdline != 0)?))
        .take_while(|byte: &u8| *byte != 0)
        .collect();
    let text = bytes.utf8_chunks().next().map_or("", |chunk| chunk.valid());
    text.into()
}

/// The memory map; empty if the loader gave none.
pub fn memory_map() -> Vec<MemoryRange> {
    let Some(info) = start_info().filter(|info| info.version >= 1) else { return Vec::new() };
    let entries = u64::from(info.memory_map_entries.min(MAX_MAP_ENTRIES));
    (0..entries)
        .map_while(|at| copy(info.memory_map.checked_add(at * size_of::<MemoryRange>() as u64)?))
        .collect()
}
