//! `--html`: the report as a page.

use std::fmt::Write as _;

use super::{Percentiles, Report};
use crate::histogram::Histogram;
use crate::page::{self, Plot, escape};
use crate::words::{milliseconds, plural};

/// The page.
pub fn html(report: &Report) -> String {
    let mut page = String::new();
    let class = if report.verdict() == "clean" { "clean" } else { "not-clean" };
    let title = format!("Launches: {}", report.verdict());
    let _ = writeln!(page, "<h1 class=\"{class}\">{title}</h1>");
    let rate = report.figures.per_second();
    let rate =
        if report.idle.is_none() { format!("; {rate:.0} per second") } else { String::new() };
    let _ = writeln!(page, "<p id=\"summary\">{}{rate}</p>", escape(&report.sums()));
    let plan = report.plan;
    let told = format!(
        "from {}, {} at once, {} kept warm; job {} with {}; {} MiB each",
        plan.origin.name(),
        plan.concurrency,
        plan.warm,
        plan.job,
        plural(plan.input.len(), "byte", "bytes"),
        report.mem_mib,
    );
    let _ = writeln!(page, "<p class=\"dim\">{}</p>", escape(&told));
    for line in report.memory() {
        let _ = writeln!(page, "<p>{}</p>", escape(&line));
    }
    times(&mut page, report);
    for (id, title, histogram) in [
        ("hello", "Start to hello", &report.figures.hello),
        ("done", "Start to done", &report.figures.done_us),
    ] {
        if histogram.total() > 0 {
            plot(&mut page, id, title, histogram);
        }
    }
    wrongs(&mut page, report);
    page::page(&format!("Cleanslate: {title}"), &page)
}

fn times(page: &mut String, report: &Report) {
    page.push_str(
        "<div class=\"wide\"><table id=\"times\">\n<tr><th class=\"text\"></th><th>count</th>",
    );
    page.push_str("<th>p50</th><th>p90</th><th>p99</th><th>max</th></tr>\n");
    for (name, times) in report.times() {
        let Percentiles { p50, p90, p99, max } = times.into();
        let cells = [p50, p90, p99, max]
            .map(|us| format!("<td>{}</td>", us.map_or("–".into(), milliseconds)));
        let (count, cells) = (times.total(), cells.concat());
        let _ = writeln!(page, "<tr><td class=\"text\">{name}</td><td>{count}</td>{cells}</tr>");
    }
    page.push_str("</table></div>\n");
}

fn plot(page: &mut String, id: &str, title: &str, times: &Histogram) {
    let ms = |us: u64| us as f64 / 1000.0;
    let _ = writeln!(page, "<h2>{title}</h2>");
    // The last per cent would make everything else a single bar; the table has it.
    let (bars, width) = times.bars(60);
    let highest = bars.iter().copied().max().unwrap_or(0);
    let end = width * bars.len() as u64;
    let titles = ("ms", "launches");
    let mut plot = Plot::new(id, title, titles, (ms(end), highest as f64), (false, true));
    for (index, count) in (0..).zip(&bars).filter(|(_, count)| **count > 0) {
        let (from, to): (u64, u64) = (index * width, (index + 1) * width);
        let name = format!("{} to {}: {count}", milliseconds(from), milliseconds(to));
        plot.bar((ms(from), ms(to)), *count as f64, &name);
    }
    page.push_str(&plot.finish());
    let beyond = times.total() - bars.iter().sum::<u64>();
    if beyond > 0 {
        let _ = writeln!(page, "<p class=\"dim\">{beyond} took longer.</p>");
    }
}

fn wrongs(page: &mut String, report: &Report) {
    page.push_str("<h2>Failures and findings</h2>\n");
    let wrongs = report.wrongs();
    if wrongs.is_empty() {
        page.push_str("<p id=\"no-failures\">None.</p>\n");
        return;
    }
    page.push_str("<ul id=\"failures\">\n");
    for line in wrongs {
        let _ = writeln!(page, "<li>{}</li>", escape(&line));
    }
    page.push_str("</ul>\n");
}
