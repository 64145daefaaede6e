//! The figures of a soak, in a bounded amount of memory however long it takes.

use std::collections::BTreeMap;

use super::line::Life;
use super::{Place, printable};
use crate::histogram::Histogram;

/// Times in their order, so many of them together that there are never more than [`MOST_POINTS`].
#[derive(Clone, Debug, Default)]
pub struct Series {
    points: Vec<Point>,
    stride_log2: u32,
    count: u64,
}

/// Some successive times.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Point {
    /// How many.
    pub count: u64,
    /// All of them.
    pub sum: u64,
    /// The longest.
    pub max: u64,
}

impl Point {
    /// Their mean.
    pub fn mean(&self) -> u64 {
        self.sum / self.count.max(1)
    }

    fn with(self, other: Self) -> Self {
        Self {
            count: self.count + other.count,
            sum: self.sum + other.sum,
            max: self.max.max(other.max),
        }
    }
}

/// More would not be seen on a page.
pub const MOST_POINTS: usize = 512;

impl Series {
    /// The next.
    pub fn add(&mut self, us: u64) {
        let index = (self.count >> self.stride_log2) as usize;
        if index == MOST_POINTS {
            let pairs = self.points.chunks(2);
            self.points =
                pairs.map(|pair| pair.iter().fold(Point::default(), |a, b| a.with(*b))).collect();
            self.stride_log2 += 1;
            return self.add(us);
        }
        if index == self.points.len() {
            self.points.push(Point::default());
        }
        self.points[index] = self.points[index].with(Point { count: 1, sum: us, max: us });
        self.count += 1;
    }

    /// The points in order.
    pub fn points(&self) -> &[Point] {
        &self.points
    }
}

/// What is known of one machine.
#[derive(Clone, Debug, Default)]
pub struct Vm {
    /// Lives that it told of.
    pub lives: u64,
    /// Processes that it has had.
    pub processes: u32,
    /// Findings in them.
    pub findings: u64,
    /// Times to hello after a reset.
    pub hello: Histogram,
    /// The same, in order.
    pub series: Series,
}

impl Vm {
    /// Resets that the next life told of.
    pub fn resets(&self) -> u64 {
        self.lives.saturating_sub(u64::from(self.processes))
    }
}

/// A finding as it is shown.
#[derive(Clone, Debug)]
pub struct Shown {
    /// Where.
    pub place: Place,
    /// In which life of that process.
    pub life: u32,
    /// How many lives the machine had by then.
    pub lives: u64,
    /// Stable name.
    pub name: String,
    /// What was seen.
    pub detail: String,
    /// Where its bundle is, if it has one.
    pub bundle: Option<String>,
}

/// Everything that is kept of a soak.
#[derive(Clone, Debug, Default)]
pub struct Figures {
    /// By the soak's seed and their number.
    pub vms: BTreeMap<(u64, u32), Vm>,
    /// Times to hello by cause and by moment.
    pub groups: BTreeMap<(&'static str, &'static str), Histogram>,
    /// How often each finding was made.
    pub names: BTreeMap<String, u64>,
    /// The first findings.
    pub shown: Vec<Shown>,
}

/// More findings are counted and not shown.
const MOST_SHOWN: usize = 1000;
/// Names of findings; a process that was taken over could make up others.
const MOST_NAMES: usize = 64;

impl Figures {
    /// A life is over, or ended with its process.
    pub fn add(&mut self, place: Place, life: &Life, bundle: Option<String>) {
        let vm = self.vms.entry((place.seed, place.vm)).or_default();
        vm.processes = place.process.saturating_add(1);
        // Lives that nobody told of have no cause.
        vm.lives += u64::from(life.cause.is_some());
        vm.findings += life.findings.len() as u64;
        // The first life includes the start of its process.
        if let (Some(us), Some(cause), true) = (life.hello_us, life.cause, life.life > 1) {
            vm.hello.add(us);
            vm.series.add(us);
            let moment = life.moment.map_or("", |moment| moment.name());
            self.groups.entry((cause.name(), moment)).or_default().add(us);
        }
        let lives = vm.lives;
        for found in &life.findings {
            let name = printable(&found.name);
            if self.names.len() < MOST_NAMES || self.names.contains_key(&name) {
                *self.names.entry(name.clone()).or_default() += 1;
            }
            if self.shown.len() < MOST_SHOWN {
                let detail = printable(&found.detail);
                let (life, bundle) = (life.life, bundle.clone());
                self.shown.push(Shown { place, life, lives, name, detail, bundle });
            }
        }
    }

    /// Lives of all machines.
    pub fn lives(&self) -> u64 {
        self.vms.values().map(|vm| vm.lives).sum()
    }

    /// Resets of all machines, as far as the next life told of them.
    pub fn resets(&self) -> u64 {
        self.vms.values().map(Vm::resets).sum()
    }

    /// Findings of all machines.
    pub fn findings(&self) -> u64 {
        self.vms.values().map(|vm| vm.findings).sum()
    }

    /// Times to hello by a part of what they are kept by.
    pub fn grouped(
        &self,
        part: impl Fn((&'static str, &'static str)) -> &'static str,
    ) -> BTreeMap<&'static str, Histogram> {
        let mut grouped: BTreeMap<_, Histogram> = BTreeMap::new();
        for (key, histogram) in &self.groups {
            grouped.entry(part(*key)).or_default().merge(histogram);
        }
        grouped
    }

    /// Times to hello of all machines.
    pub fn hello(&self) -> Histogram {
        self.vms.values().fold(Histogram::default(), |mut all, vm| {
            all.merge(&vm.hello);
            all
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_series_keeps_its_shape_in_few_points() {
        let mut series = Series::default();
        (0..1_000_000).for_each(|us| series.add(us));
        let points = series.points();
        assert!(points.len() <= MOST_POINTS && points.len() > MOST_POINTS / 2 - 2);
        assert_eq!(points.iter().map(|point| point.count).sum::<u64>(), 1_000_000);
        assert!(points.windows(2).all(|pair| pair[0].mean() < pair[1].mean()));
        assert_eq!(points.last().unwrap().max, 999_999);
    }
}
