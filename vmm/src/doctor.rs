//! What a host is and can, and which known faults its KVM has.
//!
//! [`host`] looks at the host. Each of the [`Behaviour`]s has a file of its own: what is observed there, and what that means,
//! which is a function of the observation alone. Observations take place in processes of their own ([`runner`]), so that
//! nothing that a KVM does to one of them ends the rest. [`report`] makes text and JSON of it all.

mod after_run;
mod behaviour;
pub mod host;
mod l2;
mod mdev;
mod nmis;
mod pmu;
mod pv_msrs;
pub mod report;
pub mod runner;
pub mod vmcs_fields;
pub mod vmrun;

use serde::Serialize;

pub use behaviour::{Behaviour, Unseen};

/// What is said of a behaviour.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// It is as it should be.
    Fixed,
    /// It is not.
    Affected,
    /// Nothing on this host shows it.
    CannotTell,
}

/// A verdict with its reason.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Judgement {
    /// What it is.
    pub verdict: Verdict,
    /// Why, in words.
    pub why: String,
}

impl Judgement {
    fn fixed(why: impl Into<String>) -> Self {
        Self { verdict: Verdict::Fixed, why: why.into() }
    }

    fn affected(why: impl Into<String>) -> Self {
        Self { verdict: Verdict::Affected, why: why.into() }
    }

    /// Nothing on this host shows it, and why not.
    pub fn cannot_tell(why: impl Into<String>) -> Self {
        Self { verdict: Verdict::CannotTell, why: why.into() }
    }
}

/// A word for hosts that a test has made up.
#[cfg(test)]
#[track_caller]
fn check(found: &Judgement, verdict: Verdict, words: &str) {
    assert_eq!(found.verdict, verdict, "{found:?}");
    assert!(found.why.contains(words), "{found:?} lacks {words:?}");
}
