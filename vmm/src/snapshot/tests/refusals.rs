//! What is wrong with files is said, each thing in a line of its own.

use std::os::unix::fs::FileExt;

use super::*;
use crate::kvm::host::KvmKind;

fn state_bytes(targets: &Targets) -> Vec<u8> {
    let mut bytes = vec![0; targets.state.metadata().unwrap().len() as usize];
    targets.state.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

fn read(bytes: &[u8]) -> Result<Snapshot<State>, SnapshotError> {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(bytes, 0).unwrap();
    read_state(&file, &host())
}

#[track_caller]
fn check<T>(result: Result<T, SnapshotError>, expected: &str) {
    let Err(error) = result else { panic!("it was taken") };
    let text = error.to_string();
    assert!(text.contains(expected), "{text:?} has no {expected:?}");
    assert!(!text.contains('\n'), "{text:?}");
}

#[test]
fn a_state_file_that_is_not_as_it_was_written_is_refused() {
    let (targets, _) = write_full(ram_with(&[(0, "x")]).ram());
    let bytes = state_bytes(&targets);
    assert!(read(&bytes).is_ok());
    for len in 0..bytes.len() {
        let error = read(&bytes[..len]).expect_err("a part was taken").to_string();
        assert!(error.contains("cut short"), "{len} bytes: {error}");
    }
    for at in 0..bytes.len() {
        let mut bytes = bytes.clone();
        bytes[at] ^= 0x10;
        let error = read(&bytes).expect_err("a damaged file was taken").to_string();
        let expected = match at {
            0..8 => "no state file",
            8..12 => "format has version",
            12..20 => "bytes",
            _ => "checksum is wrong",
        };
        assert!(error.contains(expected), "byte {at}: {error}");
    }
    check(read(&[&bytes[..], b"more"].concat()), "bytes, but says");
    check(read(&[0; 4096]), "no state file of a snapshot");
}

#[test]
fn another_version_is_named_before_anything_else_is_looked_at() {
    let (targets, _) = write_full(ram_with(&[]).ram());
    let mut bytes = state_bytes(&targets);
    bytes[8..12].copy_from_slice(&7u32.to_le_bytes());
    let expected = format!("has version 7, and this program reads version {VERSION}");
    check(read(&bytes), &expected);
    check(read(&bytes[..12]), &expected);
}

#[test]
fn a_state_of_another_type_or_with_more_behind_it_is_refused() {
    #[derive(Debug, Serialize, Deserialize)]
    struct Other(u8, State);
    let targets = targets();
    let memory = ram_with(&[]);
    let other = Other(9, state());
    write(&targets, host(), &other, memory.ram(), Pages::All).unwrap();
    check(read(&state_bytes(&targets)), "make no sense to this program");
    let targets = super::targets();
    write(&targets, host(), &(state(), 1u8), memory.ram(), Pages::All).unwrap();
    check(read(&state_bytes(&targets)), "bytes behind the machine's state");
}

#[test]
fn another_host_is_refused_but_can_be_looked_at() {
    let (targets, _) = write_full(ram_with(&[]).ram());
    let mut here = host();
    here.kvm = KvmKind::Software;
    check(
        read_state::<State>(&targets.state, &here),
        "made on KVM on Intel VT-x, and this host has KVM without hardware virtualization: restore it on a host like that",
    );
    assert!(read_header(&targets.state).is_ok());
}

#[test]
fn a_memory_file_that_does_not_belong_to_the_state_is_refused() {
    let (mine, header) = write_full(ram_with(&[(0x1000, "mine")]).ram());
    let (other, _) = write_full(ram_with(&[(0x1000, "other")]).ram());
    let file = &mine.memory;
    let taken = |file: &File| template(&[(&header, file)]);
    check(taken(&other.memory), "another snapshot's than the state");
    for len in [0, RAM - 1, RAM + 1] {
        file.set_len(len).unwrap();
        check(taken(file), &format!("has {len} bytes, and the state is of a machine with"));
    }
    // Truncating has dropped nothing but the last, empty page.
    file.set_len(RAM).unwrap();
    check(taken(file), "checksum is wrong");
    file.write_all_at(b"mine", 0x1000).unwrap();
    assert!(taken(file).is_ok());
    file.write_all_at(b"M", 0x1000).unwrap();
    check(taken(file), "checksum is wrong");
    check(taken(&File::open("/dev/null").unwrap()), "has 0 bytes");
}

#[test]
fn layers_on_the_wrong_base_are_refused() {
    let memory = ram_with(&[]);
    let (base, base_header) = write_full(memory.ram());
    let (other, other_header) = write_full(memory.ram());
    let (layer, layer_header) = write_layer(memory.ram(), &base_header, &[]);
    let base = (&base_header, &base.memory);
    let other = (&other_header, &other.memory);
    let layer = (&layer_header, &layer.memory);
    assert!(template(&[base, layer]).is_ok());
    let (base_id, id) = (base_header.id, layer_header.id);
    check(template(&[]), "needs a snapshot");
    check(template(&[layer]), &format!("{id} holds only what changed since snapshot {base_id}"));
    let found = format!("since snapshot {base_id}, not since {}", other_header.id);
    check(template(&[other, layer]), &found);
    check(template(&[base, layer, layer]), &format!("since snapshot {base_id}, not since {id}"));
    check(template(&[base, other]), "holds all of RAM: leave out");
    let mut larger = layer_header.clone();
    larger.ram_bytes *= 2;
    check(template(&[base, (&larger, layer.1)]), "the files are damaged");
}

#[test]
fn a_state_file_cannot_name_pages_beyond_ram() {
    let targets = targets();
    let memory = ram_with(&[(RAM - PAGE, "last")]);
    let mut header = write(&targets, host(), &state(), memory.ram(), Pages::All).unwrap().header;
    header.ram_bytes -= PAGE;
    check(read(&state_file::encode(&header, &state()).unwrap()), "pages beyond RAM");
    header.ram_bytes += 1;
    check(read(&state_file::encode(&header, &state()).unwrap()), "no multiple of 4096");
}
