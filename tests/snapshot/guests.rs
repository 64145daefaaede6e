//! Guests of a few instructions, which wait in the middle of something until they are in another machine: their vsock device
//! tells, whose address is another one there.

use std::path::Path;

use vmm::boot::Payload;
use vmm::device::vsock::GuestCid;
use vmm::kvm::pmu::PmuPolicy;
use vmm::machine::{Config, Stop};

use crate::counters::processor_is_amds;
use crate::harness::guest::Guest;
use crate::harness::vm::{Files, Vm};
use crate::harness::{eventually, file, temp_dir};

/// `guest_cid` of the vsock device's configuration space.
const CID: u32 = 0xd000_0100;
const THERE: u32 = 77;

fn config(kernel: &Path) -> Config {
    Config::new(Payload::Kernel { kernel: kernel.into(), initrd: None }, 16)
}

/// Runs `before` in one machine and `after` in another, and gives what the other printed and the snapshot in between.
fn run(before: &Guest, after: &Guest, change: impl Fn(Config) -> Config) -> (Vec<String>, Files) {
    let dir = temp_dir();
    let guest = Guest::new().raw(before.code()).print("here\n").wait_until(CID, THERE);
    let kernel = file(&dir, "guest.elf", &guest.raw(after.code()).power_off().elf());
    let vm = Vm::launch(change(config(&kernel))).unwrap();
    eventually("the guest is ready", || vm.handle.console().last_lines(1) == ["here"]);
    let files = vm.snapshot();
    let cid = GuestCid::new(THERE.into()).unwrap();
    let clone = Vm::launch(Config { cid, ..files.restored(change(config(&kernel))) }).unwrap();
    let stop = clone.stopped();
    let printed = clone.handle.console().last_lines(usize::MAX);
    assert!(matches!(stop, Stop::PowerOff), "{stop:?}; it printed {printed:?}");
    (printed, files)
}

/// Prints a letter if EDX and EAX are the halves of `value`.
fn check(guest: Guest, letter: u8, value: u64) -> Guest {
    let print = Guest::new().print(std::str::from_utf8(&[letter]).unwrap());
    // `xchg eax, edx`
    let upper = Guest::new().raw(&[0x92]).if_eax_is((value >> 32) as u32, print);
    guest.if_eax_is(value as u32, upper)
}

#[test]
fn each_counter_has_its_own_value_and_selection_and_none_is_anothers() {
    if !processor_is_amds() {
        return;
    }
    const SELECT: u32 = 0xc001_0200;
    const COUNT: u32 = 0xc001_0201;
    const GLOBAL_CONTROL: u32 = 0xc000_0301;
    let select = |number: u32| u64::from(0x3_0040 + number);
    let count = |number: u32| 0x1234_0000_0000 + u64::from(number) * 0x1_0000_0101;
    let (mut before, mut after) = (Guest::new(), Guest::new());
    for number in 0..6 {
        let (selector, counter) = (SELECT + 2 * number, COUNT + 2 * number);
        before = before.write_msr(selector, select(number)).write_msr(counter, count(number));
        after = check(after.read_msr(selector), b'a' + number as u8, select(number));
        after = check(after.read_msr(counter), b'A' + number as u8, count(number));
    }
    before = before.write_msr(GLOBAL_CONTROL, 0x2a);
    after = check(after.read_msr(GLOBAL_CONTROL), b'g', 0x2a);
    let emulated = |config| Config { pmu: PmuPolicy::Emulated, ..config };
    assert_eq!(run(&before, &after, emulated).0, ["aAbBcCdDeEfFg"]);
}

#[test]
fn a_timer_that_runs_fires_in_the_restored_machine() {
    const APIC: u32 = 0xfee0_0000;
    const REQUESTED: u32 = 0x220;
    // Once, after four seconds of nanoseconds. Interrupts are off, so that it stays requested.
    let before = Guest::new()
        .store(APIC + 0xf0, 0x1ff)
        .store(APIC + 0x3e0, 0xb)
        .store(APIC + 0x320, 0x40)
        .store(APIC + 0x380, 0xffff_ffff);
    let after = Guest::new().wait_for(APIC + REQUESTED, 1).print("fired");
    // On a slow host it may have fired before.
    let fired_there = (0..5).any(|_| {
        let (printed, files) = run(&before, &after, |config| config);
        assert_eq!(printed, ["fired"]);
        let state = serde_json::to_value(&files.read().state).unwrap();
        state["vcpus"][0]["state"]["registers"]["lapic"][REQUESTED as usize] == 0
    });
    assert!(fired_there, "it always fired before the snapshot");
}

#[test]
fn the_serial_port_and_the_reset_register_are_as_they_were() {
    // Scratch register and divisor; the reset register without its last step.
    let before = Guest::new()
        .out(0x3ff, 0x5c)
        .out(0x3fb, 0x83)
        .out(0x3f8, 0x12)
        .out(0x3f9, 0x34)
        .out(0x3fb, 0x03)
        .out(0xcf9, 0x0a);
    // `mov dx, port; xor eax, eax; in al, dx; xor edx, edx`
    let read = |guest: Guest, port: u16| {
        let [low, high] = port.to_le_bytes();
        guest.raw(&[0x66, 0xba, low, high, 0x31, 0xc0, 0xec, 0x31, 0xd2])
    };
    let after = check(read(Guest::new(), 0x3ff), b'a', 0x5c);
    let after = check(read(after, 0xcf9), b'b', 0x0a);
    // `mov ecx, eax`, and back: nothing can be printed meanwhile.
    let divisor = read(after.out(0x3fb, 0x83), 0x3f9).raw(&[0x89, 0xc1]).out(0x3fb, 0x03);
    let after = check(divisor.raw(&[0x89, 0xc8, 0x31, 0xd2]), b'c', 0x34);
    assert_eq!(run(&before, &after, |config| config).0, ["abc"]);
}
