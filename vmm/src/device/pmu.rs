//! AMD's performance counters as a model: registers, counting, overflow. Time comes in as ticks of a clock that stands still
//! while the processor is halted; the model knows no clock, no KVM and no interrupt controller.
//!
//! Registers, widths and the way in which legacy registers alias the core ones: AMD64 Architecture Programmer's Manual
//! volume 2, section 13.2, and the Processor Programming Reference, "Core Performance Monitor Counters". Where the manuals
//! leave a choice it does what KVM's virtual PMU does: reserved bits of a write are dropped, and registers that the shape
//! does not have raise #GP.
//!
//! What a model outside the processor cannot know it does not pretend to: rings are not told apart (a counter that counts
//! in either counts in both), and the counter mask, edge and invert fields hold what is written but change no rate.

use std::fmt;
use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};

/// `PerfEvtSel0` and `PerfCtr0`, the legacy registers: four of each.
const K7_SELECT: u32 = 0xc001_0000;
const K7_COUNT: u32 = 0xc001_0004;
const K7_COUNTERS: u8 = 4;
/// `PERF_CTL0`, each followed by its `PERF_CTR`: the core registers, six of each.
const CORE_SELECT: u32 = 0xc001_0200;
const CORE_COUNTERS: u8 = 6;
const GLOBAL_STATUS: u32 = 0xc000_0300;
const GLOBAL_CONTROL: u32 = 0xc000_0301;
const GLOBAL_STATUS_CLEAR: u32 = 0xc000_0302;
const GLOBAL_STATUS_SET: u32 = 0xc000_0303;

/// Every register that a model may have, and every one that is reserved for it: none of them is KVM's while a model is.
pub const REGISTERS: [RangeInclusive<u32>; 3] = [
    GLOBAL_STATUS..=GLOBAL_STATUS_SET,
    K7_SELECT..=K7_COUNT + K7_COUNTERS as u32 - 1,
    CORE_SELECT..=CORE_SELECT + 2 * CORE_COUNTERS as u32 - 1,
];

const SELECT_RESERVED: u64 = 0xffff_fff0_0028_0000;
/// Bits 16 and 17: count in ring 3 and in ring 0. With neither nothing is counted.
const SELECT_RINGS: u64 = 3 << 16;
const SELECT_INTERRUPT: u64 = 1 << 20;
const SELECT_ENABLE: u64 = 1 << 22;

/// Counters are 48 bits wide.
const COUNT_MASK: u64 = (1 << 48) - 1;

/// Rates are events a tick, in units of 2^-32.
const ONE_A_TICK: u64 = 1 << 32;

/// Which registers a model has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "UncheckedShape")]
pub struct Shape {
    version: u8,
    counters: u8,
}

/// A shape that may be of a file.
#[derive(Deserialize)]
struct UncheckedShape {
    version: u8,
    counters: u8,
}

impl TryFrom<UncheckedShape> for Shape {
    type Error = ShapeError;

    fn try_from(UncheckedShape { version, counters }: UncheckedShape) -> Result<Self, ShapeError> {
        Self::new(version, counters)
    }
}

/// No AMD processor has such counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ShapeError {
    /// A version that does not exist.
    #[error("--pmu-version {0} is neither 1 (legacy or core counters) nor 2 (PerfMonV2)")]
    Version(u8),
    /// A number of counters that the version cannot have.
    #[error(
        "--pmu-counters {counters} is not possible with --pmu-version {version}: version 1 has 4 (legacy) or 6 (core), \
         version 2 has 4 to 6"
    )]
    Counters {
        /// The wish.
        counters: u8,
        /// The version that it does not fit.
        version: u8,
    },
}

impl Shape {
    /// PerfMonV2 with all six core counters.
    pub const FULL: Self = Self { version: 2, counters: CORE_COUNTERS };

    /// Version 1 with 4 counters has the legacy registers alone, with 6 the core ones as well; version 2 (PerfMonV2) has the
    /// global registers too, and says in CPUID how many counters there are.
    ///
    /// # Errors
    /// [`ShapeError`] for all other combinations.
    pub fn new(version: u8, counters: u8) -> Result<Self, ShapeError> {
        match (version, counters) {
            (1, K7_COUNTERS | CORE_COUNTERS) | (2, K7_COUNTERS..=CORE_COUNTERS) => {
                Ok(Self { version, counters })
            }
            (1 | 2, _) => Err(ShapeError::Counters { counters, version }),
            _ => Err(ShapeError::Version(version)),
        }
    }

    /// Whether there are core registers (CPUID `PerfCtrExtCore`).
    pub fn has_core(self) -> bool {
        self.counters > K7_COUNTERS || self.has_globals()
    }

    /// Whether there are global registers (CPUID `PerfMonV2`).
    pub fn has_globals(self) -> bool {
        self.version == 2
    }

    /// How many counters there are.
    pub fn counters(self) -> u8 {
        self.counters
    }

    /// One bit for each counter.
    fn all(self) -> u64 {
        (1 << self.counters) - 1
    }

    fn register(self, index: u32) -> Option<Register> {
        let end = |first: u32, count: u8| first + u32::from(count);
        match index {
            _ if (K7_SELECT..end(K7_SELECT, K7_COUNTERS)).contains(&index) => {
                Some(Register::Select((index - K7_SELECT) as usize))
            }
            _ if (K7_COUNT..end(K7_COUNT, K7_COUNTERS)).contains(&index) => {
                Some(Register::Count((index - K7_COUNT) as usize))
            }
            _ if self.has_core()
                && (CORE_SELECT..end(CORE_SELECT, 2 * self.counters)).contains(&index) =>
            {
                let number = (index - CORE_SELECT) as usize / 2;
                match index % 2 {
                    0 => Some(Register::Select(number)),
                    _ => Some(Register::Count(number)),
                }
            }
            GLOBAL_STATUS if self.has_globals() => Some(Register::GlobalStatus),
            GLOBAL_CONTROL if self.has_globals() => Some(Register::GlobalControl),
            GLOBAL_STATUS_CLEAR if self.has_globals() => Some(Register::GlobalStatusClear),
            GLOBAL_STATUS_SET if self.has_globals() => Some(Register::GlobalStatusSet),
            _ => None,
        }
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "version {}, {} counters", self.version, self.counters)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Register {
    Select(usize),
    Count(usize),
    GlobalStatus,
    GlobalControl,
    GlobalStatusClear,
    GlobalStatusSet,
}

/// The access raises a general-protection fault in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GeneralProtection;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Counter {
    select: u64,
    value: u64,
    /// What was counted of the next event, in units of 2^-32.
    fraction: u64,
}

/// What counters hold at the tick up to which everything is counted, as plain data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedPmu {
    counters: [Counter; CORE_COUNTERS as usize],
    global_status: u64,
    global_control: u64,
    interrupt: bool,
}

/// The counters of one processor.
#[derive(Clone, Debug)]
pub struct Pmu {
    shape: Shape,
    seed: u64,
    counters: [Counter; CORE_COUNTERS as usize],
    global_status: u64,
    global_control: u64,
    /// The tick up to which everything is counted.
    now: u64,
    interrupt: bool,
}

impl Pmu {
    /// Counters in their reset state: all clear, and of the global enables all set. `seed` decides how often every event
    /// happens except the cycles, which the clock gives.
    pub fn new(shape: Shape, seed: u64) -> Self {
        Self {
            shape,
            seed,
            counters: Default::default(),
            global_status: 0,
            global_control: shape.all(),
            now: 0,
            interrupt: false,
        }
    }

    /// What the counters hold.
    pub fn save(&self) -> SavedPmu {
        let Self { counters, global_status, global_control, interrupt, .. } = *self;
        SavedPmu { counters, global_status, global_control, interrupt }
    }

    /// Gives them what others of the same shape held; bits that no register has are dropped, as at a write. Time goes on at the
    /// tick `now`, which belongs to another clock.
    pub fn restore(&mut self, saved: &SavedPmu, now: u64) {
        for (number, saved) in saved.counters.iter().take(self.shape.counters.into()).enumerate() {
            self.set(Register::Select(number), saved.select);
            self.set(Register::Count(number), saved.value);
            self.counters[number].fraction = saved.fraction & (ONE_A_TICK - 1);
        }
        self.global_status = saved.global_status & self.shape.all();
        self.set(Register::GlobalControl, saved.global_control);
        self.interrupt = saved.interrupt;
        self.skip_to(now);
    }

    /// Ticks up to `now` are not counted.
    pub fn skip_to(&mut self, now: u64) {
        self.now = now;
    }

    /// Counts up to the tick `now`. A clock that seems to go back counts nothing.
    pub fn advance(&mut self, now: u64) {
        let elapsed = now.saturating_sub(self.now);
        self.now = self.now.max(now);
        for number in 0..usize::from(self.shape.counters) {
            let rate = self.rate(number);
            let counter = &mut self.counters[number];
            // At most 2^64 ticks at 2^32 each: far from the end of 128 bits.
            let total = u128::from(counter.fraction) + u128::from(elapsed) * u128::from(rate);
            counter.fraction = total as u64 & (ONE_A_TICK - 1);
            let sum = u128::from(counter.value) + (total >> 32);
            // The counter wraps, and however often it did since the last look, that is one overflow.
            counter.value = sum as u64 & COUNT_MASK;
            if sum > u128::from(COUNT_MASK) {
                self.interrupt |= counter.select & SELECT_INTERRUPT != 0;
                if self.shape.has_globals() {
                    self.global_status |= 1 << number;
                }
            }
        }
    }

    /// Whether a counter whose interrupt is enabled has overflowed since this was last asked.
    pub fn take_interrupt(&mut self) -> bool {
        std::mem::take(&mut self.interrupt)
    }

    /// In how many ticks from the last [`Pmu::advance`] a counter will overflow whose interrupt is enabled; none if no
    /// such counter runs.
    pub fn ticks_to_interrupt(&self) -> Option<u64> {
        let interrupts = |number: &usize| {
            self.counters[*number].select & SELECT_INTERRUPT != 0 && self.rate(*number) > 0
        };
        let ticks = |number: usize| {
            let Counter { value, fraction, .. } = self.counters[number];
            let missing = (u128::from(COUNT_MASK + 1 - value) << 32) - u128::from(fraction);
            u64::try_from(missing.div_ceil(self.rate(number).into())).unwrap_or(u64::MAX)
        };
        (0..usize::from(self.shape.counters)).filter(interrupts).map(ticks).min()
    }

    /// The guest reads a register at the tick `now`.
    ///
    /// # Errors
    /// [`GeneralProtection`] if the shape does not have it.
    pub fn read(&mut self, index: u32, now: u64) -> Result<u64, GeneralProtection> {
        self.advance(now);
        Ok(match self.shape.register(index).ok_or(GeneralProtection)? {
            Register::Select(number) => self.counters[number].select,
            Register::Count(number) => self.counters[number].value,
            Register::GlobalStatus => self.global_status,
            Register::GlobalControl => self.global_control,
            Register::GlobalStatusClear | Register::GlobalStatusSet => 0,
        })
    }

    /// The guest writes a register at the tick `now`. Reserved bits are dropped.
    ///
    /// # Errors
    /// [`GeneralProtection`] if the shape does not have it.
    pub fn write(&mut self, index: u32, value: u64, now: u64) -> Result<(), GeneralProtection> {
        self.advance(now);
        match self.shape.register(index).ok_or(GeneralProtection)? {
            // Read-only, and a write no fault.
            Register::GlobalStatus => {}
            Register::GlobalStatusClear => self.global_status &= !value,
            Register::GlobalStatusSet => self.global_status |= value & self.shape.all(),
            plain => self.set(plain, value),
        }
        Ok(())
    }

    /// The machine puts back a register, as KVM takes writes of its user: the status takes the value, and its clear and set
    /// registers, which only act, take none. No time passes.
    ///
    /// # Errors
    /// [`GeneralProtection`] if the shape does not have it.
    pub fn put_back(&mut self, index: u32, value: u64) -> Result<(), GeneralProtection> {
        match self.shape.register(index).ok_or(GeneralProtection)? {
            Register::GlobalStatus => self.global_status = value & self.shape.all(),
            Register::GlobalStatusClear | Register::GlobalStatusSet => {}
            plain => self.set(plain, value),
        }
        Ok(())
    }

    /// Writes one of the registers that hold what is written.
    fn set(&mut self, register: Register, value: u64) {
        match register {
            Register::Select(number) => {
                let counter = &mut self.counters[number];
                (counter.select, counter.fraction) = (value & !SELECT_RESERVED, 0);
            }
            Register::Count(number) => {
                let counter = &mut self.counters[number];
                (counter.value, counter.fraction) = (value & COUNT_MASK, 0);
            }
            Register::GlobalControl => self.global_control = value & self.shape.all(),
            Register::GlobalStatus | Register::GlobalStatusClear | Register::GlobalStatusSet => {}
        }
    }

    /// How fast a counter counts now, in units of 2^-32 a tick.
    fn rate(&self, number: usize) -> u64 {
        let select = self.counters[number].select;
        let globally = !self.shape.has_globals() || self.global_control & 1 << number != 0;
        if select & SELECT_ENABLE == 0 || select & SELECT_RINGS == 0 || !globally {
            return 0;
        }
        event_rate(select, self.seed)
    }
}

/// Cycles not halted happen once a tick; any other event at a rate that the seed and its number decide, never faster.
fn event_rate(select: u64, seed: u64) -> u64 {
    const CYCLES_NOT_HALTED: u64 = 0x76;
    /// Slower ones would not be seen to count.
    const SLOWEST: u64 = 1 << 16;
    let (event, unit_mask) = (select & 0xff | select >> 24 & 0xf00, select >> 8 & 0xff);
    if event == CYCLES_NOT_HALTED {
        return ONE_A_TICK;
    }
    (mix(seed ^ (event << 8 | unit_mask)) >> 32).max(SLOWEST)
}

/// The output function of SplitMix64 (Steele, Lea, Flood 2014): every bit of the input moves every bit of the output.
fn mix(input: u64) -> u64 {
    let mut z = input.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

#[cfg(test)]
mod tests;
