//! The directory that is a jailed program's root, below the one that the user names. It is used if it is there; otherwise it
//! is made, and the janitor removes what was made and is empty in the end.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use crate::janitor::Janitor;
use crate::root::Mount;
use crate::user::User;

/// Something about the directory that the system refused.
#[derive(Debug, thiserror::Error)]
#[error("{action} {path:?}")]
pub struct ChrootError {
    action: &'static str,
    path: PathBuf,
    source: io::Error,
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ChrootError {
    move |source| ChrootError { action, path: path.into(), source }
}

/// Makes the directory `root` with all above it and the places of `mounts` in it, and gives it to `owner`. If it is there,
/// nothing is done.
///
/// # Errors
/// [`ChrootError`].
pub fn make(
    root: &Path,
    mounts: &[Mount],
    owner: Option<User>,
    janitor: &Janitor,
) -> Result<(), ChrootError> {
    if !make_directories(root, janitor)? {
        return Ok(());
    }
    // Here and not on the way into the jail, since these are to be removed with the directory.
    for mount in mounts {
        let place = root.join(mount.target.strip_prefix("/").unwrap_or(&mount.target));
        match mount.source.metadata() {
            Ok(metadata) if metadata.is_dir() => {
                make_directories(&place, janitor)?;
            }
            Ok(_) => make_file(&place, janitor)?,
            // The way into the jail says it better.
            Err(_) => {}
        }
    }
    // Last: until then nobody else can put anything into it.
    match owner {
        Some(User { uid, gid }) => std::os::unix::fs::chown(root, Some(uid), Some(gid))
            .map_err(failed("give the user the root directory", root)),
        None => Ok(()),
    }
}

/// Makes a directory with all above it; false if it was there.
fn make_directories(dir: &Path, janitor: &Janitor) -> Result<bool, ChrootError> {
    if dir.is_dir() {
        return Ok(false);
    }
    if let Some(above) = dir.parent() {
        make_directories(above, janitor)?;
    }
    janitor.remove_directory(dir);
    match fs::create_dir(dir) {
        Ok(()) => Ok(true),
        Err(error) => {
            janitor.forget(dir);
            Err(failed("make directory", dir)(error))
        }
    }
}

fn make_file(path: &Path, janitor: &Janitor) -> Result<(), ChrootError> {
    if let Some(above) = path.parent() {
        make_directories(above, janitor)?;
    }
    if path.exists() {
        return Ok(());
    }
    janitor.remove_file(path);
    File::create_new(path).map(drop).map_err(|error| {
        janitor.forget(path);
        failed("make file", path)(error)
    })
}
