use super::*;
use vm_memory::Bytes;

fn template_with(text: &'static [u8]) -> Template {
    let load = |ram: &GuestRam| -> Result<(), MemoryError> {
        ram.write_slice(text, GuestAddress(0x1000)).unwrap();
        Ok(())
    };
    Template::build(4 << 20, load).unwrap().0
}

fn read(memory: &Memory, address: u64) -> [u8; 4] {
    let mut bytes = [0; 4];
    memory.ram().read_slice(&mut bytes, GuestAddress(address)).unwrap();
    bytes
}

#[test]
fn a_restore_brings_back_the_template_and_zeroes_the_rest() {
    let template = template_with(b"kern");
    let mut memory = Memory::map(&template).unwrap();
    for address in [0x1000, 0x2000, (4 << 20) - 4] {
        memory.ram().write_slice(b"leak", GuestAddress(address)).unwrap();
    }
    memory.restore().unwrap();
    assert_eq!(&read(&memory, 0x1000), b"kern");
    assert_eq!(read(&memory, 0x2000), [0; 4]);
    assert_eq!(read(&memory, (4 << 20) - 4), [0; 4]);
}

#[test]
fn a_restore_below_an_address_leaves_the_rest() {
    let mut memory = Memory::map(&template_with(b"kern")).unwrap();
    for address in [0x1000, 0x2000, 0x3000] {
        memory.ram().write_slice(b"leak", GuestAddress(address)).unwrap();
    }
    memory.restore_below(0x3000).unwrap();
    assert_eq!(&read(&memory, 0x1000), b"kern");
    assert_eq!((read(&memory, 0x2000), &read(&memory, 0x3000)), ([0; 4], b"leak"));
    memory.restore_below(0).unwrap();
    assert_eq!(&read(&memory, 0x3000), b"leak");
}

#[test]
fn ram_without_file_is_empty_and_a_restore_empties_it_again() {
    const MIB: u64 = 1 << 20;
    let template = template_with(b"kern");
    let above = 4 * MIB - 4;
    // Behind the contents, on either side of where large pages begin, and at the end.
    let places = [0x1000, 0x2000, 0x3000, 2 * MIB - 4, 2 * MIB, 3 * MIB, above];
    for large in [0, 0x2000, 2 * MIB, u64::MAX] {
        let mut memory = Memory::map_contents(&template, large).unwrap();
        assert_eq!((&read(&memory, 0x1000), read(&memory, above)), (b"kern", [0; 4]));
        let write = |memory: &Memory| {
            for address in places {
                memory.ram().write_slice(b"leak", GuestAddress(address)).unwrap();
            }
        };
        write(&memory);
        memory.restore_below(2 * MIB).unwrap();
        assert_eq!((read(&memory, 2 * MIB - 4), &read(&memory, above)), ([0; 4], b"leak"));
        for _ in 0..2 {
            write(&memory);
            memory.restore().unwrap();
            assert_eq!(&read(&memory, 0x1000), b"kern");
            for address in &places[1..] {
                assert_eq!(read(&memory, *address), [0; 4], "{address:#x}, large from {large:#x}");
            }
        }
    }
}

#[test]
fn a_copy_of_the_template_comes_back_whole_whatever_became_of_it() {
    const MIB: u64 = 1 << 20;
    let load = |ram: &GuestRam| -> Result<(), MemoryError> {
        ram.write_slice(b"kern", GuestAddress(0x1000)).unwrap();
        ram.write_slice(b"init", GuestAddress(3 * MIB - 2)).unwrap();
        Ok(())
    };
    let template = Template::build(4 * MIB, load).unwrap().0;
    let mut memory = Memory::map_copy(&template).unwrap();
    let places = [0, 0x1000, 0x2000, 2 * MIB, 3 * MIB - 2, 4 * MIB - 4];
    for _ in 0..2 {
        let found = places.map(|address| read(&memory, address));
        let expected = [[0; 4], *b"kern", [0; 4], [0; 4], *b"init", [0; 4]];
        assert_eq!(found, expected);
        for address in places {
            memory.ram().write_slice(b"leak", GuestAddress(address)).unwrap();
        }
        memory.restore_below(3 * MIB - 4096).unwrap();
        assert_eq!(read(&memory, 0x1000), *b"kern");
        assert_eq!((read(&memory, 2 * MIB), read(&memory, 3 * MIB - 2)), ([0; 4], *b"leak"));
        memory.restore().unwrap();
    }
}

/// All that is in no file.
fn anonymous(memory: &Memory) -> Part<'_> {
    let region = memory.ram().iter().next().unwrap();
    let start = memory.anonymous[0].start;
    Part { region, offset: start as usize, len: (region.len() - start) as usize }
}

fn resident_pages(memory: &Memory) -> usize {
    let pages = anonymous(memory).resident().unwrap();
    pages.iter().filter(|page| **page & 1 != 0).count()
}

#[test]
fn pages_in_no_file_that_were_touched_are_emptied_where_they_are() {
    let mut memory = Memory::map_contents(&template_with(b"kern"), u64::MAX).unwrap();
    memory.restore().unwrap();
    assert_eq!(resident_pages(&memory), 0);
    for address in [0x1000, 0x2000, 0x3000, 0x9000] {
        memory.ram().write_slice(b"leak", GuestAddress(address)).unwrap();
    }
    memory.restore().unwrap();
    assert_eq!(resident_pages(&memory), 3, "the template's page is none of them");
    assert_eq!((read(&memory, 0x2000), read(&memory, 0x9000)), ([0; 4], [0; 4]));
}

#[test]
fn large_pages_are_emptied_where_they_are_if_the_first_is_in_use() {
    let template = Template::build(8 << 20, |_| Ok::<_, MemoryError>(())).unwrap().0;
    let mut memory = Memory::map_contents(&template, 0).unwrap();
    let write = |memory: &Memory, mib: u64, pages: u64| {
        for page in 0..pages {
            memory.ram().write_slice(b"leak", GuestAddress((mib << 20) + page * 4096)).unwrap();
        }
    };
    write(&memory, 0, 512);
    write(&memory, 4, 512);
    memory.restore().unwrap();
    assert_eq!(resident_pages(&memory), 1024);
    for mib in [0, 4] {
        for page in 0..512 {
            assert_eq!(read(&memory, (mib << 20) + page * 4096), [0; 4]);
        }
    }
    // Without its first page the guest is taken for one that does not use its RAM.
    let mut memory = Memory::map_contents(&template, 0).unwrap();
    write(&memory, 4, 512);
    memory.restore().unwrap();
    assert_eq!(resident_pages(&memory), 0);
}

#[test]
fn blocks_that_are_not_whole_are_dropped() {
    // 2 MiB of no file, all in small pages, but emptied as if they were large.
    let template = Template::build(2 << 20, |_| Ok::<_, MemoryError>(())).unwrap().0;
    let memory = Memory::map_contents(&template, u64::MAX).unwrap();
    memory.ram().write_slice(b"leak", GuestAddress(0x5000)).unwrap();
    anonymous(&memory).empty(LARGE_PAGE).unwrap();
    assert_eq!((resident_pages(&memory), read(&memory, 0x5000)), (0, [0; 4]));
}

#[test]
fn machines_of_one_template_do_not_see_each_other() {
    let template = template_with(b"kern");
    let (one, two) = (Memory::map(&template).unwrap(), Memory::map(&template).unwrap());
    one.ram().write_slice(b"mine", GuestAddress(0x1000)).unwrap();
    assert_eq!(&read(&two, 0x1000), b"kern");
}

#[test]
fn nobody_can_change_a_template() {
    use std::os::unix::fs::FileExt;
    let template = template_with(b"kern");
    assert!(template.file.write_at(b"evil", 0x1000).is_err());
    assert!(template.file.set_len(0).is_err());
    assert!(map(&template.file, template.bytes, libc::MAP_SHARED).is_err());
}
