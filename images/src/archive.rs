//! Archives that Linux unpacks as its first file system (Documentation/driver-api/early-userspace/buffer-format.rst). Files in,
//! bytes out; several archives behind each other are one.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};

use cpio::newc::{Builder, trailer};

const DIRECTORY: u32 = 0o040_755;
const FILE: u32 = 0o100_755;
const LINK: u32 = 0o120_777;

/// An archive of directories, files that everybody may read and run, and links.
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    /// Those with an entry of their own: the kernel makes no others.
    directories: BTreeSet<PathBuf>,
    entries: u32,
}

impl Archive {
    /// Adds a file by its absolute path, and the directories that it is in.
    pub fn file(&mut self, path: impl AsRef<Path>, contents: &[u8]) {
        self.add(path.as_ref(), FILE, contents);
    }

    /// Adds a symbolic link by its absolute path, and the directories that it is in.
    pub fn link(&mut self, path: impl AsRef<Path>, target: &str) {
        self.add(path.as_ref(), LINK, target.as_bytes());
    }

    /// Adds a directory by its absolute path, and those that it is in.
    pub fn directory(&mut self, path: impl AsRef<Path>) {
        let all: Vec<_> = path.as_ref().ancestors().filter(|dir| dir.parent().is_some()).collect();
        for dir in all.into_iter().rev() {
            if self.directories.insert(dir.into()) {
                self.entry(dir, DIRECTORY, &[]);
            }
        }
    }

    /// The whole of it.
    pub fn finish(self) -> Vec<u8> {
        let mut bytes = trailer(self.bytes).expect("memory takes all writes");
        // The kernel wants the next archive to begin at a multiple of four.
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn add(&mut self, path: &Path, mode: u32, contents: &[u8]) {
        if let Some(parent) = path.parent() {
            self.directory(parent);
        }
        self.entry(path, mode, contents);
    }

    fn entry(&mut self, path: &Path, mode: u32, contents: &[u8]) {
        let name = path.strip_prefix("/").unwrap_or(path).to_string_lossy();
        self.entries += 1;
        // A length fits: nobody has an initial file system of 4 GiB.
        let entry = Builder::new(&name).ino(self.entries).mode(mode).nlink(1);
        let mut writer = entry.write(&mut self.bytes, contents.len() as u32);
        writer.write_all(contents).expect("memory takes all writes");
        writer.finish().expect("as many bytes as were announced");
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    fn list(mut bytes: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut entries = Vec::new();
        loop {
            let mut reader = cpio::newc::Reader::new(bytes).unwrap();
            if reader.entry().is_trailer() {
                return entries;
            }
            let (name, mode) = (reader.entry().name().to_string(), reader.entry().mode());
            let mut contents = Vec::new();
            reader.read_to_end(&mut contents).unwrap();
            entries.push((name, mode, contents));
            bytes = reader.finish().unwrap();
        }
    }

    #[test]
    fn directories_come_before_what_is_in_them_and_once() {
        let mut archive = Archive::default();
        archive.file("/a/b/one", b"1");
        archive.file("/a/two", b"22");
        archive.link("/a/three", "b/one");
        archive.directory("/a/b");
        let bytes = archive.finish();
        assert!(bytes.len().is_multiple_of(4));
        let expected = [
            ("a", DIRECTORY, ""),
            ("a/b", DIRECTORY, ""),
            ("a/b/one", FILE, "1"),
            ("a/two", FILE, "22"),
            ("a/three", LINK, "b/one"),
        ];
        let expected = expected.map(|(name, mode, text)| (name.into(), mode, text.into()));
        assert_eq!(list(&bytes), expected);
    }
}
