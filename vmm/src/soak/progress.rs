//! The progress of a soak: one line on a terminal, drawn over again a few times a second.

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

/// A bar, if anybody watches.
#[derive(Debug)]
pub struct Progress {
    visible: bool,
    total: Option<u64>,
    duration: Option<Duration>,
    began: Instant,
    drawn: Option<Instant>,
}

const REDRAW: Duration = Duration::from_millis(200);

impl Progress {
    /// Progress towards a number of resets, a time, or whichever comes first.
    pub fn new(total: Option<u64>, duration: Option<Duration>) -> Self {
        let visible = io::stderr().is_terminal();
        Self { visible, total, duration, began: Instant::now(), drawn: None }
    }

    /// Shows how far it is, unless it has just done so. `count` gives resets and findings.
    pub fn show(&mut self, count: impl FnOnce() -> (u64, u64)) {
        if !self.visible || self.drawn.is_some_and(|drawn| drawn.elapsed() < REDRAW) {
            return;
        }
        self.drawn = Some(Instant::now());
        let (resets, findings) = count();
        let line = bar(self.total, self.duration, self.began.elapsed(), resets, findings);
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
    total: Option<u64>,
    duration: Option<Duration>,
    elapsed: Duration,
    resets: u64,
    findings: u64,
) -> String {
    const WIDTH: usize = 24;
    let by_number = total.map_or(0.0, |total| resets as f64 / total.max(1) as f64);
    let by_time = duration.map_or(0.0, |all| elapsed.as_secs_f64() / all.as_secs_f64());
    let part = by_number.max(by_time).clamp(0.0, 1.0);
    let full = (part * WIDTH as f64) as usize;
    let mut line =
        format!("[{}{}] {:>3.0}%", "#".repeat(full), "-".repeat(WIDTH - full), part * 100.0);
    let rate = resets as f64 / elapsed.as_secs_f64().max(0.001);
    let _ = write!(line, "  {resets} resets, {rate:.0}/s");
    let _ = match findings {
        0 => write!(line, ", no findings"),
        1 => write!(line, ", 1 finding"),
        count => write!(line, ", {count} findings"),
    };
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bar_goes_by_what_is_nearer() {
        let second = Duration::from_secs(1);
        let check = |total, duration, resets, expected: &str| {
            let line = bar(total, duration, second, resets, 0);
            assert!(line.starts_with(expected) && line.len() < 80, "{line}");
        };
        check(Some(100), None, 50, "[############------------]  50%  50 resets, 50/s, no findings");
        check(None, Some(second * 4), 9, "[######------------------]  25%  9 resets");
        check(Some(100), Some(second * 4), 75, "[##################------]  75%");
        check(Some(100), Some(second * 4), 1, "[######------------------]  25%");
        check(None, Some(second), 1 << 30, "[########################] 100%");
    }
}
