//! The result as text for a terminal.

use std::fmt::Write as _;

use super::Report;
use crate::histogram::Histogram;
use crate::words::{milliseconds, plural};

/// Findings that are shown; the others are counted.
const MOST_ROWS: usize = 50;
/// Of what was seen; bundles and JSON have all of it.
const MOST_CHARACTERS: usize = 160;

/// The table.
pub fn table(report: &Report) -> String {
    let mut text = String::new();
    machines(&mut text, report);
    let figures = &report.figures;
    let causes = figures.grouped(|(cause, _)| cause);
    let moments = figures.grouped(|(_, moment)| moment);
    for (title, groups) in [("cause", causes), ("moment", moments)] {
        if groups.is_empty() {
            continue;
        }
        let _ = writeln!(text, "\n{title:<12} resets     hello p50  p99        max");
        for (name, hello) in groups {
            let (resets, times) = (hello.total(), times(&hello));
            let _ = writeln!(text, "{name:<12} {resets:>6}     {times}");
        }
    }
    text.push('\n');
    findings(&mut text, report);
    for line in report.platforms().into_iter().chain(report.remarks()) {
        let _ = writeln!(text, "{line}");
    }
    let _ = writeln!(
        text,
        "{}: {}; {:.0} resets per second; {}",
        report.verdict().words(),
        report.sums(),
        report.rate(),
        report.seed_words(),
    );
    text
}

fn machines(text: &mut String, report: &Report) {
    let rows: Vec<_> = report.machines().into_iter().map(|key| (report.label(key), key)).collect();
    let width = rows.iter().map(|(label, _)| label.len()).max().unwrap_or(0).max(4);
    let _ = writeln!(text, "{:<width$}   lives  findings  hello p50  p99        max", "vm");
    for (label, key) in rows {
        let vm = report.figures.vms.get(&key).cloned().unwrap_or_default();
        let (lives, findings, times) = (vm.lives, vm.findings, times(&vm.hello));
        let _ = writeln!(text, "{label:<width$} {lives:>7}  {findings:>8}  {times}");
    }
}

fn findings(text: &mut String, report: &Report) {
    for shown in report.figures.shown.iter().take(MOST_ROWS) {
        let (vm, life, name) =
            (report.label((shown.place.seed, shown.place.vm)), shown.life, &shown.name);
        let detail = short(&shown.detail);
        let _ = writeln!(text, "finding in vm {vm}, life {life}: {name}: {detail}");
        if let Some(path) = &shown.bundle {
            let _ = writeln!(text, "  bundle: {path}");
        }
    }
    let hidden = report.figures.findings().saturating_sub(MOST_ROWS as u64);
    if hidden > 0 {
        let _ = writeln!(text, "and {}", plural(hidden as usize, "finding", "findings"));
    }
    if let Some(command) = report.replays.first() {
        let _ = writeln!(text, "replay the first: {command}");
    }
}

/// The beginning of what was seen.
fn short(detail: &str) -> String {
    match detail.char_indices().nth(MOST_CHARACTERS) {
        Some((end, _)) => format!("{}…", &detail[..end]),
        None => detail.into(),
    }
}

fn times(hello: &Histogram) -> String {
    let show = |us: Option<u64>| us.map_or("-".into(), milliseconds);
    let (p50, p99) = (hello.per_mille(500), hello.per_mille(990));
    format!("{:<9}  {:<9}  {}", show(p50), show(p99), show(hello.max()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_finding_is_cut_between_characters() {
        assert_eq!(short("ä"), "ä");
        let cut = short(&"ä".repeat(1000));
        assert_eq!(cut.chars().count(), MOST_CHARACTERS + 1);
        assert!(cut.ends_with('…'));
    }
}
