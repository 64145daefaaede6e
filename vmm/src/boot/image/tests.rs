use std::io::Cursor;

use super::*;
use vm_memory::GuestAddress;

fn ram() -> GuestRam {
    GuestRam::from_ranges(&[(GuestAddress(0), 16 << 20)]).unwrap()
}

fn elf(segment: Elf64_Phdr, change: impl FnOnce(&mut Elf64_Ehdr)) -> Vec<u8> {
    let mut ehdr = Elf64_Ehdr {
        e_type: 2,
        e_machine: 62,
        e_phoff: 64,
        e_phentsize: 56,
        e_phnum: 1,
        ..Default::default()
    };
    ehdr.e_ident[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    change(&mut ehdr);
    let mut bytes = ehdr.as_slice().to_vec();
    bytes.extend_from_slice(segment.as_slice());
    bytes.resize(bytes.len() + 16, 0x90);
    bytes
}

fn segment(paddr: u64, memsz: u64) -> Elf64_Phdr {
    Elf64_Phdr {
        p_type: PT_LOAD,
        p_offset: 120,
        p_paddr: paddr,
        p_filesz: memsz.min(16),
        p_memsz: memsz,
        ..Default::default()
    }
}

/// Expects `bytes` to be recognized, or refused with a problem that contains these words.
#[track_caller]
fn check(bytes: Vec<u8>, expected: Result<Kind, &str>) {
    let found = inspect(&mut Cursor::new(&bytes), &ram());
    match (&found, expected) {
        (Ok(found), Ok(expected)) => assert_eq!(*found, expected),
        (Err(problem), Err(part)) => {
            assert!(problem.contains(part), "{problem:?} lacks {part:?}")
        }
        _ => panic!("{found:?} instead of {expected:?}"),
    }
}

#[test]
fn a_file_is_recognized_or_refused_with_its_problem() {
    let good = segment(1 << 20, 0x1000);
    check(elf(good, |_| {}), Ok(Kind::Elf));
    check(vec![], Err("is empty"));
    check(b"#!/bin/sh\n".to_vec(), Err("neither an ELF"));
    check(vec![0; 4096], Err("neither an ELF"));
    check(b"\x7fELF\x02\x01".to_vec(), Err("truncated ELF"));
    check(elf(good, |e| e.e_ident[4] = 1), Err("not a 64-bit"));
    check(elf(good, |e| e.e_machine = 183), Err("another machine (number 183)"));
    check(elf(good, |e| e.e_type = 1), Err("not an executable"));
    check(elf(good, |e| e.e_phnum = 0), Err("nothing to load"));
    check(elf(good, |e| e.e_phnum = 500), Err("500 program headers"));
    check(elf(good, |e| e.e_phoff = u64::MAX), Err("truncated ELF"));
    check(elf(good, |e| e.e_phoff = 1 << 40), Err("truncated ELF"));
    check(elf(segment(0x1000, 16), |_| {}), Err("below 1 MiB"));
    check(elf(segment(15 << 20, 2 << 20), |_| {}), Err("outside RAM"));
    check(elf(segment(u64::MAX - 4, 16), |_| {}), Err("outside RAM"));
    check(
        elf(Elf64_Phdr { p_filesz: 1 << 30, ..good }, |_| {}),
        Err("ends behind the end of the file"),
    );
    check(
        elf(Elf64_Phdr { p_offset: u64::MAX, ..good }, |_| {}),
        Err("ends behind the end of the file"),
    );
}

fn bzimage(len: usize, change: impl FnOnce(&mut [u8])) -> Vec<u8> {
    let mut bytes = vec![0; len];
    bytes[0x1f1] = 1;
    bytes[0x1f4] = 4;
    bytes[0x202..0x206].copy_from_slice(b"HdrS");
    bytes[0x206..0x208].copy_from_slice(&0x20f_u16.to_le_bytes());
    bytes[0x236] = 1;
    bytes[0x258..0x260].copy_from_slice(&(1_u64 << 20).to_le_bytes());
    bytes[0x260..0x264].copy_from_slice(&(1_u32 << 20).to_le_bytes());
    change(&mut bytes);
    bytes
}

#[test]
fn a_bzimage_is_checked_for_length_entry_and_room() {
    check(bzimage(4096, |_| {}), Ok(Kind::BzImage));
    check(bzimage(4096, |b| b[0x236] = 0), Err("64-bit entry point"));
    check(bzimage(4096, |b| b[0x207] = 1), Err("64-bit entry point"));
    check(bzimage(1040, |_| {}), Err("truncated bzImage"));
    check(bzimage(4096, |b| b[0x263] = 0x7f), Err("to unpack itself"));
}
