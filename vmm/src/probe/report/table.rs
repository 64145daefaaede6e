//! The report for a terminal.

use std::fmt::Write as _;

use super::{Ending, PER_MILLE, Report, gib, us};
use crate::histogram::Histogram;
use crate::probe::checks::Outcome;
use crate::soak::printable;

/// The table.
pub fn table(report: &Report) -> String {
    let mut text = String::new();
    if !report.round_trips.is_empty() {
        let _ = writeln!(text, "{:<24}{}", "round trips, us", columns());
    }
    for figure in &report.round_trips {
        let _ = writeln!(text, "{:<24}{}", bytes(figure.bytes), times(&figure.times));
    }
    if !report.throughput.is_empty() {
        let _ = writeln!(
            text,
            "\n{:<27}{:>10} {:>10} {:>10}  credit stalls",
            "throughput, GiB/s", "median", "lowest", "highest"
        );
    }
    for figure in &report.throughput {
        let name = format!("{}, {}", figure.direction.words(), at_a_time(figure.connections));
        let ends = [figure.rates.first(), figure.rates.last()];
        let [lowest, highest] = ends.map(|rate| gib(rate.copied().unwrap_or(0.0)));
        let (median, stalls) = (gib(figure.rate()), figure.credit_stalls);
        let _ =
            writeln!(text, "{name:<27}{median:>10.3} {lowest:>10.3} {highest:>10.3}  {stalls:>13}");
    }
    if !report.connections.is_empty() {
        let _ = writeln!(text, "\n{:<24}{}  per second", "connections, us", columns());
    }
    for figure in &report.connections {
        let (name, times) = (at_a_time(figure.clients), times(&figure.times));
        let _ = writeln!(text, "{name:<24}{times}  {:>10.0}", figure.per_second);
    }
    if !text.is_empty() {
        text.push('\n');
    }
    for check in &report.checks {
        let (word, reason) = match &check.outcome {
            Outcome::Pass => ("pass", None),
            Outcome::Fail(reason) => ("FAIL", Some(reason)),
            Outcome::Unchecked(reason) => ("cannot be told", Some(reason)),
        };
        let _ = match reason {
            None => writeln!(text, "{word}: {}", check.name),
            Some(why) => writeln!(text, "{word}: {}: {}", check.name, printable(why)),
        };
    }
    if let Some(audit) = &report.dma_audit {
        let _ = writeln!(text, "{audit}");
    }
    let _ = writeln!(text, "probed: {}", report.place());
    let _ = match &report.ending {
        Ending::Failed(why) => writeln!(text, "{}: {}", report.sums(), printable(why)),
        _ => writeln!(text, "{}", report.sums()),
    };
    text
}

fn columns() -> String {
    let columns = PER_MILLE.map(|(_, name)| name).into_iter().chain(["max"]);
    columns.map(|name| format!(" {name:>9}")).collect()
}

fn times(times: &Histogram) -> String {
    let values = PER_MILLE.map(|(per_mille, _)| times.per_mille(per_mille));
    values.into_iter().chain([times.max()]).map(|ns| format!(" {:>9.1}", us(ns))).collect()
}

/// A size in words.
pub(super) fn bytes(bytes: usize) -> String {
    match bytes {
        1 => "1 byte".into(),
        bytes if bytes < 1024 => format!("{bytes} bytes"),
        bytes => format!("{} KiB", bytes / 1024),
    }
}

fn at_a_time(count: u32) -> String {
    format!("{count} at a time")
}
