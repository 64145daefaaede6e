//! The bytes of a transfer: each depends on where it is in the stream, so whoever takes them sees one that is wrong, lost, moved
//! or doubled. Cheap enough (an addition for eight bytes) not to slow down what it checks.

/// The bytes of one direction from some position on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pattern {
    seed: u64,
    at: u64,
}

/// Odd, so that a word comes again after 2^64 words only; its bits are spread like those of the golden ratio.
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

impl Pattern {
    /// What the host sends to the guest.
    pub fn to_guest(seed: u64) -> Self {
        Self { seed, at: 0 }
    }

    /// What the guest sends to the host. Other bytes, so that none can be taken for those that come back.
    pub fn to_host(seed: u64) -> Self {
        Self { seed: !seed, at: 0 }
    }

    /// How many bytes lie before this position.
    pub fn position(&self) -> u64 {
        self.at
    }

    /// Writes the next bytes.
    pub fn fill(&mut self, bytes: &mut [u8]) {
        let (head, middle) = bytes.split_at_mut(self.head_of(bytes.len()));
        let word = self.word().to_le_bytes();
        head.copy_from_slice(&word[self.within()..][..head.len()]);
        self.at += head.len() as u64;
        let mut word = self.word();
        let (words, tail) = middle.as_chunks_mut::<8>();
        for bytes in &mut *words {
            *bytes = word.to_le_bytes();
            word = word.wrapping_add(STEP);
        }
        tail.copy_from_slice(&word.to_le_bytes()[..tail.len()]);
        self.at += (words.len() * 8 + tail.len()) as u64;
    }

    /// Compares the next bytes.
    ///
    /// # Errors
    /// The position of the first byte that differs.
    pub fn check(&mut self, bytes: &[u8]) -> Result<(), u64> {
        let from = *self;
        let (head, middle) = bytes.split_at(self.head_of(bytes.len()));
        let first = self.word().to_le_bytes();
        let mut equal = head == &first[self.within()..][..head.len()];
        self.at += head.len() as u64;
        let mut word = self.word();
        let (words, tail) = middle.as_chunks::<8>();
        // Without a branch for each word, so that a compiler can take several at once.
        let mut differences = 0;
        for bytes in words {
            differences |= u64::from_le_bytes(*bytes) ^ word;
            word = word.wrapping_add(STEP);
        }
        equal &= differences == 0 && tail == &word.to_le_bytes()[..tail.len()];
        self.at += (words.len() * 8 + tail.len()) as u64;
        if equal { Ok(()) } else { Err(from.first_difference(bytes)) }
    }

    fn first_difference(mut self, bytes: &[u8]) -> u64 {
        let start = self.at;
        let is_right = |byte: &&u8| {
            let mut expected = [0];
            self.fill(&mut expected);
            **byte == expected[0]
        };
        start + bytes.iter().take_while(is_right).count() as u64
    }

    /// The word at this position.
    fn word(&self) -> u64 {
        self.seed.wrapping_add((self.at / 8).wrapping_mul(STEP))
    }

    /// How many bytes of it lie before.
    fn within(&self) -> usize {
        (self.at % 8) as usize
    }

    /// How many of the next `len` bytes end a word that began before.
    fn head_of(&self, len: usize) -> usize {
        ((8 - self.within()) % 8).min(len)
    }
}

#[cfg(test)]
mod tests {
    use alloc::vec::Vec;

    use super::*;

    fn bytes(mut pattern: Pattern, len: usize) -> Vec<u8> {
        let mut bytes = alloc::vec![0; len];
        pattern.fill(&mut bytes);
        assert_eq!(pattern.position(), len as u64);
        bytes
    }

    #[test]
    fn the_bytes_do_not_depend_on_how_they_are_cut() {
        let whole = bytes(Pattern::to_guest(7), 1000);
        for cut in 1..40 {
            let mut filled = alloc::vec![0; whole.len()];
            let (mut filler, mut checker) = (Pattern::to_guest(7), Pattern::to_guest(7));
            filled.chunks_mut(cut).for_each(|chunk| filler.fill(chunk));
            assert_eq!(filled, whole, "cut at {cut}");
            whole.chunks(cut).for_each(|chunk| checker.check(chunk).unwrap());
            assert_eq!(checker.position(), 1000);
        }
    }

    #[test]
    fn every_wrong_byte_is_found_where_it_is() {
        let right = bytes(Pattern::to_guest(9), 50);
        for start in 0..9 {
            for wrong in start..right.len() {
                let mut pattern = Pattern::to_guest(9);
                pattern.check(&right[..start]).unwrap();
                let mut changed = right.clone();
                changed[wrong] ^= 0x10;
                changed[49] ^= 1;
                assert_eq!(pattern.check(&changed[start..]), Err(wrong.min(49) as u64));
                assert_eq!(pattern.position(), 50, "what is wrong is passed over");
            }
        }
    }

    #[test]
    fn lost_moved_and_returned_bytes_are_found() {
        let right = bytes(Pattern::to_guest(1), 4096);
        assert_eq!(Pattern::to_guest(1).check(&right[8..]), Err(0));
        let swapped = [&right[..1024], &right[2048..3072], &right[1024..2048]].concat();
        assert_eq!(Pattern::to_guest(1).check(&swapped), Err(1024));
        assert_eq!(Pattern::to_host(1).check(&right), Err(0));
        assert!(Pattern::to_guest(2).check(&right).is_err());
    }
}
