//! What a PVH kernel finds in EBX (Xen `docs/misc/pvh.pandoc`, `xen/include/public/arch-x86/hvm/start_info.h`).

use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::{InitrdRange, usable_ram};
use crate::layout;
use crate::memory::GuestRam;

const MAGIC: u32 = 0x336e_c578;
/// Version 1 added the memory map.
const VERSION: u32 = 1;
const MEMORY_MAP_RAM: u32 = 1;

pub(super) fn write(ram: &GuestRam, initrd: Option<InitrdRange>) -> Result<(), GuestMemoryError> {
    let mut info = hvm_start_info {
        magic: MAGIC,
        version: VERSION,
        cmdline_paddr: layout::COMMAND_LINE,
        rsdp_paddr: layout::ACPI_RSDP,
        memmap_paddr: layout::PVH_MEMORY_MAP,
        ..Default::default()
    };
    for (i, (addr, size)) in (0..).zip(usable_ram(ram)) {
        let entry = hvm_memmap_table_entry { addr, size, type_: MEMORY_MAP_RAM, reserved: 0 };
        let at = layout::PVH_MEMORY_MAP + u64::from(i) * size_of_val(&entry) as u64;
        ram.write_obj(entry, GuestAddress(at))?;
        info.memmap_entries = i + 1;
    }
    if let Some(InitrdRange { start, bytes }) = initrd {
        let module = hvm_modlist_entry { paddr: start, size: bytes, ..Default::default() };
        ram.write_obj(module, GuestAddress(layout::PVH_MODULE))?;
        (info.nr_modules, info.modlist_paddr) = (1, layout::PVH_MODULE);
    }
    ram.write_obj(info, GuestAddress(layout::PVH_START_INFO))
}
