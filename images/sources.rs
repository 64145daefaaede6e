//! What the agent is built from: for build.rs, and for the test that what is embedded was built from what is there.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;

/// Files and directories in `guest-agent`.
pub const SOURCES: [&str; 9] = [
    "linux/src",
    "linux/Cargo.toml",
    "unikernel/src",
    "unikernel/Cargo.toml",
    "unikernel/Cargo.lock",
    "unikernel/build.rs",
    "unikernel/link.ld",
    "protocol/src",
    "protocol/Cargo.toml",
];

/// A number for the names and contents of all of them; `guest` is the path of `guest-agent`.
pub fn digest(guest: &Path) -> u64 {
    let mut hasher = DefaultHasher::new();
    SOURCES.iter().for_each(|source| add(&guest.join(source), &mut hasher));
    hasher.finish()
}

fn add(path: &Path, hasher: &mut DefaultHasher) {
    path.file_name().hash(hasher);
    if path.is_dir() {
        let entries = std::fs::read_dir(path).unwrap_or_else(|e| panic!("list {path:?}: {e}"));
        let mut paths: Vec<_> = entries.map(|entry| entry.expect("an entry").path()).collect();
        paths.sort();
        paths.iter().for_each(|path| add(path, hasher));
    } else {
        std::fs::read(path).unwrap_or_else(|e| panic!("read {path:?}: {e}")).hash(hasher);
    }
}
