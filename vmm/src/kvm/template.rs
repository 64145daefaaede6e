//! What of CPUID and of the MSRs a user wants changed for a machine's guests.

use kvm_bindings::{CpuId, Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};

use super::KvmError;

/// Which bits of a register stay, and what the others become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bits<T> {
    /// Set where a bit stays.
    pub keep: T,
    /// The other bits; zero where they stay.
    pub value: T,
}

/// A register of a leaf of CPUID.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs)]
pub enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// A change of CPUID.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuidChange {
    /// EAX of the instruction.
    pub leaf: u32,
    /// ECX of the instruction.
    pub subleaf: u32,
    /// What it returns where.
    pub register: Register,
    /// The change.
    pub bits: Bits<u32>,
}

/// A change of an MSR's value at power-on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsrChange {
    /// Its number.
    pub index: u32,
    /// The change.
    pub bits: Bits<u64>,
}

/// All that is wanted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpuTemplate {
    /// Numbers of capabilities that KVM has to have.
    pub demanded: Vec<u32>,
    /// Those that it need not have.
    pub dispensable: Vec<u32>,
    /// Changes of CPUID, in order.
    pub cpuid: Vec<CpuidChange>,
    /// Changes of MSRs, in order.
    pub msrs: Vec<MsrChange>,
}

/// A template that this host cannot follow.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// KVM lacks a capability that it demands.
    #[error("CPU template: this KVM lacks the capability {0}")]
    Lacking(u32),
    /// No machine can be without this capability.
    #[error("CPU template: the capability {0} is needed for any machine; leave out its removal")]
    Needed(u32),
    /// KVM offers no such leaf.
    #[error("CPU template: this KVM offers no CPUID leaf {leaf:#x}, subleaf {subleaf:#x}")]
    NoLeaf {
        /// The leaf.
        leaf: u32,
        /// The subleaf.
        subleaf: u32,
    },
    /// KVM has no such MSR, or does not take the value.
    #[error("CPU template: this KVM does not let MSR {index:#x} be {value:#x}")]
    Msr {
        /// Its number.
        index: u32,
        /// The value.
        value: u64,
    },
}

impl MsrChange {
    /// Makes it, and looks whether KVM has kept it.
    ///
    /// # Errors
    /// [`TemplateError::Msr`], or that KVM did not answer.
    pub(super) fn make(&self, vcpu: &VcpuFd) -> Result<(), KvmError> {
        let read = || -> Result<Option<u64>, KvmError> {
            let mut msrs = one_msr(self.index, 0)?;
            let count = vcpu.get_msrs(&mut msrs).map_err(KvmError::request("get an MSR"))?;
            Ok(msrs.as_slice()[..count].first().map(|msr| msr.data))
        };
        let old = read()?;
        let value = old.unwrap_or(0) & self.bits.keep | self.bits.value;
        vcpu.set_msrs(&one_msr(self.index, value)?).map_err(KvmError::request("set an MSR"))?;
        match read()? == Some(value) {
            true => Ok(()),
            false => Err(TemplateError::Msr { index: self.index, value }.into()),
        }
    }
}

fn one_msr(index: u32, data: u64) -> Result<Msrs, KvmError> {
    let entry = kvm_msr_entry { index, data, ..Default::default() };
    Msrs::from_entries(&[entry]).map_err(|_| KvmError::Capability("room for one MSR in a request"))
}

impl CpuTemplate {
    /// Refuses capabilities that are missing, and to do without those that no machine can do without.
    ///
    /// # Errors
    /// [`TemplateError`].
    pub fn check_capabilities(&self, kvm: &Kvm) -> Result<(), TemplateError> {
        let has = |number: &&u32| kvm.check_extension_raw(u64::from(**number)) > 0;
        if let Some(number) = self.demanded.iter().find(|number| !has(number)) {
            return Err(TemplateError::Lacking(*number));
        }
        let needed = |number: &&u32| super::capability::is_needed(**number);
        match self.dispensable.iter().find(needed) {
            Some(number) => Err(TemplateError::Needed(*number)),
            None => Ok(()),
        }
    }

    /// Makes the changes of CPUID.
    ///
    /// # Errors
    /// [`TemplateError::NoLeaf`].
    pub fn change_cpuid(&self, cpuid: &mut CpuId) -> Result<(), TemplateError> {
        for CpuidChange { leaf, subleaf, register, bits } in &self.cpuid {
            let entry = cpuid
                .as_mut_slice()
                .iter_mut()
                .find(|entry| entry.function == *leaf && entry.index == *subleaf)
                .ok_or(TemplateError::NoLeaf { leaf: *leaf, subleaf: *subleaf })?;
            let word = match register {
                Register::Eax => &mut entry.eax,
                Register::Ebx => &mut entry.ebx,
                Register::Ecx => &mut entry.ecx,
                Register::Edx => &mut entry.edx,
            };
            *word = *word & bits.keep | bits.value;
        }
        Ok(())
    }
}

impl From<TemplateError> for KvmError {
    fn from(error: TemplateError) -> Self {
        Self::Template(error)
    }
}

#[cfg(test)]
mod tests {
    use kvm_bindings::kvm_cpuid_entry2;

    use super::*;

    #[test]
    fn changes_come_in_order_and_only_where_they_are_wanted() {
        let entry = |function, index| kvm_cpuid_entry2 {
            function,
            index,
            ebx: 0b1100,
            edx: 7,
            ..Default::default()
        };
        let mut cpuid = CpuId::from_entries(&[entry(7, 0), entry(7, 1)]).unwrap();
        let change = |keep, value| CpuidChange {
            leaf: 7,
            subleaf: 1,
            register: Register::Ebx,
            bits: Bits { keep, value },
        };
        let cpuid_changes = vec![change(!0b0101, 0b0001), change(!0b1000, 0)];
        let template = CpuTemplate { cpuid: cpuid_changes, ..CpuTemplate::default() };
        template.change_cpuid(&mut cpuid).unwrap();
        let words: Vec<_> = cpuid.as_slice().iter().map(|entry| (entry.ebx, entry.edx)).collect();
        assert_eq!(words, [(0b1100, 7), (0b0001, 7)]);
    }

    #[test]
    fn a_leaf_that_is_not_there_is_refused() {
        let mut cpuid = CpuId::new(0).unwrap();
        let change = CpuidChange {
            leaf: 7,
            subleaf: 0,
            register: Register::Eax,
            bits: Bits { keep: 0, value: 0 },
        };
        let template = CpuTemplate { cpuid: vec![change], ..CpuTemplate::default() };
        let error = template.change_cpuid(&mut cpuid).unwrap_err();
        assert_eq!(
            error.to_string(),
            "CPU template: this KVM offers no CPUID leaf 0x7, subleaf 0x0"
        );
    }
}
