//! The agent's generator of random numbers. A machine that began as a copy of another has the same memory, and so the same state of
//! the generator: what tells them apart, the generation, is taken in before each output.

use sha2::{Digest, Sha256};

/// A generator: each state is a hash of the one before and of what was taken in.
#[derive(Clone, Debug, Default)]
pub struct Generator {
    state: [u8; 32],
}

impl Generator {
    /// The next bytes, after `entropy` was taken in.
    pub fn next(&mut self, entropy: &[&[u8]]) -> [u8; 32] {
        let mut hash = Sha256::new();
        hash.update([0]);
        hash.update(self.state);
        for bytes in entropy {
            // With its length, so that other cuts of the same bytes are other entropy.
            hash.update((bytes.len() as u64).to_le_bytes());
            hash.update(bytes);
        }
        self.state = hash.finalize().into();
        // Nobody learns the state from what comes out.
        let mut hash = Sha256::new();
        hash.update([1]);
        hash.update(self.state);
        hash.finalize().into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clones_differ_by_what_they_take_in_and_in_nothing_else() {
        let mut original = Generator::default();
        original.next(&[b"boot"]);
        let (mut one, mut same, mut other) = (original.clone(), original.clone(), original);
        let first = one.next(&[b"generation 1"]);
        assert_eq!(first, same.next(&[b"generation 1"]));
        assert_ne!(first, other.next(&[b"generation 2"]));
        // They stay different with the same input.
        assert_ne!(one.next(&[]), other.next(&[]));
    }

    #[test]
    fn every_output_is_another_and_none_is_the_state() {
        let mut generator = Generator::default();
        let outputs = [generator.next(&[]), generator.next(&[]), generator.next(&[b""])];
        assert!(outputs[0] != outputs[1] && outputs[1] != outputs[2]);
        assert!(!outputs.contains(&generator.state));
    }
}
