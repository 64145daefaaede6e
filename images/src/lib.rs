//! Guest images that are part of the monitor itself, so that one binary is all that a user needs.

#![forbid(unsafe_code)]

pub mod archive;
mod cache;
pub mod guest;
pub mod kernel;
pub mod lab;
pub mod unpack;

/// The guest agent: a static x86-64 ELF with a PVH entry note, to be loaded where its program headers say (from 1 MiB).
/// build.rs builds it from `guest-agent/unikernel`.
pub static AGENT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/cleanslate-agent.elf"));

/// The agent as the first process of a Linux guest: a static x86-64 program. build.rs builds it from `guest-agent/linux`.
pub static LINUX_AGENT: &[u8] =
    include_bytes!(concat!(env!("OUT_DIR"), "/cleanslate-linux-agent.elf"));

#[cfg(test)]
#[path = "../sources.rs"]
mod sources;

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::{AGENT, sources};

    #[test]
    fn the_agent_was_built_from_the_sources_that_are_there() {
        // Where this test runs, not where it was built.
        let here = std::env::var("CARGO_MANIFEST_DIR").expect("cargo sets it");
        let there = sources::digest(&Path::new(&here).join("../guest-agent"));
        let built = env!("AGENT_SOURCES");
        assert_eq!(built, there.to_string(), "stale; `touch images/build.rs` has it built again");
    }

    #[test]
    fn the_agent_is_a_small_static_elf_with_a_pvh_note() {
        assert_eq!(AGENT[..6], *b"\x7fELF\x02\x01");
        assert_eq!(AGENT[16..20], [2, 0, 62, 0], "a fixed-address executable for x86-64");
        assert!(AGENT.len() < 256 * 1024, "{} bytes", AGENT.len());
        let note = [4, 0, 0, 0, 8, 0, 0, 0, 18, 0, 0, 0, b'X', b'e', b'n', 0];
        assert!(AGENT.windows(note.len()).any(|window| window == note));
    }
}
