//! The residue check: state that a reset restores, item by item.

use alloc::string::String;

use serde::{Deserialize, Serialize};

/// One item, as found before anything in this life changed it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StateReading {
    /// Its name, such as `dr0` or `msr.pat`; the same in [`Poisoning`].
    pub item: String,
    /// Its value, or `None` if it cannot be read here.
    pub value: Option<u64>,
}

/// How long the agent was busy with a part of the check, in ticks of its time stamp counter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckTicks {
    /// With everything but RAM.
    pub state: u64,
    /// With all pages of RAM.
    pub ram: u64,
}

/// What became of one item that was to be poisoned.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Poisoning {
    /// Its name.
    pub item: String,
    /// What it holds now, or why it could not be given a value.
    pub result: Result<u64, String>,
    /// Whether it gets that value in the agent's last instructions alone, and not if the life ends before.
    pub last: bool,
}
