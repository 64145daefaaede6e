//! When a machine is reset, and by what: in turn, or drawn from a seed, so that the same seed gives the same plan.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use agent_protocol::Cause;
use serde::{Deserialize, Serialize};

/// What the machine is in the middle of when its reset comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Moment {
    /// Everything was answered and the guest's processor is halted, or busy with the reset that it was asked for.
    Quiet,
    /// Bytes are on their way in both directions, on a connection that the host has opened and on one of the guest's.
    MidTransfer,
    /// Connections are asked for that the guest has not accepted yet, and one that the host never accepts.
    MidConnect,
    /// An NMI has just been queued.
    NmiPending,
    /// The host wants a reset as well, at the same time.
    TwoCauses,
    /// The guest has been reset already, and is still booting.
    MidBoot,
}

impl Moment {
    /// Every moment.
    pub const ALL: [Self; 6] = [
        Self::Quiet,
        Self::MidTransfer,
        Self::MidConnect,
        Self::NmiPending,
        Self::TwoCauses,
        Self::MidBoot,
    ];

    /// The name that options, tables and JSON use.
    pub fn name(self) -> &'static str {
        match self {
            Self::Quiet => "quiet",
            Self::MidTransfer => "mid-transfer",
            Self::MidConnect => "mid-connect",
            Self::NmiPending => "nmi-pending",
            Self::TwoCauses => "two-causes",
            Self::MidBoot => "mid-boot",
        }
    }
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Moment {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|moment| moment.name() == word)
            .ok_or_else(|| format!("known are {}", Self::ALL.map(Self::name).join(", ")))
    }
}

/// One reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// By what.
    pub cause: Cause,
    /// In the middle of what.
    pub moment: Moment,
    /// How long after that began.
    pub delay: Duration,
}

/// The resets of a machine's lives, one after the other.
#[derive(Clone, Debug)]
pub enum Schedule {
    /// Quiet ones by these causes, in turn. Not empty; [`Cause::PowerOn`] is none.
    InTurn(Vec<Cause>),
    /// Drawn from these.
    Random {
        /// Not empty; [`Cause::PowerOn`] is none.
        causes: Vec<Cause>,
        /// Not empty.
        moments: Vec<Moment>,
        /// The same seed gives the same steps.
        seed: u64,
    },
}

/// Longest delay: most of the time that a guest takes to boot.
const MOST_DELAY_US: u64 = 600;

impl Schedule {
    /// The steps, without an end.
    pub fn steps(&self) -> Box<dyn Iterator<Item = Step> + '_> {
        match self {
            Self::InTurn(causes) => Box::new(causes.iter().cycle().map(|cause| Step {
                cause: *cause,
                moment: Moment::Quiet,
                delay: Duration::ZERO,
            })),
            Self::Random { causes, moments, seed } => {
                let mut random = Random::new(*seed);
                Box::new(std::iter::repeat_with(move || Step {
                    cause: *random.one_of(causes),
                    moment: *random.one_of(moments),
                    // Every other one at once: what takes microseconds has to be met too.
                    delay: match random.below(2) {
                        0 => Duration::ZERO,
                        _ => Duration::from_micros(random.below(MOST_DELAY_US)),
                    },
                }))
            }
        }
    }
}

/// A small generator (SplitMix64): the same numbers for the same seed, on every host and in every version of this program.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// Begins with `seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number, any of 64 bits.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `bound`, which is not 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        // By the high bits of the product: the bias is less than bound / 2^64.
        ((u128::from(self.number()) * u128::from(bound)) >> 64) as u64
    }

    /// One of some.
    fn one_of<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        &all[self.below(all.len() as u64) as usize]
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    const CAUSES: [Cause; 5] = [Cause::Host, Cause::I8042, Cause::Cf9, Cause::Acpi, Cause::Triple];

    fn steps(seed: u64, count: usize) -> Vec<Step> {
        let (causes, moments) = (CAUSES.to_vec(), Moment::ALL.to_vec());
        Schedule::Random { causes, moments, seed }.steps().take(count).collect()
    }

    #[test]
    fn the_same_seed_gives_the_same_steps_and_another_seed_others() {
        assert_eq!(steps(7, 100), steps(7, 100));
        assert_eq!(steps(7, 100)[..40], steps(7, 40));
        assert_ne!(steps(7, 100), steps(8, 100));
    }

    #[test]
    fn the_generator_gives_the_numbers_that_are_published_for_it() {
        let mut random = Random::new(1_234_567);
        let numbers: Vec<_> = (0..3).map(|_| random.number()).collect();
        assert_eq!(
            numbers,
            [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423]
        );
    }

    #[test]
    fn every_cause_meets_every_moment() {
        let steps = steps(1, 1000);
        let pairs: BTreeSet<_> = steps.iter().map(|s| (s.cause.name(), s.moment)).collect();
        assert_eq!(pairs.len(), CAUSES.len() * Moment::ALL.len());
        assert!(steps.iter().any(|step| step.delay.is_zero()));
        assert!(steps.iter().all(|step| step.delay.as_micros() < u128::from(MOST_DELAY_US)));
    }

    #[test]
    fn causes_in_turn_are_quiet() {
        let schedule = Schedule::InTurn(CAUSES[..2].to_vec());
        let causes: Vec<_> = schedule.steps().take(3).map(|s| (s.cause, s.moment)).collect();
        let expected = [Cause::Host, Cause::I8042, Cause::Host].map(|c| (c, Moment::Quiet));
        assert_eq!(causes, expected);
    }

    #[test]
    fn moments_have_one_name_everywhere() {
        for moment in Moment::ALL {
            assert_eq!(moment.name().parse(), Ok(moment));
            let json = serde_json::to_string(&moment).unwrap();
            assert_eq!(json, format!("\"{moment}\""));
        }
        assert!("loud".parse::<Moment>().unwrap_err().contains("mid-transfer"));
    }
}
