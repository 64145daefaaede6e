//! `--html`: the report as a page.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use super::{Report, Verdict};
use crate::histogram::Histogram;
use crate::page::{COLOURS, Plot, escape};
use crate::words::{milliseconds, plural};

/// Machines with a line of their own.
const MOST_LINES: usize = 16;
/// Findings in the table.
const MOST_ROWS: usize = 200;

/// The page.
pub fn html(report: &Report) -> String {
    let mut page = String::new();
    head(&mut page, report);
    series(&mut page, report);
    histogram(&mut page, report);
    by_life(&mut page, report);
    machines(&mut page, report);
    moments(&mut page, report);
    findings(&mut page, report);
    crate::page::page(&format!("Cleanslate soak: {}", report.verdict().words()), &page)
}

fn ms(us: u64) -> f64 {
    us as f64 / 1000.0
}

fn head(page: &mut String, report: &Report) {
    let words = report.verdict().words();
    let class = match report.verdict() {
        Verdict::Clean => "clean",
        _ => "not-clean",
    };
    let _ = writeln!(page, "<h1 class=\"{class}\">Soak: {words}</h1>");
    let _ = writeln!(
        page,
        "<p id=\"summary\">{}, {:.1} s, {:.0} resets per second</p>",
        report.sums(),
        report.took().as_secs_f64(),
        report.rate(),
    );
    let mut dim = |text: &str| {
        let _ = writeln!(page, "<p class=\"dim\">{}</p>", escape(text));
    };
    dim(&report.hosts().join(", "));
    report.platforms().iter().for_each(|line| dim(line));
    report.remarks().for_each(|line| dim(&line));
    let options = report.shards.first().map(|shard| shard.header.arguments.join(" "));
    dim(&format!(
        "{}; ended: {}; each machine: run {}",
        report.seed_words(),
        report.ending().name(),
        options.unwrap_or_default()
    ));
    let machines = report.shards.iter().filter_map(|shard| shard.machine.as_ref());
    let unchecked: BTreeSet<_> = machines.flat_map(|machine| &machine.unchecked).collect();
    if !unchecked.is_empty() {
        let names: Vec<_> = unchecked.into_iter().map(String::as_str).collect();
        dim(&format!("Not every host can show: {}", names.join(", ")));
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
    for (index, (key, vm)) in vms.iter().enumerate() {
        let mut resets = 0;
        let points: Vec<_> = (vm.series.points().iter())
            .map(|point| {
                resets += point.count;
                (resets as f64, ms(point.mean()))
            })
            .collect();
        let class = format!("s{}", index % COLOURS);
        plot.line(&class, &format!("machine {}", report.label(**key)), points.into_iter());
    }
    page.push_str(&plot.finish());
    let hidden = report.figures.vms.len().saturating_sub(MOST_LINES);
    page.push_str("<p class=\"dim\">");
    for (index, (key, _)) in vms.iter().enumerate() {
        let (colour, label) = (index % COLOURS, report.label(**key));
        let _ = write!(page, "<span class=\"key b{colour}\"></span>machine {label}");
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
    let (bars, width) = hello.bars(60);
    let end = width * bars.len() as u64;
    let beyond = hello.total() - bars.iter().sum::<u64>();
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
    let figures = &report.figures;
    if figures.shown.is_empty() {
        page.push_str("<p id=\"no-findings\">None.</p>\n");
        return;
    }
    let lives = figures.vms.values().map(|vm| vm.lives).max().unwrap_or(0);
    // A row for each, whatever their numbers.
    let rows: Vec<_> = report.machines().into_iter().collect();
    let row = |key| rows.iter().position(|k| *k == key).unwrap_or(0) as f64 + 1.0;
    let mut plot = Plot::new(
        "findings",
        "Which machine showed a finding in which life",
        ("lives of the machine", rows_title(report)),
        (lives as f64, rows.len() as f64),
        (true, true),
    );
    let place = |name: &str| figures.names.keys().position(|n| n == name).unwrap_or(0);
    let colour = |name: &str| place(name) % COLOURS;
    // Each name a little lower than the one before: a life that showed several would hide all but one.
    let lower = |name: &str| 0.5 * place(name) as f64 / figures.names.len().max(1) as f64;
    for shown in &figures.shown {
        let class = format!("f{}", colour(&shown.name));
        let key = (shown.place.seed, shown.place.vm);
        let name = format!("machine {}, life {}: {}", report.label(key), shown.life, shown.name);
        plot.mark(&class, (shown.lives as f64, row(key) - lower(&shown.name)), &name);
    }
    page.push_str(&plot.finish());
    page.push_str("<p class=\"dim\">");
    for (name, count) in &figures.names {
        let _ =
            write!(page, "<span class=\"key b{}\"></span>{} ({count})", colour(name), escape(name));
    }
    page.push_str("</p>\n");
}

/// The rows are the machines' numbers only if these begin with 1.
fn rows_title(report: &Report) -> &'static str {
    match report.machines().first() {
        Some((_, 1)) if report.shards.len() == 1 => "machine",
        _ => "machine, as in the table",
    }
}

fn times(hello: &Histogram) -> String {
    let show = |us: Option<u64>| us.map_or("–".into(), milliseconds);
    [hello.per_mille(500), hello.per_mille(990), hello.max()]
        .map(|us| format!("<td>{}</td>", show(us)))
        .concat()
}

fn machines(page: &mut String, report: &Report) {
    page.push_str("<h2>Machines</h2>\n<div class=\"wide\"><table id=\"machines\">\n<tr><th>machine</th><th>lives</th>");
    page.push_str(
        "<th>processes</th><th>findings</th><th>hello p50</th><th>p99</th><th>max</th></tr>\n",
    );
    for key in report.machines() {
        let vm = report.figures.vms.get(&key).cloned().unwrap_or_default();
        let label = report.label(key);
        let _ = writeln!(
            page,
            "<tr><td>{label}</td><td>{}</td><td>{}</td><td>{}</td>{}</tr>",
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
    let figures = &report.figures;
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
            report.label((shown.place.seed, shown.place.vm)),
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
