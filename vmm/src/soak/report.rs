//! The result of a soak, or of many: its verdict, and how it is told.

mod html;
mod junit;
mod table;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::time::Duration;

use super::campaign::Ending;
use super::figures::Figures;
use super::line::Machine;
use super::record::{Header, VerdictRecord};
use crate::exit;
use crate::words::plural;

pub use html::html;
pub use junit::junit;
pub use table::table;

/// Findings whose replay is kept.
pub const MOST_REPLAYS: usize = 50;

/// One soak of a report: there are more only if they were merged.
#[derive(Clone, Debug)]
pub struct Shard {
    /// What it was to do.
    pub header: Header,
    /// What its machines ran on.
    pub machine: Option<Machine>,
    /// How it ended.
    pub ending: Ending,
    /// More about that.
    pub remark: Option<String>,
    /// How long it took, if it told.
    pub took: Option<Duration>,
}

/// What there is to tell.
#[derive(Debug)]
pub struct Report {
    /// Not empty.
    pub shards: Vec<Shard>,
    /// What came of them.
    pub figures: Figures,
    /// Commands that show the first findings again.
    pub replays: Vec<String>,
}

/// What a report comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Everything was done, and nothing was found.
    Clean,
    /// Something was found.
    Findings,
    /// Not everything was done.
    Interrupted,
    /// The host failed it.
    Failed,
    /// No machine was seen to come back from a reset, so nothing is known.
    Untested,
}

impl Verdict {
    /// In words.
    pub fn words(self) -> &'static str {
        match self {
            Self::Clean => "clean",
            Self::Findings => "not clean",
            Self::Interrupted => "interrupted",
            Self::Failed => "failed",
            Self::Untested => "nothing was tested",
        }
    }

    /// The name that JSON uses; none for what is no verdict.
    pub fn name(self) -> Option<&'static str> {
        match self {
            Self::Clean => Some("clean"),
            Self::Findings => Some("findings"),
            Self::Interrupted | Self::Failed | Self::Untested => None,
        }
    }
}

/// Nothing is known of any machine.
#[derive(Debug, thiserror::Error)]
#[error("no machine was seen to come back from a reset; allow it more time")]
pub struct UntestedError;

impl Report {
    /// What it comes to.
    pub fn verdict(&self) -> Verdict {
        match (self.ending(), self.figures.findings(), self.figures.resets()) {
            (Ending::Failed, ..) => Verdict::Failed,
            (Ending::Interrupted, ..) => Verdict::Interrupted,
            (_, 1.., _) => Verdict::Findings,
            (.., 0) => Verdict::Untested,
            _ => Verdict::Clean,
        }
    }

    /// The process's exit status.
    ///
    /// # Errors
    /// [`UntestedError`].
    pub fn status(&self) -> Result<u8, UntestedError> {
        match self.verdict() {
            Verdict::Clean => Ok(exit::CLEAN),
            Verdict::Findings => Ok(exit::FINDINGS),
            Verdict::Interrupted => Ok(exit::INTERRUPTED),
            Verdict::Failed => Ok(exit::USAGE_OR_HOST),
            Verdict::Untested => Err(UntestedError),
        }
    }

    /// The worst of the shards' ends.
    pub fn ending(&self) -> Ending {
        self.shards.iter().map(|shard| shard.ending).max().unwrap_or(Ending::Failed)
    }

    /// How long the longest took.
    pub fn took(&self) -> Duration {
        self.shards.iter().filter_map(|shard| shard.took).max().unwrap_or_default()
    }

    /// How many machines there were to be.
    pub fn vms(&self) -> u32 {
        self.shards.iter().map(|shard| shard.header.vms).sum()
    }

    /// All machines by the seed of their soak and their number, whether they told of a life or not.
    pub fn machines(&self) -> BTreeSet<(u64, u32)> {
        let machines = |shard: &Shard| {
            let Header { seed, .. } = shard.header;
            shard.header.machines().map(move |vm| (seed, vm))
        };
        self.shards.iter().flat_map(machines).collect()
    }

    /// How many machines were not seen to come back from a reset.
    pub fn untested(&self) -> usize {
        let is_untested = |key| self.figures.vms.get(key).is_none_or(|vm| vm.resets() == 0);
        self.machines().iter().filter(|key| is_untested(*key)).count()
    }

    /// What a machine is called: its number, with the seed before it if there are several.
    pub fn label(&self, (seed, vm): (u64, u32)) -> String {
        match self.seeds().len() {
            1 => vm.to_string(),
            _ => format!("{seed}/{vm}"),
        }
    }

    fn seeds(&self) -> BTreeSet<u64> {
        self.shards.iter().map(|shard| shard.header.seed).collect()
    }

    fn hosts(&self) -> Vec<&str> {
        let hosts: BTreeSet<_> = self.shards.iter().map(|s| s.header.host.as_str()).collect();
        hosts.into_iter().collect()
    }

    /// The kinds of hosts, each in words, with the hosts' names if there are several.
    fn platforms(&self) -> Vec<String> {
        let words = |shard: &Shard| {
            let Machine { host, pmu, .. } = shard.machine.as_ref()?;
            let (kernel, kvm) = (super::printable(&host.kernel), host.kvm.name());
            Some(format!("Linux {kernel}, {kvm}; {}", super::printable(pmu)))
        };
        let kinds: BTreeSet<_> = self.shards.iter().filter_map(words).collect();
        let named = |kind: String| {
            let here = self.shards.iter().filter(|shard| words(shard).as_ref() == Some(&kind));
            let hosts: BTreeSet<_> = here.map(|shard| shard.header.host.as_str()).collect();
            match self.hosts().len() {
                1 => format!("host: {kind}"),
                _ => {
                    let hosts = hosts.into_iter().map(super::printable).collect::<Vec<_>>();
                    format!("host {}: {kind}", hosts.join(", "))
                }
            }
        };
        kinds.into_iter().map(named).collect()
    }

    /// What was done, in words: machines, lives, findings.
    fn sums(&self) -> String {
        let findings = match self.figures.findings() as usize {
            0 => "no findings".into(),
            count => plural(count, "finding", "findings"),
        };
        let untested = match self.untested() {
            0 => String::new(),
            count => format!(" ({count} without a reset)"),
        };
        format!(
            "{}{untested}, {}, {findings}",
            plural(self.vms() as usize, "machine", "machines"),
            plural(self.figures.lives() as usize, "life", "lives"),
        )
    }

    /// Resets in a second.
    fn rate(&self) -> f64 {
        self.figures.resets() as f64 / self.took().as_secs_f64().max(0.001)
    }

    fn seed_words(&self) -> String {
        let seeds: Vec<_> = self.seeds().iter().map(u64::to_string).collect();
        format!("{} {}", if seeds.len() == 1 { "seed" } else { "seeds" }, seeds.join(", "))
    }

    /// What ended before its time, and why; each in words.
    fn remarks(&self) -> impl Iterator<Item = String> + '_ {
        self.shards.iter().filter_map(|shard| {
            let remark = super::printable(shard.remark.as_ref()?);
            let Header { host, seed, .. } = &shard.header;
            let (machines, host) = (shard.header.machines(), super::printable(host));
            let machines = match machines.len() {
                1 => format!("machine {}", machines.start),
                _ => format!("machines {} to {}", machines.start, machines.end.saturating_sub(1)),
            };
            let ending = shard.ending.name();
            Some(format!("{ending}: {machines} of seed {seed} on {host}: {remark}"))
        })
    }

    /// The verdict as a line of JSON.
    pub fn record(&self) -> VerdictRecord {
        VerdictRecord {
            hosts: self.hosts().into_iter().map(Into::into).collect(),
            seeds: self.seeds().into_iter().collect(),
            verdict: self.verdict().name().map(Into::into),
            ending: self.ending(),
            vms: self.vms(),
            lives: self.figures.lives(),
            resets: self.figures.resets(),
            seconds: self.took().as_secs_f64(),
            findings: self.figures.findings(),
            names: self.figures.names.clone(),
            machine: self.shards.iter().find_map(|shard| shard.machine.clone()),
        }
    }
}
