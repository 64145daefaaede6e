//! Which performance counters a CPU has, from its CPUID words: AMD K7, AMD core, AMD PerfMonV2, Intel architectural.
//! Register numbers: AMD APM volume 2 and Intel SDM volume 4, by way of Linux's msr-index.h.

use agent_protocol::PmuCpuid;

const K7_SELECT: u32 = 0xc001_0000;
const K7_COUNTER: u32 = 0xc001_0004;
const CORE_SELECT: u32 = 0xc001_0200;
const CORE_COUNTER: u32 = 0xc001_0201;
const AMD_GLOBAL_STATUS: u32 = 0xc000_0300;
const AMD_GLOBAL_CONTROL: u32 = 0xc000_0301;
const AMD_GLOBAL_STATUS_SET: u32 = 0xc000_0303;
const INTEL_SELECT: u32 = 0x186;
const INTEL_COUNTER: u32 = 0xc1;
const INTEL_FIXED_COUNTER: u32 = 0x309;
const INTEL_FIXED_CONTROL: u32 = 0x38d;
const INTEL_GLOBAL_STATUS: u32 = 0x38e;
const INTEL_GLOBAL_CONTROL: u32 = 0x38f;

const PERFCTR_CORE: u32 = 1 << 23;
const AMD_CYCLES: u64 = 0x76;
const INTEL_CYCLES: u64 = 0x3c;
/// Event-select registers end at 0x18d.
const INTEL_MAX_COUNT: usize = 8;
const INTEL_MAX_FIXED: u32 = 16;

/// Why there is no driver for this CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NoDriver {
    /// No vendor or family that Linux knows counters of.
    Vendor,
    /// Intel without the architectural PMU.
    IntelModel { family: u32, model: u32 },
}

/// Intel's fixed-purpose counters.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fixed {
    pub control: u32,
    pub count: u32,
}

/// The counters of one CPU.
#[derive(Clone, Copy, Debug)]
pub(super) struct Counters {
    /// What Linux prints before the driver's name.
    pub prefix: &'static str,
    /// The driver's name.
    pub name: &'static str,
    /// Version of the architectural interface; AMD counts as 0 before PerfMonV2.
    pub version: u32,
    /// Bits of a counter.
    pub width: u32,
    /// General-purpose counters.
    pub count: usize,
    /// Event that counts cycles.
    pub cycles: u64,
    /// Fixed-purpose counters, where there are any.
    pub fixed: Option<Fixed>,
    /// The register without whose bit a counter does not run.
    pub global_control: Option<u32>,
    /// The register that sets bits of the status, where there is one for all versions of the interface.
    pub global_status_set: Option<u32>,
    global_status: Option<u32>,
    first_select: u32,
    first_counter: u32,
    step: u32,
}

impl Counters {
    /// Linux's choice of driver.
    pub fn of(cpuid: &PmuCpuid) -> Result<Self, NoDriver> {
        match &cpuid.vendor {
            b"AuthenticAMD" => Self::amd(cpuid, "AMD"),
            b"HygonGenuine" => Self::amd(cpuid, "HYGON"),
            b"GenuineIntel" => Self::intel(cpuid),
            _ => Err(NoDriver::Vendor),
        }
    }

    /// Event-select register of a counter.
    pub fn select(&self, number: usize) -> u32 {
        self.first_select + self.step * number as u32
    }

    /// Count register of a counter.
    pub fn counter(&self, number: usize) -> u32 {
        self.first_counter + self.step * number as u32
    }

    /// Every register to look at: globals, then each counter with its event select, then the fixed ones.
    pub fn registers(&self) -> impl Iterator<Item = u32> + '_ {
        let globals = self.global_control.into_iter().chain(self.global_status);
        let general =
            (0..self.count).flat_map(|number| [self.select(number), self.counter(number)]);
        let fixed = self.fixed.into_iter().flat_map(|fixed| {
            let counters = (0..fixed.count).map(|number| INTEL_FIXED_COUNTER + number);
            core::iter::once(fixed.control).chain(counters)
        });
        globals.chain(general).chain(fixed)
    }

    fn amd(cpuid: &PmuCpuid, name: &'static str) -> Result<Self, NoDriver> {
        let (family, _) = family_and_model(cpuid.signature);
        if family < 6 {
            return Err(NoDriver::Vendor);
        }
        let k7 = Self {
            prefix: "",
            name,
            version: 0,
            width: 48,
            count: 4,
            cycles: AMD_CYCLES,
            fixed: None,
            global_control: None,
            global_status_set: None,
            global_status: None,
            first_select: K7_SELECT,
            first_counter: K7_COUNTER,
            step: 1,
        };
        if cpuid.leaf_80000001_ecx & PERFCTR_CORE == 0 {
            return Ok(k7);
        }
        let prefix = match family {
            0x15 => "Fam15h core perfctr, ",
            0x17.. => "Fam17h+ core perfctr, ",
            _ => "core perfctr, ",
        };
        let core = Self {
            prefix,
            count: 6,
            first_select: CORE_SELECT,
            first_counter: CORE_COUNTER,
            step: 2,
            ..k7
        };
        let [eax, ebx, ..] = cpuid.leaf_80000022;
        if eax & 1 == 0 {
            return Ok(core);
        }
        Ok(Self {
            version: 2,
            count: (ebx & 0xf) as usize,
            global_control: Some(AMD_GLOBAL_CONTROL),
            global_status_set: Some(AMD_GLOBAL_STATUS_SET),
            global_status: Some(AMD_GLOBAL_STATUS),
            ..core
        })
    }

    fn intel(cpuid: &PmuCpuid) -> Result<Self, NoDriver> {
        let [eax, _, _, edx] = cpuid.leaf_0a;
        let (version, count, mask_len) = (eax & 0xff, (eax >> 8) & 0xff, eax >> 24);
        // Linux sets ARCH_PERFMON for more than one counter and asks for all seven architectural events' bits.
        if version == 0 || count < 2 || mask_len < 7 {
            let (family, model) = family_and_model(cpuid.signature);
            return Err(NoDriver::IntelModel { family, model });
        }
        let fixed = (edx & 0x1f).min(INTEL_MAX_FIXED);
        let has_globals = version > 1;
        Ok(Self {
            prefix: "",
            name: "Intel",
            version,
            width: (eax >> 16) & 0xff,
            count: (count as usize).min(INTEL_MAX_COUNT),
            cycles: INTEL_CYCLES,
            fixed: (has_globals && fixed > 0)
                .then_some(Fixed { control: INTEL_FIXED_CONTROL, count: fixed }),
            global_control: has_globals.then_some(INTEL_GLOBAL_CONTROL),
            global_status_set: None,
            global_status: has_globals.then_some(INTEL_GLOBAL_STATUS),
            first_select: INTEL_SELECT,
            first_counter: INTEL_COUNTER,
            step: 1,
        })
    }
}

/// Display family and model of a CPUID signature (leaf 1 EAX).
fn family_and_model(signature: u32) -> (u32, u32) {
    let family = (signature >> 8) & 0xf;
    let model = (signature >> 4) & 0xf;
    let extended_model = (signature >> 12) & 0xf0;
    match family {
        0xf => (family + ((signature >> 20) & 0xff), extended_model | model),
        6 => (family, extended_model | model),
        _ => (family, model),
    }
}
