//! Calls through the gate into ring 0; gate.s is the other side. A call costs some 16 us where ring 0 is emulated, so
//! register accesses go in batches.

use agent::pmu::{MsrOperation, Msrs};
use agent_protocol::PmuCpuid;

use super::mmio::{Access, RegisterAddress};
use super::nucleus::DEVICE_VECTOR;
use super::virtio::VirtioSetUp;

/// Ring 0 cannot be interrupted during a batch, so it is kept short.
pub(super) const MAX_ACCESSES: usize = 32;
/// How many registers one batch reads, or writes and reads.
pub(super) const MAX_MSRS: usize = 48;

/// What ring 0 does; the order is that of `gate_services` in gate.s.
#[derive(Clone, Copy)]
#[repr(u64)]
enum Service {
    Wait,
    Registers,
    Virtio,
    Msrs,
    Cpuid,
    Triple,
    Stop,
    ReadDebug,
    WriteDebug,
    ReadSystem,
    PoisonSystem,
    OpenXsave,
    ReadMsrs,
    WriteMsrs,
    Vmrun,
    ScanVmcs,
}

/// Numbers of services, for leave.s.
pub(super) const TRIPLE: u64 = Service::Triple as u64;
pub(super) const STOP: u64 = Service::Stop as u64;

unsafe extern "C" {
    fn gate_call(first: u64, second: u64, service: u64) -> u64;
}

fn call(first: u64, second: u64, service: Service) -> u64 {
    // SAFETY: gate.s keeps the C calling convention, `Service` is in the order of its table, and the callers below
    // pass what each service asks for.
    unsafe { gate_call(first, second, service as u64) }
}

/// Sleeps until an interrupt has come in since the count `seen`; may also return early. Then tells the device that the
/// causes of all interrupts so far were handled.
pub fn wait_for_interrupt(seen: u32, interrupt_ack: RegisterAddress) {
    call(u64::from(seen), interrupt_ack.get().into(), Service::Wait);
}

/// Carries out register accesses in order.
///
/// # Panics
/// If there are more than [`MAX_ACCESSES`].
pub fn access_registers(accesses: &mut [Access]) {
    assert!(accesses.len() <= MAX_ACCESSES, "{} register accesses", accesses.len());
    if accesses.is_empty() {
        return;
    }
    for access in &mut *accesses {
        access.aim();
    }
    // Of every access one address is that of a register, by `Registers`, and the other that of its own `value`.
    let count = accesses.len() as u64;
    call(accesses.as_mut_ptr_range().end as u64, count, Service::Registers);
}

/// Carries out a set-up of the device whose registers begin here. Returns ring 0's time-stamp counter afterwards.
pub(super) fn set_up_virtio(registers: RegisterAddress, set_up: &mut VirtioSetUp) -> u64 {
    // `VirtioSetUp::run` vouches for the registers, `VirtioSetUp::new` for the number of queues.
    call(registers.get().into(), (&raw mut *set_up) as u64, Service::Virtio)
}

/// Ends this life with an exception that cannot be delivered.
pub fn triple_fault() -> ! {
    call(0, 0, Service::Triple);
    stop()
}

/// Halts for good.
pub fn stop() -> ! {
    loop {
        call(0, 0, Service::Stop);
    }
}

/// The registers of this CPU.
pub struct CpuMsrs;

impl Msrs for CpuMsrs {
    fn run(&mut self, operations: &mut [MsrOperation]) {
        if operations.is_empty() {
            return;
        }
        let range = operations.as_mut_ptr_range();
        // Faults come back as marks. Which registers may be written is the callers' affair: the agent owns the machine,
        // and none of them but paging and descriptor tables (which no caller touches) bears on memory safety.
        call(range.start as u64, range.end as u64, Service::Msrs);
    }

    fn read(&mut self, operations: &mut [MsrOperation]) {
        in_batches(operations, Service::ReadMsrs);
    }

    fn write_and_read(&mut self, operations: &mut [MsrOperation]) {
        in_batches(operations, Service::WriteMsrs);
    }

    fn spin(&mut self) {
        for _ in 0..20_000 {
            core::hint::spin_loop();
        }
    }
}

/// As [`CpuMsrs::run`], but all operations are of one kind.
fn in_batches(operations: &mut [MsrOperation], service: Service) {
    for batch in operations.chunks_mut(MAX_MSRS) {
        let count = batch.len() as u64;
        call(batch.as_mut_ptr_range().end as u64, count, service);
    }
}

/// One CPUID query and its answer in EAX, EBX, ECX, EDX; the layout is that of gate.s.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct CpuidQuery {
    leaf: u32,
    subleaf: u32,
    answer: [u32; 4],
}

/// CPUID as the monitor gives it. Ring 3 must not ask itself: under a software KVM it would see the host's.
fn cpuid<const COUNT: usize>(leaves: [u32; COUNT]) -> [[u32; 4]; COUNT] {
    let mut queries = leaves.map(|leaf| CpuidQuery { leaf, ..CpuidQuery::default() });
    let range = queries.as_mut_ptr_range();
    call(range.start as u64, range.end as u64, Service::Cpuid);
    queries.map(|query| query.answer)
}

/// What CPUID tells the agent.
pub struct CpuFacts {
    /// The words about the PMU; leaves beyond the CPU's range are zero.
    pub pmu: PmuCpuid,
    /// TSC frequency, 0 if unknown.
    pub tsc_khz: u32,
}

/// Asks for everything at once.
pub fn cpu_facts() -> CpuFacts {
    const HYPERVISOR: u32 = 1 << 31;
    const TIMING_LEAF: u32 = 0x4000_0010;
    let [basic, leaf_1, leaf_0a, leaf_15, leaf_16, hypervisor, timing, extended, amd, amd_pmu] =
        cpuid([
            0,
            1,
            0x0a,
            0x15,
            0x16,
            0x4000_0000,
            TIMING_LEAF,
            0x8000_0000,
            0x8000_0001,
            0x8000_0022,
        ]);
    let within = |max: u32, leaf: u32, answer: [u32; 4]| if max >= leaf { answer } else { [0; 4] };
    let mut vendor = [0; 12];
    for (part, word) in vendor.chunks_exact_mut(4).zip([basic[1], basic[3], basic[2]]) {
        part.copy_from_slice(&word.to_le_bytes());
    }
    let pmu = PmuCpuid {
        vendor,
        signature: leaf_1[0],
        leaf_1_ecx: leaf_1[2],
        leaf_0a: within(basic[0], 0x0a, leaf_0a),
        leaf_80000001_ecx: within(extended[0], 0x8000_0001, amd)[2],
        leaf_80000022: within(extended[0], 0x8000_0022, amd_pmu),
    };
    let hypervisor_max = if leaf_1[2] & HYPERVISOR != 0 { hypervisor[0] } else { 0 };
    let told = within(hypervisor_max, TIMING_LEAF, timing)[0];
    let [denominator, numerator, crystal_hz, _] = within(basic[0], 0x15, leaf_15);
    let from_crystal = u64::from(crystal_hz) * u64::from(numerator) / u64::from(denominator.max(1));
    let base_mhz = within(basic[0], 0x16, leaf_16)[0] & 0xffff;
    let tsc_khz = match (told, (from_crystal / 1000) as u32) {
        (0, 0) => base_mhz * 1000,
        (0, khz) | (khz, _) => khz,
    };
    CpuFacts { pmu, tsc_khz }
}

/// DR0 to DR3, DR6 and DR7.
pub type DebugRegisters = [u64; 6];

/// Reads the debug registers.
pub fn debug_registers() -> DebugRegisters {
    let mut registers = [0; 6];
    call((&raw mut registers) as u64, 0, Service::ReadDebug);
    registers
}

/// Writes the debug registers, and returns what they hold then. With a breakpoint enabled in the last of them the agent would be
/// interrupted by itself.
pub fn set_debug_registers(mut registers: DebugRegisters) -> DebugRegisters {
    call((&raw mut registers) as u64, 0, Service::WriteDebug);
    registers
}

/// Control registers and those that say where tables are; the layout is that of gate.s.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub struct SystemRegisters {
    /// CR0, CR2, CR3, CR4.
    pub control: [u64; 4],
    global_table: [u8; 16],
    interrupt_table: [u8; 16],
    /// LDTR.
    pub local_table: u16,
    /// TR.
    pub task: u16,
    /// DS, ES, FS, GS.
    pub data: [u16; 4],
}

impl SystemRegisters {
    /// Reads them.
    pub fn read() -> Self {
        let mut registers = Self::default();
        call((&raw mut registers) as u64, 0, Service::ReadSystem);
        registers
    }

    /// Base of the global descriptor table.
    pub fn global_table(&self) -> u64 {
        base(&self.global_table)
    }

    /// Base of the interrupt descriptor table.
    pub fn interrupt_table(&self) -> u64 {
        base(&self.interrupt_table)
    }
}

/// Behind the limit of 16 bits.
fn base(table: &[u8; 16]) -> u64 {
    u64::from_le_bytes(core::array::from_fn(|i| table[2 + i]))
}

/// Gives CR2, LDTR, DS, ES, FS and GS other values than a reset does; the agent uses none of them.
pub fn poison_system_registers(cr2: u64) {
    call(cr2, 0, Service::PoisonSystem);
}

/// Sets XCR0 to a value that this processor takes, and lets ring 3 use the state that it enables. Returns how many bytes of state
/// were enabled before, and how many are now: under a software KVM ring 3 reads the host's XCR0, and ring 0 cannot.
pub fn open_xsave(xcr0: u64) -> [u32; 2] {
    let mut enabled_bytes = [0; 2];
    call((&raw mut enabled_bytes) as u64, xcr0, Service::OpenXsave);
    enabled_bytes
}

/// Has the local APIC deliver overflows of performance counters as NMIs, as Linux's driver does (LVTPC, x2APIC mode).
pub fn deliver_overflows_as_nmis() {
    const X2APIC_LVT_COUNTERS: u32 = 0x834;
    const NMI: u64 = 0x400;
    CpuMsrs.run(&mut [MsrOperation::write(X2APIC_LVT_COUNTERS, NMI)]);
}

/// Has the local APIC's timer interrupt once, as a device does. Its clock is taken to be that of KVM and QEMU (1 GHz) divided
/// by two as a reset leaves it: where it is not, or this is longer than it counts, the caller has to look at the time.
pub fn interrupt_in(us: u64) {
    const X2APIC_LVT_TIMER: u32 = 0x832;
    const X2APIC_INITIAL_COUNT: u32 = 0x838;
    const TICKS_PER_US: u64 = 500;
    let count = us.saturating_mul(TICKS_PER_US).clamp(1, u32::MAX.into());
    CpuMsrs.run(&mut [
        MsrOperation::write(X2APIC_LVT_TIMER, DEVICE_VECTOR.into()),
        MsrOperation::write(X2APIC_INITIAL_COUNT, count),
    ]);
}

/// Has the processor run the guest of the control block at this address, which it has to refuse. EFER.SVME is set.
pub(super) fn vmrun(control_block: u64) {
    call(control_block, 0, Service::Vmrun);
}

/// Tries all fields of a VMCS, as the [`super::vmx::Scan`] at this address says. The processor has VMX and its registers allow it.
pub(super) fn scan_vmcs(scan: u64) {
    call(scan, 0, Service::ScanVmcs);
}

/// Sends this CPU an NMI through its own local APIC (x2APIC mode).
pub fn send_self_nmi() {
    const X2APIC_ID: u32 = 0x802;
    const X2APIC_ICR: u32 = 0x830;
    const ASSERT_NMI: u64 = 0x4400;
    let mut id = [MsrOperation::read(X2APIC_ID)];
    CpuMsrs.run(&mut id);
    let destination = id[0].result().unwrap_or(0) << 32;
    CpuMsrs.run(&mut [MsrOperation::write(X2APIC_ICR, destination | ASSERT_NMI)]);
}
