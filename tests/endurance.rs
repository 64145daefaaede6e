//! Many resets leave no descriptor, no thread and no memory behind: a thousand of one machine, and hundreds in a soak.

use std::io::{BufReader, Read};

use serde_json::Value;

use crate::harness::holdings::Holdings;
use crate::harness::process::Process;
use crate::harness::{Started, cleanslate, eventually, machine_of, signal, temp_dir};
use crate::soak::Running;

/// Reads until what was read ends with `mark`.
fn read_until(stream: &mut impl Read, seen: &mut Vec<u8>, mark: &str) {
    while !seen.ends_with(mark.as_bytes()) {
        let mut byte = [0];
        assert_eq!(stream.read(&mut byte).unwrap(), 1, "{}", String::from_utf8_lossy(seen));
        seen.push(byte[0]);
    }
}

#[test]
fn a_thousand_resets_are_clean_and_leave_nothing() {
    let dir = temp_dir();
    let socket = dir.path().join("vsock");
    // Held after its verdict, so that its holdings can be counted at the end too.
    let mut command = cleanslate(&["run", "--json", "--resets", "1000", "--hold"]);
    command.args(["--reset-via", "host,i8042,cf9,acpi,triple", "--uds", socket.to_str().unwrap()]);
    let mut program = Started::new(command);
    let mut stdout = BufReader::new(program.child.stdout.take().unwrap());
    let mut seen = Vec::new();
    read_until(&mut stdout, &mut seen, "{\"life\":11,");
    let machine = machine_of(&program.child);
    let after_ten = Holdings::of(machine);
    read_until(&mut stdout, &mut seen, "\n");
    let json: Value = serde_json::from_slice(&seen).unwrap();
    assert_eq!(json["verdict"], "clean", "{:#}", json["findings"]);
    assert_eq!(json["lives"].as_array().unwrap().len(), 1001);
    // The event loop closes the last connection a moment after the main thread did.
    eventually("the descriptors are as few as after ten resets", || {
        Holdings::of(machine).descriptors <= after_ten.descriptors
    });
    let after_all = Holdings::of(machine);
    // Percentiles take eight bytes of a life, in pages.
    const SLACK_KIB: u64 = 16;
    let grown = after_all.resident_kib > after_ten.resident_kib + SLACK_KIB;
    assert!(!grown, "{after_ten:?} became {after_all:?}");
    assert_eq!(after_all.threads, after_ten.threads);
    signal(&program.child, rustix::process::Signal::INT);
    program.finish("cleanslate run --resets 1000 --hold").expect_status(0);
    assert!(!socket.exists());
}

/// The least that a process held at any of some moments: what it is busy with comes and goes, and what leaks stays.
fn least(soak: &mut Running, processes: &[Process], lives: u64) -> Vec<Holdings> {
    const MOMENTS: usize = 60;
    let mut least: Vec<Holdings> = Vec::new();
    let mut seen = [0; 2];
    soak.read_until(|line| {
        if let Some(vm) = line["vm"].as_u64() {
            seen[vm as usize - 1] = line["life"].as_u64().unwrap();
        }
        seen.iter().all(|life| *life >= lives)
    });
    for _ in 0..MOMENTS {
        soak.read_until(|_| true);
        let now: Vec<_> = processes.iter().map(|process| Holdings::of(process.pid)).collect();
        if least.is_empty() {
            least.clone_from(&now);
        }
        for (least, now) in least.iter_mut().zip(now) {
            least.descriptors = least.descriptors.min(now.descriptors);
            least.threads = least.threads.min(now.threads);
            least.resident_kib = least.resident_kib.min(now.resident_kib);
        }
    }
    least
}

#[test]
fn a_soak_holds_no_more_after_hundreds_of_resets_than_after_fifty() {
    /// A machine may be in the middle of four connections whenever one looks. A leak would have to be rarer than one in 150 lives.
    const SLACK_DESCRIPTORS: usize = 4;
    /// The heap keeps what a transfer's buffers took, or does not: a quarter of a MiB. Of each life a leak would have to be smaller
    /// than 700 bytes.
    const SLACK_KIB: u64 = 512;
    let mut soak = Running::start(&["--seed", "12"], 2);
    let callers = soak.callers();
    let machines = callers.iter().map(|caller| Running::machine_of(*caller));
    let mut processes = vec![soak.coordinator()];
    processes.extend(callers.iter().copied().chain(machines));
    let early = least(&mut soak, &processes, 50);
    let late = least(&mut soak, &processes, 800);
    for (process, (early, late)) in processes.iter().zip(early.iter().zip(&late)) {
        let told = format!("{process:?}: {early:?} became {late:?}");
        assert!(late.descriptors <= early.descriptors + SLACK_DESCRIPTORS, "{told}");
        assert!(late.threads <= early.threads, "{told}");
        assert!(late.resident_kib <= early.resident_kib + SLACK_KIB, "{told}");
        println!("{told}");
    }
    soak.signal(rustix::process::Signal::INT);
    let (outcome, _dir) = soak.finish();
    let outcome = outcome.expect_status(130);
    assert!(outcome.stdout.contains("\"findings\":0,"), "{outcome}");
}
