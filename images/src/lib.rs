//! Guest images that are part of the monitor itself, so that one binary is all that a user needs.

#![forbid(unsafe_code)]

/// The guest agent: a static x86-64 ELF with a PVH entry note, to be loaded where its program headers say (from 1 MiB).
/// build.rs builds it from `guest-agent/unikernel`.
pub static AGENT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/cleanslate-agent.elf"));

/// An agent that is after its monitor (feature `attacks` of the same crate); for tests.
#[cfg(feature = "attacker")]
pub static ATTACKER: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/cleanslate-attacker.elf"));

#[cfg(test)]
mod tests {
    use super::AGENT;

    #[test]
    fn the_agent_is_a_small_static_elf_with_a_pvh_note() {
        assert_eq!(AGENT[..6], *b"\x7fELF\x02\x01");
        assert_eq!(AGENT[16..20], [2, 0, 62, 0], "a fixed-address executable for x86-64");
        assert!(AGENT.len() < 256 * 1024, "{} bytes", AGENT.len());
        let note = [4, 0, 0, 0, 8, 0, 0, 0, 18, 0, 0, 0, b'X', b'e', b'n', 0];
        assert!(AGENT.windows(note.len()).any(|window| window == note));
    }
}
