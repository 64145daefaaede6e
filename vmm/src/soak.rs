//! A soak: many machines, each in a process of its own, reset again and again at random moments until something is found.
//!
//! This process is the coordinator. It runs no machine: it starts `cleanslate run --json-lines` for each, reads what they
//! say, and judges how they end. What a machine's process says is untrusted, as the guest may have taken it over.

pub mod bundle;
pub mod campaign;
pub mod figures;
pub mod line;
mod process;
pub mod progress;
pub mod report;

use crate::schedule::Random;

/// The seed of a machine: from the soak's, its number, and how many processes it had before.
pub fn seed_of(seed: u64, vm: u32, process: u32) -> u64 {
    let place = (u64::from(vm) << 32) | u64::from(process);
    // Numbers of this size are the same in every reader of JSON.
    Random::new(seed ^ Random::new(place).number()).number() >> 11
}

/// Text of a machine's process or its guest, for terminals and pages: no control characters, no more than a screen of it.
pub fn printable(text: &str) -> String {
    const MOST_CHARACTERS: usize = 2000;
    let visible = |c: char| if c.is_control() { '\u{fffd}' } else { c };
    text.chars().take(MOST_CHARACTERS).map(visible).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_machine_and_process_has_a_seed_of_its_own() {
        let places = (1..100).flat_map(|vm| (0..100).map(move |process| (vm, process)));
        let seeds: BTreeSet<_> = places.map(|(vm, process)| seed_of(42, vm, process)).collect();
        assert_eq!(seeds.len(), 99 * 100);
        assert!(seeds.iter().all(|seed| *seed < 1 << 53));
        assert_ne!(seed_of(1, 1, 0), seed_of(2, 1, 0));
    }

    #[test]
    fn what_machines_say_cannot_steer_a_terminal() {
        assert_eq!(printable("a\x1b[2J\nb"), "a\u{fffd}[2J\u{fffd}b");
        assert_eq!(printable(&"x".repeat(1 << 20)).len(), 2000);
    }
}
