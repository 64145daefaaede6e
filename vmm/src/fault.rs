//! Faults on purpose: each leaves out one step of a reset, so that a verdict can be seen to find what it rules out.

use std::fmt;

use serde::Serialize;

use crate::kvm::pmu::PmuPolicy;

/// `--inject`: a step of the reset that is left out. The verdict has a finding of the same name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Fault {
    /// Event selects and counters stay as they are
    PmuNotReset,
    /// Of the counters only the four that AMD's legacy registers reach are cleared
    PmuK7Only,
    /// The counters' global enables and status stay as they are
    GlobalsLeft,
    /// An NMI that was meant for the earlier life comes once the next one can take it
    NmiAfterReset,
    /// The reset comes in the handler of an NMI with another one queued, and no queued event is cancelled
    NmiQueued,
    /// RAM behind the agent's image keeps its contents
    RamKept,
    /// General, control and segment registers and those of descriptor tables stay as they are, but for what the entry point needs
    RegistersKept,
    /// Model-specific registers stay as they are, but for those of clocks, counters and KVM's interface
    MsrsKept,
    /// The local APIC keeps its mode and all registers but those of its timer
    LapicKept,
    /// The I/O APIC keeps its entries
    IoapicKept,
    /// Floating-point and vector registers stay as they are
    FpuKept,
    /// Debug registers stay as they are
    DebugregsKept,
    /// The timer of the local APIC runs on
    LapicTimerLeft,
    /// The vsock device remembers an event buffer of the earlier life, and fills it in the next
    EventBuffersStale,
    /// The vsock device keeps its connections
    VsockKept,
    /// KVM goes on writing its paravirtual clocks and flags into RAM
    PvClockLeft,
}

impl Fault {
    /// The name that options, findings and JSON use.
    pub fn name(self) -> &'static str {
        match self {
            Self::PmuNotReset => "pmu-not-reset",
            Self::PmuK7Only => "pmu-k7-only",
            Self::GlobalsLeft => "globals-left",
            Self::NmiAfterReset => "nmi-after-reset",
            Self::NmiQueued => "nmi-queued",
            Self::RamKept => "ram-kept",
            Self::RegistersKept => "registers-kept",
            Self::MsrsKept => "msrs-kept",
            Self::LapicKept => "lapic-kept",
            Self::IoapicKept => "ioapic-kept",
            Self::FpuKept => "fpu-kept",
            Self::DebugregsKept => "debugregs-kept",
            Self::LapicTimerLeft => "lapic-timer-left",
            Self::EventBuffersStale => "event-buffers-stale",
            Self::VsockKept => "vsock-kept",
            Self::PvClockLeft => "pv-clock-left",
        }
    }

    fn needs_counters(self) -> bool {
        matches!(self, Self::PmuNotReset | Self::PmuK7Only | Self::GlobalsLeft)
    }

    fn needs_poison(self) -> bool {
        matches!(
            self,
            Self::RamKept
                | Self::RegistersKept
                | Self::MsrsKept
                | Self::LapicKept
                | Self::IoapicKept
                | Self::FpuKept
                | Self::DebugregsKept
                | Self::LapicTimerLeft
                | Self::EventBuffersStale
                | Self::PvClockLeft
        )
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Faults that cannot be shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FaultError {
    /// There would be nothing to leave in them.
    #[error(
        "--inject {0} needs performance counters: add --pmu emulated, or --pmu host where KVM has some"
    )]
    NoCounters(Fault),
    /// The state would be as clean without the step.
    #[error(
        "--inject {0} leaves only what the residue check put there: add --poison, or leave soak's --no-poison out"
    )]
    NoPoison(Fault),
    /// The machine lacks the registers.
    #[error("--inject {0} needs {1}")]
    Lacking(Fault, &'static str),
    /// One hides the other.
    #[error("--inject {0} and --inject {1} exclude each other: what one clears the other leaves")]
    Contradiction(Fault, Fault),
}

/// The steps that a machine's resets leave out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Faults(Vec<Fault>);

impl Faults {
    /// A set of faults that can be seen on a machine with these counters, and with or without the residue check.
    ///
    /// # Errors
    /// [`FaultError`].
    pub fn new(
        mut faults: Vec<Fault>,
        policy: PmuPolicy,
        poison: bool,
    ) -> Result<Self, FaultError> {
        faults.sort_by_key(|fault| *fault as u8);
        faults.dedup();
        let faults = Self(faults);
        if let Some(fault) = faults.iter().find(|fault| fault.needs_counters())
            && policy == PmuPolicy::Off
        {
            return Err(FaultError::NoCounters(fault));
        }
        if let Some(fault) = faults.iter().find(|fault| fault.needs_poison())
            && !poison
        {
            return Err(FaultError::NoPoison(fault));
        }
        if faults.has(Fault::PmuNotReset) && faults.has(Fault::PmuK7Only) {
            return Err(FaultError::Contradiction(Fault::PmuNotReset, Fault::PmuK7Only));
        }
        Ok(faults)
    }

    /// Whether the step is left out.
    pub fn has(&self, fault: Fault) -> bool {
        self.0.contains(&fault)
    }

    /// All of them, each once.
    pub fn iter(&self) -> impl Iterator<Item = Fault> + '_ {
        self.0.iter().copied()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum;

    use super::*;

    #[test]
    fn a_fault_has_one_name_everywhere() {
        for fault in Fault::value_variants() {
            let name = fault.name();
            assert_eq!(fault.to_possible_value().unwrap().get_name(), name);
            assert_eq!(serde_json::to_string(fault).unwrap(), format!("\"{name}\""));
        }
    }

    #[test]
    fn faults_that_nothing_could_show_are_refused() {
        let check = |faults: &[Fault], policy, expected: Option<FaultError>| {
            assert_eq!(Faults::new(faults.to_vec(), policy, true).err(), expected, "{faults:?}");
        };
        use Fault::{GlobalsLeft, NmiAfterReset, NmiQueued, PmuK7Only, PmuNotReset};
        for fault in [PmuNotReset, PmuK7Only, GlobalsLeft] {
            check(&[fault], PmuPolicy::Off, Some(FaultError::NoCounters(fault)));
            check(&[fault], PmuPolicy::Emulated, None);
            check(&[fault], PmuPolicy::Host, None);
        }
        check(&[NmiQueued, NmiAfterReset], PmuPolicy::Off, None);
        check(
            &[PmuK7Only, NmiQueued, PmuNotReset],
            PmuPolicy::Emulated,
            Some(FaultError::Contradiction(PmuNotReset, PmuK7Only)),
        );
    }

    #[test]
    fn without_poison_state_that_nobody_touched_shows_nothing() {
        for fault in Fault::value_variants() {
            let error = Faults::new(vec![*fault], PmuPolicy::Emulated, false).err();
            let expected = fault.needs_poison().then_some(FaultError::NoPoison(*fault));
            assert_eq!(error, expected, "{fault}");
        }
    }

    #[test]
    fn a_fault_that_is_named_twice_is_one() {
        let faults = vec![Fault::NmiQueued, Fault::GlobalsLeft, Fault::NmiQueued];
        let faults = Faults::new(faults, PmuPolicy::Emulated, false).unwrap();
        assert_eq!(faults.iter().count(), 2);
        assert!(faults.has(Fault::NmiQueued) && !faults.has(Fault::PmuK7Only));
    }
}
