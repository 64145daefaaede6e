//! A machine in KVM: memory, interrupt controller, notifications.

use std::ops::{Range, RangeInclusive};
use std::sync::Arc;

use kvm_bindings::{
    KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X86_TRIPLE_FAULT_EVENT, KVM_MEM_LOG_DIRTY_PAGES, kvm_clock_data,
    kvm_enable_cap, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VmFd};
use vmm_sys_util::eventfd::EventFd;

use super::coalesced::CoalescedWrites;
use super::host::{KvmKind, Module};
use super::irq::IrqRouter;
use super::pmu::{self, PmuAbsence, PmuPolicy};
use super::vcpu::Vcpu;
use super::{KvmError, cpuid, dirty_log, msr_exits};
use crate::device::ioapic::PINS;
use crate::layout;
use crate::memory::{Memory, PageSet};

/// A machine. Created with its memory and a split interrupt controller: local APICs in the kernel, the I/O APIC outside.
#[derive(Debug)]
pub struct Vm {
    fd: Arc<VmFd>,
    pmu_absence: PmuAbsence,
}

impl Vm {
    /// Creates a machine around `memory`, which the caller keeps mapped as long as the machine lives.
    ///
    /// # Errors
    /// [`KvmError`] naming the request.
    pub fn new(
        kvm: &Kvm,
        module: Module,
        kind: KvmKind,
        memory: &Memory,
        policy: PmuPolicy,
    ) -> Result<Self, KvmError> {
        let fd = kvm.create_vm().map_err(KvmError::request("create a machine"))?;
        // Memory before the interrupt controller: the other way round the software KVM waits for milliseconds.
        for (slot, range) in memory.ranges().enumerate() {
            let region = kvm_userspace_memory_region {
                slot: slot as u32,
                flags: if memory.tracks_writes() { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
                guest_phys_addr: range.guest,
                memory_size: range.bytes,
                userspace_addr: range.host,
            };
            // SAFETY: the range is a mapping that `memory` owns. KVM touches it for a vCPU alone, and whoever builds a machine
            // ends its vCPUs before it drops the memory (`machine::Machine` keeps both, in that order). The machine's
            // descriptor may live longer, in the interrupt router of a device that the handle still shows: without a vCPU
            // it can only queue interrupts.
            unsafe { fd.set_user_memory_region(region) }
                .map_err(KvmError::request("give the machine its memory"))?;
        }
        let mut split = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, ..Default::default() };
        split.args[0] = PINS as u64;
        fd.enable_cap(&split).map_err(KvmError::request("split the interrupt controller"))?;
        enable_triple_fault_events(kvm, &fd)?;
        if kind == KvmKind::Vmx {
            fd.set_tss_address(layout::KVM_TSS as usize)
                .map_err(KvmError::request("set the TSS address"))?;
        }
        let pmu_absence = pmu::apply(kvm, &fd, module, policy)?;
        Ok(Self { fd: Arc::new(fd), pmu_absence })
    }

    /// What made the PMU absent.
    pub fn pmu_absence(&self) -> PmuAbsence {
        self.pmu_absence
    }

    /// Has the guest's accesses to these registers come to the monitor.
    ///
    /// # Errors
    /// [`KvmError::Capability`] on a KVM that cannot, [`KvmError::Request`] if it refuses.
    pub fn divert_registers(
        &self,
        kvm: &Kvm,
        ranges: &[RangeInclusive<u32>],
    ) -> Result<(), KvmError> {
        msr_exits::divert(kvm, &self.fd, ranges)
    }

    /// Delivers the I/O APIC's messages to this machine.
    pub fn irq_router(&self) -> IrqRouter {
        IrqRouter::new(Arc::clone(&self.fd))
    }

    /// Creates vCPU `id` of `count` with its CPUID. It has no registers of ours yet.
    ///
    /// # Errors
    /// [`KvmError`] naming the request.
    pub fn create_vcpu(
        &self,
        supported: &kvm_bindings::CpuId,
        id: u8,
        count: u8,
    ) -> Result<Vcpu, KvmError> {
        let fd = self.fd.create_vcpu(u64::from(id)).map_err(KvmError::request("create a vCPU"))?;
        let cpuid = cpuid::for_vcpu(supported, &fd, id, count)?;
        fd.set_cpuid2(&cpuid).map_err(KvmError::request("set the CPUID"))?;
        Vcpu::new(fd, cpuid, id)
    }

    /// Makes a 4-byte write of `value` at guest address `address` signal `fd` without leaving the kernel.
    ///
    /// # Errors
    /// [`KvmError::Request`].
    pub fn notify_on_write(&self, address: u64, value: u32, fd: &EventFd) -> Result<(), KvmError> {
        self.fd
            .register_ioevent(fd, &IoEventAddress::Mmio(address), value)
            .map_err(KvmError::request("register an ioeventfd"))
    }

    /// Lets writes to `ranges` of guest addresses wait instead of leaving guest mode; `None` where KVM cannot. One ring
    /// serves all vCPUs, and any of them leads to it. Whoever runs a vCPU answers them as soon as it comes back.
    ///
    /// # Errors
    /// [`KvmError::Request`].
    pub fn coalesce_writes(
        &self,
        vcpu: &Vcpu,
        ranges: impl IntoIterator<Item = Range<u64>>,
    ) -> Result<Option<Arc<CoalescedWrites>>, KvmError> {
        // The capability's value is the number of the ring's page.
        let page = self.fd.check_extension_int(Cap::CoalescedMmio);
        if page <= 0 {
            return Ok(None);
        }
        let writes = vcpu.map_coalesced_writes(page as usize)?;
        for range in ranges {
            let len = (range.end - range.start) as u32;
            self.fd
                .register_coalesced_mmio(IoEventAddress::Mmio(range.start), len)
                .map_err(KvmError::request("register coalesced writes"))?;
        }
        Ok(Some(Arc::new(writes)))
    }

    /// Which pages of `memory`, which it was created with, were written since it was asked last: by the guest, by KVM, by devices, or
    /// by a reset. Nobody writes meanwhile: vCPUs are parked, and devices have no request in the middle. `None` if `memory` does not
    /// note what is written.
    ///
    /// # Errors
    /// [`KvmError::Request`].
    pub fn take_dirty(&self, memory: &Memory) -> Result<Option<PageSet>, KvmError> {
        match memory.tracks_writes() {
            true => dirty_log::take(&self.fd, memory).map(Some),
            false => Ok(None),
        }
    }

    /// The machine's paravirtual clock, in nanoseconds.
    ///
    /// # Errors
    /// [`KvmError::Request`].
    pub fn clock_ns(&self) -> Result<u64, KvmError> {
        let clock = self.fd.get_clock().map_err(KvmError::request("get the paravirtual clock"))?;
        Ok(clock.clock)
    }

    /// Sets it; at power-on it is at 0.
    ///
    /// # Errors
    /// [`KvmError::Request`].
    pub fn set_clock_ns(&self, clock: u64) -> Result<(), KvmError> {
        self.fd
            .set_clock(&kvm_clock_data { clock, ..Default::default() })
            .map_err(KvmError::request("set the paravirtual clock"))
    }
}

/// Lets a reset cancel a triple fault that is queued but not delivered, where KVM can.
pub(super) fn enable_triple_fault_events(kvm: &Kvm, fd: &VmFd) -> Result<(), KvmError> {
    if kvm.check_extension_raw(u64::from(KVM_CAP_X86_TRIPLE_FAULT_EVENT)) <= 0 {
        return Ok(());
    }
    let mut events = kvm_enable_cap { cap: KVM_CAP_X86_TRIPLE_FAULT_EVENT, ..Default::default() };
    events.args[0] = 1;
    fd.enable_cap(&events).map_err(KvmError::request("enable triple fault events"))
}

/// The most vCPUs that KVM gives one machine and that 8-bit APIC numbers can tell apart.
pub fn max_vcpus(kvm: &Kvm) -> u8 {
    // 0xff is the broadcast number.
    kvm.get_max_vcpus().clamp(1, 254) as u8
}
