//! How often which times were seen, in a bounded amount of memory.

use std::collections::BTreeMap;

/// How often times of which length were seen, in whatever unit they have. Buckets are at most 3 % wide.
#[derive(Clone, Debug, Default)]
pub struct Histogram {
    counts: BTreeMap<u64, u64>,
    total: u64,
    max: u64,
}

/// Buckets between a power of two and the next.
const STEPS: u64 = 32;

impl Histogram {
    /// One more.
    pub fn add(&mut self, time: u64) {
        *self.counts.entry(floor(time)).or_default() += 1;
        self.total += 1;
        self.max = self.max.max(time);
    }

    /// How many there are.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// The largest.
    pub fn max(&self) -> Option<u64> {
        (self.total > 0).then_some(self.max)
    }

    /// The time that so many of a thousand do not exceed, to 3 %.
    pub fn per_mille(&self, per_mille: u64) -> Option<u64> {
        let rank = (self.total * per_mille).div_ceil(1000).max(1);
        let mut seen = 0;
        self.counts.iter().find_map(|(floor, count)| {
            seen += count;
            (seen >= rank).then(|| ceiling(*floor).min(self.max))
        })
    }

    /// The buckets that are not empty: from, to (not included), how many.
    pub fn buckets(&self) -> impl Iterator<Item = (u64, u64, u64)> + '_ {
        self.counts.iter().map(|(floor, count)| (*floor, ceiling(*floor) + 1, *count))
    }

    /// About `wanted` bars of equal width that hold all but the last per cent, and that width.
    pub fn bars(&self, wanted: u64) -> (Vec<u64>, u64) {
        let end = self.per_mille(990).unwrap_or(0) + 1;
        let width = (end / wanted).max(1);
        let mut bars = vec![0; (end / width + 1) as usize];
        for (from, to, count) in self.buckets().filter(|(from, ..)| *from < end) {
            if let Some(bar) = bars.get_mut(((from + to) / 2 / width) as usize) {
                *bar += count;
            }
        }
        (bars, width)
    }

    /// Adds all of another.
    pub fn merge(&mut self, other: &Self) {
        for (floor, count) in &other.counts {
            *self.counts.entry(*floor).or_default() += count;
        }
        self.total += other.total;
        self.max = self.max.max(other.max);
    }
}

fn width(time: u64) -> u64 {
    (time.max(1).ilog2().checked_sub(STEPS.ilog2())).map_or(1, |shift| 1 << shift)
}

fn floor(time: u64) -> u64 {
    time - time % width(time)
}

fn ceiling(floor: u64) -> u64 {
    floor + (width(floor) - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_right_to_three_percent() {
        let mut histogram = Histogram::default();
        (1..=10_000).for_each(|us| histogram.add(us));
        for per_mille in [10, 500, 900, 990, 999, 1000] {
            let (found, exact) = (histogram.per_mille(per_mille).unwrap(), per_mille * 10);
            assert!(found >= exact && found <= exact + exact / 32 + 1, "{per_mille}: {found}");
        }
        assert_eq!(histogram.max(), Some(10_000));
        assert_eq!(Histogram::default().per_mille(500), None);
    }

    #[test]
    fn buckets_hold_everything_once() {
        let mut histogram = Histogram::default();
        let times = [0, 1, 31, 32, 33, 1000, 1023, 1024, u64::MAX / 2];
        times.iter().for_each(|us| histogram.add(*us));
        let buckets: Vec<_> = histogram.buckets().collect();
        assert_eq!(buckets.iter().map(|(_, _, count)| count).sum::<u64>(), times.len() as u64);
        for us in times {
            assert_eq!(
                buckets.iter().filter(|(from, to, _)| (*from..*to).contains(&us)).count(),
                1
            );
        }
    }
}
