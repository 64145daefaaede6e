//! A set of pages of guest RAM, as a bit for each.

/// A set of pages of guest RAM, which are counted over all its ranges without the gap between them: page 0 is the first of the
/// lowest range.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageSet {
    words: Vec<u64>,
    pages: u64,
}

impl PageSet {
    /// None of `pages` pages.
    pub fn new(pages: u64) -> Self {
        Self { words: vec![0; pages.div_ceil(64) as usize], pages }
    }

    /// Of how many pages it is a set.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// How many are in it.
    pub fn count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Takes in `page`.
    ///
    /// # Panics
    /// If there is no such page.
    pub fn insert(&mut self, page: u64) {
        assert!(page < self.pages, "page {page} of {}", self.pages);
        self.words[(page / 64) as usize] |= 1 << (page % 64);
    }

    /// True if `page` is in it.
    pub fn contains(&self, page: u64) -> bool {
        page < self.pages && self.words[(page / 64) as usize] >> (page % 64) & 1 != 0
    }

    /// Pages behind each other, as the first and how many there are, lowest first.
    pub fn runs(&self) -> impl Iterator<Item = (u64, u64)> {
        let mut at = 0;
        std::iter::from_fn(move || {
            let start = self.next(at, true)?;
            at = self.next(start, false).unwrap_or(self.pages);
            Some((start, at - start))
        })
    }

    /// The first page from `from` on that is in the set, or is not.
    fn next(&self, from: u64, is_in: bool) -> Option<u64> {
        let mut page = from;
        while page < self.pages {
            let word = self.words[(page / 64) as usize];
            let rest = (if is_in { word } else { !word }) >> (page % 64);
            if rest != 0 {
                return Some(page + u64::from(rest.trailing_zeros())).filter(|at| *at < self.pages);
            }
            page = (page / 64 + 1) * 64;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_what_was_put_in() {
        let check = |pages: u64, of: &[u64], expected: &[(u64, u64)]| {
            let mut set = PageSet::new(pages);
            of.iter().for_each(|page| set.insert(*page));
            assert_eq!(set.runs().collect::<Vec<_>>(), expected);
            assert_eq!(set.count(), of.len() as u64);
            assert!(of.iter().all(|page| set.contains(*page)) && !set.contains(pages));
        };
        check(0, &[], &[]);
        check(70, &[], &[]);
        check(70, &[0, 1, 63, 64, 69], &[(0, 2), (63, 2), (69, 1)]);
        check(64, &[63], &[(63, 1)]);
        check(130, &(0..130).collect::<Vec<_>>(), &[(0, 130)]);
        check(200, &[130], &[(130, 1)]);
    }

    #[test]
    #[should_panic = "page 64 of 64"]
    fn there_are_no_more_pages_than_there_are() {
        PageSet::new(64).insert(64);
    }
}
