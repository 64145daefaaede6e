//! Reports on a soak for others than the one who started it.

mod html;
mod junit;
mod plot;

use std::time::Duration;

use super::campaign::Plan;
use super::figures::Figures;
use super::line::Machine;

pub use html::html;
pub use junit::junit;

/// What they tell.
pub struct Report<'a> {
    /// What was to be done.
    pub plan: &'a Plan,
    /// Name of the host.
    pub host: &'a str,
    /// What the machines ran on.
    pub machine: Option<&'a Machine>,
    /// What came of it.
    pub figures: &'a Figures,
    /// Commands that show the first findings again.
    pub replays: &'a [String],
    /// In a word or two.
    pub verdict: &'a str,
    /// Why it ended.
    pub ending: &'a str,
    /// How long it took.
    pub took: Duration,
}

/// Text for XML and HTML, where it means nothing but itself.
fn escape(text: &str) -> String {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_cannot_become_markup() {
        assert_eq!(
            escape("<a href='x'>\"&\u{1b}"),
            "&lt;a href=&#39;x&#39;&gt;&quot;&amp;\u{fffd}"
        );
    }
}
