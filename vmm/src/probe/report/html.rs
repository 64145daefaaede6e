//! `--html`: the report as a page.

use std::fmt::Write as _;

use super::table::bytes;
use super::{Ending, PER_MILLE, Report, gib, us};
use crate::histogram::Histogram;
use crate::page::{COLOURS, Plot, escape, page};
use crate::probe::checks::Outcome;
use crate::probe::{Direction, RoundTrips};

/// The page.
pub fn html(report: &Report) -> String {
    let mut body = String::new();
    let (words, name) = report.verdict();
    let class = if name == Some("pass") { "clean" } else { "not-clean" };
    let _ = writeln!(body, "<h1 class=\"{class}\">vsock probe: {words}</h1>");
    let _ = writeln!(body, "<p id=\"summary\">{}</p>", escape(&report.sums()));
    let _ = writeln!(body, "<p class=\"dim\">{}</p>", escape(&report.place()));
    if let Ending::Failed(why) = &report.ending {
        let _ = writeln!(body, "<p class=\"not-clean\">{}</p>", escape(why));
    }
    round_trips(&mut body, report);
    throughput(&mut body, report);
    connections(&mut body, report);
    checks(&mut body, report);
    page(&format!("Cleanslate probe: {words}"), &body)
}

fn round_trips(body: &mut String, report: &Report) {
    if report.round_trips.is_empty() {
        return;
    }
    body.push_str("<h2>Round trips</h2>\n<div class=\"wide\"><table id=\"round-trips\">\n");
    let _ = writeln!(body, "<tr><th>message</th><th>count</th>{}</tr>", time_heads());
    for figure in &report.round_trips {
        let (name, times) = (bytes(figure.bytes), &figure.times);
        let _ =
            writeln!(body, "<tr><td>{name}</td><td>{}</td>{}</tr>", times.total(), cells(times));
    }
    body.push_str("</table></div>\n");
    report.round_trips.iter().for_each(|figure| histogram(body, figure));
}

fn histogram(body: &mut String, figure: &RoundTrips) {
    const BARS: u64 = 60;
    let (name, times) = (bytes(figure.bytes), &figure.times);
    let _ = writeln!(body, "<h2>Round trips of {name}</h2>");
    // The last per cent would make everything else a single bar; it is in the table.
    let end = times.per_mille(990).unwrap_or(0) + 1;
    let width = (end / BARS).max(1);
    let mut bars = vec![0; (end / width + 1) as usize];
    let mut beyond = 0;
    for (from, to, count) in times.buckets() {
        match bars.get_mut(((from + to) / 2 / width) as usize) {
            Some(bar) if from < end => *bar += count,
            _ => beyond += count,
        }
    }
    let highest = bars.iter().copied().max().unwrap_or(0);
    let mut plot = Plot::new(
        &format!("trips-{}", figure.bytes),
        &format!("How many round trips of {name} took how long"),
        ("time, \u{b5}s", "round trips"),
        (us(Some(end)), highest as f64),
        (false, true),
    );
    for (index, count) in (0..).zip(&bars).filter(|(_, count)| **count > 0) {
        let (from, to): (u64, u64) = (index * width, ((index + 1) * width).min(end));
        let (from, to) = (us(Some(from)), us(Some(to)));
        plot.bar((from, to), *count as f64, &format!("{from:.1} to {to:.1} \u{b5}s: {count}"));
    }
    body.push_str(&plot.finish());
    if beyond > 0 {
        let _ = writeln!(body, "<p class=\"dim\">{beyond} took longer.</p>");
    }
}

fn throughput(body: &mut String, report: &Report) {
    if report.throughput.is_empty() {
        return;
    }
    body.push_str("<h2>Throughput with messages of 64 KiB</h2>\n");
    let highest = report.throughput.iter().map(|figure| figure.rate()).fold(0.0, f64::max);
    let most = report.throughput.iter().map(|figure| figure.connections).max().unwrap_or(1);
    let mut plot = Plot::new(
        "throughput",
        "How fast bytes pass, over the number of connections",
        ("connections", "GiB/s in each direction"),
        (most.into(), gib(highest)),
        (true, false),
    );
    for (index, direction) in Direction::ALL.into_iter().enumerate() {
        let figures = report.throughput.iter().filter(|figure| figure.direction == direction);
        let points: Vec<_> =
            figures.map(|figure| (f64::from(figure.connections), gib(figure.rate()))).collect();
        curve(&mut plot, index, direction.words(), &points);
    }
    body.push_str(&plot.finish());
    body.push_str("<p class=\"dim\">");
    for (index, direction) in Direction::ALL.into_iter().enumerate() {
        let _ = write!(body, "<span class=\"key b{index}\"></span>{}", direction.words());
    }
    body.push_str("</p>\n<div class=\"wide\"><table id=\"rates\">\n<tr><th>direction</th>");
    body.push_str("<th>connections</th><th>GiB/s</th><th>lowest</th><th>highest</th><th>credit stalls</th></tr>\n");
    for figure in &report.throughput {
        let ends = [figure.rates.first(), figure.rates.last()];
        let [lowest, highest] = ends.map(|rate| gib(rate.copied().unwrap_or(0.0)));
        let _ = writeln!(
            body,
            "<tr><td>{}</td><td>{}</td><td>{:.3}</td><td>{lowest:.3}</td><td>{highest:.3}</td><td>{}</td></tr>",
            figure.direction.words(),
            figure.connections,
            gib(figure.rate()),
            figure.credit_stalls,
        );
    }
    body.push_str("</table></div>\n");
}

/// A line with a mark at each of its points.
fn curve(plot: &mut Plot, index: usize, name: &str, points: &[(f64, f64)]) {
    if points.is_empty() {
        return;
    }
    let colour = index % COLOURS;
    plot.line(&format!("s{colour}"), name, points.iter().copied());
    for (x, y) in points {
        plot.mark(&format!("f{colour}"), (*x, *y), &format!("{name}, {x:.0}: {y:.3}"));
    }
}

fn connections(body: &mut String, report: &Report) {
    if report.connections.is_empty() {
        return;
    }
    body.push_str("<h2>Connections opened, greeted and closed</h2>\n");
    let highest = report.connections.iter().map(|figure| figure.per_second).fold(0.0, f64::max);
    let most = report.connections.iter().map(|figure| figure.clients).max().unwrap_or(1);
    let mut plot = Plot::new(
        "connections",
        "Connections in a second, over the number of clients",
        ("clients at a time", "per second"),
        (most.into(), highest.ceil()),
        (true, true),
    );
    let points: Vec<_> = (report.connections.iter())
        .map(|figure| (f64::from(figure.clients), figure.per_second))
        .collect();
    curve(&mut plot, 0, "connections per second", &points);
    body.push_str(&plot.finish());
    body.push_str("<div class=\"wide\"><table id=\"opened\">\n");
    let _ = writeln!(body, "<tr><th>clients</th><th>per second</th>{}</tr>", time_heads());
    for figure in &report.connections {
        let (clients, rate) = (figure.clients, figure.per_second);
        let cells = cells(&figure.times);
        let _ = writeln!(body, "<tr><td>{clients}</td><td>{rate:.0}</td>{cells}</tr>");
    }
    body.push_str("</table></div>\n");
}

fn time_heads() -> String {
    let names = PER_MILLE.map(|(_, name)| name).into_iter().chain(["max"]);
    names.map(|name| format!("<th>{name}, \u{b5}s</th>")).collect()
}

fn cells(times: &Histogram) -> String {
    let values = PER_MILLE.map(|(per_mille, _)| times.per_mille(per_mille));
    let values = values.into_iter().chain([times.max()]);
    values.map(|ns| format!("<td>{:.1}</td>", us(ns))).collect()
}

fn checks(body: &mut String, report: &Report) {
    body.push_str("<h2>Checks</h2>\n<div class=\"wide\"><table id=\"checks\">\n<tr><th>check</th>");
    body.push_str(
        "<th class=\"text\">result</th><th class=\"text\">what holds, or why not</th></tr>\n",
    );
    for check in &report.checks {
        let (class, word, reason) = match &check.outcome {
            Outcome::Pass => ("clean", "pass", None),
            Outcome::Fail(why) => ("not-clean", "fail", Some(why)),
            Outcome::Unchecked(why) => ("dim", "cannot be told", Some(why)),
        };
        let text = reason.map_or(check.about.into(), |why| format!("{}: {why}", check.about));
        let (name, text) = (escape(&check.name), escape(&text));
        let _ = writeln!(
            body,
            "<tr><td>{name}</td><td class=\"text {class}\">{word}</td><td class=\"detail\">{text}</td></tr>"
        );
    }
    body.push_str("</table></div>\n");
    let Some(audit) = &report.dma_audit else { return };
    let _ =
        writeln!(body, "<h2>DMA audit</h2>\n<p id=\"audit\">{}</p>", escape(&audit.to_string()));
    for violation in &audit.violations {
        let _ = writeln!(body, "<p class=\"dim\">{}</p>", escape(&violation.to_string()));
    }
}
