//! The books that are kept of memory: what is in use, by whom, and what was found on the way.

use vm_memory::{GuestAddress, GuestMemory, Permissions};

use super::AuditSummary;
use super::lines::{Dirtied, Lines};
use super::log::{Kind, Level, Log, Violation};
use super::queue::{AuditedQueue, Flaw, Link};
use super::rules::{EVENT_LEN, Rules};
use super::spans::{LINE, Span, Spans, Use};
use crate::device::virtio::chain::Direction;
use crate::memory::GuestRam;

/// A device's name and type.
#[derive(Debug)]
pub struct Name {
    pub name: String,
    pub device_type: u32,
}

/// The books.
#[derive(Debug, Default)]
pub struct Books {
    pub spans: Spans,
    pub lines: Lines,
    pub log: Log,
    /// By number.
    pub names: Vec<Name>,
    pub chains: u64,
    buffers: u64,
    unwatched: u64,
}

/// Which queue it is that something is noted of.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    pub device: usize,
    pub queue: u16,
}

/// How far a chain was followed.
#[derive(Clone, Copy, Debug, Default)]
pub struct SoFar {
    /// Bytes for the device to write.
    pub writable: u64,
    /// There is a buffer for it to write.
    writes: bool,
}

impl Books {
    /// Notes the rings of a queue. False if they are not in RAM.
    pub fn note_rings(&mut self, ram: &GuestRam, place: Place, queue: &AuditedQueue) -> bool {
        let mut all_there = true;
        for ring in queue.rings() {
            let span = ring.span(place);
            if !is_in_ram(ram, &span) {
                self.found(Kind::OutsideRam, &span, || "is not in RAM".into());
                all_there = false;
            } else if self.note(&span, Kind::OverlapsRing) && span.used_as.is_written() {
                self.lines.own(&span);
            }
        }
        all_there
    }

    /// Checks one descriptor of a chain, and notes what it names. Returns where, if it is watched from now on.
    pub fn note_link(
        &mut self,
        ram: &GuestRam,
        place: Place,
        rules: &Rules,
        so_far: &mut SoFar,
        link: &Link,
    ) -> Option<u64> {
        let Place { device, queue } = place;
        let used_as = match (link.is_table, link.writes) {
            (true, _) => Use::Table,
            (false, true) => Use::Write,
            (false, false) => Use::Read,
        };
        let (start, len) = (link.addr, u64::from(link.len));
        let span = Span { start, len, used_as, device, queue, descriptor: link.index };
        if !link.is_table {
            self.buffers += 1;
            self.check_order(rules, so_far, &span);
        }
        if len == 0 {
            return None;
        }
        if !is_in_ram(ram, &span) {
            self.found(Kind::OutsideRam, &span, || "is not in RAM".into());
            return None;
        }
        if used_as == Use::Write {
            self.check_place(&span);
        }
        if !self.note(&span, Kind::OverlapsBuffer) {
            return None;
        }
        if used_as == Use::Write {
            let Self { spans, lines, log, names, .. } = self;
            let owned = |line| spans.in_line(line).filter(|other| other.used_as.is_written());
            let owned = |line| owned(line).fold(0, |mask, other| mask | other.mask_in(line));
            lines.watch(ram, &span, owned, |dirtied| note_dirtied(log, names, &dirtied));
        }
        Some(start)
    }

    fn check_order(&mut self, rules: &Rules, so_far: &mut SoFar, span: &Span) {
        let writes = span.used_as == Use::Write;
        match (rules.direction, writes) {
            (Direction::ToGuest, false) => {
                self.found(Kind::WrongDirection, span, || {
                    "is for the device to read, where it writes".into()
                });
            }
            (Direction::ToHost, true) => {
                self.found(Kind::WrongDirection, span, || {
                    "is for the device to write, where it reads".into()
                });
            }
            (_, false) if so_far.writes => {
                self.found(Kind::WrongOrder, span, || {
                    "is to be read, behind one to be written".into()
                });
            }
            _ => {}
        }
        so_far.writes |= writes;
        if writes {
            so_far.writable += span.len;
        }
    }

    fn check_place(&mut self, span: &Span) {
        let (first, last) = span.lines();
        if span.start != first {
            self.found(Kind::Unaligned, span, || "does not begin with a cache line".into());
        }
        if span.len <= LINE && first != last {
            self.found(Kind::Straddles, span, || {
                format!("lies in two cache lines, at {first:#x} and {last:#x}")
            });
        }
    }

    /// Notes memory, unless it is in use already. Then, and for lines that are, says so; `overlap` is what an overlap is.
    fn note(&mut self, span: &Span, overlap: Kind) -> bool {
        if let Some(other) = self.spans.overlapping(span) {
            let is_same = other.start == span.start
                && (other.device, other.queue) == (span.device, span.queue);
            let kind = match (span.used_as, other.used_as) {
                (Use::Read, Use::Read) => Kind::ReadTwice,
                (one, two) if !one.is_buffer() || !two.is_buffer() => Kind::OverlapsRing,
                _ if is_same => Kind::PostedTwice,
                _ => overlap,
            };
            self.found_with(kind, span, "overlaps", &other);
            return false;
        }
        if let Some(other) = self.spans.in_lines_of(span) {
            self.found_with(Kind::SharesLine, span, "shares a cache line with", &other);
        }
        let is_watched = self.spans.insert(*span);
        self.unwatched += u64::from(!is_watched);
        is_watched
    }

    /// The device is about to give back what begins at `start`.
    pub fn forget(&mut self, ram: &GuestRam, start: u64) {
        let Self { spans, lines, log, names, .. } = self;
        if let Some(span) = spans.remove(start).filter(|span| span.used_as == Use::Write) {
            lines.release(ram, &span, |dirtied| note_dirtied(log, names, &dirtied));
        }
    }

    /// Looks at all lines that devices have.
    pub fn check_lines(&mut self, ram: &GuestRam) {
        let Self { lines, log, names, .. } = self;
        lines.check(ram, |dirtied| note_dirtied(log, names, &dirtied));
    }

    /// Event buffers one behind the other, as Linux has them: `virtio_vsock` keeps eight of four bytes in its own structure.
    pub fn check_packed(&mut self, place: Place) {
        let events = self.spans.of_queue(place.device, place.queue);
        let events = events.filter(|span| span.used_as == Use::Write && span.len == EVENT_LEN);
        let mut runs = Vec::<Span>::new();
        for event in events {
            match runs.last_mut() {
                Some(run) if run.end() == event.start => run.len += event.len,
                _ => runs.push(*event),
            }
        }
        if let Some(run) = runs.into_iter().find(|run| run.len > EVENT_LEN) {
            self.found(Kind::PackedEventBuffers, &run, || {
                let odd = if run.start % 2 == 1 { ", at an odd address" } else { "" };
                let (first, last) = run.lines();
                let lines = (last - first) / LINE + 1;
                let count = run.len / EVENT_LEN;
                format!(
                    "is the first of {count} packed event buffers, the virtio_vsock event_list of Linux (before 7.1 beside \
                     other fields): {count} times 4 bytes{odd}, in {lines} cache lines"
                )
            });
        }
    }

    /// A chain that breaks the rules of chains. `at` is where the available ring names its head.
    pub fn found_flaw(&mut self, place: Place, flaw: Flaw, at: u64) {
        let Place { device, queue } = place;
        let used_as = Use::Read;
        let span = Span { start: at, len: 0, used_as, device, queue, descriptor: flaw.index };
        self.found(flaw.kind, &span, || flaw.what.into());
    }

    /// The index of the available ring jumped by `by`.
    pub fn found_index_jump(&mut self, place: Place, queue: &AuditedQueue, by: u16) {
        let ring = queue.rings().into_iter().find(|ring| ring.used_as == Use::Available);
        ring.into_iter().for_each(|ring| {
            let span = ring.span(place);
            self.found(Kind::IndexJump, &span, || format!("has an index that jumped by {by}"));
        });
    }

    fn found(&mut self, kind: Kind, span: &Span, what: impl FnOnce() -> String) {
        add(&mut self.log, &self.names, kind, span, what);
    }

    fn found_with(&mut self, kind: Kind, span: &Span, what: &str, other: &Span) {
        let Self { log, names, .. } = self;
        add(log, names, kind, span, || format!("{what} {}, {other}", whose(names, other)));
    }

    /// What was found in all lives.
    pub fn summary(&self) -> AuditSummary {
        let violations: Vec<_> = self.log.all().cloned().collect();
        let count = |level| {
            let of_it = violations.iter().filter(|violation| violation.level == level);
            of_it.map(|violation| violation.count).sum()
        };
        AuditSummary {
            chains: self.chains,
            buffers: self.buffers,
            unwatched: self.unwatched,
            must: count(Level::Must),
            ours: count(Level::Ours),
            observed: count(Level::Observed),
            violations,
        }
    }
}

fn is_in_ram(ram: &GuestRam, span: &Span) -> bool {
    ram.check_range(GuestAddress(span.start), span.len as usize, Permissions::ReadWrite)
}

fn note_dirtied(log: &mut Log, names: &[Name], dirtied: &Dirtied) {
    add(log, names, Kind::DirtiedLine, &dirtied.beside, || {
        format!("has a line in which the guest wrote to {:#x} while the device had it", dirtied.at)
    });
}

/// A span by its owner.
fn whose(names: &[Name], span: &Span) -> String {
    let what = match span.used_as {
        Use::Read | Use::Write => format!("descriptor {}", span.descriptor),
        Use::Descriptors => "the descriptor table".into(),
        Use::Available => "the available ring".into(),
        Use::Used => "the used ring".into(),
        Use::Table => format!("the indirect table of descriptor {}", span.descriptor),
    };
    let Name { name, device_type } = &names[span.device];
    format!("{what} of {name} queue {}{}", span.queue, Rules::of(*device_type, span.queue))
}

fn add(log: &mut Log, names: &[Name], kind: Kind, span: &Span, what: impl FnOnce() -> String) {
    log.add(kind, span.device, span.queue, || {
        let of_chain = span.used_as.is_buffer() || span.used_as == Use::Table;
        let address = if span.len > 0 { format!(", {span},") } else { String::new() };
        Violation {
            level: kind.level(),
            name: kind,
            device: names[span.device].name.clone(),
            queue: span.queue,
            descriptor: of_chain.then_some(span.descriptor),
            address: span.start,
            len: span.len,
            count: 1,
            detail: format!("{}{address} {}", whose(names, span), what()),
        }
    });
}
