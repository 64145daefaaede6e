//! What was found, in a bounded amount of memory: each kind of violation on each queue is kept once, with its first example
//! and a count, so that a guest that breaks rules for ever fills nothing.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;

use serde::{Deserialize, Serialize};

/// What follows from a violation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Level {
    /// No driver may do this.
    Must,
    /// Harmless where caches are coherent with devices, as on x86, and common; a driver that has to work elsewhere too does
    /// not do it, and the agent's does not.
    Ours,
    /// Worth knowing.
    Observed,
}

/// What is wrong. Names are stable: users match them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// A buffer, ring or table is not in RAM.
    OutsideRam,
    /// The device is to read where it writes, or the other way round.
    WrongDirection,
    /// A buffer to read behind one to write (virtio 1.2, section 2.7.4.2).
    WrongOrder,
    /// The chain has less room than the device has to write.
    TooShort,
    /// A loop, a link or an index out of the table, a table that may not be there, more descriptors than the queue has.
    BrokenChain,
    /// The available ring's index jumped by more than the queue's size.
    IndexJump,
    /// Descriptors or a buffer that the device has already.
    PostedTwice,
    /// A buffer overlaps another that is in flight, and the device writes one of the two.
    OverlapsBuffer,
    /// A buffer, ring or table overlaps a descriptor table, a ring, or an indirect table in flight.
    OverlapsRing,
    /// Two buffers overlap that the device only reads. Linux sends the same page twice without copying it.
    ReadTwice,
    /// A buffer that the device writes does not begin with a cache line.
    Unaligned,
    /// A buffer that the device writes would fit into one cache line and lies in two.
    Straddles,
    /// A cache line that the device writes has something else in it that is in flight.
    SharesLine,
    /// The guest wrote into a cache line while the device had a buffer in it to write.
    DirtiedLine,
    /// Event buffers lie one behind the other: the layout of Linux's driver.
    PackedEventBuffers,
}

impl Kind {
    /// Its level.
    pub fn level(self) -> Level {
        match self {
            Self::OutsideRam
            | Self::WrongDirection
            | Self::WrongOrder
            | Self::TooShort
            | Self::BrokenChain
            | Self::IndexJump
            | Self::PostedTwice
            | Self::OverlapsBuffer
            | Self::OverlapsRing => Level::Must,
            Self::ReadTwice
            | Self::Unaligned
            | Self::Straddles
            | Self::SharesLine
            | Self::DirtiedLine => Level::Ours,
            Self::PackedEventBuffers => Level::Observed,
        }
    }
}

/// Something that is wrong, with its first example.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Violation {
    /// What follows from it.
    pub level: Level,
    /// What it is.
    pub name: Kind,
    /// The device, such as "vsock".
    pub device: String,
    /// The number of its queue.
    pub queue: u16,
    /// The first descriptor; its index is that in the indirect table if it is in one. None if it is about a ring.
    pub descriptor: Option<u16>,
    /// The first address.
    pub address: u64,
    /// Its length in bytes.
    pub len: u64,
    /// How often it was seen.
    pub count: u64,
    /// In words, with what it collides with.
    pub detail: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.detail)?;
        match self.count {
            1 => Ok(()),
            count => write!(f, " ({count} such)"),
        }
    }
}

/// Violations by what makes two of them the same: kind, number of the device, queue.
type Entries = BTreeMap<(Kind, usize, u16), Violation>;

/// What was found: in this life, in earlier ones that nobody has asked for yet, and in all.
#[derive(Debug, Default)]
pub struct Log {
    current: Entries,
    ended: Entries,
    all: Entries,
}

impl Log {
    /// Adds a violation; `first` describes it if it is the first of its kind.
    pub fn add(
        &mut self,
        kind: Kind,
        device: usize,
        queue: u16,
        first: impl FnOnce() -> Violation,
    ) {
        let key = (kind, device, queue);
        let known = self.current.get_mut(&key);
        let is_new = known.is_none();
        known.into_iter().for_each(|violation| violation.count += 1);
        let total = self.all.get_mut(&key).map(|violation| violation.count += 1);
        if is_new {
            let violation = first();
            if total.is_none() {
                self.all.insert(key, violation.clone());
            }
            self.current.insert(key, violation);
        }
    }

    /// A life is over.
    pub fn begin_life(&mut self) {
        for (key, violation) in std::mem::take(&mut self.current) {
            merge(&mut self.ended, key, violation);
        }
    }

    /// What was found in lives that are over, once.
    pub fn take_ended(&mut self) -> Vec<Violation> {
        std::mem::take(&mut self.ended).into_values().collect()
    }

    /// What was found in all lives.
    pub fn all(&self) -> impl Iterator<Item = &Violation> {
        self.all.values()
    }
}

fn merge(entries: &mut Entries, key: (Kind, usize, u16), violation: Violation) {
    match entries.entry(key) {
        Entry::Vacant(entry) => {
            entry.insert(violation);
        }
        Entry::Occupied(mut entry) => entry.get_mut().count += violation.count,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn add(log: &mut Log, kind: Kind, queue: u16) {
        log.add(kind, 0, queue, || Violation {
            level: kind.level(),
            name: kind,
            device: "vsock".into(),
            queue,
            descriptor: None,
            address: 0,
            len: 0,
            count: 1,
            detail: String::new(),
        });
    }

    #[test]
    fn violations_of_a_kind_are_counted_and_kept_once() {
        let mut log = Log::default();
        (0..100_000).for_each(|_| add(&mut log, Kind::OutsideRam, 1));
        add(&mut log, Kind::OutsideRam, 2);
        let counts: Vec<_> = log.all().map(|violation| violation.count).collect();
        assert_eq!(counts, [100_000, 1]);
        assert_eq!(log.current.len() + log.all.len() + log.ended.len(), 4);
    }

    #[test]
    fn a_life_has_its_own_violations_and_lives_that_nobody_asked_for_are_told_together() {
        let mut log = Log::default();
        add(&mut log, Kind::Unaligned, 0);
        assert_eq!(log.take_ended(), []);
        for _ in 0..3 {
            log.begin_life();
            add(&mut log, Kind::Unaligned, 0);
        }
        let ended = log.take_ended();
        assert_eq!((ended.len(), ended[0].count), (1, 3));
        assert_eq!(log.take_ended(), []);
        log.begin_life();
        assert_eq!(log.take_ended()[0].count, 1);
        assert_eq!(log.all().next().unwrap().count, 4);
    }
}
