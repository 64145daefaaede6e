//! The report: what a guest found of itself after a reset. The same type for every personality of the agent.

use alloc::string::String;
use alloc::vec::Vec;

use serde::{Deserialize, Serialize};

use crate::Cause;

/// Everything that the agent knows about its life so far.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The life number that the agent was started with (`agent.life=`), 0 if it was told none.
    pub life: u32,
    /// The cause that the agent was started with (`agent.cause=`).
    pub cause: Option<Cause>,
    /// The kernel log, oldest first, in Linux's wording.
    pub dmesg: Vec<LogLine>,
    /// Log lines that did not fit the ring and were dropped, oldest first.
    pub dmesg_dropped: u32,
    /// The performance counters as found, before anything wrote to them.
    pub pmu: PmuReport,
    /// Non-maskable interrupts of this life.
    pub nmi: NmiReport,
    /// Processor exceptions of this life, the agent's own gate left out; one entry a vector.
    pub exceptions: Vec<ExceptionRecord>,
    /// What the tracker of DMA buffers saw.
    pub dma: DmaReport,
    /// What came over vsock that belongs to nothing in this life.
    pub vsock: VsockReport,
    /// When things happened.
    pub timings: Timings,
    /// What a Linux says of itself beyond that; only if the agent runs in one.
    pub linux: Option<LinuxReport>,
}

/// What a Linux says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinuxReport {
    /// Of the kernel, such as `6.1.0-48-cloud-amd64`.
    pub release: String,
    /// Bits of /proc/sys/kernel/tainted (Documentation/admin-guide/tainted-kernels.rst).
    pub taint: u64,
    /// Row `NMI` of /proc/interrupts: non-maskable interrupts of each processor.
    pub nmis: Vec<u64>,
    /// Row `PMI`: those that were overflows of performance counters.
    pub pmis: Vec<u64>,
}

/// One line of the kernel log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogLine {
    /// Microseconds since the kernel's entry point.
    pub us: u64,
    /// Severity as in syslog: 0 emergency … 3 error, 4 warning, 6 info.
    pub level: u8,
    /// The text without timestamp or newline.
    pub text: String,
}

/// What the boot-time check of the performance counters concluded, in the terms of Linux's `check_hw_exists`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PmuStatus {
    /// No usable counters, on a machine that says it is virtual.
    Absent,
    /// Counters work and none was running.
    Present {
        /// The driver's name as the log gives it, such as `AMD` or `Fam17h+ core perfctr, AMD`.
        driver: String,
    },
    /// Counters work, but one was already running when the kernel started.
    BrokenBios {
        /// The event-select register that was found enabled.
        msr: u32,
        /// What it held.
        value: u64,
    },
    /// Counters do not hold what is written to them, on a machine that does not say it is virtual.
    Broken,
    /// Registers hold values but an enabled counter does not count.
    PresentDead,
}

/// CPUID words that describe the PMU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PmuCpuid {
    /// Vendor string of leaf 0, in the order EBX, EDX, ECX.
    pub vendor: [u8; 12],
    /// Leaf 1 EAX: family, model, stepping.
    pub signature: u32,
    /// Leaf 1 ECX: bit 15 PDCM, bit 31 hypervisor.
    pub leaf_1_ecx: u32,
    /// Leaf 0x0a EAX, EBX, ECX, EDX (Intel architectural PMU).
    pub leaf_0a: [u32; 4],
    /// Leaf 0x80000001 ECX: bit 23 PERFCTR_CORE.
    pub leaf_80000001_ecx: u32,
    /// Leaf 0x80000022 EAX, EBX, ECX, EDX (AMD PerfMonV2).
    pub leaf_80000022: [u32; 4],
}

/// One register as read before anything wrote to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsrReading {
    /// Register number.
    pub index: u32,
    /// Its value, or `None` if reading it faulted.
    pub value: Option<u64>,
}

/// The performance counters as found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PmuReport {
    /// The conclusion.
    pub status: PmuStatus,
    /// The CPUID words that it rests on.
    pub cpuid: PmuCpuid,
    /// Every PMU register that was looked at, in that order, with the value it had at first.
    pub msrs: Vec<MsrReading>,
}

/// One non-maskable interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NmiRecord {
    /// Port 0x61 as read by the handler: bit 7 SERR, bit 6 IOCHK.
    pub reason: u8,
    /// Guest TSC in the handler.
    pub tsc: u64,
    /// The interrupted instruction.
    pub rip: u64,
}

/// Counts of non-maskable interrupts, classified in Linux's order: claimed, SERR, IOCHK, unknown.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NmiReport {
    /// All of them; the sum of the others.
    pub total: u32,
    /// Expected ones: counter overflows of the agent's own, and its self-test.
    pub claimed: u32,
    /// PCI system errors (reason bit 7).
    pub serr: u32,
    /// I/O check errors (reason bit 6).
    pub iochk: u32,
    /// Those that nobody can explain.
    pub unknown: u32,
    /// The first ones in detail; fewer than `total` if there were more than the recorder holds.
    pub records: Vec<NmiRecord>,
}

/// A processor exception that was recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExceptionRecord {
    /// Vector 0–31.
    pub vector: u8,
    /// How often.
    pub count: u32,
    /// Error code of the last one, 0 where the vector has none.
    pub error_code: u64,
    /// Instruction pointer of the last one.
    pub rip: u64,
    /// CR2 of the last one, meaningful for vector 14 alone.
    pub cr2: u64,
}

/// What the guest's tracker of DMA buffers saw.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DmaReport {
    /// Buffers given to a device so far.
    pub handed_over: u64,
    /// Buffers that came back.
    pub handed_back: u64,
    /// Buffers now owned by a device.
    pub in_flight: u32,
    /// Violations in words, such as an overlap or a cache line shared with a buffer in flight; the first few.
    pub violations: Vec<String>,
    /// How many violations there were.
    pub violation_count: u32,
}

/// Packets for connections that this life never had: somebody remembers those of an earlier one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockReport {
    /// How many. Requests for new connections are none.
    pub stale_packets: u64,
    /// The first few in words: what they were, and from which port of the host to which of the guest.
    pub first: Vec<String>,
}

/// When things happened, as guest TSC values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timings {
    /// TSC at the kernel's entry point.
    pub tsc_entry: u64,
    /// TSC when the agent (ring 3) started.
    pub tsc_agent: u64,
    /// TSC when the vsock driver was ready; 0 if there is no vsock device.
    pub tsc_ready: u64,
    /// TSC when the report was made.
    pub tsc_report: u64,
    /// TSC frequency in kHz where the hypervisor or CPUID tells it, else 0.
    pub tsc_khz: u32,
}
