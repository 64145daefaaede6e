//! What `soak --json` prints, a line each: what it is to do, every life, the verdict. `merge` reads it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::Place;
use super::campaign::Ending;
use super::line::{Life, Machine};
use super::plan::Plan;

/// One line.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "line", rename_all = "kebab-case")]
pub enum Record {
    /// The first.
    Plan(Header),
    /// A life is over, or a machine's process came to a bad end.
    Life(Box<LifeRecord>),
    /// The last.
    Verdict(VerdictRecord),
}

/// What a soak is to do, and where.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// Name of the host.
    pub host: String,
    /// What everything random comes from.
    pub seed: u64,
    /// How many machines.
    pub vms: u32,
    /// The number of the first.
    pub first_vm: u32,
    /// How many resets each; none if only the time counts.
    pub resets: Option<u32>,
    /// For how many seconds at most.
    pub duration: Option<u64>,
    /// Arguments of `run` that are the same for each machine, but for those of its jail.
    pub arguments: Vec<String>,
}

impl Header {
    /// Of this plan.
    pub fn new(plan: &Plan, host: String) -> Self {
        Self {
            host,
            seed: plan.seed,
            vms: plan.vms,
            first_vm: plan.first_vm,
            resets: plan.resets,
            duration: plan.duration.map(|duration| duration.as_secs()),
            arguments: plan.arguments.clone(),
        }
    }

    /// The machines' numbers.
    pub fn machines(&self) -> std::ops::Range<u32> {
        self.first_vm..self.first_vm.saturating_add(self.vms)
    }
}

/// A life and where it was.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LifeRecord {
    /// Name of the host.
    pub host: String,
    /// The soak's.
    pub seed: u64,
    /// Number of the machine.
    pub vm: u32,
    /// Which of its processes; the first is 0.
    pub process: u32,
    /// The process's own.
    pub vm_seed: u64,
    /// The life, without its evidence.
    #[serde(flatten)]
    pub life: Life,
    /// Where its bundle is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bundle: Option<String>,
    /// The command that runs the machine again up to it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replay: Option<String>,
}

impl LifeRecord {
    /// Where it was.
    pub fn place(&self) -> Place {
        Place { seed: self.seed, vm: self.vm, process: self.process }
    }
}

/// The verdict and the sums.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VerdictRecord {
    /// Names of the hosts.
    pub hosts: Vec<String>,
    /// The soaks' seeds.
    pub seeds: Vec<u64>,
    /// "clean" or "findings"; none if not everything was done that there was to do.
    pub verdict: Option<String>,
    /// Why it ended.
    pub ending: Ending,
    /// How many machines.
    pub vms: u32,
    /// Lives that were told of.
    pub lives: u64,
    /// Resets that the next life told of.
    pub resets: u64,
    /// How long it took; of several soaks the longest.
    pub seconds: f64,
    /// How many findings.
    pub findings: u64,
    /// How often each was made.
    pub names: BTreeMap<String, u64>,
    /// What the machines ran on.
    pub machine: Option<Machine>,
}
