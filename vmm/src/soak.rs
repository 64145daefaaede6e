//! A soak: many machines, each in a process of its own, reset again and again at random moments until something is found.
//!
//! This process is the coordinator. It runs no machine: it starts `cleanslate run --json-lines` for each, reads what they
//! say, and judges how they end. What a machine's process says is untrusted, as the guest may have taken it over.

pub mod bundle;
pub mod campaign;
pub mod figures;
pub mod line;
pub mod merge;
pub mod plan;
pub mod process;
pub mod record;
pub mod report;
mod slot;

/// Where something happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The soak's seed.
    pub seed: u64,
    /// Which machine.
    pub vm: u32,
    /// Which of its processes; the first is 0.
    pub process: u32,
}

/// Text of a machine's process or its guest, for terminals and pages: no control characters, no more than a screen of it.
pub fn printable(text: &str) -> String {
    const MOST_CHARACTERS: usize = 2000;
    let visible = |c: char| if c.is_control() { '\u{fffd}' } else { c };
    text.chars().take(MOST_CHARACTERS).map(visible).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_machines_say_cannot_steer_a_terminal() {
        assert_eq!(printable("a\x1b[2J\nb"), "a\u{fffd}[2J\u{fffd}b");
        assert_eq!(printable(&"x".repeat(1 << 20)).len(), 2000);
    }
}
