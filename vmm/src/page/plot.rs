//! Plots as SVG, written by hand: a few of them need no library, and a page without scripts needs no more than they have.

use std::fmt::Write as _;

use super::escape;

/// Size of a plot in its own units; the page scales it.
const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 260.0;
const LEFT: f64 = 64.0;
/// Half a label of seven digits.
const RIGHT: f64 = 28.0;
const TOP: f64 = 12.0;
const BOTTOM: f64 = 44.0;

/// An axis from 0, with room for its largest value.
struct Axis {
    end: f64,
    step: f64,
}

impl Axis {
    /// Steps of 1, 2 or 5 times a power of ten, about `ticks` of them.
    fn new(max: f64, ticks: f64) -> Self {
        let max = if max > 0.0 { max } else { 1.0 };
        let rough = max / ticks;
        let power = 10_f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].map(|m| m * power).into_iter().find(|s| *s >= rough);
        let step = step.unwrap_or(rough);
        Self { end: (max / step).ceil() * step, step }
    }

    /// An axis of whole numbers.
    fn whole(max: u64, ticks: f64) -> Self {
        let Self { step, .. } = Self::new(max as f64, ticks);
        let step = step.max(1.0);
        Self { end: (max.max(1) as f64 / step).ceil() * step, step }
    }

    fn ticks(&self) -> impl Iterator<Item = f64> + '_ {
        (0..=(self.end / self.step).round() as u32).map(|tick| f64::from(tick) * self.step)
    }

    fn label(&self, value: f64) -> String {
        match self.step {
            step if step >= 1.0 => format!("{value:.0}"),
            step if step >= 0.1 => format!("{value:.1}"),
            _ => format!("{value:.2}"),
        }
    }
}

/// A plot with its axes.
pub struct Plot {
    svg: String,
    x: Axis,
    y: Axis,
}

impl Plot {
    /// An empty plot, with what it shows in words and the titles of its axes, for values up to these.
    pub fn new(
        id: &str,
        says: &str,
        titles: (&str, &str),
        max: (f64, f64),
        whole: (bool, bool),
    ) -> Self {
        let axis = |max: f64, ticks, whole| match whole {
            true => Axis::whole(max as u64, ticks),
            false => Axis::new(max, ticks),
        };
        let (x, y) = (axis(max.0, 8.0, whole.0), axis(max.1, 5.0, whole.1));
        let mut plot = Self { svg: String::new(), x, y };
        let says = escape(says);
        let _ = writeln!(
            plot.svg,
            "<svg id=\"{id}\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{says}\">"
        );
        plot.axes(titles);
        plot
    }

    fn axes(&mut self, (x_title, y_title): (&str, &str)) {
        let (left, right, bottom) = (LEFT, WIDTH - RIGHT, HEIGHT - BOTTOM);
        for value in self.y.ticks().collect::<Vec<_>>() {
            let (y, label) = (self.y(value), self.y.label(value));
            let _ = writeln!(
                self.svg,
                "<line class=\"grid\" x1=\"{left}\" y1=\"{y:.1}\" x2=\"{right}\" y2=\"{y:.1}\"/>\
                 <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{label}</text>",
                left - 6.0,
                y + 4.0
            );
        }
        for value in self.x.ticks().collect::<Vec<_>>() {
            let (x, label) = (self.x(value), self.x.label(value));
            let _ = writeln!(
                self.svg,
                "<line class=\"axis\" x1=\"{x:.1}\" y1=\"{bottom}\" x2=\"{x:.1}\" y2=\"{}\"/>\
                 <text x=\"{x:.1}\" y=\"{}\" text-anchor=\"middle\">{label}</text>",
                bottom + 4.0,
                bottom + 17.0
            );
        }
        let middle = (LEFT + right) / 2.0;
        let half = (TOP + bottom) / 2.0;
        let _ = writeln!(
            self.svg,
            "<line class=\"axis\" x1=\"{left}\" y1=\"{bottom}\" x2=\"{right}\" y2=\"{bottom}\"/>\
             <text class=\"title\" x=\"{middle}\" y=\"{}\" text-anchor=\"middle\">{}</text>\
             <text class=\"title\" transform=\"translate(14 {half}) rotate(-90)\" text-anchor=\"middle\">{}</text>",
            HEIGHT - 8.0,
            escape(x_title),
            escape(y_title),
        );
    }

    fn x(&self, value: f64) -> f64 {
        LEFT + value / self.x.end * (WIDTH - LEFT - RIGHT)
    }

    fn y(&self, value: f64) -> f64 {
        HEIGHT - BOTTOM - value / self.y.end * (HEIGHT - TOP - BOTTOM)
    }

    /// A line through points.
    pub fn line(&mut self, class: &str, name: &str, points: impl Iterator<Item = (f64, f64)>) {
        let points: Vec<_> =
            points.map(|(x, y)| format!("{:.1},{:.1}", self.x(x), self.y(y))).collect();
        // A single point would not show as a line.
        let points = match points.as_slice() {
            [one] => format!("{one} {one}"),
            all => all.join(" "),
        };
        let _ = writeln!(
            self.svg,
            "<polyline class=\"{class}\" points=\"{points}\"><title>{}</title></polyline>",
            escape(name)
        );
    }

    /// A bar from one value to another.
    pub fn bar(&mut self, (from, to): (f64, f64), height: f64, name: &str) {
        let (x, width) = (self.x(from), (self.x(to) - self.x(from)).max(0.8));
        let (y, foot) = (self.y(height), self.y(0.0));
        let _ = writeln!(
            self.svg,
            "<rect class=\"bar\" x=\"{x:.2}\" y=\"{y:.2}\" width=\"{width:.2}\" height=\"{:.2}\">\
             <title>{}</title></rect>",
            (foot - y).max(0.5),
            escape(name)
        );
    }

    /// A mark.
    pub fn mark(&mut self, class: &str, (x, y): (f64, f64), name: &str) {
        let (x, y) = (self.x(x), self.y(y));
        let _ = writeln!(
            self.svg,
            "<circle class=\"{class}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4\"><title>{}</title></circle>",
            escape(name)
        );
    }

    /// The finished plot.
    pub fn finish(mut self) -> String {
        self.svg.push_str("</svg>\n");
        self.svg
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_end_at_a_round_number_that_holds_everything() {
        for max in [0.0, 0.3, 1.0, 7.2, 99.0, 1001.0, 123_456.0] {
            let axis = Axis::new(max, 5.0);
            assert!(axis.end >= max && axis.ticks().count() <= 8, "{max}: {}", axis.end);
        }
        let labels: Vec<_> = {
            let axis = Axis::whole(3, 5.0);
            axis.ticks().map(|t| axis.label(t)).collect()
        };
        assert_eq!(labels, ["0", "1", "2", "3"]);
    }

    #[test]
    fn nothing_is_drawn_outside() {
        let mut plot = Plot::new("p", "a plot", ("x", "y"), (10.0, 4.0), (false, false));
        plot.bar((0.0, 10.0), 4.0, "all");
        let (x, y) = (plot.x(10.0), plot.y(4.0));
        assert!(x <= WIDTH && y >= 0.0 && plot.y(0.0) <= HEIGHT);
        assert!(plot.finish().ends_with("</svg>\n"));
    }
}
