//! What a kernel file is, and whether it can be loaded at all. The loader copies; the checks that users need are here.

use std::io::{Read, Seek, SeekFrom};

use linux_loader::elf::{Elf64_Ehdr, Elf64_Phdr, PT_LOAD};
use vm_memory::{ByteValued, GuestMemoryBackend, GuestMemoryRegion};

use crate::layout;
use crate::memory::GuestRam;

/// A format that can be loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Elf,
    BzImage,
}

/// More program headers than any kernel has; the count in the header is 16 bits wide.
const MAX_PROGRAM_HEADERS: u16 = 256;

pub(super) fn ram_ranges(ram: &GuestRam) -> impl Iterator<Item = (u64, u64)> {
    ram.iter().map(|region| (region.start_addr().0, region.len()))
}

/// End of the RAM range that starts at 0.
pub(super) fn low_ram_end(ram: &GuestRam) -> u64 {
    ram_ranges(ram).next().map_or(0, |(_, bytes)| bytes)
}

/// Says what `file` is, or in words that follow its path why it cannot be loaded.
pub(super) fn inspect<F: Read + Seek>(file: &mut F, ram: &GuestRam) -> Result<Kind, String> {
    let unreadable = |e: std::io::Error| format!("cannot be read: {e}");
    let len = file.seek(SeekFrom::End(0)).map_err(unreadable)?;
    let mut head = [0; 0x264];
    file.rewind().map_err(unreadable)?;
    let got = read_up_to(file, &mut head).map_err(unreadable)?;
    match &head[..got] {
        [0x7f, b'E', b'L', b'F', ..] => {
            inspect_elf(file, &head[..got], len, ram).map(|()| Kind::Elf)
        }
        [.., _] if got == head.len() && &head[0x202..0x206] == b"HdrS" => {
            inspect_bzimage(&head, len, ram).map(|()| Kind::BzImage)
        }
        [] => Err("is empty".into()),
        _ => Err("is neither an ELF executable nor a bzImage".into()),
    }
}

fn read_up_to<F: Read>(file: &mut F, buffer: &mut [u8]) -> std::io::Result<usize> {
    let mut got = 0;
    while got < buffer.len() {
        match file.read(&mut buffer[got..])? {
            0 => break,
            n => got += n,
        }
    }
    Ok(got)
}

fn inspect_elf<F: Read + Seek>(
    file: &mut F,
    head: &[u8],
    len: u64,
    ram: &GuestRam,
) -> Result<(), String> {
    const CLASS_64: u8 = 2;
    const MACHINE_X86_64: u16 = 62;
    const TYPE_EXECUTABLE: u16 = 2;
    const TYPE_SHARED: u16 = 3;
    let truncated = || "is a truncated ELF file".to_string();
    let header = head.get(..size_of::<Elf64_Ehdr>()).ok_or_else(truncated)?;
    let mut ehdr = Elf64_Ehdr::default();
    ehdr.as_mut_slice().copy_from_slice(header);
    if ehdr.e_ident[4] != CLASS_64 {
        return Err("is not a 64-bit ELF file".into());
    }
    if ehdr.e_machine != MACHINE_X86_64 {
        return Err(format!(
            "is an ELF file for another machine (number {}), not x86-64",
            ehdr.e_machine
        ));
    }
    if !matches!(ehdr.e_type, TYPE_EXECUTABLE | TYPE_SHARED) {
        return Err("is an ELF file but not an executable".into());
    }
    if ehdr.e_phnum > MAX_PROGRAM_HEADERS {
        return Err(format!(
            "has {} program headers; at most {MAX_PROGRAM_HEADERS} make sense",
            ehdr.e_phnum
        ));
    }
    let mut segments = 0;
    file.seek(SeekFrom::Start(ehdr.e_phoff)).map_err(|_| truncated())?;
    for _ in 0..ehdr.e_phnum {
        let mut phdr = Elf64_Phdr::default();
        file.read_exact(phdr.as_mut_slice()).map_err(|_| truncated())?;
        if phdr.p_type == PT_LOAD {
            check_segment(&phdr, len, ram)?;
            segments += 1;
        }
    }
    match segments {
        0 => Err("has nothing to load".into()),
        _ => Ok(()),
    }
}

fn check_segment(phdr: &Elf64_Phdr, file_len: u64, ram: &GuestRam) -> Result<(), String> {
    let (start, bytes) = (phdr.p_paddr, phdr.p_memsz.max(phdr.p_filesz));
    if phdr.p_offset.checked_add(phdr.p_filesz).is_none_or(|end| end > file_len) {
        return Err("is truncated: a segment ends behind the end of the file".into());
    }
    if bytes == 0 {
        return Ok(());
    }
    if start < layout::BOOT_DATA_END {
        return Err(format!("has a segment at {start:#x}, below 1 MiB, where boot data lies"));
    }
    let fits = |(from, len): (u64, u64)| {
        start >= from && start.checked_add(bytes).is_some_and(|end| end <= from + len)
    };
    match ram_ranges(ram).any(fits) {
        true => Ok(()),
        false => Err(format!(
            "has a segment of {bytes:#x} bytes at {start:#x}, outside RAM; give --mem more"
        )),
    }
}

fn inspect_bzimage(head: &[u8; 0x264], len: u64, ram: &GuestRam) -> Result<(), String> {
    let u16_at = |at: usize| u16::from_le_bytes([head[at], head[at + 1]]);
    let u32_at = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| head[at + i]));
    let u64_at = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| head[at + i]));
    // Linux x86 boot protocol 2.12 brought `xloadflags`, bit 0 of which announces the 64-bit entry.
    if u16_at(0x206) < 0x20c || u16_at(0x236) & 1 == 0 {
        return Err("is a bzImage without a 64-bit entry point".into());
    }
    let setup_bytes = (u64::from(head[0x1f1].max(1)) + 1) * 512;
    let system_bytes = u64::from(u32_at(0x1f4)) * 16;
    if setup_bytes + system_bytes > len {
        return Err(format!(
            "is a truncated bzImage: {len} of {} bytes",
            setup_bytes + system_bytes
        ));
    }
    let needed = u64_at(0x258).saturating_add(u64::from(u32_at(0x260)));
    let loaded = layout::HIGH_MEMORY + (len - setup_bytes);
    if needed.max(loaded) > low_ram_end(ram) {
        return Err(format!(
            "needs RAM up to {:#x} to unpack itself; give --mem more",
            needed.max(loaded)
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
