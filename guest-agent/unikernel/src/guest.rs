//! The agent itself: what it remembers of this life and how it answers the host.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use agent::jobs;
use agent::kernel_log::{Clock, KernelLog, Level};
use agent::nmi::NmiAccount;
use agent::params::{Params, PortWrite};
use agent::pmu;
use agent::random::Generator;
use agent::vsock::Answer;
use agent_protocol::{
    GuestReset, Hello, Identity, PROTOCOL_VERSION, PmuReport, Probe, Probed, Reply, Report,
    Request, Timings, VmcsFields, VsockReport,
};

use crate::arch::{gate, leave, port, pvh, records, svm, tsc, vmx};
use crate::dma;
use crate::machine_state;
use crate::virtio::RequestDevices;

/// How long to wait for a reset or an NMI that does not come, in polls: some milliseconds.
const PATIENCE: u32 = 1 << 18;

/// Stale packets that are told in words; all are counted.
const MAX_STALE_TEXTS: usize = 8;

/// The agent of one life.
pub struct Agent {
    params: Params,
    cmdline: String,
    log: KernelLog,
    nmi_account: NmiAccount,
    pmu: Option<PmuReport>,
    timings: Timings,
    /// When ring 3 began.
    entered: tsc::Native,
    /// Events of the vsock device so far: none, unless the machine was restored from somewhere.
    events: u64,
    /// Devices that the host has asked for.
    devices: RequestDevices,
    vsock: VsockReport,
    /// The vsock device's address, as it showed it last.
    cid: u64,
    generator: Generator,
    /// Whether this life ends with marks in all registers.
    poisoned: bool,
    /// Whether it does nothing more than wait for its end.
    holds: bool,
}

impl Agent {
    /// An agent that has looked at nothing but its command line.
    pub fn new(cmdline: String, params: Params, entered: tsc::Native) -> Self {
        let tsc_entry = records::boot().tsc_entry;
        Self {
            params,
            cmdline,
            log: KernelLog::new(),
            nmi_account: NmiAccount::default(),
            pmu: None,
            timings: Timings { tsc_entry, ..Timings::default() },
            entered,
            events: 0,
            devices: RequestDevices::default(),
            vsock: VsockReport::default(),
            cid: 0,
            generator: Generator::default(),
            poisoned: false,
            holds: false,
        }
    }

    /// The number of this life, 0 if nobody told.
    pub fn life(&self) -> u32 {
        self.params.life
    }

    /// Logs a line with the present time.
    pub fn log(&mut self, level: Level, text: String) {
        self.log.push(tsc::now(), level, text);
    }

    /// Notes that the vsock driver is ready.
    pub fn set_ready(&mut self) {
        self.timings.tsc_ready = tsc::now();
    }

    /// What a kernel says and checks while it boots. The first connection is greeted before, to be greeted early; nothing
    /// is answered before.
    #[inline(never)]
    pub fn finish_boot(&mut self) {
        if self.pmu.is_some() {
            return;
        }
        let facts = gate::cpu_facts();
        self.timings.tsc_khz = facts.tsc_khz;
        self.timings.tsc_agent = self.entered.in_ring0();
        self.log_boot();
        let (report, lines) = pmu::check(facts.pmu, &mut gate::CpuMsrs);
        for (level, text) in lines {
            self.log(level, text);
        }
        if pmu::has_driver(&report.status) {
            gate::deliver_overflows_as_nmis();
        }
        self.pmu = Some(report);
    }

    /// The report of this life so far.
    #[inline(never)]
    pub fn report(&mut self) -> Report {
        self.finish_boot();
        let nmis = records::nmis();
        for (tsc, text) in self.nmi_account.log_lines(&nmis) {
            self.log.push(tsc, Level::Emergency, text);
        }
        let timings = Timings { tsc_report: tsc::now(), ..self.timings };
        let clock = Clock { tsc_entry: timings.tsc_entry, tsc_khz: timings.tsc_khz };
        Report {
            life: self.params.life,
            cause: self.params.cause,
            dmesg: self.log.to_lines(clock),
            dmesg_dropped: self.log.dropped(),
            pmu: self.pmu.clone().expect("finish_boot has checked the PMU"),
            nmi: self.nmi_account.report(&nmis),
            exceptions: records::exceptions().collect(),
            dma: dma::report(),
            vsock: self.vsock.clone(),
            timings,
            linux: None,
        }
    }

    /// Whether the local APIC's timer is the agent's own, and not yet what the residue check has made of it.
    pub fn may_use_timer(&self) -> bool {
        !self.poisoned
    }

    /// Whether nothing is left to do but [`Agent::hold`]; what was said before should be sent first.
    pub fn must_hold(&self) -> bool {
        self.holds
    }

    /// Waits for the host to reset the machine, with marks in all registers.
    pub fn hold(&self) -> ! {
        #[cfg(feature = "attacks")]
        crate::attacker::attack_devices(&self.params);
        leave::to_host()
    }

    /// Powers the machine off, or halts where nobody said how.
    pub fn power_off(&mut self) -> ! {
        if let Some(PortWrite { port, value }) = self.params.acpi_poweroff {
            port::write(port, value);
        }
        gate::stop()
    }

    fn log_boot(&mut self) {
        let version = env!("CARGO_PKG_VERSION");
        let tsc = self.timings.tsc_entry;
        let mut log = |text| self.log.push(tsc, Level::Info, text);
        log(format!("Cleanslate guest agent version {version}"));
        log(format!("Command line: {}", self.cmdline));
        let map: Vec<_> = pvh::memory_map();
        if !map.is_empty() {
            log("BIOS-provided physical RAM map:".into());
        }
        for range in map.iter().filter(|range| range.len > 0) {
            let (start, last) = (range.start, range.start.wrapping_add(range.len).wrapping_sub(1));
            let kind = if range.kind == 1 { "usable" } else { "reserved" };
            log(format!("BIOS-e820: [mem {start:#018x}-{last:#018x}] {kind}"));
        }
        for (number, device) in self.params.devices().enumerate() {
            let (base, last, irq) = (device.base, device.base + device.size - 1, device.irq);
            let name = format!("virtio-mmio.{number}");
            log(format!(
                "virtio-mmio: Registering device {name} at {base:#x}-{last:#x}, IRQ {irq}."
            ));
        }
        if self.timings.tsc_ready != 0 {
            self.log.push(self.timings.tsc_ready, Level::Info, "virtio_vsock: ready".into());
        }
    }

    fn arm_pmu(&mut self, overflow_in: u64) -> Reply {
        self.finish_boot();
        match &self.pmu {
            Some(report) if pmu::has_driver(&report.status) => {
                match pmu::arm(&report.cpuid, overflow_in, &mut gate::CpuMsrs) {
                    true => Reply::Done,
                    false => Reply::Refused("a PMU register took no value".into()),
                }
            }
            _ => Reply::Refused("there are no performance counters".into()),
        }
    }

    /// The state that a reset restores, as it was before this life changed it.
    fn state(&self, ram: bool) -> Reply {
        let (readings, ticks) = machine_state::read(&self.params, self.has_avx(), self.events, ram);
        Reply::State(readings, ticks)
    }

    /// Whether the processor has XSAVE and AVX, and so XCR0 and YMM registers.
    fn has_avx(&self) -> bool {
        const XSAVE_AND_AVX: u32 = 1 << 26 | 1 << 28;
        let leaf_1_ecx = self.pmu.as_ref().map_or(0, |report| report.cpuid.leaf_1_ecx);
        leaf_1_ecx & XSAVE_AND_AVX == XSAVE_AND_AVX
    }

    fn failed_vmrun(&self) -> Result<[u64; 2], String> {
        const SVM: u32 = 1 << 2;
        let features = self.pmu.as_ref().map_or(0, |report| report.cpuid.leaf_80000001_ecx);
        match features & SVM {
            0 => Err("the guest's CPUID has no SVM".into()),
            _ => svm::failed_vmrun(),
        }
    }

    fn vmcs_fields(&self) -> Result<VmcsFields, String> {
        const VMX: u32 = 1 << 5;
        let features = self.pmu.as_ref().map_or(0, |report| report.cpuid.leaf_1_ecx);
        match features & VMX {
            0 => Err("the guest's CPUID has no VMX".into()),
            _ => vmx::vmcs_fields(),
        }
    }

    fn identify(&mut self) -> Identity {
        let generation = self.params.generation.and_then(pvh::generation).unwrap_or_default();
        // Without the device the generation alone tells clones apart.
        let random = self.devices.random(&self.params, 32).unwrap_or_default();
        let now = tsc::now().to_le_bytes();
        let random = self.generator.next(&[&generation, &random, &now]);
        Identity { generation, cid: self.cid, random }
    }

    fn nmi_self_test(&mut self) -> bool {
        let before = records::nmi_count();
        gate::send_self_nmi();
        let delivered = wait_until(|| records::nmi_count() != before);
        if delivered {
            self.nmi_account.claim(before);
        }
        delivered
    }

    /// Comes back only if the reset did not happen, and from a poisoned life not even then.
    fn reset(&mut self, reset: GuestReset) -> Reply {
        if matches!(reset, GuestReset::Sysrq | GuestReset::Panic | GuestReset::Kexec) {
            return Reply::Refused(format!(
                "this is no Linux, which alone can do that ({reset:?})"
            ));
        }
        #[cfg(feature = "attacks")]
        crate::attacker::attack_devices(&self.params);
        if self.poisoned {
            machine_state::last_poison();
            match (reset, self.params.acpi_reset) {
                (GuestReset::I8042, _) => leave::by_port(0x64, 0xfe),
                (GuestReset::Cf9, _) => leave::by_port(0xcf9, 0x06),
                (GuestReset::Triple, _) => leave::by_triple_fault(),
                (GuestReset::Acpi, Some(PortWrite { port, value })) => leave::by_port(port, value),
                (GuestReset::Acpi, None)
                | (GuestReset::Sysrq | GuestReset::Panic | GuestReset::Kexec, _) => {}
            }
        }
        match reset {
            GuestReset::I8042 => port::write(0x64, 0xfe),
            GuestReset::Cf9 => port::write(0xcf9, 0x06),
            GuestReset::Triple => gate::triple_fault(),
            GuestReset::Sysrq | GuestReset::Panic | GuestReset::Kexec => {}
            GuestReset::Acpi => match self.params.acpi_reset {
                Some(PortWrite { port, value }) => port::write(port, value),
                None => return Reply::Refused("no agent.acpi_reset= on the command line".into()),
            },
        }
        wait_until(|| false);
        Reply::Refused(format!("the machine did not reset ({reset:?})"))
    }
}

impl Answer for Agent {
    fn hello(&self) -> Hello {
        let Timings { tsc_entry, tsc_ready, .. } = self.timings;
        Hello { version: PROTOCOL_VERSION, life: self.params.life, tsc_entry, tsc_ready }
    }

    fn answer(&mut self, request: Request) -> Option<Reply> {
        // Not yet done if the host asked before it was greeted.
        self.finish_boot();
        Some(match request {
            Request::GetReport => Reply::Report(self.report()),
            Request::Ping(number) => Reply::Pong(number),
            Request::Echo(bytes) => Reply::Echo(bytes),
            Request::NmiSelfTest => Reply::NmiSelfTest { delivered: self.nmi_self_test() },
            Request::Reset(reset) => self.reset(reset),
            Request::PowerOff => self.power_off(),
            Request::ArmPmu { overflow_in } => self.arm_pmu(overflow_in),
            Request::GetState => self.state(true),
            Request::GetStateBesideRam => self.state(false),
            Request::Poison => {
                self.poisoned = true;
                let (poisonings, ticks) = machine_state::poison(&self.params, self.has_avx());
                Reply::Poisoned(poisonings, ticks)
            }
            Request::Hold => {
                machine_state::last_poison();
                self.holds = true;
                return None;
            }
            Request::Disk { number, request } => {
                let answer = self.devices.disk(&self.params, number, &request);
                answer.map_or_else(Reply::Refused, Reply::Disk)
            }
            Request::Random { bytes } => {
                let random = self.devices.random(&self.params, bytes);
                random.map_or_else(Reply::Refused, Reply::Random)
            }
            Request::Probe(Probe::FailedVmrun) => match self.failed_vmrun() {
                Ok([before, after]) => Reply::Probed(Probed::FailedVmrun { before, after }),
                Err(why) => Reply::Refused(why),
            },
            Request::Probe(Probe::VmcsFields) => match self.vmcs_fields() {
                Ok(fields) => Reply::Probed(Probed::VmcsFields(fields)),
                Err(why) => Reply::Refused(why),
            },
            Request::AwaitNmi { seen, ticks } => {
                let began = tsc::now();
                while records::nmi_count() == seen && tsc::now().wrapping_sub(began) < ticks {
                    core::hint::spin_loop();
                }
                Reply::Done
            }
            Request::Job { name, input } => {
                let spin = |ms| {
                    let end = self.now_us() + 1000 * ms;
                    while self.now_us() < end {
                        core::hint::spin_loop();
                    }
                };
                jobs::run(&name, input, spin).map_or_else(Reply::Refused, Reply::Job)
            }
            Request::Identify => Reply::Identity(self.identify()),
            // Whoever has the connections carries them out.
            Request::Connect { .. } | Request::Transfer(_) | Request::Shutdown { .. } => {
                return None;
            }
        })
    }

    fn now_us(&self) -> u64 {
        /// Where nobody tells the frequency: about that of every processor.
        const LIKELY_KHZ: u32 = 2_500_000;
        let khz = Some(self.timings.tsc_khz).filter(|khz| *khz > 0).unwrap_or(LIKELY_KHZ);
        tsc::now().wrapping_sub(self.timings.tsc_entry) / u64::from(khz.div_ceil(1000))
    }

    fn note_stale(&mut self, guest_port: u32, packet: String) {
        #[cfg(feature = "attacks")]
        if self.params.attack.ask_for_packets_to(guest_port, self.params.life) {
            return;
        }
        #[cfg(not(feature = "attacks"))]
        let _ = guest_port;
        self.vsock.stale_packets += 1;
        if self.vsock.first.len() < MAX_STALE_TEXTS {
            self.vsock.first.push(packet);
        }
    }

    fn note_cid(&mut self, cid: u64) {
        self.cid = cid;
    }

    fn note_event(&mut self) {
        self.events += 1;
    }

    fn warn(&mut self, text: String) {
        self.log(Level::Warning, text);
    }
}

fn wait_until(done: impl Fn() -> bool) -> bool {
    (0..PATIENCE).any(|_| {
        core::hint::spin_loop();
        done()
    })
}
