//! Cache lines that a device's buffer has only a part of, as they were when the device got it: whatever changes in the rest
//! was written by the guest while the device had the line.
//!
//! The rest is kept as it is, 63 bytes or fewer, rather than as a hash: so it can be compared without the bytes of a
//! neighbour that the device writes meanwhile, and the byte that changed can be named.

use std::collections::BTreeMap;

use vm_memory::{Bytes, GuestAddress};

use super::spans::{LINE, Span};
use crate::memory::GuestRam;

/// One line.
#[derive(Debug)]
struct Watched {
    bytes: [u8; LINE as usize],
    /// The bytes that a device may write, a bit each.
    owned: u64,
    /// How many buffers to write lie in it.
    buffers: u32,
    /// The one that was posted last.
    latest: Span,
}

impl Watched {
    /// The first byte that changed and that no device may write; then everything is as it is now.
    fn compare(&mut self, now: [u8; LINE as usize]) -> Option<u64> {
        let before = std::mem::replace(&mut self.bytes, now);
        (0..LINE).find(|byte| {
            let at = *byte as usize;
            self.owned >> byte & 1 == 0 && before[at] != now[at]
        })
    }
}

/// A line that the guest wrote to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dirtied {
    /// The first byte.
    pub at: u64,
    /// The buffer that shares its line with it.
    pub beside: Span,
}

/// The lines that are watched.
#[derive(Debug, Default)]
pub struct Lines(BTreeMap<u64, Watched>);

impl Lines {
    /// The lines that `span` has only a part of.
    fn partial(span: &Span) -> impl Iterator<Item = (u64, u64)> {
        let (first, last) = span.lines();
        let last = (last != first).then_some(last);
        let masks = [Some(first), last].into_iter().flatten();
        let span = *span;
        masks.map(move |line| (line, span.mask_in(line))).filter(|(_, mask)| *mask != u64::MAX)
    }

    /// The device has got `span` to write. `owned_else` says which other bytes of a line at an address are a device's.
    pub fn watch(
        &mut self,
        ram: &GuestRam,
        span: &Span,
        owned_else: impl Fn(u64) -> u64,
        mut found: impl FnMut(Dirtied),
    ) {
        for (line, mask) in Self::partial(span) {
            let now = read(ram, line);
            let watched = self.0.entry(line).or_insert_with(|| Watched {
                bytes: now,
                owned: owned_else(line),
                buffers: 0,
                latest: *span,
            });
            let beside = watched.latest;
            // What the guest wrote into the new buffer it wrote before it posted that, beside another.
            watched
                .compare(now)
                .map(|at| Dirtied { at: line + at, beside })
                .into_iter()
                .for_each(&mut found);
            watched.owned |= mask;
            watched.buffers += 1;
            watched.latest = *span;
        }
    }

    /// The device may write `ring` from now on.
    pub fn own(&mut self, ring: &Span) {
        let (first, last) = ring.lines();
        for (line, watched) in self.0.range_mut(first..=last) {
            watched.owned |= ring.mask_in(*line);
        }
    }

    /// The device is about to give `span` back.
    pub fn release(&mut self, ram: &GuestRam, span: &Span, mut found: impl FnMut(Dirtied)) {
        for (line, mask) in Self::partial(span) {
            let Some(watched) = self.0.get_mut(&line) else { continue };
            if let Some(at) = watched.compare(read(ram, line)) {
                found(Dirtied { at: line + at, beside: *span });
            }
            watched.owned &= !mask;
            watched.buffers -= 1;
            if watched.buffers == 0 {
                self.0.remove(&line);
            }
        }
    }

    /// Looks at all lines now.
    pub fn check(&mut self, ram: &GuestRam, mut found: impl FnMut(Dirtied)) {
        for (line, watched) in &mut self.0 {
            if let Some(at) = watched.compare(read(ram, *line)) {
                found(Dirtied { at: line + at, beside: watched.latest });
            }
        }
    }
}

/// RAM comes in pages, so a line with a byte of it has no other.
fn read(ram: &GuestRam, line: u64) -> [u8; LINE as usize] {
    let mut bytes = [0; LINE as usize];
    // What is not there does not change.
    let _ = ram.read_slice(&mut bytes, GuestAddress(line));
    bytes
}
