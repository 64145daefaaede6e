//! What the counters say about a reset. The agent read every register before anything wrote to one, so each has to hold
//! what the architecture promises after a reset; which of them do not tells what the reset left out.

use std::collections::BTreeMap;

use agent_protocol::{MsrReading, PmuStatus, Report};

use super::Add;
use crate::kvm::pmu::PmuPolicy;

/// Event selects: bit 20 has an overflow interrupt, bit 22 enables the counter.
const INTERRUPT: u64 = 1 << 20;
const ENABLED: u64 = 1 << 22;

/// What a register is, by its number (facts of AMD's and Intel's manuals as in `kvm::pmu`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Register {
    /// Event select of a counter; the number of its count register.
    Select { counter: u32 },
    /// Count of a counter.
    Count,
    /// Intel's enables of the fixed counters, four bits each.
    FixedControl,
    /// Enable bits of all counters.
    GlobalControl,
    /// Overflow bits of all counters.
    GlobalStatus,
    /// None that a verdict knows.
    Other,
}

impl Register {
    fn of(index: u32) -> Self {
        match index {
            0x186..=0x18d => Self::Select { counter: index - 0x186 + 0xc1 },
            0xc001_0000..=0xc001_0003 => Self::Select { counter: index + 4 },
            0xc001_0200..=0xc001_020b if index.is_multiple_of(2) => {
                Self::Select { counter: index + 1 }
            }
            0xc1..=0xc8 | 0x309..=0x318 | 0xc001_0004..=0xc001_0007 | 0xc001_0200..=0xc001_020b => {
                Self::Count
            }
            0x38d => Self::FixedControl,
            0x38f | 0xc000_0301 => Self::GlobalControl,
            0x38e | 0xc000_0300 => Self::GlobalStatus,
            _ => Self::Other,
        }
    }
}

/// AMD's registers that the legacy ones do not lead to: counters 4 and up.
fn is_beyond_k7(index: u32) -> bool {
    (0xc001_0208..=0xc001_020b).contains(&index)
}

/// The PMU is what the policy wants, and as a reset leaves it.
pub(super) fn check(policy: PmuPolicy, life: u32, report: &Report, add: &mut Add) {
    // Where no counter is idle, the boot check cannot tell a PMU that is not there from one that runs away.
    let running = report.pmu.msrs.iter().find_map(|msr| Some((msr.index, running(msr)?)));
    if let (Some((msr, value)), false) = (running, is_corrupted(report)) {
        add("pmu-corrupted", format!("MSR {msr:x} was {value:x} before the kernel touched it"));
    }
    match (&report.pmu.status, policy) {
        (PmuStatus::BrokenBios { msr, value }, _) => {
            add("pmu-corrupted", format!("MSR {msr:x} was {value:x} before the kernel touched it"));
        }
        (PmuStatus::Present { driver }, PmuPolicy::Off) => {
            add("pmu-visible", format!("--pmu off, but the guest has a working {driver} PMU"));
        }
        (PmuStatus::Absent, PmuPolicy::Host) => {
            add("pmu-missing", "--pmu host, but the guest finds no PMU".into());
        }
        (PmuStatus::Absent, PmuPolicy::Emulated) => {
            add("pmu-missing", "--pmu emulated, but the guest finds no PMU".into());
        }
        (PmuStatus::Broken, _) => {
            add("pmu-broken", "counters do not hold what is written to them".into());
        }
        (PmuStatus::PresentDead, _) => {
            add("pmu-dead", "counters hold values but do not count".into());
        }
        (PmuStatus::Absent, PmuPolicy::Off)
        | (PmuStatus::Present { .. }, PmuPolicy::Host | PmuPolicy::Emulated) => {}
    }
    check_leftovers(life, report, add);
}

/// Registers that a reset should have cleared. Which of them it left alone tells what it does not do.
fn check_leftovers(life: u32, report: &Report, add: &mut Add) {
    let counters = count_of_counters(report);
    let left: Vec<_> = report.pmu.msrs.iter().filter(|msr| !is_reset(msr, counters)).collect();
    if let (1, false) = (life, left.is_empty()) {
        return add("pmu-residue", format!("at power-on {}", in_words(&left)));
    }
    let (globals, counters): (Vec<_>, Vec<_>) = left.into_iter().partition(|msr| {
        matches!(Register::of(msr.index), Register::GlobalControl | Register::GlobalStatus)
    });
    if !counters.is_empty() {
        let name = match counters.iter().all(|msr: &&MsrReading| is_beyond_k7(msr.index)) {
            true => "pmu-k7-only",
            false => "pmu-not-reset",
        };
        add(name, format!("the reset left {}", in_words(&counters)));
    }
    if !globals.is_empty() {
        add("globals-left", format!("the reset left {}", in_words(&globals)));
    }
}

fn in_words(left: &[&MsrReading]) -> String {
    let one = |msr: &&MsrReading| format!("{:x} is {:x}", msr.index, msr.value.unwrap_or(0));
    let all: Vec<_> = left.iter().map(one).collect();
    format!("MSR {}", all.join(", "))
}

/// Whether a register holds what it holds after a reset: all clear, and of the global enables all set.
fn is_reset(msr: &MsrReading, counters: u32) -> bool {
    let all = 1_u64.checked_shl(counters).unwrap_or(0).wrapping_sub(1);
    match (Register::of(msr.index), msr.value) {
        // What faults is not there.
        (_, None) | (Register::Other, _) => true,
        (Register::GlobalControl, Some(value)) => value == all,
        (_, Some(value)) => value == 0,
    }
}

/// How many counters have event selects, as the agent found them.
fn count_of_counters(report: &Report) -> u32 {
    let is_select = |msr: &&MsrReading| matches!(Register::of(msr.index), Register::Select { .. });
    report.pmu.msrs.iter().filter(is_select).count() as u32
}

pub(super) fn is_corrupted(report: &Report) -> bool {
    matches!(report.pmu.status, PmuStatus::BrokenBios { .. })
}

/// The value of an event select that has its counter enabled, or of Intel's control register with either enable bit of a
/// fixed counter.
fn running(msr: &MsrReading) -> Option<u64> {
    const FIXED_ENABLED: u64 = 0x3333_3333_3333_3333;
    let value = msr.value?;
    let enabled = match Register::of(msr.index) {
        Register::Select { .. } => value & ENABLED,
        Register::FixedControl => value & FIXED_ENABLED,
        _ => 0,
    };
    (enabled != 0).then_some(value)
}

/// What the counters showed that were found running with an interrupt at their overflow.
fn interrupting(report: &Report) -> impl Iterator<Item = u64> + '_ {
    // For looking up: a guest decides how many there are.
    let values: BTreeMap<_, _> =
        report.pmu.msrs.iter().rev().filter_map(|msr| Some((msr.index, msr.value?))).collect();
    report.pmu.msrs.iter().filter_map(move |msr| match Register::of(msr.index) {
        Register::Select { counter } if running(msr)? & INTERRUPT != 0 => {
            values.get(&counter).copied()
        }
        _ => None,
    })
}

/// How many NMIs the counters explain that were found running: one each, since the next overflow takes hours.
pub(super) fn overflows(report: &Report) -> u32 {
    interrupting(report).count() as u32
}

/// In how many cycles the last counter overflows that was found running and interrupts then, if that is soon.
pub fn ticks_to_overflow(report: &Report) -> Option<u64> {
    /// Counters have 48 bits: of AMD always, of Intel on all processors with PerfMon version 2 or newer.
    const FULL: u64 = 1 << 48;
    /// A second or less.
    const SOON: u64 = 1 << 30;
    interrupting(report)
        .map(|count| FULL.saturating_sub(count))
        .filter(|distance| *distance <= SOON)
        .max()
}
