//! The residue check: looks at all state that a reset restores, and poisons it.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use agent::params::Params;
use agent::residue;
use agent_protocol::{CheckTicks, Poisoning, StateReading};

use crate::arch::first_look;
use crate::arch::fpu::{self, Extended, Fpu};
use crate::arch::gate::{self, CpuMsrs, DebugRegisters, SystemRegisters};
use crate::arch::leave::MARK;
use crate::arch::{ram, tsc};
use crate::dma::pools::EVENTS;
use crate::io_apic;

const DEBUG_NAMES: [&str; 6] = ["dr0", "dr1", "dr2", "dr3", "dr6", "dr7"];
/// Addresses of nothing; in DR6 a breakpoint that was hit, in DR7 the kind of the first one, which is not enabled.
const DEBUG_POISON: DebugRegisters =
    [0x1eaf_0000, 0x1eaf_1000, 0x1eaf_2000, 0x1eaf_3000, 0xffff_0ff1, 0x1_0400];

/// A masked interrupt, for pins that the agent does not use.
const IO_APIC_POISON: u32 = 0x1_00f5;

const EVENTS_NAME: &str = "vsock.events";
const RAM_NAME: &str = "ram.pages";
const RAM_BEYOND_NAME: &str = "ram.above_1gib";

/// An address of nothing.
const CR2_POISON: u64 = 0x1eaf_4000;

/// What has a value at first that the agent did not give it. What the way here changes was saved before, and the agent uses
/// nothing else of all this.
/// `has_avx` says whether the processor has XCR0 and YMM registers, `events` are those that the vsock device has sent; `ram` whether
/// it is looked at as well.
pub fn read(
    params: &Params,
    has_avx: bool,
    events: u64,
    ram: bool,
) -> (Vec<StateReading>, CheckTicks) {
    let began = tsc::now();
    let mut readings = residue::read(&mut CpuMsrs);
    let mut add = |item: String, value| readings.push(StateReading { item, value });
    for (name, value) in first_look::GENERAL.into_iter().zip(first_look::general()) {
        add(name.into(), Some(value));
    }
    for (name, value) in first_look::EARLY.into_iter().zip(first_look::early().unwrap_or_default())
    {
        add(name.into(), Some(value));
    }
    for (name, value) in fpu_items(&fpu::early()) {
        add(name, Some(value));
    }
    if has_avx {
        extended_items(&fpu::extended())
            .into_iter()
            .for_each(|(name, value)| add(name, Some(value)));
    }
    for (name, value) in DEBUG_NAMES.into_iter().zip(gate::debug_registers()) {
        add(name.into(), Some(value));
    }
    let pins = free_pins(params);
    for (pin, half) in pins.iter().zip(io_apic::redirections(&pins)) {
        add(pin_name(*pin), half.map(u64::from));
    }
    add(EVENTS_NAME.into(), Some(events));
    let mut ram_ticks = 0;
    if ram {
        let (dirty, ticks) = timed(ram::dirty_pages);
        add(RAM_NAME.into(), Some(dirty));
        ram_ticks = ticks;
    }
    let state = tsc::now().wrapping_sub(began).wrapping_sub(ram_ticks);
    (readings, CheckTicks { state, ram: ram_ticks })
}

/// What an action returns, and how many ticks it took.
fn timed<T>(action: impl FnOnce() -> T) -> (T, u64) {
    let began = tsc::now();
    let value = action();
    (value, tsc::now().wrapping_sub(began))
}

/// Ends what a reset has left in service: no device could interrupt the agent otherwise, and nobody would hear of it.
pub fn end_service() {
    if first_look::something_is_in_service() {
        residue::end_service(&mut CpuMsrs);
    }
}

/// Gives everything another value than it has after a reset. What the agent itself needs gets it in [`last_poison`] and when
/// it leaves, but is promised here.
pub fn poison(params: &Params, has_avx: bool) -> (Vec<Poisoning>, CheckTicks) {
    let began = tsc::now();
    gate::poison_system_registers(CR2_POISON);
    let (mut poisonings, in_service) = residue::poison(ram::scratch(), &mut CpuMsrs);
    let mut add = |item: String, result| {
        let last = is_last(&item);
        poisonings.push(Poisoning { item, result, last });
    };
    for name in first_look::GENERAL {
        add(name.into(), Ok(mark_of(name)));
    }
    let looked = first_look::early().is_some();
    let system = System::read();
    for name in first_look::EARLY {
        let held = match (looked, name) {
            (false, _) => Err("the command line does not begin with look=first".into()),
            (true, "seg.cs") => {
                Err("the entry point has the selector of the agent's ring 0".into())
            }
            (true, residue::IN_SERVICE) => in_service.clone(),
            (true, name) => Ok(system.value(name)),
        };
        add(name.into(), held);
    }
    let held = gate::set_debug_registers(DEBUG_POISON);
    for ((name, poison), held) in DEBUG_NAMES.into_iter().zip(DEBUG_POISON).zip(held) {
        add(name.into(), held_or_not(poison, Some(held)));
    }
    let pins = free_pins(params);
    for (pin, half) in pins.iter().zip(io_apic::set_redirections(&pins, IO_APIC_POISON)) {
        add(pin_name(*pin), held_or_not(IO_APIC_POISON.into(), half.map(u64::from)));
    }
    for pin in params.devices().map(|device| device.irq) {
        add(pin_name(pin), Err("a device of the agent's uses it".into()));
    }
    // Buffers that wait for the device: a reset has to let go of them, or they are filled in the next life.
    add(EVENTS_NAME.into(), Ok(EVENTS as u64));
    let ((stamped, dirty), ram) = timed(|| (ram::stamp(), ram::dirty_pages()));
    add(RAM_NAME.into(), held_or_not(stamped.max(1), Some(dirty)));
    if ram::reaches_beyond_map() {
        add(RAM_BEYOND_NAME.into(), Err("the agent maps 1 GiB of RAM".into()));
    }
    if has_avx {
        extended_items(&fpu::poison_extended())
            .into_iter()
            .for_each(|(name, value)| add(name, Ok(value)));
    } else {
        add("fpu.xcr0_bytes".into(), Err("the processor has no AVX".into()));
    }
    for (name, value) in fpu_items(&fpu::poison()) {
        add(name, Ok(value));
    }
    (poisonings, CheckTicks { state: tsc::now().wrapping_sub(began).wrapping_sub(ram), ram })
}

/// Whether an item gets its value in [`last_poison`] or in leave.s.
fn is_last(item: &str) -> bool {
    let number = item.strip_prefix("fpu.xmm").and_then(|number| number.parse().ok());
    item.starts_with("reg.") || item == residue::IN_SERVICE || number.is_some_and(|n: u8| n < 8)
}

/// What would disturb the agent if it was done earlier: an interrupt that stays in service.
pub fn last_poison() {
    residue::keep_in_service(&mut CpuMsrs);
}

/// What a general register holds when a poisoned life ends; in RAX and RDX there is what the reset needs as well.
fn mark_of(name: &str) -> u64 {
    let number = match name.rsplit_once('.').map_or("", |(_, register)| register) {
        "eax" => 0,
        "ecx" => 1,
        "edx" => 2,
        "rbx" => 3,
        "esp" => 4,
        "rbp" => 5,
        "rsi" => 6,
        "rdi" => 7,
        numbered => numbered[1..].parse().unwrap_or(0),
    };
    MARK + number
}

/// Registers of [`first_look::EARLY`] that are as they will be in the end, most of them because the agent runs with that.
struct System {
    registers: SystemRegisters,
    efer: u64,
    apic_base: u64,
    spurious_vector: u64,
}

impl System {
    fn read() -> Self {
        const X2APIC_BASE: u32 = 0x1b;
        const EFER: u32 = 0xc000_0080;
        const SPURIOUS_VECTOR: u32 = 0x80f;
        let indices = [EFER, X2APIC_BASE, SPURIOUS_VECTOR];
        let [efer, apic_base, spurious_vector] =
            residue::read_some(indices, &mut CpuMsrs).map(Option::unwrap_or_default);
        Self { registers: SystemRegisters::read(), efer, apic_base, spurious_vector }
    }

    /// What the register holds in the end.
    fn value(&self, name: &str) -> u64 {
        /// Of ring 3; ring 0 has none.
        const USER_DATA: u64 = 0x2b;
        let Self { registers, .. } = self;
        match name {
            "seg.ss" => USER_DATA,
            "seg.ds" => registers.data[0].into(),
            "seg.es" => registers.data[1].into(),
            "seg.fs" => registers.data[2].into(),
            "seg.gs" => registers.data[3].into(),
            "seg.ldtr" => registers.local_table.into(),
            "seg.tr" => registers.task.into(),
            "seg.gdt_base" => registers.global_table(),
            "seg.idt_base" => registers.interrupt_table(),
            "cr.cr0" => registers.control[0],
            "cr.cr2" => registers.control[1],
            "cr.cr3" => registers.control[2],
            "cr.cr4" => registers.control[3],
            "cr.efer" => self.efer,
            "lapic.base" => self.apic_base,
            "lapic.spurious_vector" => self.spurious_vector,
            general => mark_of(general) & 0xffff_ffff,
        }
    }
}

/// Every third pin, but for those of devices: each access to one costs a way to the monitor and back.
fn free_pins(params: &Params) -> Vec<u8> {
    (0..io_apic::PINS)
        .step_by(3)
        .filter(|pin| params.devices().all(|device| device.irq != *pin))
        .collect()
}

fn pin_name(pin: u8) -> String {
    format!("ioapic.pin{pin}")
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
        (String::from("fpu.tags"), fpu.tags),
        (String::from("fpu.mxcsr"), fpu.mxcsr),
    ];
    items.extend(numbered("fpu.st", &fpu.x87));
    items.extend(numbered("fpu.xmm", &fpu.xmm));
    items
}

fn extended_items(extended: &Extended) -> Vec<(String, u64)> {
    let mut items = alloc::vec![(String::from("fpu.xcr0_bytes"), extended.enabled_bytes)];
    items.extend(numbered("fpu.ymm", &extended.ymm));
    items
}

fn numbered<'a>(name: &'a str, values: &'a [u64]) -> impl Iterator<Item = (String, u64)> + 'a {
    values.iter().enumerate().map(move |(number, value)| (format!("{name}{number}"), *value))
}
