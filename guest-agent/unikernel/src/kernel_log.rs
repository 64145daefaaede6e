//! The kernel log: a bounded list of lines in Linux's wording, so that one parser reads both personalities.

use alloc::collections::VecDeque;
use alloc::string::String;
use alloc::vec::Vec;

use agent_protocol::LogLine;

/// How many lines are kept; the oldest go first.
const MAX_LINES: usize = 64;
/// Longer texts (a command line, say) are cut.
const MAX_TEXT: usize = 512;

/// Severity as in syslog.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// System is unusable; Linux logs stray NMIs so.
    Emergency = 0,
    /// Error.
    Error = 3,
    /// Warning.
    Warning = 4,
    /// Information.
    Info = 6,
}

/// Converts TSC values to microseconds since the kernel's entry.
#[derive(Clone, Copy, Debug, Default)]
pub struct Clock {
    /// TSC at the entry.
    pub tsc_entry: u64,
    /// TSC frequency; while it is 0 (unknown) the clock assumes 1 GHz.
    pub tsc_khz: u32,
}

impl Clock {
    fn us_at(self, tsc: u64) -> u64 {
        let khz = if self.tsc_khz == 0 { 1_000_000 } else { self.tsc_khz };
        let since = u128::from(tsc.saturating_sub(self.tsc_entry));
        u64::try_from(since * 1000 / u128::from(khz)).unwrap_or(u64::MAX)
    }
}

struct Line {
    tsc: u64,
    level: Level,
    text: String,
}

/// The log. Lines carry TSC values until they are reported, since the frequency may become known later.
#[derive(Default)]
pub struct KernelLog {
    lines: VecDeque<Line>,
    dropped: u32,
}

impl KernelLog {
    /// An empty log.
    pub const fn new() -> Self {
        Self { lines: VecDeque::new(), dropped: 0 }
    }

    /// Appends one line.
    pub fn push(&mut self, tsc: u64, level: Level, mut text: String) {
        if let Some((cut, _)) = text.char_indices().find(|(at, _)| *at >= MAX_TEXT) {
            text.truncate(cut);
        }
        if self.lines.len() == MAX_LINES {
            self.lines.pop_front();
            self.dropped = self.dropped.saturating_add(1);
        }
        self.lines.push_back(Line { tsc, level, text });
    }

    /// How many lines were dropped.
    pub fn dropped(&self) -> u32 {
        self.dropped
    }

    /// The lines for a report, oldest first.
    pub fn to_lines(&self, clock: Clock) -> Vec<LogLine> {
        let line = |line: &Line| LogLine {
            us: clock.us_at(line.tsc),
            level: line.level as u8,
            text: line.text.clone(),
        };
        self.lines.iter().map(line).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_lines_make_room_and_are_counted() {
        let mut log = KernelLog::new();
        for number in 0..MAX_LINES + 3 {
            log.push(number as u64 * 2000, Level::Info, number.to_string());
        }
        assert_eq!(log.dropped(), 3);
        let lines = log.to_lines(Clock { tsc_entry: 0, tsc_khz: 2_000_000 });
        assert_eq!(lines.len(), MAX_LINES);
        assert_eq!(lines[0], LogLine { us: 3, level: 6, text: "3".into() });
    }

    #[test]
    fn long_texts_are_cut_at_a_character() {
        let mut log = KernelLog::new();
        log.push(5, Level::Error, "é".repeat(MAX_TEXT));
        let line = &log.to_lines(Clock { tsc_entry: 9, tsc_khz: 0 })[0];
        assert_eq!((line.us, line.level, line.text.len()), (0, 3, MAX_TEXT));
    }
}
