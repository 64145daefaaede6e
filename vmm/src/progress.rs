//! Progress: one line on a terminal, drawn over again a few times a second.

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

/// A bar, if anybody watches.
#[derive(Debug)]
pub struct Progress {
    visible: bool,
    nouns: Nouns,
    total: Option<u64>,
    duration: Option<Duration>,
    began: Instant,
    drawn: Option<Instant>,
}

/// What is done, and what can be wrong with it: one and many.
#[derive(Clone, Copy, Debug)]
pub struct Nouns {
    /// What is counted.
    pub done: &'static str,
    /// One that is wrong.
    pub wrong: &'static str,
    /// And many.
    pub wrongs: &'static str,
}

const REDRAW: Duration = Duration::from_millis(200);

impl Progress {
    /// Progress towards a number, a time, or whichever comes first.
    pub fn new(nouns: Nouns, total: Option<u64>, duration: Option<Duration>) -> Self {
        let visible = io::stderr().is_terminal();
        Self { visible, nouns, total, duration, began: Instant::now(), drawn: None }
    }

    /// Shows how far it is, unless it has just done so. `count` gives what is done and what was wrong.
    pub fn show(&mut self, count: impl FnOnce() -> (u64, u64)) {
        if !self.visible || self.drawn.is_some_and(|drawn| drawn.elapsed() < REDRAW) {
            return;
        }
        self.drawn = Some(Instant::now());
        let line = bar(self.nouns, self.total, self.duration, self.began.elapsed(), count());
        // Who cannot be told how far it is cannot be told that either.
        let _ = write!(io::stderr(), "\r{line}\x1b[K");
    }

    /// Makes room for something else.
    pub fn clear(&mut self) {
        if self.drawn.take().is_some() {
            let _ = write!(io::stderr(), "\r\x1b[K");
        }
    }
}

/// The line: less than 80 columns.
fn bar(
    Nouns { done: noun, wrong, wrongs }: Nouns,
    total: Option<u64>,
    duration: Option<Duration>,
    elapsed: Duration,
    (done, wrong_ones): (u64, u64),
) -> String {
    const WIDTH: usize = 24;
    let by_number = total.map_or(0.0, |total| done as f64 / total.max(1) as f64);
    let by_time = duration.map_or(0.0, |all| elapsed.as_secs_f64() / all.as_secs_f64());
    let part = by_number.max(by_time).clamp(0.0, 1.0);
    let full = (part * WIDTH as f64) as usize;
    let mut line =
        format!("[{}{}] {:>3.0}%", "#".repeat(full), "-".repeat(WIDTH - full), part * 100.0);
    let rate = done as f64 / elapsed.as_secs_f64().max(0.001);
    let _ = write!(line, "  {done} {noun}, {rate:.0}/s");
    let _ = match wrong_ones {
        0 => write!(line, ", no {wrongs}"),
        1 => write!(line, ", 1 {wrong}"),
        count => write!(line, ", {count} {wrongs}"),
    };
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bar_goes_by_what_is_nearer() {
        let second = Duration::from_secs(1);
        let nouns = Nouns { done: "resets", wrong: "finding", wrongs: "findings" };
        let check = |total, duration, resets, expected: &str| {
            let line = bar(nouns, total, duration, second, (resets, 0));
            assert!(line.starts_with(expected) && line.len() < 80, "{line}");
        };
        check(Some(100), None, 50, "[############------------]  50%  50 resets, 50/s, no findings");
        check(None, Some(second * 4), 9, "[######------------------]  25%  9 resets");
        check(Some(100), Some(second * 4), 75, "[##################------]  75%");
        check(Some(100), Some(second * 4), 1, "[######------------------]  25%");
        check(None, Some(second), 1 << 30, "[########################] 100%");
    }
}
