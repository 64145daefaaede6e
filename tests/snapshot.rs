//! A machine that is captured goes on in another one, with all that its guest can tell of itself.

use std::collections::BTreeMap;

use agent_protocol::StateReading;
use vmm::machine::{CaptureError, Config};

use crate::harness::vm::{Files, Vm, agent};

fn by_name(state: Vec<StateReading>) -> BTreeMap<String, Option<u64>> {
    state.into_iter().map(|StateReading { item, value }| (item, value)).collect()
}

#[test]
fn every_item_of_a_poisoned_guest_comes_back_with_its_value() {
    let vm = Vm::launch(Config { looks_first: true, ..agent() }).unwrap();
    let mut agent = vm.agent();
    let (poisonings, _) = agent.poison().unwrap();
    let held = poisonings.iter().filter(|poisoning| poisoning.result.is_ok()).count();
    let before = by_name(agent.state().unwrap().0);
    let files = vm.snapshot();
    drop(vm);
    let vm = Vm::launch(files.restored(self::agent())).unwrap();
    let after = by_name(vm.agent().state().unwrap().0);
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
