//! The boot-time check of the performance counters. It decides as Linux's `check_hw_exists` does
//! (arch/x86/events/core.c), says so in Linux's words, and notes every register before anything writes to one.

mod counters;

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use agent_protocol::{MsrReading, PmuCpuid, PmuReport, PmuStatus};

use crate::kernel_log::Level;
use counters::{Counters, Fixed, NoDriver};

/// Event-select bit 22: the counter is enabled.
const ENABLE: u64 = 1 << 22;
/// Event-select bit 20: an overflow interrupts.
const INTERRUPT: u64 = 1 << 20;
/// Event-select bits 16 and 17: count in rings 3 and 0.
const USER_AND_KERNEL: u64 = 3 << 16;
const HYPERVISOR: u32 = 1 << 31;

/// Prefix of the outcome line.
const EVENTS: &str = "Performance Events: ";

/// One MSR access; an array of them passes the gate at once, so the layout is that of gate.s.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct MsrOperation {
    /// Register number.
    pub index: u32,
    /// 0 reads, anything else writes.
    pub write: u8,
    /// Set to 1 if the access faulted.
    pub faulted: u8,
    reserved: u16,
    /// What was read or is to be written.
    pub value: u64,
}

impl MsrOperation {
    /// A read.
    pub fn read(index: u32) -> Self {
        Self { index, write: 0, faulted: 0, reserved: 0, value: 0 }
    }

    /// A write.
    pub fn write(index: u32, value: u64) -> Self {
        Self { index, write: 1, faulted: 0, reserved: 0, value }
    }

    /// The value, unless the access faulted.
    pub fn result(&self) -> Option<u64> {
        (self.faulted == 0).then_some(self.value)
    }
}

/// The registers of a machine.
pub trait Msrs {
    /// Carries out the operations in order; a fault marks its operation and the rest go on.
    fn run(&mut self, operations: &mut [MsrOperation]);

    /// Carries out operations that are all reads.
    fn read(&mut self, operations: &mut [MsrOperation]) {
        self.run(operations);
    }

    /// Carries out operations that are all writes, each followed by a read: they have the values that the registers hold then.
    fn write_and_read(&mut self, operations: &mut [MsrOperation]) {
        for write in operations {
            self.run(core::slice::from_mut(write));
            let mut read = [MsrOperation::read(write.index)];
            self.run(&mut read);
            (write.value, write.faulted) = (read[0].value, write.faulted | read[0].faulted);
        }
    }

    /// Lets some tens of thousands of cycles pass in ring 3.
    fn spin(&mut self);
}

/// Lines for the kernel log.
pub type Lines = Vec<(Level, String)>;

/// Checks the counters of a machine with these CPUID words.
pub fn check(cpuid: PmuCpuid, msrs: &mut impl Msrs) -> (PmuReport, Lines) {
    let counters = match Counters::of(&cpuid) {
        Ok(counters) => counters,
        Err(reason) => return no_driver(cpuid, reason),
    };
    let mut found: Vec<_> = counters.registers().map(MsrOperation::read).collect();
    msrs.read(&mut found);
    let check = Check { cpuid, counters, found };
    let (status, lines) = check.conclude(msrs);
    (PmuReport { status, cpuid, msrs: check.readings() }, lines)
}

/// True if Linux would use these counters. It then has their overflows come as NMIs.
pub fn has_driver(status: &PmuStatus) -> bool {
    match status {
        PmuStatus::Present { .. } | PmuStatus::BrokenBios { .. } | PmuStatus::PresentDead => true,
        PmuStatus::Absent | PmuStatus::Broken => false,
    }
}

/// Leaves every register with a value that it does not have after a reset: the first counter running, `overflow_in` cycles
/// before its overflow interrupts, the others idle, so that the boot check of a life that finds them so has some to test.
/// False if there are no counters or a register faulted.
pub fn arm(cpuid: &PmuCpuid, overflow_in: u64, msrs: &mut impl Msrs) -> bool {
    /// What the idle counters are left with.
    const MARK: u64 = 0x1eaf;
    let Ok(counters) = Counters::of(cpuid) else { return false };
    let select = counters.cycles | USER_AND_KERNEL | INTERRUPT;
    let count = 1_u64.checked_shl(counters.width).unwrap_or(0).wrapping_sub(overflow_in);
    let mut writes = Vec::new();
    for number in 1..counters.count {
        writes.push(MsrOperation::write(counters.select(number), select));
        writes.push(MsrOperation::write(counters.counter(number), MARK + number as u64));
    }
    if let Some(set) = counters.global_status_set {
        writes.push(MsrOperation::write(set, 1 << (counters.count - 1)));
    }
    if let Some(control) = counters.global_control {
        writes.push(MsrOperation::write(control, 1));
    }
    writes.push(MsrOperation::write(counters.counter(0), count));
    writes.push(MsrOperation::write(counters.select(0), select | ENABLE));
    msrs.run(&mut writes);
    writes.iter().all(|write| write.faulted == 0)
}

fn no_driver(cpuid: PmuCpuid, reason: NoDriver) -> (PmuReport, Lines) {
    let tail = "no PMU driver, software events only.";
    let line = match reason {
        NoDriver::Vendor => format!("{EVENTS}{tail}"),
        NoDriver::IntelModel { family, model } => {
            format!("{EVENTS}unsupported CPU family {family} model {model} {tail}")
        }
    };
    let report = PmuReport { status: PmuStatus::Absent, cpuid, msrs: Vec::new() };
    (report, alloc::vec![(Level::Info, line)])
}

struct Check {
    cpuid: PmuCpuid,
    counters: Counters,
    found: Vec<MsrOperation>,
}

impl Check {
    fn readings(&self) -> Vec<MsrReading> {
        let reading = |operation: &MsrOperation| MsrReading {
            index: operation.index,
            value: operation.result(),
        };
        self.found.iter().map(reading).collect()
    }

    fn value(&self, index: u32) -> Result<u64, Failure> {
        let operation = self.found.iter().find(|operation| operation.index == index);
        operation.and_then(MsrOperation::result).ok_or(Failure { msr: index, value: 0 })
    }

    fn conclude(&self, msrs: &mut impl Msrs) -> (PmuStatus, Lines) {
        match self.running_and_idle().and_then(|(running, idle)| {
            self.holds_what_is_written(idle, msrs)?;
            Ok((running, idle))
        }) {
            Ok((Some((msr, value)), _)) => self.broken_bios(msr, value),
            Ok((None, idle)) => self.present(idle, msrs),
            Err(failure) => self.failed(failure),
        }
    }

    /// The last control register found enabled, and the last counter found free. Linux's steps 1 to 3.
    fn running_and_idle(&self) -> Result<(Option<(u32, u64)>, usize), Failure> {
        let (mut running, mut idle) = (None, None);
        for number in 0..self.counters.count {
            let msr = self.counters.select(number);
            let value = self.value(msr)?;
            if value & ENABLE != 0 {
                running = Some((msr, value));
            } else {
                idle = Some(number);
            }
        }
        if let Some(Fixed { control, count }) = self.counters.fixed {
            let value = self.value(control)?;
            if (0..count).any(|number| value & (3 << (4 * number)) != 0) {
                running = Some((control, value));
            }
        }
        let first = self.counters.select(0);
        Ok((
            running,
            idle.ok_or(Failure { msr: first, value: running.map_or(0, |(_, value)| value) })?,
        ))
    }

    /// Linux's step 4. KVM without a PMU reads some counters as 0 and swallows writes. Unlike Linux this puts the old
    /// value back, so that a later look at the registers finds no trace of the check.
    fn holds_what_is_written(&self, number: usize, msrs: &mut impl Msrs) -> Result<(), Failure> {
        let counter = self.counters.counter(number);
        let old = self.value(counter)?;
        let written = old ^ 0xffff;
        let mut operations = [
            MsrOperation::write(counter, written),
            MsrOperation::read(counter),
            MsrOperation::write(counter, old),
        ];
        msrs.run(&mut operations);
        let [write, read, _] = operations;
        match read.result() {
            Some(value) if value == written && write.faulted == 0 => Ok(()),
            _ => Err(Failure { msr: counter, value: read.value }),
        }
    }

    fn failed(&self, Failure { msr, value }: Failure) -> (PmuStatus, Lines) {
        let tail = "using software events only.";
        if self.cpuid.leaf_1_ecx & HYPERVISOR != 0 {
            let line = format!("{EVENTS}PMU not available due to virtualization, {tail}");
            return (PmuStatus::Absent, alloc::vec![(Level::Info, line)]);
        }
        let line = format!("{EVENTS}Broken PMU hardware detected, {tail}");
        let detail = format!("Failed to access perfctr msr (MSR {msr:x} is {value:x})");
        (PmuStatus::Broken, alloc::vec![(Level::Info, line), (Level::Error, detail)])
    }

    fn broken_bios(&self, msr: u32, value: u64) -> (PmuStatus, Lines) {
        let Counters { prefix, name, .. } = self.counters;
        let complaint = "Broken BIOS detected, complain to your hardware vendor.";
        let detail = "[Firmware Bug]: the BIOS has corrupted hw-PMU resources";
        let mut lines = alloc::vec![
            (Level::Info, format!("{EVENTS}{prefix}{complaint}")),
            (Level::Error, format!("{detail} (MSR {msr:x} is {value:x})")),
            (Level::Info, format!("{name} PMU driver.")),
        ];
        lines.extend(self.driver_lines());
        (PmuStatus::BrokenBios { msr, value }, lines)
    }

    fn present(&self, idle: usize, msrs: &mut impl Msrs) -> (PmuStatus, Lines) {
        let Counters { prefix, name, .. } = self.counters;
        let mut lines = alloc::vec![(Level::Info, format!("{EVENTS}{prefix}{name} PMU driver."))];
        lines.extend(self.driver_lines());
        let status = if self.counts(idle, msrs) {
            PmuStatus::Present { driver: format!("{prefix}{name}") }
        } else {
            PmuStatus::PresentDead
        };
        (status, lines)
    }

    /// What Linux says of a driver that has loaded, in the words of 6.18 and later.
    fn driver_lines(&self) -> Lines {
        let Counters { version, width, count, fixed, .. } = self.counters;
        [
            format!("... version:                {version}"),
            format!("... bit width:              {width}"),
            format!("... generic counters:       {count}"),
            format!("... fixed-purpose counters: {}", fixed.map_or(0, |fixed| fixed.count)),
        ]
        .into_iter()
        .map(|line| (Level::Info, line))
        .collect()
    }

    /// Whether an enabled counter advances. Leaves the registers as they were found.
    fn counts(&self, number: usize, msrs: &mut impl Msrs) -> bool {
        let (select, counter) = (self.counters.select(number), self.counters.counter(number));
        let old = |index| self.value(index).unwrap_or(0);
        let mut start = alloc::vec![
            MsrOperation::write(counter, 0),
            MsrOperation::write(select, self.counters.cycles | USER_AND_KERNEL | ENABLE),
        ];
        let mut stop =
            alloc::vec![MsrOperation::read(counter), MsrOperation::write(select, old(select))];
        if let Some(global) = self.counters.global_control {
            start.push(MsrOperation::write(global, 1 << number));
            stop.push(MsrOperation::write(global, old(global)));
        }
        stop.push(MsrOperation::write(counter, old(counter)));
        msrs.run(&mut start);
        msrs.spin();
        msrs.run(&mut stop);
        stop[0].result().is_some_and(|value| value != 0)
    }
}

/// The register at which the check failed.
#[derive(Clone, Copy, Debug)]
struct Failure {
    msr: u32,
    value: u64,
}

#[cfg(test)]
mod tests;
