use super::*;
use vm_memory::Bytes;

fn template_with(text: &'static [u8]) -> Template {
    let load = |ram: &GuestRam| -> Result<(), MemoryError> {
        ram.write_slice(text, GuestAddress(0x1000)).unwrap();
        Ok(())
    };
    Template::build(4 << 20, load).unwrap().0
}

fn map(template: &Template) -> Memory {
    Memory::map(Backing::private(template).unwrap()).unwrap()
}

fn map_contents(template: &Template, large: u64) -> Memory {
    Memory::map(Backing::contents(template, large).unwrap()).unwrap()
}

fn read(memory: &Memory, address: u64) -> [u8; 4] {
    let mut bytes = [0; 4];
    memory.ram().read_slice(&mut bytes, GuestAddress(address)).unwrap();
    bytes
}

#[test]
fn a_restore_brings_back_the_template_and_zeroes_the_rest() {
    let template = template_with(b"kern");
    let mut memory = map(&template);
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
    let mut memory = map(&template_with(b"kern"));
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
        let mut memory = map_contents(&template, large);
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
    let mut memory = Memory::map(Backing::copy(&template).unwrap()).unwrap();
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
    let stretches = &memory.stretches[0];
    let start = stretches.iter().find(|stretch| stretch.kind != Kind::File).unwrap().start;
    Part { region, offset: start as usize, len: (region.len() - start) as usize }
}

fn resident_pages(memory: &Memory) -> usize {
    let pages = anonymous(memory).resident().unwrap();
    pages.iter().filter(|page| **page & 1 != 0).count()
}

#[test]
fn pages_in_no_file_that_were_touched_are_emptied_where_they_are() {
    let mut memory = map_contents(&template_with(b"kern"), u64::MAX);
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
    let mut memory = map_contents(&template, 0);
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
    let mut memory = map_contents(&template, 0);
    write(&memory, 4, 512);
    memory.restore().unwrap();
    assert_eq!(resident_pages(&memory), 0);
}

#[test]
fn blocks_that_are_not_whole_are_dropped() {
    // 2 MiB of no file, all in small pages, but emptied as if they were large.
    let template = Template::build(2 << 20, |_| Ok::<_, MemoryError>(())).unwrap().0;
    let memory = map_contents(&template, u64::MAX);
    memory.ram().write_slice(b"leak", GuestAddress(0x5000)).unwrap();
    anonymous(&memory).empty(LARGE_PAGE).unwrap();
    assert_eq!((resident_pages(&memory), read(&memory, 0x5000)), (0, [0; 4]));
}

#[test]
fn machines_of_one_template_do_not_see_each_other() {
    let template = template_with(b"kern");
    let (one, two) = (map(&template), map(&template));
    one.ram().write_slice(b"mine", GuestAddress(0x1000)).unwrap();
    assert_eq!(&read(&two, 0x1000), b"kern");
}

#[test]
fn nobody_can_change_a_template() {
    use std::os::unix::fs::FileExt;
    let template = template_with(b"kern");
    assert!(template.file.write_at(b"evil", 0x1000).is_err());
    assert!(template.file.set_len(0).is_err());
    assert!(map_file(&template.file, template.bytes, libc::MAP_SHARED).is_err());
}

#[test]
fn only_what_is_sealed_and_of_the_right_size_is_taken_for_a_template() {
    let template = template_with(b"kern");
    let clone = || template.file.try_clone().unwrap();
    let taken = Template::from_file(clone(), 4 << 20).unwrap();
    assert_eq!(&read(&map(&taken), 0x1000), b"kern");
    assert!(matches!(Template::from_file(clone(), 2 << 20), Err(MemoryError::NoTemplate)));
    let unsealed = template::create_memfd(4 << 20).unwrap();
    assert!(Template::from_file(unsealed, 4 << 20).is_err());
    assert!(Template::from_file(tempfile::tempfile().unwrap(), 0).is_err());
}

/// Words in RAM, at these addresses.
fn template_of(bytes: u64, words: &'static [(u64, &str)]) -> Template {
    let load = |ram: &GuestRam| -> Result<(), MemoryError> {
        for (address, word) in words {
            ram.write_slice(word.as_bytes(), GuestAddress(*address)).unwrap();
        }
        Ok(())
    };
    Template::build(bytes, load).unwrap().0
}

#[test]
fn contents_all_over_ram_are_mapped_and_what_is_between_them_is_in_no_file() {
    const MIB: u64 = 1 << 20;
    let template = template_of(
        16 * MIB,
        &[(0x1000, "kern"), (0x3000, "near"), (8 * MIB, "midd"), (16 * MIB - 4, "last")],
    );
    let mut memory = Memory::map(Backing::extents(&template, 10 * MIB).unwrap()).unwrap();
    let stretch = |start, end, kind| Stretch { start, end, kind };
    let expected = [
        stretch(0, 0x1000, Kind::Small),
        // The hole in between is not worth a mapping.
        stretch(0x1000, 0x4000, Kind::File),
        stretch(0x4000, 8 * MIB, Kind::Small),
        stretch(8 * MIB, 8 * MIB + 0x1000, Kind::File),
        stretch(8 * MIB + 0x1000, 10 * MIB, Kind::Small),
        stretch(10 * MIB, 16 * MIB - 0x1000, Kind::Large),
        stretch(16 * MIB - 0x1000, 16 * MIB, Kind::File),
    ];
    assert_eq!(memory.stretches, [expected]);
    let places = [0x1000, 0x3000, 8 * MIB, 16 * MIB - 4];
    let holes = [0, 0x2000, 0x4000, 9 * MIB, 12 * MIB];
    for _ in 0..2 {
        let found = places.map(|address| read(&memory, address));
        assert_eq!(found, [*b"kern", *b"near", *b"midd", *b"last"]);
        assert_eq!(holes.map(|address| read(&memory, address)), [[0; 4]; 5]);
        for address in places.into_iter().chain(holes) {
            memory.ram().write_slice(b"leak", GuestAddress(address)).unwrap();
        }
        memory.restore().unwrap();
    }
    // Reading what is in no file has put nothing into the template.
    let pages: u64 =
        template.extents().unwrap().iter().map(|(start, end)| (end - start) / 4096).sum();
    assert_eq!(pages, 5, "four pages with contents, and the hole between two of them");
}

#[test]
fn another_template_takes_the_place_of_the_first_at_the_same_addresses() {
    let mut memory = map(&template_with(b"kern"));
    let before: Vec<_> = memory.ranges().collect();
    let ram = memory.ram().clone();
    memory.ram().write_slice(b"leak", GuestAddress(0x9000)).unwrap();
    let other = template_of(4 << 20, &[(0x2000, "boot")]);
    memory.replace(Backing::contents(&other, 0x10_0000).unwrap()).unwrap();
    drop(other);
    let kinds: Vec<_> = memory.stretches.iter().flatten().map(|stretch| stretch.kind).collect();
    assert_eq!(kinds, [Kind::File, Kind::Small, Kind::Large]);
    for _ in 0..2 {
        let found = [0x1000, 0x2000, 0x9000].map(|address| read(&memory, address));
        assert_eq!(found, [[0; 4], *b"boot", [0; 4]]);
        memory.ram().write_slice(b"leak", GuestAddress(0x2000)).unwrap();
        memory.ram().write_slice(b"leak", GuestAddress(0x20_0000)).unwrap();
        memory.restore().unwrap();
        assert_eq!(read(&memory, 0x20_0000), [0; 4]);
    }
    assert_eq!(memory.ranges().collect::<Vec<_>>(), before);
    ram.write_slice(b"seen", GuestAddress(0x5000)).unwrap();
    assert_eq!(&read(&memory, 0x5000), b"seen", "whoever had the RAM before has it still");
    let larger = Template::build(8 << 20, |_| Ok::<_, MemoryError>(())).unwrap().0;
    let error = memory.replace(Backing::private(&larger).unwrap()).unwrap_err();
    assert!(matches!(error, MemoryError::OtherSize { .. }));
    assert_eq!(&read(&memory, 0x5000), b"seen", "refused before anything was done");
}
