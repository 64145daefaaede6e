use super::*;

fn plan() -> Plan {
    Plan {
        vms: 1,
        first_vm: 1,
        resets: Some(10),
        duration: None,
        keep_going: false,
        seed: 42,
        silence: Duration::from_secs(1),
        arguments: vec!["--poison".into()],
    }
}

fn end(change: impl FnOnce(&mut Slot), wait_status: i32) -> Option<&'static str> {
    let mut slot = Slot::new(&plan(), 1);
    change(&mut slot);
    slot.judge_end(ExitStatus::from_raw(wait_status), &[]).map(|(name, _)| name)
}

/// A wait status as the kernel gives it for an exit.
fn exited(code: u8) -> i32 {
    i32::from(code) << 8
}

#[test]
fn an_end_is_a_finding_unless_it_was_wanted_or_comes_with_a_verdict() {
    let verdict = |slot: &mut Slot| slot.verdict = true;
    let asked = |slot: &mut Slot| slot.asked = true;
    let killed = |slot: &mut Slot| slot.killed = true;
    let said = |how| move |slot: &mut Slot| slot.end = Some((how, String::new()));
    assert_eq!(end(verdict, exited(0)), None);
    assert_eq!(end(verdict, exited(1)), None);
    assert_eq!(end(|_| {}, exited(0)), Some("vm-failed"));
    assert_eq!(end(|_| {}, exited(2)), Some("vm-failed"));
    assert_eq!(end(|_| {}, exited(130)), Some("vm-killed"));
    assert_eq!(end(asked, exited(130)), None);
    assert_eq!(end(asked, 15), None);
    assert_eq!(end(asked, 9), Some("vm-killed"));
    assert_eq!(end(|_| {}, 15), Some("vm-killed"));
    assert_eq!(end(killed, 9), None);
    assert_eq!(end(said(End::OutOfMemory), exited(2)), Some("vm-out-of-memory"));
    assert_eq!(end(said(End::Killed), exited(2)), Some("vm-killed"));
    assert_eq!(end(said(End::ForbiddenCall), exited(2)), Some("vm-forbidden-call"));
    assert_eq!(end(said(End::Failed), exited(2)), Some("vm-failed"));
}

#[test]
fn a_replay_has_the_seed_of_its_process() {
    let plan = plan();
    let words = plan.replay(1, 0, 5);
    let seed = seed_of(42, 1, 0).to_string();
    assert_eq!(words, ["run", "--resets", "5", "--seed", &seed, "--poison"]);
    assert_ne!(plan.replay(1, 1, 5)[4], seed);
}
