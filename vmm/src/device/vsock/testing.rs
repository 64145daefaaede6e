//! What the tests of this device share: a directory, and a driver that keeps to the specification unless told otherwise.

mod driver;

use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

pub use self::driver::{BUFFER_LEN, EVENT_BUFFERS, TestDriver};

/// A directory of its own for one test, removed with everything in it.
pub struct TempDir(PathBuf);

impl TempDir {
    pub fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("vsock-{}-{count}", std::process::id()));
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).unwrap();
    }
}
