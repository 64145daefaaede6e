//! Pages as a reader sees them, in a headless browser.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

/// Added to a copy of the page: says in its title what a reader would see.
const MEASURE: &str = "<script>
const box = e => e.getBoundingClientRect();
const shown = [...document.querySelectorAll('svg')].map(svg => {
  const inside = [...svg.querySelectorAll('rect,circle,polyline,text')].every(e => {
    const a = box(e), b = box(svg);
    return a.left >= b.left - 1 && a.right <= b.right + 1 && a.top >= b.top - 1 && a.bottom <= b.bottom + 1; });
  const count = what => [...svg.querySelectorAll(what)].filter(e => box(e).width + box(e).height > 0).length;
  return [svg.id, inside, count('rect'), count('circle'), count('polyline'), count('text') > 8].join(' '); });
const wide = document.documentElement.scrollWidth > document.documentElement.clientWidth;
const high = Math.max(...[...document.querySelectorAll('rect')].map(e => box(e).height));
document.title = JSON.stringify({shown, wide, high, size: innerWidth});
</script>";

/// What a reader sees.
pub struct Seen {
    /// Of each plot: its name, whether nothing sticks out, how many bars, marks and lines it has, whether it has labels. And
    /// whether the page is wider than the window, and how high the highest bar is.
    pub title: Value,
    /// The whole page, as the browser has it.
    pub dom: String,
}

/// Shows a page, which needs nothing but itself, in a window of this width. None where there is no browser.
#[track_caller]
pub fn look(file: &Path, width: u32) -> Option<Seen> {
    let page = fs::read_to_string(file).unwrap();
    for word in ["<script", "http:", "https:", "src=", "url("] {
        assert!(!page.contains(word), "the page is not self-contained: {word}");
    }
    let copy = file.with_extension("measured.html");
    fs::write(&copy, page.replace("</body>", &format!("{MEASURE}</body>"))).unwrap();
    let mut chromium = Command::new("chromium");
    chromium.args(["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]);
    chromium.arg(format!("--window-size={width},900"));
    chromium.arg(format!("--user-data-dir={}", file.with_extension("profile").display()));
    let Ok(output) = chromium.arg(format!("file://{}", copy.display())).output() else {
        super::skipped("chromium is not installed");
        return None;
    };
    let dom = String::from_utf8_lossy(&output.stdout).into_owned();
    let title = dom.split("<title>").nth(1).and_then(|rest| rest.split("</title>").next());
    let title = serde_json::from_str(title.unwrap_or_default()).unwrap_or_else(|error| {
        panic!("{error}: {title:?} {}", String::from_utf8_lossy(&output.stderr))
    });
    Some(Seen { title, dom })
}
