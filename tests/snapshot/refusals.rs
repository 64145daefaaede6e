//! What cannot be restored is refused, with the reason.

use std::sync::Arc;

use serde_json::{Value, json};
use vmm::device::block::DiskConfig;
use vmm::lifecycle::chain;
use vmm::machine::{Config, MachineState, RamSource, Restore};
use vmm::snapshot::Header;

use crate::harness::vm::{Files, Vm, agent};
use crate::harness::{file, temp_dir};

/// Restores with `config` and expects this in the error.
#[track_caller]
fn check(config: Config, reason: &str) {
    match Vm::launch(config) {
        Ok(_) => panic!("restored, though {reason:?} was expected"),
        Err(error) => {
            let words = chain(&error);
            assert!(words.contains(reason), "{reason:?} is not in {words:?}");
        }
    }
}

/// The same snapshot with another host and another state.
fn changed(files: &Files, change_host: impl Fn(&mut Value), state: impl Fn(&mut Value)) -> Config {
    let config = files.restored(agent());
    let restore = config.restore.clone().unwrap();
    let mut host = serde_json::to_value(&restore.header.host).unwrap();
    change_host(&mut host);
    let host = serde_json::from_value(host).unwrap();
    let header = Header { host, ..restore.header };
    let mut states = serde_json::to_value(&*restore.state).unwrap();
    state(&mut states);
    let state: MachineState = serde_json::from_value(states).unwrap();
    Config { restore: Some(Restore { header, state: Arc::new(state), ..restore }), ..config }
}

#[test]
fn another_host_another_processor_and_other_numbers_of_things_are_refused() {
    let vm = Vm::launch(Config { vcpus: 2, ..agent() }).unwrap();
    // Its driver runs by then.
    drop(vm.agent());
    let files = vm.snapshot();
    let check_state = |state: &dyn Fn(&mut Value), reason: &str| {
        check(changed(&files, |_| {}, state), reason);
    };
    let signature = |host: &mut Value| host["processor"]["signature"] = 0x123.into();
    check(changed(&files, signature, |_| {}), "the snapshot was made on");
    let name = |state: &mut Value| {
        let leaves = state["vcpus"][1]["state"]["cpuid"].as_array_mut().unwrap();
        // Function 0x80000002, of the processor's name; its EAX comes behind number, index and flags.
        let is_it = |leaf: &&mut Value| leaf[0] == 2 && leaf[3] == 0x80;
        let leaf = leaves.iter_mut().find(is_it).unwrap();
        leaf[12] = (leaf[12].as_u64().unwrap() ^ 1).into();
    };
    check_state(
        &name,
        "restore vCPU 1 of the snapshot: this host gives its guests another processor",
    );
    let memory = |state: &mut Value| state["description"]["mem_mib"] = 65.into();
    check_state(&memory, "but is of a machine with 65 MiB");
    let agents = |state: &mut Value| state["description"]["guest"] = json!({"agent": 1});
    check_state(&agents, "or another version of it");
    let full = |state: &mut Value| state["console"]["in_buffer"] = vec![0; 65].into();
    check_state(&full, "its serial port holds 65 bytes");
    let rings = |state: &mut Value| {
        state["virtio"][0]["queues"][0]["descriptors"] = 0xffff_ffff_0000_u64.into();
    };
    check_state(&rings, "restore the vsock at slot 0 of the snapshot: no driver could have set up");
    let one = Config { vcpus: 1, ..files.restored(agent()) };
    check(one, "the snapshot's state is of 2 vCPUs, and its description of 1");
    let more = Config { rng: true, ..files.restored(agent()) };
    check(more, "the snapshot's state is of 1 virtio devices, and its description of 2");
    // The snapshot itself is good.
    Vm::launch(files.restored(agent())).unwrap().agent().ping().unwrap();
}

#[test]
fn a_machine_with_a_disk_wants_the_same_disk() {
    let dir = temp_dir();
    let disk = file(&dir, "disk", &[0; 4096]);
    let other = file(&dir, "other", &[0; 8192]);
    let with = |path: &std::path::PathBuf, read_only| Config {
        disks: vec![DiskConfig { path: path.clone(), read_only }],
        ..agent()
    };
    let vm = Vm::launch(with(&disk, true)).unwrap();
    drop(vm.agent());
    let files = vm.snapshot();
    check(files.restored(agent()), "give them again with --disk, in the same order (0 given)");
    check(files.restored(with(&other, true)), "the disk had 4096 bytes and has 8192 now");
    drop(vm);
    check(files.restored(with(&disk, false)), "give the disk with \",ro\"");
    Vm::launch(files.restored(with(&disk, true))).unwrap().agent().ping().unwrap();
}

#[test]
fn files_that_do_not_belong_together_are_refused() {
    let vm = Vm::launch(agent()).unwrap();
    drop(vm.agent());
    let one = vm.snapshot();
    vm.resume();
    drop(vm.agent());
    let another = vm.snapshot();
    let mut config = one.restored(agent());
    let RamSource::Files(layers) = &mut config.restore.as_mut().unwrap().ram else {
        panic!("it comes from files");
    };
    layers[0].1 = another.memory();
    // The agent remembers the connection that there was between them.
    check(config, "the memory file's checksum is wrong");
    let config = one.restored(agent());
    let file = std::fs::File::options().write(true).open(one.memory()).unwrap();
    file.set_len(4096).unwrap();
    check(config, "the memory file has 4096 bytes");
}
