//! A machine that is captured goes on in another one, with all that its guest can tell of itself.

/// What guests without an agent tell of registers, timers and counters.
mod guests;
/// What cannot be restored is refused.
mod refusals;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{ErrorKind, Read};

use agent_protocol::{AGENT_PORT, DiskAnswer, DiskRequest, Reply, Request, StateReading, frame};
use vmm::device::block::DiskConfig;
use vmm::device::virtio::audit::AuditMode;
use vmm::device::vsock::{GuestCid, GuestPort};
use vmm::kvm::pmu::PmuPolicy;
use vmm::machine::{CaptureError, Config, NmiOutcome, NmiVia, SnapshotKind};
use vmm::snapshot::Kind;

use crate::counters::processor_is_amds;
use crate::harness::vm::{Files, Vm, agent};
use crate::harness::{file, temp_dir};

fn by_name(state: Vec<StateReading>) -> BTreeMap<String, Option<u64>> {
    state.into_iter().map(|StateReading { item, value }| (item, value)).collect()
}

#[test]
fn every_item_of_a_poisoned_guest_comes_back_with_its_value() {
    let vm = Vm::launch(Config { looks_first: true, ..agent() }).unwrap();
    let mut agent = vm.agent();
    let (poisonings, _) = agent.poison().unwrap();
    let held = poisonings.iter().filter(|poisoning| poisoning.result.is_ok()).count();
    let before = by_name(agent.state(true).unwrap().0);
    let files = vm.snapshot();
    drop(vm);
    let vm = Vm::launch(files.restored(self::agent())).unwrap();
    let after = by_name(vm.agent().state(true).unwrap().0);
    println!("{} items, {held} of them poisoned", before.len());
    assert!(before.len() > 130 && held > 90, "{} items, {held} poisoned", before.len());
    assert!(before.keys().eq(after.keys()));
    let differ: Vec<_> = before
        .iter()
        .zip(after.values())
        .filter(|((_, before), after)| before != after)
        .map(|((item, before), after)| format!("{item} was {before:x?} and is {after:x?}"))
        .collect();
    // The device has told it that its connections are gone.
    assert_eq!(differ, ["vsock.events was Some(0) and is Some(1)"]);
}

#[test]
fn only_a_paused_machine_can_be_captured_and_it_goes_on() {
    let vm = Vm::launch(agent()).unwrap();
    let mut agent = vm.agent();
    let early = vm.try_snapshot(&Files::new());
    assert!(matches!(early, Err(CaptureError::NotPaused)), "{early:?}");
    vm.pause();
    vm.pause();
    vm.try_snapshot(&Files::new()).unwrap();
    vm.try_snapshot(&Files::new()).unwrap();
    vm.resume();
    vm.resume();
    agent.ping().expect("the connection is what it was");
}

#[test]
fn who_talks_to_a_paused_machine_waits_and_is_answered_when_it_goes_on() {
    let vm = Vm::launch(agent()).unwrap();
    let mut old = vm.agent();
    vm.pause();
    let mut new = vm.handle.connect(GuestPort(AGENT_PORT)).unwrap();
    old.write(&frame::encode(&Request::Ping(7)).unwrap()).unwrap();
    // Whatever could be on its way has arrived when the machine has written a snapshot.
    vm.try_snapshot(&Files::new()).unwrap();
    new.set_nonblocking(true).unwrap();
    assert_eq!(new.read(&mut [0; 1]).unwrap_err().kind(), ErrorKind::WouldBlock);
    vm.resume();
    new.set_nonblocking(false).unwrap();
    assert_eq!(new.read(&mut [0; 1]).unwrap(), 1, "the first byte of the hello");
    assert_eq!(old.reply().unwrap(), Reply::Pong(7));
}

#[test]
fn a_reset_of_a_paused_machine_shows_when_it_goes_on() {
    let vm = Vm::launch(agent()).unwrap();
    drop(vm.agent());
    vm.pause();
    assert_eq!(vm.reset(), 2);
    let files = Files::new();
    vm.try_snapshot(&files).unwrap();
    assert_eq!(files.read().state.life().0, 2);
    vm.resume();
    assert_eq!(vm.agent().hello().life, 2);
    // It was before its first instruction.
    assert_eq!(vm.restore(&files).agent().hello().life, 2);
}

#[test]
fn an_nmi_that_was_queued_comes_in_the_restored_machine() {
    let vm = Vm::launch(agent()).unwrap();
    assert_eq!(vm.agent().report().unwrap().nmi.total, 0);
    vm.pause();
    assert_eq!(vm.nmi(NmiVia::Message), NmiOutcome::Queued);
    let files = Files::new();
    vm.try_snapshot(&files).unwrap();
    assert_eq!(vm.restore(&files).agent().report().unwrap().nmi.total, 1);
    // The one that was captured has it as well.
    vm.resume();
    assert_eq!(vm.agent().report().unwrap().nmi.total, 1);
}

#[test]
fn armed_counters_go_on_from_their_values_to_their_overflow() {
    const MASK: u64 = (1 << 48) - 1;
    const ENABLE: u64 = 1 << 22;
    if !processor_is_amds() {
        return;
    }
    let vm = Vm::launch(Config { pmu: PmuPolicy::Emulated, pmu_seed: 5, ..agent() }).unwrap();
    let mut agent = vm.agent();
    agent.arm_pmu(1 << 31).unwrap();
    drop(agent);
    let files = vm.snapshot();
    let pmu = |files: &Files| {
        serde_json::to_value(&files.read().state).unwrap()["vcpus"][0]["pmu"].clone()
    };
    let before = pmu(&files);
    let vm = vm.restore(&files);
    let after = pmu(&vm.snapshot());
    println!("{before}\n{after}");
    assert_eq!(before["global_control"], after["global_control"]);
    let counters = |pmu: &serde_json::Value| pmu["counters"].as_array().unwrap().clone();
    let mut running = 0;
    for (before, after) in counters(&before).iter().zip(&counters(&after)) {
        let field = |of: &serde_json::Value, name| of[name].as_u64().unwrap();
        assert_eq!(before["select"], after["select"]);
        if field(before, "select") & ENABLE == 0 {
            assert_eq!(before, after);
            continue;
        }
        running += 1;
        // On from where it was: far less than what lies between two of them. It may have overflowed on a slow host.
        let ran = field(after, "value").wrapping_sub(field(before, "value")) & MASK;
        assert!(ran < 1 << 40, "{before} {after}");
    }
    assert!(running > 0, "no counter was running");
    vm.resume();
    let mut agent = vm.agent();
    agent.await_nmi(0, 1 << 40).unwrap();
    assert_eq!(agent.report().unwrap().nmi.total, 1, "the overflow came once");
}

#[test]
fn clones_live_beside_each_other_and_can_be_told_apart() {
    let vm = Vm::launch(agent()).unwrap();
    let mut original = vm.agent();
    let mut identities = vec![original.identify().unwrap().unwrap()];
    let files = vm.snapshot();
    let with_cid = |cid| Config { cid: GuestCid::new(cid).unwrap(), ..files.restored(agent()) };
    let clones = [10, 11].map(|cid| Vm::launch(with_cid(cid)).unwrap());
    for clone in &clones {
        identities.push(clone.agent().identify().unwrap().unwrap());
    }
    vm.resume();
    identities.push(original.identify().unwrap().unwrap());
    let cids: Vec<_> = identities.iter().map(|identity| identity.cid).collect();
    assert_eq!(cids, [3, 10, 11, 3]);
    let generations: BTreeSet<_> = identities.iter().map(|identity| identity.generation).collect();
    assert_eq!(generations.len(), 3, "{identities:?}");
    let random: BTreeSet<_> = identities.iter().map(|identity| identity.random).collect();
    assert_eq!(random.len(), 4, "{identities:?}");
    // A clone of a clone is as good.
    let clone = clones[0].restore(&clones[0].snapshot());
    assert!(!generations.contains(&clone.agent().identify().unwrap().unwrap().generation));
}

#[test]
fn connections_of_the_captured_machine_are_over_for_the_guest_and_new_ones_work() {
    let vm = Vm::launch(agent()).unwrap();
    let mut held: Vec<_> = (0..32).map(|_| vm.agent()).collect();
    let files = vm.snapshot();
    let clone = vm.restore(&files);
    let mut new: Vec<_> = (0..32).map(|_| clone.agent()).collect();
    new.iter_mut().for_each(|agent| agent.ping().unwrap());
    vm.resume();
    held.iter_mut().for_each(|agent| agent.ping().unwrap());
}

#[test]
fn devices_go_on_with_their_files() {
    let dir = temp_dir();
    let disk = file(&dir, "disk", &[0x5a; 64 << 10]);
    let disks = vec![DiskConfig { path: disk, read_only: true }];
    let config = Config { disks, rng: true, dma_audit: AuditMode::Strict, ..agent() };
    let vm = Vm::launch(config).unwrap();
    let check = |vm: &Vm| {
        let mut agent = vm.agent();
        let read = agent.disk(0, DiskRequest::Read { sector: 5, bytes: 4096 }).unwrap().unwrap();
        assert_eq!(read, DiskAnswer::Bytes(vec![0x5a; 4096]));
        let random = agent.random(64).unwrap().unwrap();
        assert!(random.iter().any(|byte| *byte != 0));
        let violations = vm.handle.dma_audit().unwrap().take_all();
        assert!(violations.is_empty(), "{violations:?}");
        assert_eq!(vm.handle.guest_stats().offences(), Vec::<String>::new());
    };
    check(&vm);
    let clone = vm.restore(&vm.snapshot());
    check(&clone);
    check(&clone.restore(&clone.snapshot()));
}

#[test]
fn processors_that_were_never_started_still_wait() {
    let vm = Vm::launch(Config { vcpus: 2, ..agent() }).unwrap();
    drop(vm.agent());
    let files = vm.snapshot();
    let clone = vm.restore(&files);
    clone.agent().ping().unwrap();
    let run_state = |files: &Files| {
        let state = serde_json::to_value(&files.read().state).unwrap();
        state["vcpus"][1]["state"]["registers"]["mp_state"].clone()
    };
    // KVM_MP_STATE_UNINITIALIZED.
    assert_eq!(run_state(&files), serde_json::json!([1, 0, 0, 0]));
    assert_eq!(run_state(&clone.snapshot()), run_state(&files));
}

#[test]
fn a_layer_holds_what_was_written_since_the_snapshot_below_it() {
    let vm = Vm::launch(agent()).unwrap();
    vm.pause();
    let untracked = vm.try_snapshot_of(&Files::new(), SnapshotKind::Layer);
    assert!(matches!(untracked, Err(CaptureError::NotTracked)), "{untracked:?}");

    let tracked = Config { track_dirty_pages: true, ..agent() };
    let vm = Vm::launch(tracked).unwrap();
    let mut agent = vm.agent();
    vm.pause();
    let early = vm.try_snapshot_of(&Files::new(), SnapshotKind::Layer);
    assert!(matches!(early, Err(CaptureError::NoParent)), "{early:?}");
    let mut layers = vec![Files::new()];
    let full = vm.try_snapshot(&layers[0]).unwrap();
    let mut generations = vec![full.header.id];
    for _ in 0..2 {
        vm.resume();
        agent.echo(&[7; 1000]).unwrap();
        vm.pause();
        let files = Files::new();
        let layer = vm.try_snapshot_of(&files, SnapshotKind::Layer).unwrap();
        assert_eq!(layer.header.kind, Kind::Layer(*generations.last().unwrap()));
        assert!(0 < layer.memory_bytes && layer.memory_bytes < full.memory_bytes, "{layer:?}");
        generations.push(layer.header.id);
        layers.push(files);
    }
    // And one more of a machine that was restored.
    let stack = |layers: &[Files]| {
        Files::stacked(layers, Config { track_dirty_pages: true, ..self::agent() })
    };
    let clone = Vm::launch(stack(&layers)).unwrap();
    clone.agent().ping().unwrap();
    clone.pause();
    layers.push(Files::new());
    let layer = clone.try_snapshot_of(layers.last().unwrap(), SnapshotKind::Layer).unwrap();
    assert_eq!(layer.header.kind, Kind::Layer(*generations.last().unwrap()));
    let clone = Vm::launch(stack(&layers)).unwrap();
    clone.agent().ping().unwrap();
    assert_eq!(clone.reset(), 2);
    assert_eq!(clone.agent().hello().life, 2);
}
