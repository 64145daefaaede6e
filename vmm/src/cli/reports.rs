//! Reports in files, as `soak`, `merge` and `probe` write them.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use clap::Args;

use crate::soak::report::{Report, html, junit};

#[derive(Debug, Args)]
// clap would name a group for the struct, which has the same name as the one that it is part of.
#[group(skip)]
pub(super) struct Arguments {
    /// Write a report for test runners in JUnit's format
    #[arg(long, value_name = "FILE")]
    junit: Option<PathBuf>,

    /// Write a page with plots for a browser
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

/// A report cannot be written.
#[derive(Debug, thiserror::Error)]
pub(super) enum FileError {
    #[error("write {0:?}")]
    Write(PathBuf, #[source] io::Error),
    #[error("--junit and --html name the same file, {0:?}")]
    Same(PathBuf),
}

/// Reports that were asked for. Those that are never written leave nothing, and what was there stays.
pub(super) struct Files {
    junit: Option<ReportFile>,
    html: Option<ReportFile>,
}

/// A file for a report.
pub(super) struct ReportFile {
    path: PathBuf,
    file: File,
    /// It was not there before, and is empty.
    is_new: bool,
}

impl Arguments {
    /// Opens the files.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn open(&self) -> Result<Files, FileError> {
        let open = |path: &Option<PathBuf>| path.as_deref().map(ReportFile::open).transpose();
        let files = Files { junit: open(&self.junit)?, html: open(&self.html)? };
        if let (Some(junit), Some(html)) = (&files.junit, &files.html)
            && junit.is_same(html).map_err(|error| FileError::Write(html.path.clone(), error))?
        {
            return Err(FileError::Same(html.path.clone()));
        }
        Ok(files)
    }
}

impl Files {
    /// Writes them all, even if one fails.
    ///
    /// # Errors
    /// The first failure.
    pub fn write(self, report: &Report) -> Result<(), FileError> {
        let written = [(self.junit, junit as fn(&Report) -> String), (self.html, html)]
            .map(|(file, text)| file.map_or(Ok(()), |file| file.write(&text(report))));
        written.into_iter().collect()
    }
}

impl ReportFile {
    /// Opens it now, so that it does not fail after hours. What is in it stays until there is a report.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn open(path: &Path) -> Result<Self, FileError> {
        let mut options = OpenOptions::new();
        options.write(true);
        let (file, is_new) = match options.clone().create_new(true).open(path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                (options.open(path), false)
            }
            result => (result, true),
        };
        let file = file.map_err(|error| FileError::Write(path.into(), error))?;
        Ok(Self { path: path.into(), file, is_new })
    }

    fn is_same(&self, other: &Self) -> io::Result<bool> {
        let (mine, theirs) = (self.file.metadata()?, other.file.metadata()?);
        // A device may take both.
        Ok(mine.is_file() && (mine.dev(), mine.ino()) == (theirs.dev(), theirs.ino()))
    }

    /// Replaces what is in it.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn write(mut self, text: &str) -> Result<(), FileError> {
        self.is_new = false;
        let is_file = self.file.metadata().is_ok_and(|metadata| metadata.is_file());
        let emptied = if is_file { self.file.set_len(0) } else { Ok(()) };
        let written = emptied.and_then(|()| self.file.write_all(text.as_bytes()));
        written.map_err(|error| FileError::Write(self.path.clone(), error))
    }
}

impl Drop for ReportFile {
    fn drop(&mut self) {
        if self.is_new {
            // It is ours, and tells nothing.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}
