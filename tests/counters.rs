//! `--pmu emulated`: a guest finds AMD's counters, and they count, overflow and interrupt like those.

use std::io::Read;
use std::path::Path;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;

use crate::harness::guest::Guest;
use crate::harness::{Outcome, Started, TRACES, cleanslate, file, run, signal, skipped, temp_dir};

const CORE_SELECT: u32 = 0xc001_0200;
const CORE_COUNT: u32 = 0xc001_0201;
const GLOBAL_STATUS: u32 = 0xc000_0300;
const GLOBAL_CONTROL: u32 = 0xc000_0301;

/// Cycles not halted, counted in every ring, with an interrupt at the overflow.
const CYCLES: u64 = 0x53_0076;
const CYCLES_SILENT: u64 = 0x43_0076;

/// A counter that is this far from its overflow reaches it in some milliseconds.
const DISTANCE: u32 = 1 << 23;

/// True where guests look for AMD's counters; says that the test is not run elsewhere.
pub fn processor_is_amds() -> bool {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let is_amd = cpuinfo.contains("AuthenticAMD") || cpuinfo.contains("HygonGenuine");
    if !is_amd {
        skipped("the emulated counters are AMD's, and this processor is not");
    }
    is_amd
}

#[test]
fn the_agent_finds_amds_counters_in_every_life_and_they_are_clean() {
    if !processor_is_amds() {
        return;
    }
    let arguments = ["run", "--json", "--pmu", "emulated", "--resets", "5"];
    let via = ["--reset-via", "host,i8042,cf9,acpi,triple"];
    let outcome = run(&[&arguments[..], &via].concat()).expect_status(0);
    let json = outcome.json();
    assert_eq!(json["pmu"]["absence"], "emulated", "{outcome}");
    assert_eq!(json["pmu"]["shape"]["counters"], 6, "{outcome}");
    assert_eq!(json["lives"].as_array().unwrap().len(), 6, "{outcome}");
    for life in json["lives"].as_array().unwrap() {
        let report = &life["report"];
        let driver = report["pmu"]["status"]["present"]["driver"].as_str().unwrap();
        assert!(driver.ends_with("core perfctr, AMD"), "{outcome}");
        assert!(logged(report, "core perfctr, AMD PMU driver."), "{outcome}");
        assert!(logged(report, "... version:                2"), "{outcome}");
        let registers = report["pmu"]["msrs"].as_array().unwrap();
        assert_eq!(registers.len(), 2 + 12, "{outcome}");
        for register in registers {
            let expected = if register["index"] == GLOBAL_CONTROL { 0x3f } else { 0 };
            assert_eq!(register["value"], expected, "{register} {outcome}");
        }
        assert_eq!(report["nmi"]["total"], 0, "{outcome}");
    }
}

fn logged(report: &Value, text: &str) -> bool {
    let lines = report["dmesg"].as_array().unwrap();
    lines.iter().any(|line| line["text"].as_str().unwrap().contains(text))
}

#[test]
fn cpuid_and_registers_say_what_the_options_say() {
    if !processor_is_amds() {
        return;
    }
    let check = |options: &[&str], driver: &str, registers: usize| {
        let outcome =
            run(&[&["run", "--json", "--resets", "1", "--pmu", "emulated"], options].concat())
                .expect_status(0);
        for life in outcome.json()["lives"].as_array().unwrap() {
            let pmu = &life["report"]["pmu"];
            let found = pmu["status"]["present"]["driver"].as_str().unwrap();
            assert!(found.ends_with(driver), "{found} {outcome}");
            assert_eq!(pmu["msrs"].as_array().unwrap().len(), registers, "{outcome}");
        }
    };
    check(&["--pmu-version", "1", "--pmu-counters", "4"], "AMD", 8);
    check(&["--pmu-version", "1"], "core perfctr, AMD", 12);
    check(&["--pmu-counters", "4"], "core perfctr, AMD", 2 + 8);
    check(&["--pmu-version", "2", "--pmu-counters", "5"], "core perfctr, AMD", 2 + 10);
    check(&["--vcpus", "2", "--pmu-seed", "7"], "core perfctr, AMD", 2 + 12);
}

#[test]
fn wishes_for_counters_that_no_processor_has_are_refused() {
    let check = |options: &[&str], message| {
        run(&[&["run"], options].concat())
            .expect_status(2)
            .expect_stderr(message)
            .expect_one_line_of_stderr();
    };
    check(&["--pmu", "emulated", "--pmu-version", "3"], "--pmu-version 3 is neither 1");
    check(&["--pmu", "emulated", "--pmu-counters", "7"], "--pmu-counters 7 is not possible");
    check(&["--pmu", "emulated", "--pmu-version", "1", "--pmu-counters", "5"], "4 (legacy) or 6");
    for option in ["--pmu-version", "--pmu-counters", "--pmu-seed"] {
        check(&[option, "2"], "add --pmu emulated");
        check(&["--pmu", "host", option, "2"], "add --pmu emulated");
    }
}

fn run_guest(guest: Guest, options: &[&str]) -> Outcome {
    let dir = temp_dir();
    let kernel = file(&dir, "guest.elf", &guest.elf());
    run(&[&["run", "--pmu", "emulated", "--kernel", kernel.to_str().unwrap()], options].concat())
}

/// A guest without interrupt table that dies of the first fault or NMI, with the local APIC enabled and NMIs at overflows.
fn with_nmis_at_overflow() -> Guest {
    with_entry_for_counters(0x400)
}

/// The same with this in the local APIC's entry for counters.
fn with_entry_for_counters(entry: u32) -> Guest {
    const SPURIOUS_VECTOR: u32 = 0xfee0_00f0;
    const LVT_COUNTERS: u32 = 0xfee0_0340;
    Guest::new().store(SPURIOUS_VECTOR, 0x1ff).store(LVT_COUNTERS, entry)
}

/// Starts a counter that is [`DISTANCE`] cycles from its overflow.
fn start(guest: Guest, select: u64) -> Guest {
    start_at(DISTANCE, guest, select)
}

fn start_at(distance: u32, guest: Guest, select: u64) -> Guest {
    let count = (1 << 48) - u64::from(distance);
    guest.write_msr(CORE_COUNT, count).write_msr(CORE_SELECT, select)
}

#[test]
fn registers_that_the_counters_do_not_have_raise_a_fault() {
    if !processor_is_amds() {
        return;
    }
    // A fault in a guest without interrupt table is a triple fault: status 4.
    let check = |index, options: &[&str], status| {
        run_guest(Guest::new().read_msr(index).power_off(), options).expect_status(status);
        run_guest(Guest::new().write_msr(index, 0).power_off(), options).expect_status(status);
    };
    check(GLOBAL_STATUS, &[], 0);
    check(GLOBAL_STATUS, &["--pmu-version", "1"], 4);
    check(0xc001_020b, &[], 0);
    check(0xc001_020b, &["--pmu-counters", "5"], 4);
    check(CORE_SELECT, &["--pmu-version", "1", "--pmu-counters", "4"], 4);
    check(0xc001_0003, &["--pmu-version", "1", "--pmu-counters", "4"], 0);
}

#[test]
fn reserved_bits_are_dropped_and_legacy_registers_are_aliases() {
    if !processor_is_amds() {
        return;
    }
    let guest = Guest::new()
        .write_msr(CORE_SELECT, 0xffff_ffff_ffbf_ffff)
        .read_msr(0xc001_0000)
        .if_eax_is(0xff97_ffff, Guest::new().power_off())
        .triple_fault();
    run_guest(guest, &[]).expect_status(0);
}

#[test]
fn an_overflow_is_an_nmi_where_the_local_apic_says_so() {
    if !processor_is_amds() {
        return;
    }
    // Far more than the distance: timers of a busy host may be late.
    let spin = 1 << 29;
    let guest = start(with_nmis_at_overflow(), CYCLES).spin(spin).power_off();
    run_guest(guest, &[]).expect_status(4);
    let silent = start(with_nmis_at_overflow(), CYCLES_SILENT).spin(spin).power_off();
    run_guest(silent, &[]).expect_status(0);
    // A masked entry for an NMI, and an interrupt with a vector, which the model does not deliver.
    for entry in [0x1_0400, 0x41] {
        let other = start(with_entry_for_counters(entry), CYCLES).spin(spin).power_off();
        run_guest(other, &[]).expect_status(0);
    }
    let as_at_power_on = start(Guest::new(), CYCLES).spin(spin).power_off();
    run_guest(as_at_power_on, &[]).expect_status(0);
}

#[test]
fn an_overflow_shows_in_the_status_without_any_interrupt() {
    if !processor_is_amds() {
        return;
    }
    let guest = start(Guest::new(), CYCLES_SILENT)
        .spin(2 * DISTANCE)
        .read_msr(GLOBAL_STATUS)
        .if_eax_is(1, Guest::new().power_off())
        .triple_fault();
    run_guest(guest, &[]).expect_status(0);
}

#[test]
fn a_counter_of_cycles_not_halted_sleeps_with_its_processor() {
    if !processor_is_amds() {
        return;
    }
    /// Many times the way to the overflow.
    const SLEEP: Duration = Duration::from_millis(1500);
    let dir = temp_dir();
    // Some 0.4 s: the guest is asleep long before, even on a busy host. An NMI would wake it, and it has no way to take one.
    let guest = start_at(1 << 30, with_nmis_at_overflow().print("s"), CYCLES).halt();
    let kernel = file(&dir, "guest.elf", &guest.elf());
    let arguments = ["run", "--no-jail", "--pmu", "emulated", "--kernel", kernel.to_str().unwrap()];
    let mut program = Started::new(cleanslate(&arguments));
    let mut byte = [0];
    program.child.stdout.as_mut().unwrap().read_exact(&mut byte).unwrap();
    let before = wake_ups(program.child.id());
    std::thread::sleep(SLEEP);
    let during = wake_ups(program.child.id()) - before;
    signal(&program.child, Signal::INT);
    program.finish("cleanslate run --kernel, asleep").expect_status(130);
    // Some ten looks, the last ones half a second apart; each wakes two threads. Without patience it would be fifty.
    // A tracer wakes them far more often.
    assert!(
        during < 80 || std::env::var_os(TRACES).is_some(),
        "{during} wake-ups while the guest slept for {SLEEP:?}"
    );
}

#[test]
fn a_guest_that_overflows_its_counters_for_ever_can_still_be_stopped() {
    if !processor_is_amds() {
        return;
    }
    const LVT_COUNTERS: u32 = 0xfee0_0340;
    let round = (0..6)
        .fold(Guest::new(), |guest, counter| {
            guest.write_msr(CORE_COUNT + 2 * counter, (1 << 48) - 1)
        })
        // A reserved mode, and back.
        .store(LVT_COUNTERS, 0x1_0300)
        .store(LVT_COUNTERS, 0x1_0400)
        .write_msr(GLOBAL_STATUS + 2, u64::MAX);
    let armed = (0..6).fold(with_entry_for_counters(0x1_0400).print("s"), |guest, counter| {
        guest.write_msr(CORE_SELECT + 2 * counter, CYCLES)
    });
    let dir = temp_dir();
    let kernel = file(&dir, "guest.elf", &armed.for_ever(round).elf());
    let arguments = ["run", "--no-jail", "--pmu", "emulated", "--kernel", kernel.to_str().unwrap()];
    let mut program = Started::new(cleanslate(&arguments));
    program.child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    signal(&program.child, Signal::INT);
    program.finish("cleanslate run --kernel, in a storm").expect_status(130);
}

/// How often the threads of a process have gone to sleep of themselves so far.
fn wake_ups(process: u32) -> u64 {
    let tasks = std::fs::read_dir(Path::new("/proc").join(process.to_string()).join("task"));
    let count = |status: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        line.unwrap().trim().parse::<u64>().unwrap()
    };
    let status = |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("status"));
    tasks.unwrap().map(|task| count(&status(task.unwrap()).unwrap())).sum()
}
