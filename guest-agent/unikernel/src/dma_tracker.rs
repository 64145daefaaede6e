//! Notes every buffer that a device is given and gives back, and what is wrong with it, the way Linux's dma-debug does.
//!
//! A buffer that the device writes must have its cache lines to itself: where caches are not coherent with devices, a
//! line that the CPU or another transfer writes meanwhile destroys one side's data.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use agent_protocol::DmaReport;

/// Bytes of a cache line.
pub const LINE: u64 = 64;
/// Violations kept in words; all are counted.
const MAX_TEXTS: usize = 8;

/// A range of memory that a device may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// First byte.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
    /// Whether the device writes it.
    pub device_writes: bool,
}

impl Span {
    fn end(self) -> u64 {
        self.start.saturating_add(self.len)
    }

    fn overlaps(self, other: Self) -> bool {
        self.start < other.end() && other.start < self.end()
    }

    fn lines(self) -> Self {
        let start = self.start / LINE * LINE;
        Self { start, len: self.end().saturating_add(LINE - 1) / LINE * LINE - start, ..self }
    }
}

/// The tracker.
#[derive(Default)]
pub struct DmaTracker {
    rings: Vec<Span>,
    in_flight: Vec<Span>,
    handed_over: u64,
    handed_back: u64,
    violations: Vec<String>,
    violation_count: u32,
}

impl DmaTracker {
    /// A tracker that has seen nothing.
    pub const fn new() -> Self {
        Self {
            rings: Vec::new(),
            in_flight: Vec::new(),
            handed_over: 0,
            handed_back: 0,
            violations: Vec::new(),
            violation_count: 0,
        }
    }

    /// Notes memory that both sides use for good: descriptor tables and rings.
    pub fn share_ring(&mut self, ring: Span) {
        self.rings.push(ring);
    }

    /// Notes that a device now owns a buffer. Returns whether that is in order.
    pub fn hand_over(&mut self, span: Span) -> bool {
        self.handed_over += 1;
        let before = self.violation_count;
        if span.device_writes && !(span.start.is_multiple_of(LINE) && span.len.is_multiple_of(LINE))
        {
            self.violation(format!(
                "{:#x}+{:#x} is not made of whole cache lines",
                span.start, span.len
            ));
        }
        if let Some(other) = self.conflict(span) {
            let what = if other.start == span.start {
                "posted twice with"
            } else if other.overlaps(span) {
                "overlaps"
            } else {
                "shares a cache line with"
            };
            let (start, len) = (span.start, span.len);
            self.violation(format!(
                "{start:#x}+{len:#x} {what} {:#x}+{:#x}",
                other.start, other.len
            ));
        }
        self.in_flight.push(span);
        self.violation_count == before
    }

    /// Notes that the device has given the buffer back. Returns whether it had it.
    pub fn hand_back(&mut self, span: Span) -> bool {
        let Some(at) = self.in_flight.iter().position(|other| *other == span) else {
            self.violation(format!("{:#x}+{:#x} came back but was not out", span.start, span.len));
            return false;
        };
        self.handed_back += 1;
        self.in_flight.swap_remove(at);
        true
    }

    /// What was seen so far.
    pub fn report(&self) -> DmaReport {
        DmaReport {
            handed_over: self.handed_over,
            handed_back: self.handed_back,
            in_flight: self.in_flight.len() as u32,
            violations: self.violations.clone(),
            violation_count: self.violation_count,
        }
    }

    /// A span in use that `span` must not share lines with: any, if one of the two is written by the device.
    fn conflict(&self, span: Span) -> Option<Span> {
        let mut used = self.rings.iter().chain(&self.in_flight);
        used.find(|other| {
            (span.device_writes || other.device_writes) && span.lines().overlaps(other.lines())
        })
        .copied()
    }

    fn violation(&mut self, text: String) {
        self.violation_count = self.violation_count.saturating_add(1);
        if self.violations.len() < MAX_TEXTS {
            self.violations.push(text);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn to_guest(start: u64, len: u64) -> Span {
        Span { start, len, device_writes: true }
    }

    fn to_host(start: u64, len: u64) -> Span {
        Span { start, len, device_writes: false }
    }

    #[test]
    fn conflicts_are_named() {
        let check = |first: Span, second: Span, expected: &str| {
            let mut tracker = DmaTracker::new();
            tracker.hand_over(first);
            assert_eq!(tracker.hand_over(second), expected.is_empty(), "{first:?} {second:?}");
            let report = tracker.report();
            assert!(report.violations.concat().contains(expected), "{report:?}");
            assert_eq!(report.violation_count == 0, expected.is_empty(), "{report:?}");
        };
        check(to_guest(0, 64), to_guest(64, 64), "");
        check(to_host(0, 10), to_host(10, 10), "");
        check(to_guest(0, 64), to_guest(0, 64), "posted twice");
        check(to_guest(0, 128), to_guest(64, 64), "0x40+0x40 overlaps 0x0+0x80");
        check(to_guest(64, 64), to_host(32, 10), "");
        check(to_guest(64, 64), to_host(60, 10), "overlaps");
        check(to_host(60, 4), to_guest(0, 64), "overlaps");
        check(to_guest(0, 64), to_guest(100, 4), "whole cache lines");
        check(to_host(100, 4), to_guest(64, 64), "overlaps");
        check(to_host(64, 4), to_guest(0, 66), "whole cache lines");
        check(to_host(0, 1), to_guest(u64::MAX, u64::MAX), "whole cache lines");
    }

    #[test]
    fn a_line_shared_without_overlap_is_a_violation() {
        let mut tracker = DmaTracker::new();
        assert!(tracker.hand_over(to_host(64, 4)));
        assert!(!tracker.hand_over(to_guest(96, 4)));
        assert!(tracker.report().violations[1].contains("shares a cache line"));
    }

    #[test]
    fn rings_are_never_free() {
        let mut tracker = DmaTracker::new();
        tracker.share_ring(to_guest(4096, 4096));
        assert!(!tracker.hand_over(to_host(4096 + 100, 4)));
    }

    #[test]
    fn buffers_come_back_once() {
        let mut tracker = DmaTracker::new();
        tracker.hand_over(to_guest(0, 64));
        assert!(tracker.hand_back(to_guest(0, 64)));
        assert!(!tracker.hand_back(to_guest(0, 64)));
        let report = tracker.report();
        assert_eq!((report.handed_over, report.handed_back, report.in_flight), (1, 1, 0));
        assert_eq!(report.violation_count, 1);
    }

    #[test]
    fn many_violations_are_counted_but_not_all_kept() {
        let mut tracker = DmaTracker::new();
        for _ in 0..100 {
            tracker.hand_over(to_guest(0, 64));
        }
        assert_eq!(tracker.report().violation_count, 99);
        assert_eq!(tracker.report().violations.len(), MAX_TEXTS);
    }
}
