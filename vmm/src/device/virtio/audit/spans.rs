//! Memory that is in use: rings for as long as their driver runs, buffers and tables while the device has them. All that is
//! noted is disjoint: what overlaps is told and not noted.

use std::collections::BTreeMap;
use std::fmt;

/// Bytes of a cache line.
pub const LINE: u64 = 64;

/// Most ranges in use at a time. More are possible with indirect tables alone: each may have as many descriptors as its queue.
const MOST: usize = 1 << 15;

/// What memory is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// A buffer that the device reads.
    Read,
    /// A buffer that it writes.
    Write,
    /// A descriptor table.
    Descriptors,
    /// The ring by which the driver makes chains available.
    Available,
    /// The ring by which the device gives them back.
    Used,
    /// An indirect table.
    Table,
}

impl Use {
    /// The device writes there.
    pub fn is_written(self) -> bool {
        matches!(self, Self::Write | Self::Used)
    }

    /// It is a buffer.
    pub fn is_buffer(self) -> bool {
        matches!(self, Self::Read | Self::Write)
    }
}

/// A range of memory that is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// First byte.
    pub start: u64,
    /// Length in bytes, not 0. The range does not wrap.
    pub len: u64,
    /// What it is.
    pub used_as: Use,
    /// Number of the device.
    pub device: usize,
    /// Number of its queue.
    pub queue: u16,
    /// Index in the descriptor table, or in the indirect one; 0 for rings.
    pub descriptor: u16,
}

impl Span {
    /// The byte behind it.
    pub fn end(&self) -> u64 {
        self.start + self.len
    }

    /// Addresses of the first and the last line that it lies in.
    pub fn lines(&self) -> (u64, u64) {
        (self.start / LINE * LINE, (self.end() - 1) / LINE * LINE)
    }

    /// The bytes of the line at `line` that belong to it, a bit each.
    pub fn mask_in(&self, line: u64) -> u64 {
        let from = self.start.clamp(line, line + LINE) - line;
        let to = self.end().clamp(line, line + LINE) - line;
        let below = |bit: u64| u64::MAX.checked_shl(bit as u32).map_or(u64::MAX, |above| !above);
        below(to) & !below(from)
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}+{:#x}", self.start, self.len)
    }
}

/// Memory in use.
#[derive(Debug, Default)]
pub struct Spans(BTreeMap<u64, Span>);

impl Spans {
    /// Something that overlaps `span`. If the device only reads `span`, that is something worse than another such buffer if it
    /// is among the last few.
    pub fn overlapping(&self, span: &Span) -> Option<Span> {
        /// A guest can have any number of them overlapped at once.
        const LOOKED_AT: usize = 64;
        let before_end = self.0.range(..span.end()).rev().map(|(_, other)| *other);
        let mut all = before_end.take_while(|other| other.end() > span.start).take(LOOKED_AT);
        let first = all.next()?;
        match span.used_as == Use::Read && first.used_as == Use::Read {
            true => all.find(|other| other.used_as != Use::Read).or(Some(first)),
            false => Some(first),
        }
    }

    /// Something in the lines of `span`, which overlaps nothing, that must not be there: the device writes one of the two.
    pub fn in_lines_of(&self, span: &Span) -> Option<Span> {
        let (first, last) = span.lines();
        self.within(first, span.start)
            .chain(self.within(span.end(), last + LINE))
            .find(|other| other.used_as.is_written() || span.used_as.is_written())
    }

    /// All that lies in the line at `line`: 64 ranges or fewer, as they are disjoint.
    pub fn in_line(&self, line: u64) -> impl Iterator<Item = Span> {
        self.within(line, line + LINE)
    }

    /// What lies at least partly in these addresses, which belong to one line, the last one first.
    fn within(&self, start: u64, end: u64) -> impl Iterator<Item = Span> {
        let before_end = self.0.range(..end).rev().map(|(_, other)| *other);
        before_end.take_while(move |other| other.end() > start)
    }

    /// Notes memory that overlaps nothing noted. False if there is too much of it.
    pub fn insert(&mut self, span: Span) -> bool {
        let fits = self.0.len() < MOST;
        if fits {
            self.0.insert(span.start, span);
        }
        fits
    }

    /// Forgets what begins at `start`.
    pub fn remove(&mut self, start: u64) -> Option<Span> {
        self.0.remove(&start)
    }

    /// Forgets what belongs to a device.
    pub fn remove_device(&mut self, device: usize) {
        self.0.retain(|_, span| span.device != device);
    }

    /// What belongs to a queue, the lowest address first.
    pub fn of_queue(&self, device: usize, queue: u16) -> impl Iterator<Item = &Span> {
        self.0.values().filter(move |span| (span.device, span.queue) == (device, queue))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(start: u64, len: u64, used_as: Use) -> Span {
        Span { start, len, used_as, device: 0, queue: 0, descriptor: 0 }
    }

    fn spans(all: &[Span]) -> Spans {
        let mut spans = Spans::default();
        all.iter().for_each(|span| assert!(spans.insert(*span)));
        spans
    }

    #[test]
    fn overlaps_are_seen_from_every_side() {
        let spans = spans(&[span(64, 64, Use::Write), span(128, 1, Use::Read)]);
        let check = |start, len, expected: Option<u64>| {
            let found = spans.overlapping(&span(start, len, Use::Write)).map(|other| other.start);
            assert_eq!(found, expected, "{start}+{len}");
        };
        check(0, 64, None);
        check(129, 1000, None);
        check(0, 65, Some(64));
        check(127, 1, Some(64));
        check(80, 4, Some(64));
        check(64, 64, Some(64));
        check(0, 1000, Some(128));
        check(128, 4, Some(128));
    }

    #[test]
    fn a_buffer_to_read_that_overlaps_others_and_worse_names_the_worse() {
        let spans =
            spans(&[span(0, 8, Use::Read), span(8, 8, Use::Available), span(16, 8, Use::Read)]);
        let found = |start, len| spans.overlapping(&span(start, len, Use::Read)).unwrap().used_as;
        assert_eq!(found(0, 24), Use::Available);
        assert_eq!(found(16, 24), Use::Read);
    }

    #[test]
    fn what_shares_a_line_is_seen_if_the_device_writes_one_of_the_two() {
        let check = |other: Span, new: Span, expected: bool| {
            let spans = spans(&[other]);
            assert_eq!(spans.in_lines_of(&new).is_some(), expected, "{other:?} {new:?}");
        };
        check(span(0, 64, Use::Write), span(64, 64, Use::Write), false);
        check(span(0, 65, Use::Write), span(65, 64, Use::Write), true);
        check(span(0, 65, Use::Write), span(65, 64, Use::Read), true);
        check(span(0, 65, Use::Read), span(65, 64, Use::Write), true);
        check(span(0, 65, Use::Read), span(65, 64, Use::Read), false);
        check(span(200, 4, Use::Write), span(65, 130, Use::Write), true);
        check(span(200, 4, Use::Used), span(65, 130, Use::Read), true);
        check(span(200, 4, Use::Available), span(65, 130, Use::Read), false);
        check(span(0, 4096, Use::Write), span(4096, 1, Use::Read), false);
    }

    #[test]
    fn masks_have_a_bit_for_each_byte_in_the_line() {
        let check = |start, len, line, mask: u64| {
            assert_eq!(span(start, len, Use::Write).mask_in(line), mask, "{start}+{len} in {line}");
        };
        check(64, 64, 64, u64::MAX);
        check(0, 1000, 64, u64::MAX);
        check(64, 4, 64, 0xf);
        check(62, 4, 64, 0x3);
        check(62, 4, 0, 3 << 62);
        check(0, 64, 64, 0);
        check(128, 64, 64, 0);
        check(127, 1, 64, 1 << 63);
    }

    #[test]
    fn there_is_an_end_to_what_is_noted() {
        let mut spans = Spans::default();
        let noted = (0..2 * MOST as u64).filter(|i| spans.insert(span(i * 2, 1, Use::Read)));
        assert_eq!(noted.count(), MOST);
    }
}
