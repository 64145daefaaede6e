//! The residue check: looks at all state that a reset restores, and poisons it.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use agent::residue;
use agent_protocol::{Poisoning, StateReading};

use crate::arch::fpu::{self, Fpu};
use crate::arch::gate::{self, CpuMsrs, DebugRegisters};
use crate::arch::ram;
use crate::io_apic;

const DEBUG_NAMES: [&str; 6] = ["dr0", "dr1", "dr2", "dr3", "dr6", "dr7"];
/// Addresses of nothing; in DR6 a breakpoint that was hit, in DR7 the kind of the first one, which is not enabled.
const DEBUG_POISON: DebugRegisters =
    [0x1eaf_0000, 0x1eaf_1000, 0x1eaf_2000, 0x1eaf_3000, 0xffff_0ff1, 0x1_0400];

/// A pin that no device has, and a masked interrupt for it.
const IO_APIC_PIN: u8 = 20;
const IO_APIC_NAME: &str = "ioapic.pin20";
const IO_APIC_POISON: u64 = 0x0100_0000_0001_00f5;

const RAM_NAME: &str = "ram.pages";
const RAM_BEYOND_NAME: &str = "ram.above_1gib";

/// What has a value at first that the agent did not give it. The floating-point unit was saved before anything used it,
/// and the agent uses nothing else of all this.
pub fn read() -> Vec<StateReading> {
    let mut readings = residue::read(&mut CpuMsrs);
    let mut add = |item: String, value| readings.push(StateReading { item, value });
    for (name, value) in fpu_items(&fpu::early()) {
        add(name, Some(value));
    }
    for (name, value) in DEBUG_NAMES.into_iter().zip(gate::debug_registers()) {
        add(name.into(), Some(value));
    }
    add(IO_APIC_NAME.into(), io_apic::redirection(IO_APIC_PIN));
    add(RAM_NAME.into(), Some(ram::dirty_pages()));
    readings
}

/// Gives everything another value than it has after a reset. The floating-point unit comes last.
pub fn poison() -> Vec<Poisoning> {
    let mut poisonings = residue::poison(ram::scratch(), &mut CpuMsrs);
    let mut add = |item: String, result| poisonings.push(Poisoning { item, result });
    for (name, why) in residue::NOT_POISONABLE {
        add(name.into(), Err(why.into()));
    }
    gate::set_debug_registers(&DEBUG_POISON);
    let held = gate::debug_registers();
    for ((name, poison), held) in DEBUG_NAMES.into_iter().zip(DEBUG_POISON).zip(held) {
        add(name.into(), held_or_not(poison, Some(held)));
    }
    io_apic::set_redirection(IO_APIC_PIN, IO_APIC_POISON);
    add(IO_APIC_NAME.into(), held_or_not(IO_APIC_POISON, io_apic::redirection(IO_APIC_PIN)));
    let stamped = ram::stamp();
    add(RAM_NAME.into(), held_or_not(stamped.max(1), Some(ram::dirty_pages())));
    if ram::reaches_beyond_map() {
        add(RAM_BEYOND_NAME.into(), Err("the agent maps 1 GiB of RAM".into()));
    }
    for (name, value) in fpu_items(&fpu::poison()) {
        add(name, Ok(value));
    }
    poisonings
}

fn held_or_not(poison: u64, held: Option<u64>) -> Result<u64, String> {
    match held {
        Some(held) if held == poison => Ok(held),
        Some(held) => Err(format!("it holds {held:#x} after a write of {poison:#x}")),
        None => Err("there is none".into()),
    }
}

fn fpu_items(fpu: &Fpu) -> Vec<(String, u64)> {
    let mut items = alloc::vec![
        (String::from("fpu.control"), fpu.control),
        (String::from("fpu.mxcsr"), fpu.mxcsr),
    ];
    items.extend((8..).zip(fpu.xmm).map(|(number, value)| (format!("fpu.xmm{number}"), value)));
    items
}
