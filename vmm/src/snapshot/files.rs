//! Names of snapshots' files: nothing has the name of a snapshot that is not whole.
//!
//! Files are written under names of their own beside the targets (`NAME.partial`), which only one writer has at a time. What a killed
//! writer leaves there is recognizably no snapshot, and the next writer takes it over.

use std::fs::{File, TryLockError};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};

use super::{Header, SnapshotError, Targets, read_header};

/// Why a file with a name could not be had, or not be given its name.
#[derive(Debug, thiserror::Error)]
pub enum FilesError {
    /// The host failed.
    #[error("{action} {path:?}")]
    Io {
        /// What was asked of it.
        action: &'static str,
        /// With which file.
        path: PathBuf,
        /// What it said.
        source: io::Error,
    },
    /// No file that can be written or read at any place.
    #[error("{0:?} is no regular file: a snapshot's state and memory are two files")]
    NotRegular(PathBuf),
    /// One file cannot be both.
    #[error("{0:?} cannot be both the state file and the memory file")]
    Same(PathBuf),
    /// No file name.
    #[error("{0:?} has no file name at its end")]
    NoName(PathBuf),
    /// Somebody else writes the same snapshot.
    #[error("{0:?} is being written by another process: wait for that, or choose another name")]
    Busy(PathBuf),
    /// What was written is no snapshot.
    #[error("keep the snapshot {path:?}")]
    NotWhole {
        /// The state file's name.
        path: PathBuf,
        /// What is wrong with it.
        source: SnapshotError,
    },
}

impl FilesError {
    fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { action, path: path.to_owned(), source }
    }
}

/// Opens a file of a snapshot for reading.
///
/// # Errors
/// [`FilesError::Io`] or [`FilesError::NotRegular`].
pub fn open(path: &Path) -> Result<File, FilesError> {
    let mut options = File::options();
    // A pipe without a writer would be waited for.
    options.read(true).custom_flags(OFlags::NONBLOCK.bits() as i32);
    let file = options.open(path).map_err(FilesError::io("open", path))?;
    let metadata = file.metadata().map_err(FilesError::io("look at", path))?;
    match metadata.is_file() {
        true => Ok(file),
        false => Err(FilesError::NotRegular(path.to_owned())),
    }
}

/// The two files of a snapshot that is being written. They are removed if they do not become one.
#[derive(Debug)]
pub struct Drafts {
    state: Draft,
    memory: Draft,
}

impl Drafts {
    /// Files that are to be named `state` and `memory`, empty as yet. Only their owner can read them: RAM is full of secrets.
    ///
    /// # Errors
    /// [`FilesError`].
    pub fn create(state: &Path, memory: &Path) -> Result<Self, FilesError> {
        if state == memory {
            return Err(FilesError::Same(state.to_owned()));
        }
        Ok(Self { state: Draft::create(state)?, memory: Draft::create(memory)? })
    }

    /// Their descriptors, for whoever writes them.
    ///
    /// # Errors
    /// [`FilesError::Io`] if there are too many descriptors.
    pub fn targets(&self) -> Result<Targets, FilesError> {
        let clone = |draft: &Draft| {
            draft.file.try_clone().map_err(FilesError::io("open anew", &draft.partial))
        };
        Ok(Targets { state: clone(&self.state)?, memory: clone(&self.memory)? })
    }

    /// Gives them their names, when they have been written and are on the medium. An older snapshot of the same names is whole
    /// until then; after that there is a moment at which there is no state file, and so no snapshot.
    ///
    /// # Errors
    /// [`FilesError`]. Nothing new has a name then, unless it is the memory file alone.
    pub fn commit(mut self) -> Result<Header, FilesError> {
        let path = || self.state.target.clone();
        let not_whole = |source| FilesError::NotWhole { path: path(), source };
        let header = read_header(&self.state.file).map_err(not_whole)?;
        let (expected, found) = (header.ram_bytes, self.memory.len()?);
        if found != expected {
            return Err(not_whole(SnapshotError::MemoryLength { expected, found }));
        }
        self.memory.sync()?;
        self.state.sync()?;
        // From here on no state file may be beside another snapshot's memory.
        let old = &self.state.target;
        match std::fs::remove_file(old) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(FilesError::Io { action: "replace", path: old.clone(), source: error });
            }
            _ => sync_directory(old)?,
        }
        self.memory.name()?;
        self.state.name()?;
        Ok(header)
    }
}

/// A file under a name of its own beside the one that it is to have.
#[derive(Debug)]
struct Draft {
    file: File,
    partial: PathBuf,
    target: PathBuf,
    is_named: bool,
}

impl Draft {
    fn create(target: &Path) -> Result<Self, FilesError> {
        let Some(name) = target.file_name() else {
            return Err(FilesError::NoName(target.to_owned()));
        };
        // What a rename would silently replace, or fail at when all work is done.
        match std::fs::symlink_metadata(target) {
            Ok(metadata) if !metadata.is_file() => {
                return Err(FilesError::NotRegular(target.to_owned()));
            }
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(FilesError::io("look at", target)(error));
            }
            _ => {}
        }
        let mut partial = name.to_owned();
        partial.push(".partial");
        let partial = target.with_file_name(partial);
        let file = lock_partial(&partial)?;
        // It is ours now: from here on it goes away with this value.
        let draft = Self { file, partial, target: target.to_owned(), is_named: false };
        draft.file.set_len(0).map_err(FilesError::io("empty", &draft.partial))?;
        Ok(draft)
    }

    fn len(&self) -> Result<u64, FilesError> {
        let metadata = self.file.metadata().map_err(FilesError::io("look at", &self.partial))?;
        Ok(metadata.len())
    }

    fn sync(&self) -> Result<(), FilesError> {
        self.file.sync_all().map_err(FilesError::io("write to the medium", &self.partial))
    }

    fn name(&mut self) -> Result<(), FilesError> {
        std::fs::rename(&self.partial, &self.target)
            .map_err(FilesError::io("rename", &self.partial))?;
        self.is_named = true;
        sync_directory(&self.target)
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.is_named {
            // It has been our own since it was locked. If this fails, the next writer takes it over.
            let _ = std::fs::remove_file(&self.partial);
        }
    }
}

/// Opens `path`, which exists or not, for this process alone.
fn lock_partial(path: &Path) -> Result<File, FilesError> {
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    loop {
        let mut options = File::options();
        options.read(true).write(true).create(true).truncate(false);
        options.mode((Mode::RUSR | Mode::WUSR).bits()).custom_flags(flags.bits() as i32);
        let file = options.open(path).map_err(FilesError::io("create", path))?;
        let opened = file.metadata().map_err(FilesError::io("look at", path))?;
        if !opened.is_file() {
            return Err(FilesError::NotRegular(path.to_owned()));
        }
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(FilesError::Busy(path.to_owned())),
            Err(TryLockError::Error(error)) => return Err(FilesError::io("lock", path)(error)),
        }
        // Another writer may have given the file its name, or removed it, before the lock was ours.
        let same =
            |named: std::fs::Metadata| (named.dev(), named.ino()) == (opened.dev(), opened.ino());
        if std::fs::symlink_metadata(path).is_ok_and(same) {
            return Ok(file);
        }
    }
}

/// Has the names in the directory of `path` on the medium.
fn sync_directory(path: &Path) -> Result<(), FilesError> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    let directory = parent.unwrap_or(Path::new("."));
    File::open(directory)
        .and_then(|directory| directory.sync_all())
        .map_err(FilesError::io("write to the medium", directory))
}
