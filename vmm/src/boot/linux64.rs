//! Linux's 64-bit boot protocol (kernel documentation, `arch/x86/boot.rst`): boot parameters, page tables, descriptors.

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::{InitrdRange, usable_ram};
use crate::layout;
use crate::memory::GuestRam;

/// Offset of the 64-bit entry point from where a bzImage's protected-mode part is loaded.
pub(super) const BZIMAGE_ENTRY: u64 = 0x200;

const E820_RAM: u32 = 1;
/// Loader number of those that have none of their own.
const LOADER_UNDEFINED: u8 = 0xff;

/// First address that an initrd may not touch: what the kernel says, or for a bare ELF what kernels without a header take.
pub(super) fn initrd_limit(header: Option<&setup_header>) -> u64 {
    header.map_or(0x3800_0000, |header| u64::from(header.initrd_addr_max) + 1)
}

pub(super) fn write(
    ram: &GuestRam,
    header: Option<setup_header>,
    initrd: Option<InitrdRange>,
) -> Result<(), GuestMemoryError> {
    let mut params = boot_params { hdr: header.unwrap_or(bare_elf_header()), ..Default::default() };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = layout::COMMAND_LINE as u32;
    params.hdr.cmdline_size = layout::COMMAND_LINE_MAX as u32;
    params.acpi_rsdp_addr = layout::ACPI_RSDP;
    if let Some(InitrdRange { start, bytes }) = initrd {
        // Both lie below 4 GiB: `initrd_limit` is a 32-bit number.
        (params.hdr.ramdisk_image, params.hdr.ramdisk_size) = (start as u32, bytes as u32);
    }
    for (slot, (addr, size)) in params.e820_table.iter_mut().zip(usable_ram(ram)) {
        *slot = boot_e820_entry { addr, size, r#type: E820_RAM };
        params.e820_entries += 1;
    }
    ram.write_obj(params, GuestAddress(layout::ZERO_PAGE))?;
    write_descriptors(ram)?;
    write_page_tables(ram)
}

/// What a kernel that comes without a setup header would have said.
fn bare_elf_header() -> setup_header {
    setup_header {
        boot_flag: 0xaa55,
        header: 0x5372_6448,
        kernel_alignment: 0x0100_0000,
        ..Default::default()
    }
}

/// `__BOOT_CS` (0x10) and `__BOOT_DS` (0x18), as the protocol demands.
fn write_descriptors(ram: &GuestRam) -> Result<(), GuestMemoryError> {
    const CODE_64: u64 = 0x00af_9b00_0000_ffff;
    const DATA: u64 = 0x00cf_9300_0000_ffff;
    for (i, descriptor) in (0..).zip([0, 0, CODE_64, DATA]) {
        ram.write_obj::<u64>(descriptor, GuestAddress(layout::GDT + 8 * i))?;
    }
    Ok(())
}

/// Maps the first 4 GiB one to one with 2 MiB pages.
fn write_page_tables(ram: &GuestRam) -> Result<(), GuestMemoryError> {
    const PRESENT_WRITABLE: u64 = 0b11;
    const LARGE: u64 = 1 << 7;
    let (pml4, pdpt, first) =
        (layout::PAGE_TABLES, layout::PAGE_TABLES + 0x1000, layout::PAGE_TABLES + 0x2000);
    ram.write_obj(pdpt | PRESENT_WRITABLE, GuestAddress(pml4))?;
    for gib in 0..4_u64 {
        let directory = first + gib * 0x1000;
        ram.write_obj(directory | PRESENT_WRITABLE, GuestAddress(pdpt + 8 * gib))?;
        for page in 0..512_u64 {
            let address = gib << 30 | page << 21;
            ram.write_obj(address | PRESENT_WRITABLE | LARGE, GuestAddress(directory + 8 * page))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_zero_page_names_ram_initrd_and_command_line() {
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), 64 << 20)]).unwrap();
        let initrd = InitrdRange { start: 0x300_0000, bytes: 0x1234 };
        write(&ram, None, Some(initrd)).unwrap();
        let params: boot_params = ram.read_obj(GuestAddress(layout::ZERO_PAGE)).unwrap();
        let (entries, table, hdr) = (params.e820_entries, params.e820_table, params.hdr);
        assert_eq!(entries, 2);
        let (addr, size) = (table[1].addr, table[1].size);
        assert_eq!((addr, size), (1 << 20, 63 << 20));
        let (image, size, line) = (hdr.ramdisk_image, hdr.ramdisk_size, hdr.cmd_line_ptr);
        assert_eq!((image, size, u64::from(line)), (0x300_0000, 0x1234, layout::COMMAND_LINE));
    }

    #[test]
    fn the_last_page_below_4_gib_is_mapped_to_itself() {
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        write_page_tables(&ram).unwrap();
        let entry: u64 = ram.read_obj(GuestAddress(layout::PAGE_TABLES + 0x5ff8)).unwrap();
        assert_eq!(entry, 0xffe0_0000 | 0x83);
    }
}
