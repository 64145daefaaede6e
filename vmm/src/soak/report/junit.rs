//! `--junit`: one test case for each machine, with its findings as failures.

use std::fmt::Write as _;

use super::{Report, escape};

/// The report as XML.
pub fn junit(report: &Report) -> String {
    let Report { plan, figures, .. } = report;
    let machines = plan.first_vm..plan.first_vm.saturating_add(plan.vms);
    let failed = figures.vms.values().filter(|vm| vm.findings > 0).count();
    let seconds = report.took.as_secs_f64();
    let mut text = String::from("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n");
    let attributes =
        format!("tests=\"{}\" failures=\"{failed}\" errors=\"0\" time=\"{seconds:.3}\"", plan.vms);
    let _ = writeln!(text, "<testsuites name=\"cleanslate soak\" {attributes}>");
    let host = escape(report.host);
    let _ = writeln!(
        text,
        "  <testsuite name=\"soak\" {attributes} skipped=\"0\" hostname=\"{host}\">"
    );
    let _ = writeln!(text, "    <properties>");
    for (name, value) in [
        ("seed", plan.seed.to_string()),
        ("verdict", report.verdict.into()),
        ("ending", report.ending.into()),
        ("arguments", plan.arguments.join(" ")),
    ] {
        let _ = writeln!(text, "      <property name=\"{name}\" value=\"{}\"/>", escape(&value));
    }
    let _ = writeln!(text, "    </properties>");
    for number in machines {
        let vm = figures.vms.get(&number);
        let lives = vm.map_or(0, |vm| vm.lives);
        let _ = write!(
            text,
            "    <testcase classname=\"cleanslate.soak\" name=\"vm {number}\" time=\"{seconds:.3}\">"
        );
        if vm.is_some_and(|vm| vm.findings > 0) {
            text.push('\n');
            failures(&mut text, report, number);
            let _ = writeln!(text, "      <system-out>{lives} lives</system-out>");
            text.push_str("    ");
        }
        text.push_str("</testcase>\n");
    }
    text.push_str("  </testsuite>\n</testsuites>\n");
    text
}

/// One failure for a machine: readers of the format expect no more.
fn failures(text: &mut String, report: &Report, number: u32) {
    let of_vm = || report.figures.shown.iter().filter(|shown| shown.place.vm == number);
    let first = of_vm().next();
    let (name, detail) = first.map_or(("findings", ""), |f| (f.name.as_str(), f.detail.as_str()));
    let (name, message) = (escape(name), escape(detail));
    let _ = write!(text, "      <failure type=\"{name}\" message=\"{message}\">");
    for shown in of_vm() {
        let bundle = shown.bundle.as_ref().map_or(String::new(), |path| format!(" ({path})"));
        let line = format!("life {}: {}: {}{bundle}", shown.life, shown.name, shown.detail);
        let _ = writeln!(text, "{}", escape(&line));
    }
    let hidden = report.figures.vms[&number].findings - of_vm().count() as u64;
    if hidden > 0 {
        let _ = writeln!(text, "and {hidden} more");
    }
    text.push_str("</failure>\n");
}
