//! The smallest machine that runs: one vCPU in real mode and a few bytes of code. It shows what KVM does, undisturbed by
//! devices and by a guest's system, and how long the calls take that no monitor can do without.

use std::collections::BTreeMap;
use std::io;
use std::time::{Duration, Instant};

use kvm_bindings::{
    CpuId, KVM_CAP_ENFORCE_PV_FEATURE_CPUID, KVM_CAP_SPLIT_IRQCHIP, KVM_MAX_CPUID_ENTRIES,
    KVM_VCPUEVENT_VALID_NMI_PENDING, Msrs, kvm_enable_cap, kvm_msr_entry,
    kvm_userspace_memory_region, kvm_vcpu_events,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::KvmError;
use super::pmu::{self, PmuAbsence};
use super::state::PowerOnState;
use super::tsc::TscOffset;
use super::vm::enable_triple_fault_events;
use crate::fault::Faults;
use crate::memory::GuestRam;

/// Where the code begins.
const CODE: u64 = 0x1000;
/// Where the handlers of exceptions and NMIs are, each this long.
const HANDLERS: u64 = 0x2000;
const HANDLER_BYTES: u64 = 8;
/// The end of the stack.
const STACK: u64 = 0x4000;
/// RAM of a machine for checks.
const BYTES: usize = 64 * 1024;

const VECTORS: u8 = 32;
const NMI: u16 = 2;
const GENERAL_PROTECTION: u16 = 13;

/// To this port the code writes EAX when it is done.
const DONE_PORT: u8 = 0x10;
/// To this one and those behind it, handlers of vectors do.
const VECTOR_PORTS: u8 = 0x20;

/// What KVM answered to a request of a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// It did what was asked.
    Accepted,
    /// It refused, with this error number; 0 where it does not give one, as for registers.
    Refused(i32),
}

impl Answer {
    pub(super) fn new(result: Result<(), kvm_ioctls::Error>) -> Self {
        result.map_or_else(|errno| Self::Refused(errno.errno()), |()| Self::Accepted)
    }

    /// True if it did.
    pub fn is_accepted(self) -> bool {
        self == Self::Accepted
    }
}

/// What code did first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// It came to its end with this in EAX.
    Done(u32),
    /// It was interrupted by an NMI.
    Nmi,
    /// It was not allowed to do something: a general-protection exception.
    Fault,
}

/// A register of the performance counters before and after a reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counter {
    /// Its number.
    pub index: u32,
    /// What it held before.
    pub dirty: u64,
    /// What the reset left.
    pub left: u64,
    /// What it should have left.
    pub wanted: u64,
}

/// A machine with one vCPU.
#[derive(Debug)]
pub struct BareMachine {
    // Dropped in this order: KVM uses the RAM for the vCPU's sake alone.
    vcpu: VcpuFd,
    _vm: VmFd,
    ram: GuestRam,
}

impl BareMachine {
    /// A machine with this CPUID, which is to be part of what KVM supports.
    ///
    /// # Errors
    /// [`KvmError`] naming the request.
    pub fn new(kvm: &Kvm, cpuid: &CpuId) -> Result<Self, KvmError> {
        // As every machine that is to be reset.
        Self::with(kvm, cpuid, |vm| enable_triple_fault_events(kvm, vm), |_| Ok(()))
    }

    /// The same with its PMU disabled.
    ///
    /// # Errors
    /// [`KvmError`] naming the request.
    pub fn without_pmu(kvm: &Kvm, cpuid: &CpuId) -> Result<Self, KvmError> {
        Self::with(kvm, cpuid, pmu::disable, |_| Ok(()))
    }

    /// The same with paravirtual features only where CPUID shows them. KVM has `KVM_CAP_ENFORCE_PV_FEATURE_CPUID`.
    ///
    /// # Errors
    /// [`KvmError`] naming the request.
    pub fn enforcing_pv_features(kvm: &Kvm, cpuid: &CpuId) -> Result<Self, KvmError> {
        Self::with(
            kvm,
            cpuid,
            |_| Ok(()),
            |vcpu| {
                let mut enforce =
                    kvm_enable_cap { cap: KVM_CAP_ENFORCE_PV_FEATURE_CPUID, ..Default::default() };
                enforce.args[0] = 1;
                vcpu.enable_cap(&enforce)
                    .map_err(KvmError::request("bind paravirtual features to CPUID"))
            },
        )
    }

    /// `early` is done before there is a vCPU, `late` before that has its CPUID.
    fn with(
        kvm: &Kvm,
        cpuid: &CpuId,
        early: impl FnOnce(&VmFd) -> Result<(), KvmError>,
        late: impl FnOnce(&VcpuFd) -> Result<(), KvmError>,
    ) -> Result<Self, KvmError> {
        let machine = Self::create(kvm, ram(BYTES)?, early)?;
        late(&machine.vcpu)?;
        machine.vcpu.set_cpuid2(cpuid).map_err(KvmError::request("set the CPUID"))?;
        Ok(machine)
    }

    /// Memory, a split interrupt controller, and a vCPU without a CPUID.
    fn create(
        kvm: &Kvm,
        ram: GuestRam,
        early: impl FnOnce(&VmFd) -> Result<(), KvmError>,
    ) -> Result<Self, KvmError> {
        let vm = kvm.create_vm().map_err(KvmError::request("create a machine"))?;
        for (slot, region) in (0..).zip(ram.iter()) {
            let region = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
            };
            // SAFETY: the region is a mapping that `ram` owns, which the machine keeps longer than its vCPU and its
            // descriptor.
            unsafe { vm.set_user_memory_region(region) }
                .map_err(KvmError::request("give the machine its memory"))?;
        }
        let mut split = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, ..Default::default() };
        split.args[0] = 24;
        vm.enable_cap(&split).map_err(KvmError::request("split the interrupt controller"))?;
        early(&vm)?;
        let vcpu = vm.create_vcpu(0).map_err(KvmError::request("create a vCPU"))?;
        Ok(Self { vcpu, _vm: vm, ram })
    }

    /// Sets the instruction pointer, as at a start.
    fn start(&self) -> Result<(), KvmError> {
        let mut sregs =
            self.vcpu.get_sregs().map_err(KvmError::request("get the system registers"))?;
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        self.vcpu.set_sregs(&sregs).map_err(KvmError::request("set the system registers"))?;
        let mut regs = self.vcpu.get_regs().map_err(KvmError::request("get the registers"))?;
        (regs.rip, regs.rsp, regs.rflags) = (CODE, STACK, 2);
        self.vcpu.set_regs(&regs).map_err(KvmError::request("set the registers"))
    }

    /// Runs until the guest writes to a port: which, and what.
    fn run_to_port(&mut self) -> Result<(u16, u32), KvmError> {
        match self.vcpu.run().map_err(KvmError::request("run the vCPU"))? {
            VcpuExit::IoOut(port, data) => {
                let mut value = [0; 4];
                value.iter_mut().zip(data).for_each(|(to, from)| *to = *from);
                Ok((port, u32::from_le_bytes(value)))
            }
            other => {
                let source = io::Error::other(format!("it ended with {other:?}"));
                Err(KvmError::Request { action: "run a few instructions in real mode", source })
            }
        }
    }

    /// Runs `code` from its first instruction to its end.
    ///
    /// # Errors
    /// [`KvmError`] if the guest comes to no end of its own.
    pub fn run(&mut self, code: &Code) -> Result<Outcome, KvmError> {
        code.load(&self.ram)?;
        self.start()?;
        let (port, value) = self.run_to_port()?;
        Ok(match port.checked_sub(VECTOR_PORTS.into()) {
            Some(NMI) => Outcome::Nmi,
            Some(GENERAL_PROTECTION) => Outcome::Fault,
            None if port == u16::from(DONE_PORT) => Outcome::Done(value),
            _ => {
                let source = io::Error::other(format!("it wrote {value:#x} to port {port:#x}"));
                return Err(KvmError::Request {
                    action: "run a few instructions in real mode",
                    source,
                });
            }
        })
    }

    /// Sets the CPUID once more.
    pub fn set_cpuid(&self, cpuid: &CpuId) -> Answer {
        Answer::new(self.vcpu.set_cpuid2(cpuid))
    }

    /// The CPUID as KVM has it now, of `count` entries.
    ///
    /// # Errors
    /// [`KvmError::Request`].
    pub fn cpuid(&self, count: usize) -> Result<CpuId, KvmError> {
        let cpuid = self.vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES);
        let cpuid = cpuid.map_err(KvmError::request("get the CPUID"))?;
        // Older kernels give as many as there is room for, the last ones empty.
        let entries = cpuid.as_slice().get(..count).unwrap_or(cpuid.as_slice());
        CpuId::from_entries(entries).map_err(|_| KvmError::Capability("room for the CPUID"))
    }

    /// Writes an MSR as a host does.
    ///
    /// # Errors
    /// [`KvmError::Request`]; a register that KVM refuses is none.
    pub fn write_msr(&self, index: u32, value: u64) -> Result<Answer, KvmError> {
        let msrs = one_msr(index, value)?;
        let count = self.vcpu.set_msrs(&msrs).map_err(KvmError::request("set an MSR"))?;
        Ok(if count == 1 { Answer::Accepted } else { Answer::Refused(0) })
    }

    /// Reads an MSR as a host does; `None` if KVM refuses.
    ///
    /// # Errors
    /// [`KvmError::Request`].
    pub fn read_msr(&self, index: u32) -> Result<Option<u64>, KvmError> {
        let mut msrs = one_msr(index, 0)?;
        let count = self.vcpu.get_msrs(&mut msrs).map_err(KvmError::request("get an MSR"))?;
        Ok((count == 1).then(|| msrs.as_slice()[0].data))
    }

    /// Queues an NMI.
    ///
    /// # Errors
    /// [`KvmError::Request`].
    pub fn queue_nmi(&self) -> Result<(), KvmError> {
        self.vcpu.nmi().map_err(KvmError::request("queue an NMI"))
    }

    /// How many NMIs wait.
    ///
    /// # Errors
    /// [`KvmError::Request`].
    pub fn waiting_nmis(&self) -> Result<u8, KvmError> {
        let events = self.vcpu.get_vcpu_events().map_err(KvmError::request("get the events"))?;
        Ok(events.nmi.pending)
    }

    /// Has KVM forget events that wait, as a reset does.
    ///
    /// # Errors
    /// [`KvmError::Request`].
    pub fn cancel_nmis(&self) -> Result<(), KvmError> {
        let none = kvm_vcpu_events { flags: KVM_VCPUEVENT_VALID_NMI_PENDING, ..Default::default() };
        self.vcpu.set_vcpu_events(&none).map_err(KvmError::request("cancel queued events"))
    }

    /// Makes all performance-counter registers dirty that a reset of ours clears, resets the vCPU as machines are reset, and
    /// tells what they hold. Those that KVM does not have are left out. The vCPU has not run.
    ///
    /// # Errors
    /// [`KvmError`] naming the request.
    pub fn counters_after_reset(&self, kvm: &Kvm, cpuid: &CpuId) -> Result<Vec<Counter>, KvmError> {
        /// An event select that is enabled; 1 for global registers, which have few bits.
        const DIRT: [u64; 2] = [0x53_0076, 1];
        let faults = Faults::default();
        let power_on =
            PowerOnState::capture(kvm, &self.vcpu, cpuid, PmuAbsence::NotAbsent, &faults)?;
        // The last write to a register is the one that counts.
        let wanted: BTreeMap<u32, u64> = pmu::reset_sequence(cpuid, &faults).into_iter().collect();
        let mut counters = Vec::new();
        for (&index, &wanted) in &wanted {
            for dirt in DIRT {
                if self.write_msr(index, dirt)?.is_accepted() {
                    break;
                }
            }
            if let Some(dirty) = self.read_msr(index)? {
                counters.push(Counter { index, dirty, left: dirty, wanted });
            }
        }
        power_on.restore(&self.vcpu, TscOffset::from_now(&self.vcpu)?)?;
        for counter in &mut counters {
            counter.left = self.read_msr(counter.index)?.unwrap_or(counter.left);
        }
        Ok(counters)
    }

    /// The vCPU, for what other modules do with it.
    pub(super) fn vcpu(&self) -> &VcpuFd {
        &self.vcpu
    }
}

fn one_msr(index: u32, data: u64) -> Result<Msrs, KvmError> {
    Msrs::from_entries(&[kvm_msr_entry { index, data, ..Default::default() }])
        .map_err(|_| KvmError::Capability("room for one MSR"))
}

fn ram(bytes: usize) -> Result<GuestRam, KvmError> {
    GuestRam::from_ranges(&[(GuestAddress(0), bytes)]).map_err(|error| KvmError::Request {
        action: "map memory for a machine",
        source: io::Error::other(error.to_string()),
    })
}

/// Code for real mode, with 32-bit operands. At its end EAX goes to [`DONE_PORT`].
#[derive(Clone, Debug, Default)]
pub struct Code(Vec<u8>);

impl Code {
    /// Nothing but its end.
    pub fn new() -> Self {
        Self::default()
    }

    /// `mov ecx, index; rdmsr`.
    pub fn read_msr(mut self, index: u32) -> Self {
        self.load_ecx(index);
        self.0.extend([0x0f, 0x32]);
        self
    }

    /// `mov ecx, index; mov eax, value; xor edx, edx; wrmsr`.
    pub fn write_msr(mut self, index: u32, value: u32) -> Self {
        self.load_ecx(index);
        self.0.extend([0x66, 0xb8]);
        self.0.extend(value.to_le_bytes());
        self.0.extend([0x66, 0x31, 0xd2]);
        self.0.extend([0x0f, 0x30]);
        self
    }

    fn load_ecx(&mut self, value: u32) {
        self.0.extend([0x66, 0xb9]);
        self.0.extend(value.to_le_bytes());
    }

    /// Puts it into RAM, with a handler for each exception and for NMIs that writes to a port of its own.
    fn load(&self, ram: &GuestRam) -> Result<(), KvmError> {
        // `out port, eax; hlt`
        let out = |port| [0x66, 0xe7, port, 0xf4];
        let write = |bytes: &[u8], address| {
            ram.write_slice(bytes, GuestAddress(address)).map_err(|error| KvmError::Request {
                action: "write code into RAM",
                source: io::Error::other(error.to_string()),
            })
        };
        for vector in 0..VECTORS {
            let handler = HANDLERS + HANDLER_BYTES * u64::from(vector);
            write(&out(VECTOR_PORTS + vector), handler)?;
            // An entry of the vector table: offset and segment.
            write(&(handler as u32).to_le_bytes(), 4 * u64::from(vector))?;
        }
        write(&[&self.0[..], &out(DONE_PORT)].concat(), CODE)
    }
}

/// Keeps KVM in use. With the first machine it turns virtualization on in all processors and patches the kernel's scheduler, and
/// undoes that with the last: neither is to happen with each of many machines that come one after the other.
#[derive(Debug)]
pub struct InUse {
    _machine: VmFd,
}

impl InUse {
    /// Takes a machine that has nothing and does nothing.
    ///
    /// # Errors
    /// [`KvmError::Request`].
    pub fn new(kvm: &Kvm) -> Result<Self, KvmError> {
        let machine = kvm.create_vm().map_err(KvmError::request("create a machine"))?;
        Ok(Self { _machine: machine })
    }
}

/// How long the fewest KVM calls take that lead to a guest's first `out`: memory, split interrupt controller, one vCPU with
/// CPUID.
///
/// # Errors
/// [`KvmError`] naming the request.
pub fn launch_floor(mem_mib: usize) -> Result<Duration, KvmError> {
    let ram = ram(mem_mib << 20)?;
    Code::new().load(&ram)?;
    let began = Instant::now();
    let kvm = super::open()?;
    let mut machine = BareMachine::create(&kvm, ram, |_| Ok(()))?;
    let cpuid = supported_cpuid(&kvm)?;
    machine.vcpu.set_cpuid2(&cpuid).map_err(KvmError::request("set the CPUID"))?;
    machine.start()?;
    machine.run_to_port()?;
    Ok(began.elapsed())
}

/// Everything that KVM can give a guest.
///
/// # Errors
/// [`KvmError::Request`].
pub fn supported_cpuid(kvm: &Kvm) -> Result<CpuId, KvmError> {
    kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(KvmError::request("get the supported CPUID"))
}
