//! What sandboxes cost that wait for jobs: memory and wake-ups.

use std::collections::BTreeMap;
use std::time::Duration;

use super::cell::{Cell, Stage};
use super::memory;

/// How long everything may come to rest before something is measured: a timer for a handshake may run for five seconds more.
pub const SETTLE: Duration = Duration::from_secs(6);

/// What is to be measured.
#[derive(Clone, Copy, Debug)]
pub struct IdlePlan {
    /// How many sandboxes.
    pub count: u64,
    /// For how long their wake-ups are counted.
    pub span: Duration,
    /// Whether they are kept until a signal.
    pub hold: bool,
}

/// What was measured. What the kernel does not tell this user is `None`.
#[derive(Clone, Copy, Debug, Default, serde::Serialize)]
pub struct IdleFigures {
    /// How many sandboxes were there.
    pub count: u64,
    /// By how much the host could give away less memory than before: with them, all that the kernel has for them.
    pub host_kib: Option<u64>,
    /// Their processes' memory, shared pages by their shares (`Pss`).
    pub proportional_kib: Option<u64>,
    /// How often all of them together woke up in a second.
    pub wake_ups_per_second: Option<f64>,
    #[serde(skip)]
    pub(super) held: bool,
}

/// How often all sandboxes that wait have woken up.
pub(super) fn wake_ups(cells: &BTreeMap<u64, Cell>) -> Option<u64> {
    ready(cells).map(|cell| memory::wake_ups(cell.running.pid())).sum()
}

/// Measures. `before` were their wake-ups a `span` ago, and so much the host could give away before them.
pub(super) fn measure(
    cells: &BTreeMap<u64, Cell>,
    before: Option<u64>,
    span: Duration,
    available_kib: Option<u64>,
) -> IdleFigures {
    let woken = wake_ups(cells).zip(before).map(|(now, before)| now.saturating_sub(before));
    let host = available_kib.zip(memory::available_kib());
    IdleFigures {
        count: ready(cells).count() as u64,
        host_kib: host.map(|(before, now)| before.saturating_sub(now)),
        proportional_kib: ready(cells)
            .map(|cell| memory::proportional_kib(cell.running.pid()))
            .sum(),
        wake_ups_per_second: woken.map(|woken| woken as f64 / span.as_secs_f64()),
        held: false,
    }
}

fn ready(cells: &BTreeMap<u64, Cell>) -> impl Iterator<Item = &Cell> {
    cells.values().filter(|cell| cell.stage == Stage::Ready)
}
