//! What was written comes back.

use std::os::unix::fs::FileExt;

use rustix::fs::SeekFrom;

use super::*;

#[test]
fn a_full_snapshot_brings_back_state_and_ram() {
    let contents = [(0, "first"), (0x1ffe, "over"), (RAM - 4, "last")];
    let memory = ram_with(&contents);
    let (targets, written) = write_full(memory.ram());
    let snapshot: Snapshot<State> = read_state(&targets.state, &host()).unwrap();
    assert_eq!(snapshot.state, state());
    assert_eq!(snapshot.header, written);
    assert_eq!(snapshot.header, read_header(&targets.state).unwrap());
    assert_eq!((written.kind, written.pages.stored()), (Kind::Full, 4));
    let template = template(&[(&snapshot.header, &targets.memory)]).unwrap();
    let expected = words(&[(0, "first"), (0x1ffe, "ov"), (0x2000, "er"), (RAM - 4, "last")]);
    assert_eq!(words_in(&template), expected);
}

#[test]
fn a_memory_file_is_ram_with_holes_where_it_is_empty() {
    let memory = ram_with(&[(0x5000, "here"), (0x20_0000, "there")]);
    let (targets, _) = write_full(memory.ram());
    let file = &targets.memory;
    assert_eq!(file.metadata().unwrap().len(), RAM);
    let mut at = 0;
    let mut extents = Vec::new();
    while let Ok(start) = rustix::fs::seek(file, SeekFrom::Data(at)) {
        at = rustix::fs::seek(file, SeekFrom::Hole(start)).unwrap();
        extents.push((start, at));
    }
    assert_eq!(extents, [(0x5000, 0x6000), (0x20_0000, 0x20_1000)]);
    let mut word = [0; 5];
    file.read_exact_at(&mut word, 0x20_0000).unwrap();
    assert_eq!(&word, b"there");
}

#[test]
fn a_memory_file_without_its_holes_is_as_good() {
    let contents = [(0x5000, "here"), (0x20_0000, "there")];
    let (targets, header) = write_full(ram_with(&contents).ram());
    let mut bytes = vec![0; RAM as usize];
    targets.memory.read_exact_at(&mut bytes, 0).unwrap();
    let copy = tempfile::tempfile().unwrap();
    copy.write_all_at(&bytes, 0).unwrap();
    // Nor does it matter what is where nothing is kept.
    copy.write_all_at(b"noise", 0x7000).unwrap();
    assert_eq!(words_in(&template(&[(&header, &copy)]).unwrap()), words(&contents));
}

#[test]
fn layers_bring_back_what_changed_and_what_became_empty() {
    let memory = ram_with(&[(0x1000, "one"), (0x2000, "two"), (0x3000, "three")]);
    let (base, base_header) = write_full(memory.ram());
    put(memory.ram(), &[(0x1000, "\0\0\0"), (0x2000, "2nd"), (0x9000, "nine")]);
    let (layer, layer_header) = write_layer(memory.ram(), &base_header, &[1, 2, 9]);
    assert_eq!(layer_header.kind, Kind::Layer(base_header.id));
    assert_eq!(layer_header.pages.stored(), 2);
    put(memory.ram(), &[(0x2000, "3rd"), (0x9000, "\0\0\0\0")]);
    // A page that is not named has not changed, whatever is in it.
    put(memory.ram(), &[(0x3000, "THREE")]);
    let (top, top_header) = write_layer(memory.ram(), &layer_header, &[2, 9, 10]);
    let of = |layers: &[(&Header, &File)]| words_in(&template(layers).unwrap());
    let base = (&base_header, &base.memory);
    let layer = (&layer_header, &layer.memory);
    let top = (&top_header, &top.memory);
    assert_eq!(of(&[base]), words(&[(0x1000, "one"), (0x2000, "two"), (0x3000, "three")]));
    let expected = words(&[(0x2000, "2nd"), (0x3000, "three"), (0x9000, "nine")]);
    assert_eq!(of(&[base, layer]), expected);
    assert_eq!(of(&[base, layer, top]), words(&[(0x2000, "3rd"), (0x3000, "three")]));
}

#[test]
fn ranges_of_ram_lie_behind_each_other_in_the_file() {
    let ranges = [(GuestAddress(0), 0x3000), (GuestAddress(0x1_0000_0000), 0x2000)];
    let ram = GuestRam::from_ranges(&ranges).unwrap();
    put(&ram, &[(0x2000, "low"), (0x1_0000_0000, "high"), (0x1_0000_1000, "end")]);
    let check = |kind: Pages<'_>| {
        let targets = targets();
        let header = write(&targets, host(), &state(), &ram, kind).unwrap().header;
        let extents: Vec<_> = header.pages.extents().map(|e| (e.first, e.pages)).collect();
        assert_eq!((header.ram_bytes, extents), (0x5000, vec![(2, 3)]));
        let mut word = [0; 4];
        targets.memory.read_exact_at(&mut word, 0x3000).unwrap();
        assert_eq!(&word, b"high");
    };
    check(Pages::All);
    let mut dirty = PageSet::new(5);
    (2..5).for_each(|page| dirty.insert(page));
    check(Pages::Since { parent: SnapshotId([1; 16]), dirty: &dirty });
}

#[test]
fn what_becomes_of_the_files_afterwards_does_not_reach_a_template() {
    let (targets, header) = write_full(ram_with(&[(0x1000, "kept")]).ram());
    let template = template(&[(&header, &targets.memory)]).unwrap();
    let memory = Memory::map(Backing::private(&template).unwrap()).unwrap();
    targets.memory.write_all_at(b"evil", 0x1000).unwrap();
    targets.memory.set_len(0).unwrap();
    let mut word = [0; 4];
    memory.ram().read_slice(&mut word, GuestAddress(0x1000)).unwrap();
    assert_eq!(&word, b"kept");
}

#[test]
fn each_snapshot_has_a_name_of_its_own() {
    let memory = ram_with(&[]);
    let (one, two) = (write_full(memory.ram()).1, write_full(memory.ram()).1);
    assert_ne!(one.id, two.id);
    assert!(one.created > 1_700_000_000, "{}", one.created);
}
