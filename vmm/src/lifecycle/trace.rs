//! What was done to a machine lately, and when: for whoever has to explain a finding.

use std::collections::VecDeque;
use std::time::Instant;

/// The last events of a machine; older ones are forgotten.
#[derive(Clone, Debug)]
pub struct Trace {
    began: Instant,
    events: VecDeque<(u64, String)>,
}

/// Two or three lives.
const MOST_EVENTS: usize = 40;

impl Trace {
    /// No events yet. Their times count from `began`.
    pub fn new(began: Instant) -> Self {
        Self { began, events: VecDeque::with_capacity(MOST_EVENTS) }
    }

    /// Something was done, or seen.
    pub(super) fn note(&mut self, what: impl FnOnce() -> String) {
        if self.events.len() == MOST_EVENTS {
            self.events.pop_front();
        }
        self.events.push_back((self.began.elapsed().as_micros() as u64, what()));
    }

    /// The events in order, with microseconds.
    pub fn lines(&self) -> Vec<String> {
        self.events.iter().map(|(us, what)| format!("{us:>12} us  {what}")).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_trace_is_bounded_and_keeps_the_last_events() {
        let mut trace = Trace::new(Instant::now());
        for number in 0..1000 {
            trace.note(|| format!("event {number}"));
        }
        let lines = trace.lines();
        assert_eq!(lines.len(), MOST_EVENTS);
        assert!(lines[MOST_EVENTS - 1].ends_with(" us  event 999"), "{lines:?}");
    }
}
