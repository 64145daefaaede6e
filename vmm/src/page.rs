//! Pages for a browser that need nothing else, neither scripts nor files.

mod plot;

use std::fmt::Write as _;

pub use plot::Plot;

/// Colours for lines (`s0`…), marks (`f0`…) and keys (`b0`…); more of these share them.
pub const COLOURS: usize = 6;

/// A page with this title and these elements.
pub fn page(title: &str, body: &str) -> String {
    let mut page =
        String::from("<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n");
    page.push_str("<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n");
    let _ = writeln!(page, "<title>{}</title>", escape(title));
    let _ = writeln!(page, "<style>\n{}</style>\n</head>\n<body>", include_str!("page/page.css"));
    page.push_str(body);
    page.push_str("</body>\n</html>\n");
    page
}

/// Text for XML and HTML, where it means nothing but itself.
pub fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            // XML 1.0 has no way to write these.
            c if c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}') => escaped.push('\u{fffd}'),
            c => escaped.push(c),
        }
    }
    escaped
}
