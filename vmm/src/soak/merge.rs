//! Many soaks' lines of JSON to one report: the shards of a campaign over many hosts.
//!
//! What does not fit together is refused; what ended before its time is told of, and not hidden.

use std::collections::BTreeMap;
use std::io::{self, BufRead, Read};

use super::campaign::Ending;
use super::figures::Figures;
use super::record::{Header, LifeRecord, Record, VerdictRecord};
use super::report::{MOST_REPLAYS, Report, Shard};

/// A line of one life is not longer, whatever was found.
const LONGEST_LINE: u64 = 8 << 20;

/// Why there is no report.
#[derive(Debug, thiserror::Error)]
pub enum MergeError {
    /// The file could not be read.
    #[error("read {0:?}")]
    Read(String, #[source] io::Error),
    /// There is something else in it.
    #[error("{source_name:?}, line {number}: {what}")]
    Line {
        /// The file.
        source_name: String,
        /// Counted from 1.
        number: u64,
        /// What is wrong with it.
        what: String,
    },
    /// There is no soak in it.
    #[error("{0:?} has no line of `soak --json`")]
    Empty(String),
}

/// Collects soaks.
#[derive(Debug, Default)]
pub struct Merger {
    shards: Vec<Shard>,
    /// Where each is from.
    sources: Vec<String>,
    figures: Figures,
    replays: Vec<String>,
    open: Option<Open>,
}

/// The shard whose lines are being read: it is the last one.
#[derive(Debug)]
struct Open {
    /// Where each machine is: process and life.
    reached: BTreeMap<u32, (u32, u32)>,
    names: BTreeMap<String, u64>,
}

impl Merger {
    /// Reads all lines of a file: those of one soak, or of several one after the other.
    ///
    /// # Errors
    /// [`MergeError`].
    pub fn read(&mut self, name: &str, mut stream: impl BufRead) -> Result<(), MergeError> {
        let before = self.shards.len();
        let mut bytes = Vec::new();
        for number in 1.. {
            bytes.clear();
            let count = (&mut stream).take(LONGEST_LINE).read_until(b'\n', &mut bytes);
            if count.map_err(|error| MergeError::Read(name.into(), error))? == 0 {
                break;
            }
            let is_whole = bytes.ends_with(b"\n");
            let taken = match serde_json::from_slice(&bytes) {
                Ok(record) => self.take(name, record),
                // Its writer was ended in the middle of it.
                Err(_) if !is_whole && self.open.is_some() => break,
                Err(error) => Err(format!("no line of `soak --json`: {error}")),
            };
            taken.map_err(|what| MergeError::Line { source_name: name.into(), number, what })?;
        }
        self.close();
        match self.shards.len() > before {
            true => Ok(()),
            false => Err(MergeError::Empty(name.into())),
        }
    }

    /// All of it.
    pub fn report(self) -> Report {
        Report { shards: self.shards, figures: self.figures, replays: self.replays }
    }

    fn take(&mut self, name: &str, record: Record) -> Result<(), String> {
        match record {
            Record::Plan(header) => self.begin(name, header),
            Record::Life(record) => self.life(*record),
            Record::Verdict(verdict) => self.verdict(verdict),
        }
    }

    fn begin(&mut self, name: &str, header: Header) -> Result<(), String> {
        // The one before it in this file has ended without a verdict.
        self.close();
        let others = self.shards.iter().zip(&self.sources);
        for (Shard { header: other, .. }, source) in others {
            let (mine, theirs) = (header.machines(), other.machines());
            let common = mine.start.max(theirs.start)..mine.end.min(theirs.end);
            if header.seed == other.seed && !common.is_empty() {
                let (vm, seed) = (common.start, header.seed);
                return Err(format!("machine {vm} of seed {seed} is in {source:?} already"));
            }
            if header.arguments != other.arguments {
                let (mine, theirs) = (header.arguments.join(" "), other.arguments.join(" "));
                return Err(format!(
                    "its machines ran with other options than those of {source:?}: {mine}; {theirs}"
                ));
            }
        }
        let remark = Some(format!("{name:?} ends without a verdict"));
        let ending = Ending::Interrupted;
        self.shards.push(Shard { header, machine: None, ending, remark, took: None });
        self.sources.push(name.into());
        self.open = Some(Open { reached: BTreeMap::new(), names: BTreeMap::new() });
        Ok(())
    }

    fn life(&mut self, record: LifeRecord) -> Result<(), String> {
        let (Some(open), Some(Shard { header, .. })) = (&mut self.open, self.shards.last()) else {
            return Err("a life outside of a soak".into());
        };
        let place = record.place();
        if (record.seed, &record.host) != (header.seed, &header.host)
            || !header.machines().contains(&place.vm)
            || record.vm_seed != place.seed_of_process()
        {
            return Err("a life of another soak".into());
        }
        let here = (place.process, record.life.life);
        if open.reached.get(&place.vm).is_some_and(|reached| here <= *reached) {
            return Err(format!("life {} of machine {} came before", record.life.life, place.vm));
        }
        open.reached.insert(place.vm, here);
        for found in &record.life.findings {
            *open.names.entry(super::printable(&found.name)).or_default() += 1;
        }
        let bundle = record.bundle.map(|path| super::printable(&format!("{}:{path}", record.host)));
        self.figures.add(place, &record.life, bundle);
        if let Some(replay) = record.replay
            && self.replays.len() < MOST_REPLAYS
        {
            self.replays.push(super::printable(&replay));
        }
        Ok(())
    }

    fn verdict(&mut self, verdict: VerdictRecord) -> Result<(), String> {
        let (Some(open), Some(shard)) = (self.open.take(), self.shards.last_mut()) else {
            return Err("a verdict outside of a soak".into());
        };
        let Header { seed, .. } = shard.header;
        let machines = shard.header.machines();
        let range = (seed, machines.start)..(seed, machines.end);
        let vms = || self.figures.vms.range(range.clone()).map(|(_, vm)| vm);
        let counted = (
            vms().map(|vm| vm.lives).sum::<u64>(),
            vms().map(super::figures::Vm::resets).sum::<u64>(),
            vms().map(|vm| vm.findings).sum::<u64>(),
        );
        if counted != (verdict.lives, verdict.resets, verdict.findings)
            || open.names != verdict.names
        {
            let (lives, _, findings) = counted;
            return Err(format!(
                "the verdict is about {} lives and {} findings, and there are lines of {lives} and {findings}",
                verdict.lives, verdict.findings
            ));
        }
        shard.machine = verdict.machine;
        shard.ending = verdict.ending;
        shard.remark = match verdict.ending {
            Ending::Interrupted => Some("by a signal".into()),
            Ending::Failed => Some("by its host".into()),
            Ending::Complete | Ending::TimeUp | Ending::Finding => None,
        };
        let took = std::time::Duration::try_from_secs_f64(verdict.seconds);
        shard.took = Some(took.map_err(|_| "a time that is none".to_string())?);
        Ok(())
    }

    fn close(&mut self) {
        self.open = None;
    }
}

#[cfg(test)]
mod tests;
