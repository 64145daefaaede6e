//! A virtual processor: its first state, how it runs, how it is interrupted, and what each exit means.

use std::io;
use std::os::fd::AsRawFd;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    CpuId, KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_SHADOW, kvm_lapic_state, kvm_regs,
    kvm_run, kvm_segment, kvm_sregs, kvm_vcpu_events,
};
use kvm_ioctls::{Kvm, ReadMsrExit, VcpuExit, VcpuFd, WriteMsrExit};
use vm_memory::{Bytes, GuestAddress};

use super::KvmError;
use super::coalesced::CoalescedWrites;
use super::msr_exits::{MsrRead, MsrWrite};
use super::pmu::PmuAbsence;
use super::state::{PowerOnState, StateError, VcpuState};
use super::template::MsrChange;
use super::tsc::TscOffset;
use super::unhalted::UnhaltedClock;
use crate::fault::Faults;
use crate::layout::{self, Entry};
use crate::memory::GuestRam;

/// Why a vCPU came back from guest mode, as the machine sees it.
#[derive(Debug, PartialEq, Eq)]
pub enum Exit<'a> {
    /// `in` from a port, or `rep ins`: one byte after the other, to fill in.
    PortRead(u16, &'a mut [u8]),
    /// `out` to a port, or `rep outs`: one byte after the other.
    PortWrite(u16, &'a [u8]),
    /// Read of an address without RAM, to fill in.
    MmioRead(u64, &'a mut [u8]),
    /// Write to an address without RAM.
    MmioWrite(u64, &'a [u8]),
    /// End of a level-triggered interrupt of the I/O APIC.
    EndOfInterrupt(u8),
    /// `rdmsr` of a register that the guest has from the monitor.
    MsrRead(MsrRead<'a>),
    /// `wrmsr` to such a register.
    MsrWrite(MsrWrite<'a>),
    /// Somebody wants the vCPU's attention.
    Kicked,
    /// An exception with no way to deliver it.
    TripleFault,
    /// KVM cannot go on with this guest; [`Vcpu::suberror`] says more.
    InternalError,
    /// The processor refused the guest's state, for this reason.
    FailEntry(u64),
    /// An exit that this monitor has no use for.
    Unexpected(String),
}

/// A view of a vCPU's `kvm_run` page of our own. kvm-ioctls makes a `&mut kvm_run` of its view whenever the vCPU comes back,
/// which claims the whole page for the thread that runs it, and shows nobody the pointer behind it. A store of another
/// thread goes by this view, of which there never is such a reference; what both views show is one page to the kernel.
#[derive(Debug)]
struct RunPage(NonNull<kvm_run>);

// SAFETY: the mapping belongs to no thread, and the only access to it is atomic.
unsafe impl Send for RunPage {}
// SAFETY: as for `Send`.
unsafe impl Sync for RunPage {}

impl RunPage {
    fn map(fd: &VcpuFd) -> io::Result<Self> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice takes nothing away from anybody.
        let page = unsafe {
            libc::mmap(
                ptr::null_mut(),
                size_of::<kvm_run>(),
                protection,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                0,
            )
        };
        NonNull::new(page.cast())
            .filter(|_| page != libc::MAP_FAILED)
            .map(Self)
            .ok_or_else(io::Error::last_os_error)
    }

    fn immediate_exit(&self) -> &AtomicU8 {
        // SAFETY: the mapping is large enough for the field and lives as long as `self`; nothing but the kernel and this
        // function's callers accesses the byte by this view, and the kernel takes it for a flag.
        unsafe { AtomicU8::from_ptr(&raw mut (*self.0.as_ptr()).immediate_exit) }
    }
}

impl Drop for RunPage {
    fn drop(&mut self) {
        // SAFETY: `map` made exactly this mapping, and no reference into it outlives `self`.
        unsafe { libc::munmap(self.0.as_ptr().cast(), size_of::<kvm_run>()) };
    }
}

/// A vCPU that one thread runs and others may interrupt.
#[derive(Debug)]
pub struct VcpuCell {
    vcpu: Mutex<Vcpu>,
    run_page: Arc<RunPage>,
}

impl VcpuCell {
    /// Makes `vcpu` interruptible.
    pub fn new(vcpu: Vcpu) -> Self {
        let run_page = Arc::clone(&vcpu.run_page);
        Self { vcpu: Mutex::new(vcpu), run_page }
    }

    /// The vCPU itself. Its thread holds the lock while it runs the guest.
    pub fn lock(&self) -> MutexGuard<'_, Vcpu> {
        // A vCPU thread that panicked has ended the process (`panic = "abort"`), or failed a test.
        self.vcpu.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the next or current `KVM_RUN` return [`Exit::Kicked`]. If the vCPU may be in guest mode, a signal to its
    /// thread must follow.
    pub fn request_exit(&self) {
        self.run_page.immediate_exit().store(1, Ordering::SeqCst);
    }

    /// Takes back [`VcpuCell::request_exit`].
    pub fn allow_entry(&self) {
        self.run_page.immediate_exit().store(0, Ordering::SeqCst);
    }
}

/// A virtual processor.
#[derive(Debug)]
pub struct Vcpu {
    pub(super) fd: VcpuFd,
    cpuid: CpuId,
    id: u8,
    run_page: Arc<RunPage>,
}

impl Vcpu {
    /// Wraps a vCPU that has its CPUID.
    ///
    /// # Errors
    /// [`KvmError::Request`] if its page cannot be mapped.
    pub(super) fn new(fd: VcpuFd, cpuid: CpuId, id: u8) -> Result<Self, KvmError> {
        let run_page = RunPage::map(&fd)
            .map_err(|source| KvmError::Request { action: "map a vCPU's page", source })?;
        Ok(Self { fd, cpuid, id, run_page: Arc::new(run_page) })
    }

    /// Makes the changes of MSRs that a user wants. Comes before [`Vcpu::power_on`], so that each reset makes them too.
    ///
    /// # Errors
    /// [`TemplateError`](super::template::TemplateError), as a [`KvmError`].
    pub fn change_msrs(&self, changes: &[MsrChange]) -> Result<(), KvmError> {
        changes.iter().try_for_each(|change| change.make(&self.fd))
    }

    /// Gives the vCPU its registers for the first instruction and captures the result, for resets that leave out what `faults`
    /// say. The first vCPU starts at `entry`,
    /// the others wait to be started by it.
    ///
    /// # Errors
    /// [`KvmError`] naming the request.
    pub fn power_on(
        &self,
        kvm: &Kvm,
        entry: Entry,
        pmu_absence: PmuAbsence,
        faults: &Faults,
    ) -> Result<PowerOnState, KvmError> {
        if self.id == 0 {
            let mut sregs =
                self.fd.get_sregs().map_err(KvmError::request("get the system registers"))?;
            let regs = entry_registers(entry, &mut sregs);
            self.fd.set_sregs(&sregs).map_err(KvmError::request("set the system registers"))?;
            self.fd.set_regs(&regs).map_err(KvmError::request("set the registers"))?;
        }
        let mut lapic = self.fd.get_lapic().map_err(KvmError::request("get the local APIC"))?;
        wire_local_interrupts(&mut lapic);
        self.fd.set_lapic(&lapic).map_err(KvmError::request("set the local APIC"))?;
        PowerOnState::capture(kvm, &self.fd, &self.cpuid, pmu_absence, faults)
    }

    /// The machine's ring of coalesced writes, at page `number` of each vCPU.
    pub(super) fn map_coalesced_writes(&self, number: usize) -> Result<CoalescedWrites, KvmError> {
        CoalescedWrites::map(&self.fd, number)
    }

    /// The offset with which the time stamp counter would start at zero now.
    ///
    /// # Errors
    /// See [`TscOffset::from_now`].
    pub fn zero_tsc(&self) -> Result<TscOffset, KvmError> {
        TscOffset::from_now(&self.fd)
    }

    /// Puts back the state at power-on.
    ///
    /// # Errors
    /// See [`PowerOnState::restore`].
    pub fn reset(&self, state: &PowerOnState, tsc: TscOffset) -> Result<(), KvmError> {
        state.restore(&self.fd, tsc)
    }

    /// What a parked vCPU is now, on a clock that is at zero with the offset `zero`; see [`VcpuState::capture`].
    ///
    /// # Errors
    /// See there.
    pub fn capture(&self, power_on: &PowerOnState, zero: TscOffset) -> Result<VcpuState, KvmError> {
        VcpuState::capture(&self.fd, &self.cpuid, power_on, zero)
    }

    /// Makes this vCPU, which has not run, what another one was; see [`VcpuState::restore`].
    ///
    /// # Errors
    /// See there.
    pub fn restore(
        &self,
        state: &VcpuState,
        power_on: &PowerOnState,
        zero: TscOffset,
    ) -> Result<(), StateError> {
        state.restore(&self.fd, &self.cpuid, power_on, zero)
    }

    /// Tells a guest that reads KVM's clock that it was paused, so that its watchdogs forgive the time. Others need not know, and
    /// KVM refuses then.
    pub fn note_pause(&self) {
        let _ = self.fd.kvmclock_ctrl();
    }

    /// Runs the guest until it needs something.
    ///
    /// # Errors
    /// [`KvmError::Request`] if KVM fails; a guest's own misery is an [`Exit`].
    pub fn run(&mut self) -> Result<Exit<'_>, KvmError> {
        match self.fd.run() {
            Ok(VcpuExit::IoIn(port, data)) => Ok(Exit::PortRead(port, data)),
            Ok(VcpuExit::IoOut(port, data)) => Ok(Exit::PortWrite(port, data)),
            Ok(VcpuExit::MmioRead(address, data)) => Ok(Exit::MmioRead(address, data)),
            Ok(VcpuExit::MmioWrite(address, data)) => Ok(Exit::MmioWrite(address, data)),
            Ok(VcpuExit::IoapicEoi(vector)) => Ok(Exit::EndOfInterrupt(vector)),
            Ok(VcpuExit::X86Rdmsr(ReadMsrExit { error, index, data, .. })) => {
                Ok(Exit::MsrRead(MsrRead { index, value: data, error }))
            }
            Ok(VcpuExit::X86Wrmsr(WriteMsrExit { error, index, data, .. })) => {
                Ok(Exit::MsrWrite(MsrWrite { index, value: data, error }))
            }
            Ok(VcpuExit::Shutdown) => Ok(Exit::TripleFault),
            Ok(VcpuExit::Intr) => Ok(Exit::Kicked),
            Ok(VcpuExit::InternalError) => Ok(Exit::InternalError),
            Ok(VcpuExit::FailEntry(reason, _)) => Ok(Exit::FailEntry(reason)),
            Ok(other) => Ok(Exit::Unexpected(format!("{other:?}"))),
            Err(errno) if matches!(errno.errno(), libc::EINTR | libc::EAGAIN) => Ok(Exit::Kicked),
            Err(errno) => Err(KvmError::request("run the vCPU")(errno)),
        }
    }

    /// KVM's reason for the last [`Exit::InternalError`]; 1 means that it had to emulate an instruction and could not.
    pub fn suberror(&mut self) -> u32 {
        // SAFETY: every member of the union is plain data of at most the union's size, so reading this one is defined after
        // any exit; after KVM_EXIT_INTERNAL_ERROR it is also the one that KVM wrote.
        unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal.suberror }
    }

    /// Queues an NMI, if the guest has the NMI pin of its local APIC (LINT1) connected. KVM does not look at the pin itself.
    ///
    /// # Errors
    /// [`KvmError::Request`].
    pub fn inject_nmi(&self) -> Result<bool, KvmError> {
        let lapic = self.fd.get_lapic().map_err(KvmError::request("get the local APIC"))?;
        self.queue_nmi_through(&lapic, LVT_LINT1)
    }

    /// Queues an NMI as another processor's message brings it, or a device's: no entry of the local APIC can mask that.
    ///
    /// # Errors
    /// [`KvmError::Request`].
    pub fn send_nmi(&self) -> Result<(), KvmError> {
        self.fd.nmi().map_err(KvmError::request("queue an NMI"))
    }

    /// Delivers the overflow of a performance counter as the local APIC's entry for it (LVTPC) says: as an NMI if it is
    /// unmasked and wants one, else not at all. The entry stays as it is: AMD's local APIC does not mask it on delivery, as
    /// Intel's does. Returns whether an NMI was queued.
    ///
    /// # Errors
    /// [`KvmError::Request`].
    pub fn deliver_overflow(&mut self) -> Result<bool, KvmError> {
        /// Bit 11 of the APIC base register: without it there is no APIC, whatever its registers hold.
        const APIC_ENABLED: u64 = 1 << 11;
        if self.fd.get_kvm_run().apic_base & APIC_ENABLED == 0 {
            return Ok(false);
        }
        let lapic = self.fd.get_lapic().map_err(KvmError::request("get the local APIC"))?;
        self.queue_nmi_through(&lapic, LVT_COUNTERS)
    }

    fn queue_nmi_through(&self, lapic: &kvm_lapic_state, entry: usize) -> Result<bool, KvmError> {
        let entry = register(lapic, entry);
        if entry & LVT_MASKED != 0 || entry & LVT_MODE != LVT_MODE_NMI {
            return Ok(false);
        }
        self.send_nmi()?;
        Ok(true)
    }

    /// Leaves the vCPU in the handler of an NMI with another one queued and no other event, as if its machine was reset at
    /// such a moment.
    ///
    /// # Errors
    /// [`KvmError::Request`].
    pub fn queue_nmi_behind_another(&self) -> Result<(), KvmError> {
        let mut events = kvm_vcpu_events {
            flags: KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW,
            ..Default::default()
        };
        (events.nmi.masked, events.nmi.pending) = (1, 1);
        self.fd.set_vcpu_events(&events).map_err(KvmError::request("queue an NMI"))
    }

    /// A clock that stands still while this vCPU is halted.
    ///
    /// # Errors
    /// [`KvmError`] on a KVM that does not say how long it was.
    pub fn unhalted_clock(&self) -> Result<UnhaltedClock, KvmError> {
        UnhaltedClock::new(&self.fd)
    }

    /// What this vCPU knows of itself.
    pub fn cpuid(&self) -> &CpuId {
        &self.cpuid
    }

    /// The instruction pointer and the bytes there, for messages. No bytes if the address leads nowhere.
    pub fn bytes_at_rip(&self, ram: &GuestRam) -> (u64, Vec<u8>) {
        const LONGEST_INSTRUCTION: usize = 15;
        let Ok(regs) = self.fd.get_regs() else { return (0, Vec::new()) };
        let base = self.fd.get_sregs().map_or(0, |sregs| match sregs.cs.l {
            0 => sregs.cs.base,
            _ => 0,
        });
        let mut bytes = Vec::new();
        for i in 0..LONGEST_INSTRUCTION as u64 {
            let linear = base.wrapping_add(regs.rip).wrapping_add(i);
            let Ok(physical) = self.fd.translate_gva(linear) else { break };
            let Ok(byte) = ram.read_obj::<u8>(GuestAddress(physical.physical_address)) else {
                break;
            };
            if physical.valid == 0 {
                break;
            }
            bytes.push(byte);
        }
        (regs.rip, bytes)
    }
}

/// Offsets in the register page of a local APIC (Intel SDM volume 3, table "Local APIC Register Address Map").
const LVT_COUNTERS: usize = 0x340;
const LVT_LINT0: usize = 0x350;
const LVT_LINT1: usize = 0x360;
const LVT_MASKED: u32 = 1 << 16;
const LVT_MODE: u32 = 7 << 8;
const LVT_MODE_NMI: u32 = 4 << 8;
const LVT_MODE_EXTINT: u32 = 7 << 8;

/// Connects the local interrupt pins as firmware would: LINT0 to a legacy controller, LINT1 to NMI.
fn wire_local_interrupts(lapic: &mut kvm_lapic_state) {
    set_register(lapic, LVT_LINT0, LVT_MODE_EXTINT);
    set_register(lapic, LVT_LINT1, LVT_MODE_NMI);
}

fn register(lapic: &kvm_lapic_state, offset: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|i| lapic.regs[offset + i] as u8))
}

fn set_register(lapic: &mut kvm_lapic_state, offset: usize, value: u32) {
    for (i, byte) in value.to_le_bytes().into_iter().enumerate() {
        lapic.regs[offset + i] = byte as _;
    }
}

const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const RFLAGS_RESERVED: u64 = 1 << 1;

const CODE: u8 = 0xb;
const DATA: u8 = 0x3;
const TSS_BUSY: u8 = 0xb;

/// Sets what `entry`'s boot protocol asks for.
fn entry_registers(entry: Entry, sregs: &mut kvm_sregs) -> kvm_regs {
    let mut regs = kvm_regs { rflags: RFLAGS_RESERVED, ..Default::default() };
    let data = flat_segment(0x18, DATA, false);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    match entry {
        // Xen's x86/HVM direct boot ABI: protected mode, flat segments, paging off, start info in EBX.
        Entry::Pvh { rip } => {
            sregs.cs = flat_segment(0x10, CODE, false);
            sregs.tr =
                kvm_segment { limit: 0x67, type_: TSS_BUSY, present: 1, ..Default::default() };
            sregs.cr0 = CR0_PE | CR0_ET;
            (sregs.cr4, sregs.efer) = (0, 0);
            regs.rip = rip;
            regs.rbx = layout::PVH_START_INFO;
        }
        // Linux's 64-bit boot protocol: long mode, identity-mapped, boot parameters in RSI.
        Entry::Linux64 { rip } => {
            sregs.cs = flat_segment(0x10, CODE, true);
            sregs.tr =
                kvm_segment { limit: 0x67, type_: TSS_BUSY, present: 1, ..Default::default() };
            (sregs.gdt.base, sregs.gdt.limit) = (layout::GDT, 31);
            (sregs.idt.base, sregs.idt.limit) = (0, 0);
            sregs.cr3 = layout::PAGE_TABLES;
            sregs.cr4 = CR4_PAE;
            sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
            sregs.efer = EFER_LME | EFER_LMA;
            regs.rip = rip;
            regs.rsi = layout::ZERO_PAGE;
        }
    }
    regs
}

fn flat_segment(selector: u16, type_: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        ..Default::default()
    }
}
