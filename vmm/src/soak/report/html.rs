//! `--html`: one page that needs nothing else, neither scripts nor files.

use std::fmt::Write as _;

use super::plot::Plot;
use super::{Report, escape};
use crate::soak::figures::Histogram;
use crate::words::{milliseconds, plural};

/// Colours; more lines or names share them.
const COLOURS: usize = 6;
/// Machines with a line of their own.
const MOST_LINES: usize = 16;
/// Findings in the table.
const MOST_ROWS: usize = 200;

/// The page.
pub fn html(report: &Report) -> String {
    let mut page =
        String::from("<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n");
    page.push_str("<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n");
    let _ = writeln!(page, "<title>Cleanslate soak: {}</title>", escape(report.verdict));
    let _ = writeln!(page, "<style>\n{}</style>\n</head>\n<body>", include_str!("page.css"));
    head(&mut page, report);
    series(&mut page, report);
    histogram(&mut page, report);
    by_life(&mut page, report);
    machines(&mut page, report);
    moments(&mut page, report);
    findings(&mut page, report);
    page.push_str("</body>\n</html>\n");
    page
}

fn ms(us: u64) -> f64 {
    us as f64 / 1000.0
}

fn head(page: &mut String, report: &Report) {
    let Report { figures, plan, verdict, took, .. } = report;
    let count = |count: u64, one, many| plural(count as usize, one, many);
    let findings = match figures.findings() {
        0 => "no findings".into(),
        findings => count(findings, "finding", "findings"),
    };
    let class = verdict.replace(' ', "-");
    let _ = writeln!(page, "<h1 class=\"{class}\">Soak: {verdict}</h1>");
    let rate = figures.resets() as f64 / took.as_secs_f64().max(0.001);
    let _ = writeln!(
        page,
        "<p id=\"summary\">{}, {}, {findings}, {:.1} s, {rate:.0} resets per second</p>",
        plural(plan.vms as usize, "machine", "machines"),
        count(figures.lives(), "life", "lives"),
        took.as_secs_f64(),
    );
    let machine = report
        .machine
        .map(|m| format!("; Linux {}, {}; {}", m.host.kernel, m.host.kvm.name(), m.pmu));
    let host = format!("{}{}", report.host, machine.unwrap_or_default());
    let _ = writeln!(page, "<p class=\"dim\">{}</p>", escape(&host));
    let options = plan.arguments.join(" ");
    let _ = writeln!(
        page,
        "<p class=\"dim\">Seed {}; ended: {}; each machine: run {}</p>",
        plan.seed,
        escape(report.ending),
        escape(&options)
    );
    if let Some(machine) = report.machine.filter(|machine| !machine.unchecked.is_empty()) {
        let names = escape(&machine.unchecked.join(", "));
        let _ = writeln!(page, "<p class=\"dim\">This host cannot show: {names}</p>");
    }
}

fn series(page: &mut String, report: &Report) {
    page.push_str("<h2>Time to hello over resets</h2>\n");
    let vms: Vec<_> = report.figures.vms.iter().take(MOST_LINES).collect();
    let ends = vms.iter().map(|(_, vm)| vm.hello.total()).max().unwrap_or(0);
    let highest = vms.iter().flat_map(|(_, vm)| vm.series.points()).map(|p| p.mean()).max();
    let mut plot = Plot::new(
        "series",
        "Time from a reset to the agent's hello, over the resets of each machine",
        ("resets", "mean, ms"),
        (ends as f64, ms(highest.unwrap_or(0))),
        (true, false),
    );
    for (index, (number, vm)) in vms.iter().enumerate() {
        let mut resets = 0;
        let points: Vec<_> = (vm.series.points().iter())
            .map(|point| {
                resets += point.count;
                (resets as f64, ms(point.mean()))
            })
            .collect();
        let class = format!("s{}", index % COLOURS);
        plot.line(&class, &format!("machine {number}"), points.into_iter());
    }
    page.push_str(&plot.finish());
    let hidden = report.figures.vms.len().saturating_sub(MOST_LINES);
    page.push_str("<p class=\"dim\">");
    for (index, (number, _)) in vms.iter().enumerate() {
        let _ = write!(page, "<span class=\"key b{}\"></span>machine {number}", index % COLOURS);
    }
    if hidden > 0 {
        let _ = write!(page, " and {hidden} more that are not drawn");
    }
    page.push_str("</p>\n");
}

fn histogram(page: &mut String, report: &Report) {
    page.push_str("<h2>How long a reset takes</h2>\n");
    let hello = report.figures.hello();
    // The last per cent would make everything else a single bar; it is in the table, and the last bar says how many there are.
    let end = hello.percentile(99).unwrap_or(0) + 1;
    let width = (end / 60).max(1);
    let mut bars: Vec<u64> = vec![0; (end / width + 1) as usize];
    let mut beyond = 0;
    for (from, to, count) in hello.buckets() {
        match bars.get_mut(((from + to) / 2 / width) as usize) {
            Some(bar) if from < end => *bar += count,
            _ => beyond += count,
        }
    }
    let highest = bars.iter().copied().max().unwrap_or(0);
    let mut plot = Plot::new(
        "histogram",
        "How many resets took how long until the agent's hello",
        ("time to hello, ms", "resets"),
        (ms(end), highest as f64),
        (false, true),
    );
    for (index, count) in (0..).zip(&bars).filter(|(_, count)| **count > 0) {
        let (from, to): (u64, u64) = (index * width, (index + 1) * width);
        let name = format!("{} to {}: {count}", milliseconds(from), milliseconds(to));
        plot.bar((ms(from), ms(to.min(end))), *count as f64, &name);
    }
    page.push_str(&plot.finish());
    let _ = writeln!(
        page,
        "<p class=\"dim\">{}</p>",
        match beyond {
            0 => "All resets are shown.".into(),
            count => format!("{} took longer.", plural(count as usize, "reset", "resets")),
        }
    );
}

fn by_life(page: &mut String, report: &Report) {
    page.push_str("<h2>Findings by life</h2>\n");
    let figures = report.figures;
    if figures.shown.is_empty() {
        page.push_str("<p id=\"no-findings\">None.</p>\n");
        return;
    }
    let lives = figures.vms.values().map(|vm| vm.lives).max().unwrap_or(0);
    let highest = figures.vms.keys().max().copied().unwrap_or(1);
    let mut plot = Plot::new(
        "findings",
        "Which machine showed a finding in which life",
        ("lives of the machine", "machine"),
        (lives as f64, f64::from(highest)),
        (true, true),
    );
    let colour = |name: &str| figures.names.keys().position(|n| n == name).unwrap_or(0) % COLOURS;
    for shown in &figures.shown {
        let class = format!("f{}", colour(&shown.name));
        let name = format!("machine {}, life {}: {}", shown.place.vm, shown.life, shown.name);
        plot.mark(&class, (shown.lives as f64, f64::from(shown.place.vm)), &name);
    }
    page.push_str(&plot.finish());
    page.push_str("<p class=\"dim\">");
    for (name, count) in &figures.names {
        let _ =
            write!(page, "<span class=\"key b{}\"></span>{} ({count})", colour(name), escape(name));
    }
    page.push_str("</p>\n");
}

fn times(hello: &Histogram) -> String {
    let show = |us: Option<u64>| us.map_or("–".into(), milliseconds);
    [hello.percentile(50), hello.percentile(99), hello.max()]
        .map(|us| format!("<td>{}</td>", show(us)))
        .concat()
}

fn machines(page: &mut String, report: &Report) {
    page.push_str("<h2>Machines</h2>\n<div class=\"wide\"><table id=\"machines\">\n<tr><th>machine</th><th>lives</th>");
    page.push_str(
        "<th>processes</th><th>findings</th><th>hello p50</th><th>p99</th><th>max</th></tr>\n",
    );
    for (number, vm) in &report.figures.vms {
        let _ = writeln!(
            page,
            "<tr><td>{number}</td><td>{}</td><td>{}</td><td>{}</td>{}</tr>",
            vm.lives,
            vm.processes,
            vm.findings,
            times(&vm.hello)
        );
    }
    page.push_str("</table></div>\n");
}

fn moments(page: &mut String, report: &Report) {
    page.push_str("<h2>Causes and moments</h2>\n<div class=\"wide\"><table id=\"moments\">\n<tr><th>cause</th>");
    page.push_str("<th class=\"text\">moment</th><th>resets</th><th>hello p50</th><th>p99</th><th>max</th></tr>\n");
    for ((cause, moment), hello) in &report.figures.groups {
        let (resets, times) = (hello.total(), times(hello));
        let _ = writeln!(
            page,
            "<tr><td>{cause}</td><td class=\"text\">{moment}</td><td>{resets}</td>{times}</tr>"
        );
    }
    page.push_str("</table></div>\n");
}

fn findings(page: &mut String, report: &Report) {
    let figures = report.figures;
    if figures.shown.is_empty() {
        return;
    }
    page.push_str("<h2>Findings</h2>\n<div class=\"wide\"><table id=\"list\">\n<tr><th>machine</th><th>life</th>");
    page.push_str("<th class=\"text\">finding</th><th class=\"text\">what was seen</th></tr>\n");
    for shown in figures.shown.iter().take(MOST_ROWS) {
        let bundle = shown.bundle.as_ref().map_or(String::new(), |path| format!(" ({path})"));
        let _ = writeln!(
            page,
            "<tr><td>{}</td><td>{}</td><td class=\"text\">{}</td><td class=\"detail\">{}</td></tr>",
            shown.place.vm,
            shown.life,
            escape(&shown.name),
            escape(&format!("{}{bundle}", shown.detail)),
        );
    }
    page.push_str("</table></div>\n");
    let hidden = figures.findings().saturating_sub(figures.shown.len().min(MOST_ROWS) as u64);
    if hidden > 0 {
        let _ = writeln!(page, "<p>and {hidden} more</p>");
    }
    if let Some(command) = report.replays.first() {
        let _ = writeln!(page, "<h2>See the first again</h2>\n<pre>{}</pre>", escape(command));
    }
}
