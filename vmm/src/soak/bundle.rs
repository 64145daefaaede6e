//! What is kept of a life that something was found in: a directory of small files that explain it and say how to see it again.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::Place;
use super::line::{Found, Life};

/// More lives are told of, but nothing of them is kept.
const MOST_BUNDLES: u32 = 20;

/// Where bundles go.
#[derive(Debug)]
pub struct Bundles {
    wanted: PathBuf,
    /// Whether another name will do if that one is taken.
    is_default: bool,
    /// This program, for scripts.
    program: String,
    made: Option<PathBuf>,
    count: u32,
}

/// A bundle could not be written.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// There is something already.
    #[error("bundle directory {0:?} is not empty")]
    NotEmpty(PathBuf),
    /// There could be none.
    #[error("bundles could not be kept in {path:?}; name another directory with --bundle")]
    Refused {
        /// What was tried.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// The host refused.
    #[error("write the bundle {path:?}")]
    Io {
        /// What was to be written.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
}

/// What a bundle says besides its evidence.
#[derive(Debug, Serialize)]
pub struct Facts<'a> {
    /// Name of the host.
    pub host: &'a str,
    /// The soak's.
    pub seed: u64,
    /// The process's own.
    pub vm_seed: u64,
    /// Number of the machine.
    pub vm: u32,
    /// Which of its processes.
    pub process: u32,
    /// In which life of it.
    pub life: u32,
    /// Why that began.
    pub cause: Option<&'static str>,
    /// In the middle of what.
    pub moment: Option<&'static str>,
    /// What was found.
    pub findings: &'a [Found],
    /// The command that runs the machine again.
    pub replay: &'a str,
}

impl Bundles {
    /// Bundles go into `directory`, which is made if something is found. Without one, into one with the seed in its name.
    ///
    /// # Errors
    /// [`BundleError`] if the directory is not empty or nothing could be written into it.
    pub fn new(directory: Option<&Path>, seed: u64) -> Result<Self, BundleError> {
        let is_default = directory.is_none();
        let wanted = directory.map_or_else(|| format!("cleanslate-soak-{seed}").into(), Into::into);
        // Tried now, so that it does not fail after hours.
        let tried = match fs::read_dir(&wanted).map(|mut entries| entries.next().is_some()) {
            Ok(true) if !is_default => return Err(BundleError::NotEmpty(wanted)),
            Ok(true) => PathBuf::from(format!("cleanslate-soak-{seed}-{}", std::process::id())),
            Ok(false) => wanted.join("try"),
            Err(_) => wanted.clone(),
        };
        fs::create_dir(&tried)
            .and_then(|()| fs::remove_dir(&tried))
            .map_err(|source| BundleError::Refused { path: wanted.clone(), source })?;
        let program = std::env::current_exe().unwrap_or_else(|_| "cleanslate".into());
        let program = program.to_string_lossy().into_owned();
        Ok(Self { wanted, is_default, program, made: None, count: 0 })
    }

    /// Keeps a life. Returns its directory, or none if there are enough.
    ///
    /// # Errors
    /// [`BundleError`].
    pub fn keep(
        &mut self,
        place: Place,
        life: &Life,
        facts: &Facts,
        replay: &[String],
        errors: &[String],
    ) -> Result<Option<PathBuf>, BundleError> {
        if self.count == MOST_BUNDLES {
            return Ok(None);
        }
        self.count += 1;
        let top = match &self.made {
            Some(path) => path.clone(),
            None => self.make()?,
        };
        let mut name = format!("vm{}-life{}", place.vm, life.life);
        if place.process > 0 {
            name = format!("vm{}-process{}-life{}", place.vm, place.process + 1, life.life);
        }
        let path = top.join(name);
        match fs::create_dir(&path) {
            // Two findings of one process in one life: one from its line, one from its end.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            result => result.map_err(failed(&path))?,
        }
        let write = |name: &str, text: String| {
            let path = path.join(name);
            fs::write(&path, text).map_err(failed(&path))
        };
        let json = |value: Result<String, serde_json::Error>| value.unwrap_or_default() + "\n";
        write("finding.json", json(serde_json::to_string_pretty(facts)))?;
        let program = shell(std::slice::from_ref(&self.program));
        script(
            &path.join("replay.sh"),
            &format!("#!/bin/sh\nexec {program} {} \"$@\"\n", shell(replay)),
        )?;
        if let Some(evidence) = &life.evidence {
            write("before.json", json(serde_json::to_string_pretty(&evidence.before)))?;
            write("life.json", json(serde_json::to_string_pretty(&evidence.life)))?;
            write("console.txt", lines(&evidence.console))?;
            write("trace.txt", lines(&evidence.trace))?;
        }
        if !errors.is_empty() {
            write("stderr.txt", lines(errors))?;
        }
        Ok(Some(path))
    }

    /// Makes the directory for all of them.
    fn make(&mut self) -> Result<PathBuf, BundleError> {
        const MOST_TRIES: u32 = 1000;
        let mut path = self.wanted.clone();
        for number in 2.. {
            match fs::create_dir(&path) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    if !self.is_default {
                        break;
                    }
                    if number == MOST_TRIES {
                        return Err(failed(&path)(error));
                    }
                }
                result => {
                    result.map_err(failed(&path))?;
                    break;
                }
            }
            path = format!("{}-{number}", self.wanted.display()).into();
        }
        self.made = Some(path.clone());
        Ok(path)
    }
}

/// Writes a file that can be run.
fn script(path: &Path, text: &str) -> Result<(), BundleError> {
    let mut options = fs::OpenOptions::new();
    let file = options.write(true).create(true).truncate(true).mode(0o777).open(path);
    file.and_then(|mut file| file.write_all(text.as_bytes())).map_err(failed(path))
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> BundleError {
    move |source| BundleError::Io { path: path.into(), source }
}

fn lines(lines: &[String]) -> String {
    lines.iter().map(|line| format!("{line}\n")).collect()
}

/// A command line for a shell.
pub fn shell(words: &[String]) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_=.,/:+@".contains(c);
    let quote = |word: &String| match !word.is_empty() && word.chars().all(is_plain) {
        true => word.clone(),
        false => format!("'{}'", word.replace('\'', r"'\''")),
    };
    words.iter().map(quote).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_survives_the_shell() {
        let check = |words: &[&str], expected: &str| {
            let words: Vec<_> = words.iter().map(ToString::to_string).collect();
            assert_eq!(shell(&words), expected);
        };
        check(&["cleanslate", "run", "--cgroup", "a.b=1"], "cleanslate run --cgroup a.b=1");
        check(&["a b", "it's", "", "$x"], r"'a b' 'it'\''s' '' '$x'");
    }
}
