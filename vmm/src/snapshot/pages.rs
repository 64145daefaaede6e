//! Which pages of RAM a snapshot has something to say about.

use serde::{Deserialize, Serialize};

/// Pages behind each other that are alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Number of the first.
    pub first: u64,
    /// How many.
    pub pages: u64,
    /// True if they are empty and not in the memory file.
    pub is_empty: bool,
}

/// The pages that count, lowest first. A full snapshot names those with contents, all others are empty. A layer names those that
/// changed, and which of them are empty now; all others are as its parent has them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageMap(Vec<Run>);

/// An extent as it is written: small numbers are short.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Run {
    /// Pages between the last run and this one that do not count.
    skipped: u32,
    pages: u32,
    is_empty: bool,
}

impl PageMap {
    /// What is named, in order.
    pub fn extents(&self) -> impl Iterator<Item = Extent> {
        let mut at = 0;
        self.0.iter().map(move |run| {
            let first = at + u64::from(run.skipped);
            at = first + u64::from(run.pages);
            Extent { first, pages: u64::from(run.pages), is_empty: run.is_empty }
        })
    }

    /// How many pages are in the memory file.
    pub fn stored(&self) -> u64 {
        self.extents().filter(|extent| !extent.is_empty).map(|extent| extent.pages).sum()
    }

    /// True if all are of RAM of so many pages. Nobody may use a map that was read from a file before this was asked.
    pub(super) fn fits(&self, pages: u64) -> bool {
        // At most as many runs as there are bytes in a file, of less than 2^33 pages each: the sum cannot wrap.
        self.extents().all(|extent| extent.pages > 0 && extent.first + extent.pages <= pages)
    }
}

/// Makes a map of pages that come in order.
#[derive(Debug, Default)]
pub(super) struct PageMapBuilder {
    runs: Vec<Run>,
    end: u64,
}

impl PageMapBuilder {
    /// Names `page`, which lies behind all that were named.
    pub fn push(&mut self, page: u64, is_empty: bool) {
        let skipped = page - self.end;
        self.end = page + 1;
        match self.runs.last_mut() {
            Some(run) if skipped == 0 && run.is_empty == is_empty && run.pages < u32::MAX => {
                run.pages += 1;
            }
            // RAM has less than 2^32 pages (16 TiB).
            _ => self.runs.push(Run { skipped: skipped as u32, pages: 1, is_empty }),
        }
    }

    /// The map.
    pub fn finish(self) -> PageMap {
        PageMap(self.runs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_has_what_was_named_and_fits_where_that_is() {
        let mut map = PageMapBuilder::default();
        for (page, is_empty) in [(0, false), (1, false), (2, true), (5, false), (6, false)] {
            map.push(page, is_empty);
        }
        let map = map.finish();
        let extent = |first, pages, is_empty| Extent { first, pages, is_empty };
        let expected = [extent(0, 2, false), extent(2, 1, true), extent(5, 2, false)];
        assert_eq!(map.extents().collect::<Vec<_>>(), expected);
        assert_eq!(map.stored(), 4);
        assert!(map.fits(7) && !map.fits(6));
        assert!(PageMap::default().fits(0));
    }

    #[test]
    fn runs_of_a_file_may_not_be_empty_or_beyond_ram() {
        let fits = |runs: &[(u32, u32)], pages| {
            let run = |(skipped, pages): &(u32, u32)| Run {
                skipped: *skipped,
                pages: *pages,
                is_empty: false,
            };
            PageMap(runs.iter().map(run).collect()).fits(pages)
        };
        assert!(fits(&[(1, 2), (0, 1)], 4));
        assert!(!fits(&[(1, 2), (0, 1)], 3));
        assert!(!fits(&[(0, 0)], 4));
        assert!(!fits(&[(u32::MAX, u32::MAX), (u32::MAX, u32::MAX)], 4));
    }
}
