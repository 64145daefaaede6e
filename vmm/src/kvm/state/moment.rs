//! What a vCPU is at a moment at which it is parked: plain data, read of one and given to another.

use kvm_bindings::{CpuId, kvm_cpuid_entry2, kvm_msr_entry};
use kvm_ioctls::{KvmNestedStateBuffer, VcpuFd};
use serde::{Deserialize, Serialize};
use zerocopy::{FromBytes, IntoBytes};

use super::PowerOnState;
use super::msrs::{MSR_TSC_DEADLINE, entry, read_msrs, write_msrs};
use super::registers::{Registers, Surroundings};
use crate::fault::Faults;
use crate::kvm::cpuid::{AMD_EXTENDED_FEATURES, Leaf, TIMING};
use crate::kvm::tsc::TscOffset;
use crate::kvm::{KvmError, pmu};

/// Why a state is not one of this vCPU's.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Another processor.
    #[error("this host gives its guests another processor: CPUID leaf {0:#x} differs")]
    Cpuid(u32),
    /// Registers that are not there, or no value for some that are.
    #[error("it is not about the {0} that vCPUs have here")]
    Registers(&'static str),
    /// A state of a guest's guest that is none.
    #[error("its state of nested guests has {0} bytes, which cannot be")]
    Nested(usize),
    /// KVM refused something.
    #[error(transparent)]
    Kvm(#[from] KvmError),
}

/// A vCPU that has run and is parked with no exit to complete.
#[derive(Serialize, Deserialize)]
pub struct VcpuState {
    cpuid: Vec<kvm_cpuid_entry2>,
    registers: Registers,
    /// The time stamp counter, at the same moment for all vCPUs of a machine.
    tsc: u64,
    /// Registers by which the guest tells KVM to write into its RAM.
    pv: Vec<kvm_msr_entry>,
    /// Registers of KVM's counters, by number.
    pmu: Vec<kvm_msr_entry>,
    nested: Option<Nested>,
}

impl VcpuState {
    /// Reads the state of a vCPU of which `power_on` was captured. `zero` is the offset with which a time stamp counter would
    /// start at zero at the moment that counts for all vCPUs of the machine.
    ///
    /// # Errors
    /// [`KvmError`] naming what KVM did not give.
    pub fn capture(
        vcpu: &VcpuFd,
        cpuid: &CpuId,
        power_on: &PowerOnState,
        zero: TscOffset,
    ) -> Result<Self, KvmError> {
        let mut registers = Registers::get(vcpu)?;
        // Events tell of the same interrupt.
        registers.sregs.interrupt_bitmap = Default::default();
        registers.msrs = read_all(vcpu, power_on.registers.msrs.iter().map(|msr| msr.index))?;
        let deadline = read_all(vcpu, [MSR_TSC_DEADLINE])?;
        registers.deadline = deadline.first().map_or(0, |msr| msr.data);
        Ok(Self {
            cpuid: cpuid.as_slice().to_vec(),
            registers,
            tsc: TscOffset::of(vcpu)?.since(zero),
            pv: read_all(vcpu, power_on.pv.iter().map(|msr| msr.index))?,
            pmu: read_all(vcpu, power_on.counters.iter().copied())?,
            nested: if may_nest(cpuid) { Nested::capture(vcpu)? } else { None },
        })
    }

    /// Makes a vCPU that has not run what this one was. Its time stamp counter goes on from where it stopped, if `zero` is the
    /// offset with which it would start at zero now. Guest RAM is what it was at that time: KVM may write into it from here on.
    ///
    /// # Errors
    /// [`StateError`]; the vCPU must be dropped.
    pub fn restore(
        &self,
        vcpu: &VcpuFd,
        cpuid: &CpuId,
        power_on: &PowerOnState,
        zero: TscOffset,
    ) -> Result<(), StateError> {
        self.check(cpuid, power_on)?;
        let values: Vec<_> = self.pmu.iter().map(|msr| (msr.index, msr.data)).collect();
        let writes = pmu::restore_sequence(cpuid, &values);
        self.registers.put_back(
            vcpu,
            &Surroundings {
                tsc: zero.plus(self.tsc),
                nested: self.nested.as_ref(),
                pmu: &writes.iter().map(entry).collect::<Vec<_>>(),
                left_out: &Faults::default(),
                instead: None,
            },
        )?;
        // With these KVM writes into RAM, so they come when all else is in place.
        Ok(write_msrs(vcpu, &self.pv)?)
    }

    /// The state may have been through a file: it is to say something about the registers that a vCPU has here, and about no
    /// others. What values they can have is KVM's to judge.
    fn check(&self, cpuid: &CpuId, power_on: &PowerOnState) -> Result<(), StateError> {
        let ours = cpuid.as_slice();
        // Frequencies are measured anew whenever a host starts; whether they are close enough is known already.
        let differs = |(ours, its): &(&kvm_cpuid_entry2, &kvm_cpuid_entry2)| {
            ours != its && (ours.function, its.function) != (TIMING, TIMING)
        };
        if let Some((ours, _)) = ours.iter().zip(&self.cpuid).find(differs) {
            return Err(StateError::Cpuid(ours.function));
        }
        if ours.len() != self.cpuid.len() {
            return Err(StateError::Cpuid(0));
        }
        fn same<'a>(
            its: &[kvm_msr_entry],
            ours: impl Iterator<Item = &'a u32>,
            what: &'static str,
        ) -> Result<(), StateError> {
            match its.iter().map(|msr| &msr.index).eq(ours) {
                true => Ok(()),
                false => Err(StateError::Registers(what)),
            }
        }
        same(&self.registers.msrs, power_on.registers.msrs.iter().map(|msr| &msr.index), "MSRs")?;
        same(&self.pv, power_on.pv.iter().map(|msr| &msr.index), "paravirtual MSRs")?;
        same(&self.pmu, power_on.counters.iter(), "performance counters")?;
        match &self.nested {
            Some(nested) if !may_nest(cpuid) => Err(StateError::Nested(nested.0.len())),
            Some(nested) => nested.check(),
            None => Ok(()),
        }
    }
}

/// Reads registers that have been read before.
fn read_all(
    vcpu: &VcpuFd,
    indices: impl IntoIterator<Item = u32>,
) -> Result<Vec<kvm_msr_entry>, KvmError> {
    let indices: Vec<_> = indices.into_iter().collect();
    let values = read_msrs(vcpu, &indices)?;
    let missing = indices.iter().zip(&values).find(|(index, msr)| **index != msr.index);
    match missing.map(|(index, _)| *index).or(indices.get(values.len()).copied()) {
        Some(index) => Err(KvmError::MsrGone(index)),
        None => Ok(values),
    }
}

/// Whether a guest with this CPUID can have guests of its own.
fn may_nest(cpuid: &CpuId) -> bool {
    const VMX: u32 = 1 << 5;
    const SVM: u32 = 1 << 2;
    Leaf::get(cpuid, 1, 0).ecx & VMX != 0
        || Leaf::get(cpuid, AMD_EXTENDED_FEATURES, 0).ecx & SVM != 0
}

/// What KVM knows of a guest's own guests (`KVM_GET_NESTED_STATE`): a header, which has its length in bytes 4 to 7, and a control
/// structure or two.
#[derive(Serialize, Deserialize)]
pub struct Nested(Vec<u8>);

impl Nested {
    const HEADER: usize = 128;

    /// `None` on a KVM that does not tell.
    fn capture(vcpu: &VcpuFd) -> Result<Option<Self>, KvmError> {
        let mut buffer = Box::<KvmNestedStateBuffer>::default();
        match vcpu.nested_state(&mut buffer) {
            Ok(_) => {
                let bytes = buffer.as_bytes();
                let len = (buffer.size as usize).clamp(Self::HEADER, bytes.len());
                Ok(Some(Self(bytes[..len].to_vec())))
            }
            Err(errno) if errno.errno() == libc::EINVAL => Ok(None),
            Err(errno) => Err(KvmError::request("get the state of nested guests")(errno)),
        }
    }

    fn check(&self) -> Result<(), StateError> {
        let len = self.0.len();
        let said =
            self.0.get(4..8).and_then(|size| Some(u32::from_ne_bytes(size.try_into().ok()?)));
        let fits = (Self::HEADER..=size_of::<KvmNestedStateBuffer>()).contains(&len);
        if fits && said == u32::try_from(len).ok() { Ok(()) } else { Err(StateError::Nested(len)) }
    }

    pub fn put_back(&self, vcpu: &VcpuFd) -> Result<(), KvmError> {
        let mut bytes = self.0.clone();
        bytes.resize(size_of::<KvmNestedStateBuffer>(), 0);
        let buffer = KvmNestedStateBuffer::read_from_bytes(&bytes)
            .map_err(|_| KvmError::Capability("room for the state of nested guests"))?;
        vcpu.set_nested_state(&buffer)
            .map_err(KvmError::request("put back the state of nested guests"))
    }
}
