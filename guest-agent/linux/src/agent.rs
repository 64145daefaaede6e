//! What the agent knows of its life, and how it answers what the host asks.

use std::error::Error;
use std::fs;
use std::sync::Mutex;
use std::thread;
use std::time::Duration;

use agent::params::Params;
use agent::pmu::{self as counters, MsrOperation, Msrs};
use agent_protocol::{
    DmaReport, GuestReset, Hello, LinuxReport, LogLine, NmiRecord, NmiReport, PROTOCOL_VERSION,
    PmuReport, Reply, Report, Request, Timings, VsockReport,
};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::time::TimeValLike;
use nix::time::{ClockId, clock_gettime};

use crate::modules::{self, Group};
use crate::{cpu, device, interrupts, kernel_log, kexec, pmu};

/// How long to wait for a reset that does not come.
const PATIENCE: Duration = Duration::from_secs(10);
/// Violations that are told in words; all are counted.
const MAX_TEXTS: usize = 8;

/// The agent of one life.
#[derive(Debug)]
pub struct Agent {
    command_line: String,
    params: Params,
    tsc_agent: u64,
    tsc_ready: u64,
    /// What must not be done twice at once, such as loading drivers.
    turn: Mutex<()>,
}

impl Default for Agent {
    fn default() -> Self {
        Self::new()
    }
}

impl Agent {
    /// An agent that knows nothing but when it began.
    pub fn new() -> Self {
        Self {
            command_line: String::new(),
            params: Params::default(),
            tsc_agent: cpu::tsc(),
            tsc_ready: 0,
            turn: Mutex::new(()),
        }
    }

    /// Reads its orders; takes /proc.
    ///
    /// # Errors
    /// Those of /proc/cmdline.
    pub fn read_command_line(&mut self) -> Result<(), Box<dyn Error>> {
        let line =
            fs::read_to_string("/proc/cmdline").map_err(|e| format!("/proc/cmdline: {e}"))?;
        self.params = Params::parse(&line);
        self.command_line = line.trim_end().into();
        Ok(())
    }

    /// Notes that the vsock driver is ready.
    pub fn set_ready(&mut self) {
        self.tsc_ready = cpu::tsc();
    }

    /// The greeting. The kernel's log would take long to read for that alone, so the entry is not told in it.
    pub fn hello(&self) -> Hello {
        Hello {
            version: PROTOCOL_VERSION,
            life: self.params.life,
            tsc_entry: 0,
            tsc_ready: self.tsc_ready,
        }
    }

    /// Carries out one request; those about connections and transfers do not come here.
    pub fn answer(&self, request: Request) -> Option<Reply> {
        let _turn = self.turn.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        Some(match request {
            Request::GetReport => self.report().map_or_else(Reply::Refused, Reply::Report),
            Request::Ping(number) => Reply::Pong(number),
            Request::Echo(bytes) => Reply::Echo(bytes),
            Request::Reset(reset) => {
                refused(reset_machine(reset, &self.command_line, self.params.life))
            }
            Request::PowerOff => {
                let Err(error) = reboot(RebootMode::RB_POWER_OFF);
                Reply::Refused(format!("power off: {error}"))
            }
            Request::ArmPmu { overflow_in } => refused(arm(overflow_in)),
            Request::AwaitNmi { seen, ticks } => refused(await_nmi(seen, ticks)),
            Request::Disk { number, request } => {
                device::disk(number, &request).map_or_else(Reply::Refused, Reply::Disk)
            }
            Request::Random { bytes } => {
                device::random(bytes).map_or_else(Reply::Refused, Reply::Random)
            }
            Request::NmiSelfTest => {
                Reply::Refused("Linux sends itself no NMI at a program's wish".into())
            }
            Request::Probe(_) => Reply::Refused("Linux lets no program try that".into()),
            Request::GetState | Request::GetStateBesideRam | Request::Poison | Request::Hold => {
                Reply::Refused("Linux's registers are not the agent's to poison".into())
            }
            Request::Job { .. } | Request::Identify => {
                Reply::Refused("only the unikernel does jobs and tells clones apart".into())
            }
            Request::Connect { .. } | Request::Transfer(_) | Request::Shutdown { .. } => {
                return None;
            }
        })
    }

    fn report(&self) -> Result<Report, String> {
        let (dmesg, dmesg_dropped) =
            kernel_log::read().map_err(|error| format!("read /dev/kmsg: {error}"))?;
        let table = read("/proc/interrupts")?;
        let tsc_khz = tsc_khz(&dmesg);
        let tsc_report = cpu::tsc();
        let clock = Clock { tsc_entry: tsc_entry(tsc_report, tsc_khz)?, tsc_khz };
        let nmi = nmi_report(&dmesg, &table, clock);
        let linux = LinuxReport {
            release: read("/proc/sys/kernel/osrelease")?.trim().into(),
            taint: read("/proc/sys/kernel/tainted")?.trim().parse().unwrap_or(u64::MAX),
            nmis: interrupts::row(&table, "NMI").unwrap_or_default(),
            pmis: interrupts::row(&table, "PMI").unwrap_or_default(),
        };
        Ok(Report {
            life: self.params.life,
            cause: self.params.cause,
            dma: dma_report(&dmesg),
            pmu: PmuReport {
                status: pmu::status(&dmesg),
                cpuid: cpu::pmu_cpuid(),
                // The kernel wrote to them before anybody could look.
                msrs: Vec::new(),
            },
            dmesg,
            dmesg_dropped,
            nmi,
            exceptions: Vec::new(),
            vsock: VsockReport::default(),
            timings: Timings {
                tsc_entry: clock.tsc_entry,
                tsc_agent: self.tsc_agent,
                tsc_ready: self.tsc_ready,
                tsc_report,
                tsc_khz,
            },
            linux: Some(linux),
        })
    }
}

fn refused(result: Result<(), String>) -> Reply {
    match result {
        Ok(()) => Reply::Done,
        Err(why) => Reply::Refused(why),
    }
}

fn read(path: &str) -> Result<String, String> {
    fs::read_to_string(path).map_err(|error| format!("read {path}: {error}"))
}

/// What the kernel says of the counter's frequency: `tsc: Detected 2799.998 MHz processor`, and what it finds more exactly later.
fn tsc_khz(log: &[LogLine]) -> u32 {
    let khz = |line: &LogLine| {
        let rest = line.text.strip_prefix("tsc: ")?;
        let (_, tail) = rest
            .split_once("Detected ")
            .or_else(|| rest.split_once("clocksource calibration: "))?;
        let mhz: f64 = tail.split_whitespace().next()?.parse().ok()?;
        (0.0..4e6).contains(&mhz).then_some((mhz * 1000.0) as u32)
    };
    log.iter().rev().find_map(khz).unwrap_or(0)
}

/// What the counter showed when the kernel's clock began, which is early in its boot.
fn tsc_entry(now: u64, khz: u32) -> Result<u64, String> {
    let uptime =
        clock_gettime(ClockId::CLOCK_MONOTONIC).map_err(|error| format!("clock: {error}"))?;
    let us = u64::try_from(uptime.num_microseconds()).unwrap_or(0);
    Ok(now.saturating_sub(us.saturating_mul(khz.into()) / 1000))
}

/// From the log's time to the counter.
#[derive(Clone, Copy)]
struct Clock {
    tsc_entry: u64,
    tsc_khz: u32,
}

/// The rows have the counts; the log, which may leave some out, has the reasons.
fn nmi_report(log: &[LogLine], table: &str, clock: Clock) -> NmiReport {
    let sum = |name| {
        let counts = interrupts::row(table, name).unwrap_or_default();
        u32::try_from(counts.iter().sum::<u64>()).unwrap_or(u32::MAX)
    };
    let mut report = NmiReport { total: sum("NMI"), claimed: sum("PMI"), ..NmiReport::default() };
    for LogLine { us, text, .. } in log {
        let Some(reason) = reason(text) else { continue };
        let tsc = clock.tsc_entry + us.saturating_mul(clock.tsc_khz.into()) / 1000;
        report.records.push(NmiRecord { reason, tsc, rip: 0 });
        match reason >> 6 {
            0 => {}
            1 => report.iochk += 1,
            _ => report.serr += 1,
        }
    }
    let explained = report.claimed.saturating_add(report.iochk).saturating_add(report.serr);
    let logged = report.records.len() as u32;
    report.unknown = match report.total.checked_sub(explained) {
        Some(unknown) => unknown,
        // The log knows of more than the row: believe the worse.
        None => logged.saturating_sub(report.iochk).saturating_sub(report.serr),
    };
    report
}

/// Of the lines of arch/x86/kernel/nmi.c that name the reason byte.
fn reason(text: &str) -> Option<u8> {
    const LINES: [&str; 3] = [
        "NMI received for unknown reason ",
        "NMI: PCI system error (SERR) for reason ",
        "NMI: IOCK error (debug interrupt?) for reason ",
    ];
    let tail = LINES.iter().find_map(|line| Some(text.split_once(line)?.1))?;
    u8::from_str_radix(tail.get(..2)?, 16).ok()
}

/// What the kernel's own tracker of DMA buffers said, if it has one (kernel/dma/debug.c).
fn dma_report(log: &[LogLine]) -> DmaReport {
    let complaints = log.iter().filter(|line| line.level <= 4 && line.text.contains("DMA-API:"));
    let texts: Vec<_> = complaints.map(|line| line.text.clone()).collect();
    DmaReport {
        violation_count: texts.len() as u32,
        violations: texts.into_iter().take(MAX_TEXTS).collect(),
        ..DmaReport::default()
    }
}

/// Comes back only if the machine was not reset.
fn reset_machine(reset: GuestReset, cmdline: &str, life: u32) -> Result<(), String> {
    // The words of kernel/reboot.c.
    let kind = match reset {
        GuestReset::I8042 | GuestReset::Sysrq | GuestReset::Panic => "kbd",
        GuestReset::Cf9 => "pci",
        GuestReset::Acpi => "acpi",
        GuestReset::Triple => "triple",
        GuestReset::Kexec => return kexec::start(cmdline, life.wrapping_add(1)),
    };
    let file = "/sys/kernel/reboot/type";
    fs::write(file, kind).map_err(|error| format!("write {kind:?} to {file}: {error}"))?;
    let outcome = match reset {
        GuestReset::Sysrq => press("b"),
        GuestReset::Panic => press("c"),
        _ => {
            let Err(error) = reboot(RebootMode::RB_AUTOBOOT);
            Err(error.to_string())
        }
    };
    thread::sleep(PATIENCE);
    Err(format!("the machine did not reset ({reset:?}): {outcome:?}"))
}

/// The magic key with this letter.
fn press(key: &str) -> Result<(), String> {
    fs::write("/proc/sysrq-trigger", key).map_err(|error| format!("/proc/sysrq-trigger: {error}"))
}

/// Leaves the counters dirty and one running, behind the kernel's back: with no event of perf's it does not touch them.
fn arm(overflow_in: u64) -> Result<(), String> {
    modules::load(Group::Msr)?;
    let mut registers = Registers::open()?;
    match counters::arm(&cpu::pmu_cpuid(), overflow_in, &mut registers) {
        true => Ok(()),
        false => Err("there are no performance counters, or one took no value".into()),
    }
}

/// Model-specific registers of the first processor, by the file of Linux's driver.
struct Registers(fs::File);

impl Registers {
    fn open() -> Result<Self, String> {
        let path = "/dev/cpu/0/msr";
        let file = fs::OpenOptions::new().read(true).write(true).open(path);
        file.map(Self).map_err(|error| format!("open {path}: {error}"))
    }
}

impl Msrs for Registers {
    fn run(&mut self, operations: &mut [MsrOperation]) {
        use std::os::unix::fs::FileExt;
        for operation in operations {
            let mut value = operation.value.to_le_bytes();
            let result = match operation.write {
                0 => self.0.read_exact_at(&mut value, operation.index.into()),
                _ => self.0.write_all_at(&value, operation.index.into()),
            };
            operation.value = u64::from_le_bytes(value);
            operation.faulted = result.is_err().into();
        }
    }

    fn spin(&mut self) {
        (0..10_000).for_each(|_| std::hint::spin_loop());
    }
}

/// Keeps a processor busy until there are others than `seen` NMIs, or for so many ticks.
fn await_nmi(seen: u32, ticks: u64) -> Result<(), String> {
    let began = cpu::tsc();
    while cpu::tsc().wrapping_sub(began) < ticks {
        let counts = interrupts::row(&read("/proc/interrupts")?, "NMI").unwrap_or_default();
        if counts.iter().sum::<u64>() != u64::from(seen) {
            break;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(lines: &[(u64, &str)]) -> Vec<LogLine> {
        let line = |(us, text): &(u64, &str)| LogLine { us: *us, level: 4, text: (*text).into() };
        lines.iter().map(line).collect()
    }

    const CLOCK: Clock = Clock { tsc_entry: 1000, tsc_khz: 2_000_000 };

    #[test]
    fn nmis_are_counted_by_the_rows_and_explained_by_the_log() {
        let table = "  CPU0\n NMI: 5 1 Non-maskable interrupts\n PMI: 2 0 Performance\n";
        let log = log(&[
            (10, "Uhhuh. NMI received for unknown reason 30 on CPU 0."),
            (20, "NMI: PCI system error (SERR) for reason b0 on CPU 0."),
            (30, "NMI: IOCK error (debug interrupt?) for reason 60 on CPU 1."),
        ]);
        let report = nmi_report(&log, table, CLOCK);
        let counts = (report.total, report.claimed, report.serr, report.iochk, report.unknown);
        assert_eq!(counts, (6, 2, 1, 1, 2));
        let reasons: Vec<_> = report.records.iter().map(|r| (r.reason, r.tsc)).collect();
        assert_eq!(reasons, [(0x30, 21_000), (0xb0, 41_000), (0x60, 61_000)]);
    }

    #[test]
    fn a_log_that_knows_more_than_the_row_is_believed() {
        let log = log(&[(10, "Uhhuh. NMI received for unknown reason 20 on CPU 0.")]);
        assert_eq!(nmi_report(&log, " NMI: 0\n PMI: 1\n", CLOCK).unknown, 1);
        assert_eq!(nmi_report(&[], " NMI: 0\n", CLOCK), NmiReport::default());
    }

    #[test]
    fn the_frequency_is_the_last_that_the_kernel_found() {
        let coarse = (0, "tsc: Detected 2799.998 MHz processor");
        let fine = (1, "tsc: Refined TSC clocksource calibration: 2800.012 MHz");
        assert_eq!(tsc_khz(&log(&[coarse])), 2_799_998);
        assert_eq!(tsc_khz(&log(&[coarse, fine])), 2_800_012);
        assert_eq!(tsc_khz(&log(&[(0, "tsc: Detected x MHz")])), 0);
        assert_eq!(tsc_khz(&[]), 0);
    }

    #[test]
    fn dma_complaints_are_violations_and_its_greeting_is_none() {
        let complaint =
            "DMA-API: virtio1: cacheline tracking EEXIST, overlapping mappings aren't supported";
        let mut log = log(&[(0, complaint); 12]);
        log.push(LogLine { us: 0, level: 6, text: "DMA-API: preallocated 65536 entries".into() });
        let report = dma_report(&log);
        assert_eq!((report.violation_count, report.violations.len()), (12, MAX_TEXTS));
    }
}
