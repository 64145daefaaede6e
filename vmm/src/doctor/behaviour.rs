//! The behaviours of KVM that are looked at: their names, what is right, since when, and who observes and judges them.

use std::path::Path;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Judgement, after_run, l2, mdev, nmis, pmu, pv_msrs, vmcs_fields, vmrun};
use crate::kvm::host::Module;
use crate::kvm::{self, KvmError};

/// A behaviour of KVM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Behaviour {
    /// Nested VMX: fields of VMCSs.
    VmcsFields,
    /// Nested SVM: the exit code of a failed VMRUN.
    VmrunExitCode,
    /// Paravirtual registers without their features.
    PvMsrs,
    /// CPUID and feature registers while a nested guest is active.
    CpuidInL2,
    /// CPUID after a vCPU has run.
    CpuidAfterRun,
    /// Performance counters that are disabled, or reset.
    PmuOff,
    /// NMIs that are cancelled.
    NmiCancel,
    /// Mediated devices.
    Mdev,
}

/// Why nothing was observed.
#[derive(Debug, thiserror::Error)]
pub enum Unseen {
    /// This host does not have what it takes.
    #[error("{0}")]
    Here(String),
    /// KVM failed.
    #[error(transparent)]
    Kvm(#[from] KvmError),
}

impl Unseen {
    pub(super) fn here(why: impl Into<String>) -> Self {
        Self::Here(why.into())
    }
}

impl Behaviour {
    /// All of them, as they are listed.
    pub const ALL: [Self; 8] = [
        Self::VmcsFields,
        Self::VmrunExitCode,
        Self::PvMsrs,
        Self::CpuidInL2,
        Self::CpuidAfterRun,
        Self::PmuOff,
        Self::NmiCancel,
        Self::Mdev,
    ];

    /// The name that options, tables and JSON use.
    pub fn name(self) -> &'static str {
        match self {
            Self::VmcsFields => "vmcs-fields",
            Self::VmrunExitCode => "vmrun-exit-code",
            Self::PvMsrs => "pv-msrs",
            Self::CpuidInL2 => "cpuid-in-l2",
            Self::CpuidAfterRun => "cpuid-after-run",
            Self::PmuOff => "pmu-off",
            Self::NmiCancel => "nmi-cancel",
            Self::Mdev => "mdev",
        }
    }

    /// What a KVM does that is not affected.
    pub fn explanation(self) -> &'static str {
        match self {
            Self::VmcsFields => {
                "a hypervisor in a guest gets an error from VMCS fields that the processor lacks, and VMX_VMCS_ENUM names none"
            }
            Self::VmrunExitCode => {
                "a hypervisor in a guest whose VMRUN fails finds exit code -1 in 64 bits, not in 32"
            }
            Self::PvMsrs => {
                "a monitor may read all paravirtual registers that KVM lists and write 0 to them, also if CPUID hides them"
            }
            Self::CpuidInL2 => {
                "a monitor can change neither CPUID nor feature registers while a guest of the guest is active"
            }
            Self::CpuidAfterRun => {
                "a monitor cannot change the CPUID of a vCPU that has run, but may set the same once more"
            }
            Self::PmuOff => {
                "a machine whose PMU is disabled has no counters, and after a reset counters are zero"
            }
            Self::NmiCancel => "KVM_SET_VCPU_EVENTS without pending NMIs cancels those that wait",
            Self::Mdev => "parents and types of mediated devices (vfio/mdev) are listed",
        }
    }

    /// Which kernels are not affected.
    pub fn fixed_in(self) -> &'static str {
        match self {
            Self::VmcsFields | Self::CpuidInL2 => "Linux 7.0",
            Self::VmrunExitCode => "Linux 6.19, 6.18.3; 6.12.107 and 6.1.176 have it",
            Self::PvMsrs => "Linux 7.0; 6.12.107 has it, 6.1.176 a part",
            Self::CpuidAfterRun => "Linux 5.17",
            Self::PmuOff => "Linux 5.18",
            Self::NmiCancel => "all that are known: Linux 6.1 and newer",
            Self::Mdev => "Linux 7.1, in a comment alone",
        }
    }

    /// Whether it takes KVM to look at it.
    pub fn needs_kvm(self) -> bool {
        self != Self::Mdev
    }

    /// Looks at this host, as JSON of a type that [`Self::judge`] knows. [`Self::VmrunExitCode`] and
    /// [`Self::VmcsFields`] take a machine with an agent: [`vmrun::observe`], [`vmcs_fields::Features`].
    ///
    /// # Errors
    /// [`Unseen`].
    pub fn observe(self) -> Result<Value, Unseen> {
        if self == Self::Mdev {
            return Ok(json(&mdev::observe(Path::new("/sys"))));
        }
        let (kvm, module) = (kvm::open()?, Module::read());
        Ok(match self {
            Self::PvMsrs => json(&pv_msrs::observe(&kvm, module)?),
            Self::CpuidInL2 => json(&l2::observe(&kvm)?),
            Self::CpuidAfterRun => json(&after_run::observe(&kvm)?),
            Self::PmuOff => json(&pmu::observe(&kvm, module)?),
            Self::NmiCancel => json(&nmis::observe(&kvm)?),
            Self::VmcsFields | Self::VmrunExitCode | Self::Mdev => {
                return Err(Unseen::here("another one observes it"));
            }
        })
    }

    /// What an observation means.
    pub fn judge(self, observed: &Value) -> Judgement {
        match self {
            Self::VmcsFields => judge(observed, vmcs_fields::judge),
            Self::VmrunExitCode => judge(observed, vmrun::judge),
            Self::PvMsrs => judge(observed, pv_msrs::judge),
            Self::CpuidInL2 => judge(observed, l2::judge),
            Self::CpuidAfterRun => judge(observed, after_run::judge),
            Self::PmuOff => judge(observed, pmu::judge),
            Self::NmiCancel => judge(observed, nmis::judge),
            Self::Mdev => judge(observed, mdev::judge),
        }
    }
}

/// An observation for another process.
pub(super) fn json<T: Serialize>(observed: &T) -> Value {
    // Structures of numbers, words and lists cannot fail.
    serde_json::to_value(observed).unwrap_or_default()
}

fn judge<T: DeserializeOwned>(observed: &Value, judge: impl Fn(&T) -> Judgement) -> Judgement {
    match T::deserialize(observed) {
        Ok(observed) => judge(&observed),
        Err(error) => Judgement::cannot_tell(format!("its process said something else: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum;

    use super::*;
    use crate::doctor::{Verdict, check};

    #[test]
    fn behaviours_have_one_name_everywhere() {
        assert_eq!(Behaviour::value_variants(), Behaviour::ALL);
        for behaviour in Behaviour::ALL {
            let name = behaviour.name();
            assert_eq!(behaviour.to_possible_value().unwrap().get_name(), name);
            assert_eq!(json(&behaviour), Value::from(name));
        }
    }

    #[test]
    fn nonsense_tells_nothing() {
        for behaviour in Behaviour::ALL {
            for nonsense in [Value::Null, Value::from("fixed"), Value::from(vec![1])] {
                let found = behaviour.judge(&nonsense);
                check(&found, Verdict::CannotTell, "its process said something else");
            }
        }
    }
}
