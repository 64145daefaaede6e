//! `--junit`: one test case for each machine, with its findings as failures.

use std::fmt::Write as _;

use super::{Report, Verdict};
use crate::page::escape;

/// The report as XML.
pub fn junit(report: &Report) -> String {
    let figures = &report.figures;
    let machines = report.machines();
    let failed = figures.vms.values().filter(|vm| vm.findings > 0).count();
    // Who reads no more than this must not take for clean what was not brought to its end.
    let is_error = report.verdict().name().is_none();
    let (tests, errors) = (machines.len() + usize::from(is_error), u32::from(is_error));
    let is_skipped =
        |key: &_| figures.vms.get(key).is_none_or(|vm| vm.resets() == 0 && vm.findings == 0);
    let skipped = machines.iter().filter(|key| is_skipped(key)).count();
    let seconds = report.took().as_secs_f64();
    let mut text = String::from("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n");
    let attributes = format!(
        "tests=\"{tests}\" failures=\"{failed}\" errors=\"{errors}\" skipped=\"{skipped}\" time=\"{seconds:.3}\""
    );
    let _ = writeln!(text, "<testsuites name=\"cleanslate soak\" {attributes}>");
    let host = escape(&report.hosts().join(", "));
    let _ = writeln!(text, "  <testsuite name=\"soak\" {attributes} hostname=\"{host}\">");
    let _ = writeln!(text, "    <properties>");
    let arguments = report.shards.first().map(|shard| shard.header.arguments.join(" "));
    for (name, value) in [
        ("seed", report.seeds().iter().map(u64::to_string).collect::<Vec<_>>().join(", ")),
        ("verdict", report.verdict().words().into()),
        ("ending", report.ending().name().into()),
        ("arguments", arguments.unwrap_or_default()),
    ] {
        let _ = writeln!(text, "      <property name=\"{name}\" value=\"{}\"/>", escape(&value));
    }
    let _ = writeln!(text, "    </properties>");
    if is_error {
        error(&mut text, report, report.verdict());
    }
    for key in machines {
        let vm = figures.vms.get(&key);
        let lives = vm.map_or(0, |vm| vm.lives);
        let label = report.label(key);
        let _ = write!(
            text,
            "    <testcase classname=\"cleanslate.soak\" name=\"vm {label}\" time=\"{seconds:.3}\">"
        );
        if vm.is_some_and(|vm| vm.findings > 0) {
            text.push('\n');
            failures(&mut text, report, key);
            let _ = writeln!(text, "      <system-out>{lives} lives</system-out>");
            text.push_str("    ");
        } else if is_skipped(&key) {
            text.push_str("<skipped message=\"it was not seen to come back from a reset\"/>");
        }
        text.push_str("</testcase>\n");
    }
    text.push_str("  </testsuite>\n</testsuites>\n");
    text
}

/// A case of its own for what is no verdict.
fn error(text: &mut String, report: &Report, verdict: Verdict) {
    let name = verdict.words();
    let remarks = escape(&report.remarks().collect::<Vec<_>>().join("\n"));
    let _ = writeln!(
        text,
        "    <testcase classname=\"cleanslate.soak\" name=\"soak\">\n      \
         <error type=\"{name}\" message=\"{}\">{remarks}</error>\n    </testcase>",
        escape(&report.sums())
    );
}

/// One failure for a machine: readers of the format expect no more.
fn failures(text: &mut String, report: &Report, key: (u64, u32)) {
    let is_here = |place: crate::soak::Place| (place.seed, place.vm) == key;
    let of_vm = || report.figures.shown.iter().filter(|shown| is_here(shown.place));
    let first = of_vm().next();
    let (name, detail) = first.map_or(("findings", ""), |f| (f.name.as_str(), f.detail.as_str()));
    let (name, message) = (escape(name), escape(detail));
    let _ = write!(text, "      <failure type=\"{name}\" message=\"{message}\">");
    for shown in of_vm() {
        let bundle = shown.bundle.as_ref().map_or(String::new(), |path| format!(" ({path})"));
        let line = format!("life {}: {}: {}{bundle}", shown.life, shown.name, shown.detail);
        let _ = writeln!(text, "{}", escape(&line));
    }
    let hidden = report.figures.vms[&key].findings - of_vm().count() as u64;
    if hidden > 0 {
        let _ = writeln!(text, "and {hidden} more");
    }
    text.push_str("</failure>\n");
}
