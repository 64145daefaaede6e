//! A writer of the archives that Linux unpacks as its first file system
//! (Documentation/driver-api/early-userspace/buffer-format.rst). Pure: files in, bytes out.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;

/// An archive of directories and programs that everybody may enter and run.
#[derive(Default)]
pub struct Archive {
    bytes: Vec<u8>,
    /// Those with an entry of their own: the kernel makes no others.
    directories: BTreeSet<PathBuf>,
    entries: usize,
}

impl Archive {
    /// Adds a program by its absolute path, and the directories that it is in.
    pub fn add(&mut self, path: &Path, contents: &[u8]) {
        let above: Vec<_> = path.ancestors().skip(1).filter(|dir| *dir != Path::new("/")).collect();
        for dir in above.into_iter().rev() {
            if self.directories.insert(dir.into()) {
                self.entry(dir, DIRECTORY, &[]);
            }
        }
        self.entry(path, PROGRAM, contents);
    }

    /// The whole of it.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry(Path::new("TRAILER!!!"), 0, &[]);
        self.bytes
    }

    fn entry(&mut self, path: &Path, mode: u32, contents: &[u8]) {
        let name = path.strip_prefix("/").unwrap_or(path).to_str().expect("a plain name");
        self.entries += 1;
        let (inode, mode, links, size, name_size) =
            (self.entries, mode as usize, 1, contents.len(), name.len() + 1);
        // Zeros: owner, group, time, the devices' numbers, the check sum.
        let fields = [inode, mode, 0, 0, links, 0, size, 0, 0, 0, 0, name_size, 0];
        self.bytes.extend(b"070701");
        for field in fields {
            self.bytes.extend(format!("{field:08x}").bytes());
        }
        self.bytes.extend(name.bytes().chain([0]));
        self.pad();
        self.bytes.extend(contents);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}
