//! The program that a jail is to run: found as a shell finds one, opened while the host's files are in sight, and looked at
//! before anything is made, since a loader that is missing inside would come out as "no such file" of a file that is there.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, AtFlags, CWD, Mode, OFlags};
use rustix::io::Errno;

use crate::root::{Mount, Root};

/// Where programs are looked for without `PATH`, as execvp(3) does.
const DEFAULT_PATH: &str = "/bin:/usr/bin";

/// Most program headers and longest loader's path that are looked at. The kernel takes no more (binfmt_elf, `PATH_MAX`).
const PROGRAM_HEADERS_MAX: u16 = 512;
const LOADER_PATH_MAX: u64 = 4096;

/// A program that is open.
#[derive(Debug)]
pub struct Program {
    path: PathBuf,
    file: File,
    loader: Option<PathBuf>,
}

/// Why a program cannot be run in a jail.
#[derive(Debug, thiserror::Error)]
pub enum ProgramError {
    /// There is none of that name.
    #[error("find command {0:?}: no directory of PATH has it")]
    NotInPath(OsString),
    /// It is not there, or may not be read.
    #[error("open command {path:?}")]
    Open {
        /// Its path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It is a directory, a device or something else that is no program.
    #[error("command {0:?} is not a regular file")]
    NotAFile(PathBuf),
    /// It may not be run.
    #[error(
        "command {path:?} may not be executed; its mode or its file system's options forbid it"
    )]
    NotExecutable {
        /// Its path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It starts with `#!`.
    #[error(
        "command {0:?} is a script, which has no interpreter in a jail; name the interpreter as the command and show it the \
         script with --bind"
    )]
    Script(PathBuf),
    /// The kernel would not take it.
    #[error("command {0:?} is no 64-bit ELF program")]
    NotElf(PathBuf),
    /// It cannot be read, or names no loader where it says it does.
    #[error("read the headers of command {path:?}")]
    Headers {
        /// Its path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It is linked dynamically, to what the jail does not have.
    #[error(
        "command {path:?} needs the loader {loader:?}, which the jail does not have; link it statically, or put the loader \
         and the libraries into the directory that --chroot-base-dir makes its root"
    )]
    NoLoader {
        /// Its path.
        path: PathBuf,
        /// What it asks for.
        loader: PathBuf,
    },
}

impl Program {
    /// Opens the program that a shell would run for `command`: a path, if it has a slash, or else what the first directory
    /// of `search` (the variable `PATH`) has that may be executed.
    ///
    /// # Errors
    /// [`ProgramError`].
    pub fn find(command: &OsStr, search: Option<&OsStr>) -> Result<Self, ProgramError> {
        if command.as_bytes().contains(&b'/') {
            return Self::open(command.into());
        }
        let search = search.unwrap_or(OsStr::new(DEFAULT_PATH));
        let mut candidates = std::env::split_paths(search)
            // An empty part means the working directory.
            .map(|dir| if dir == Path::new("") { PathBuf::from(".") } else { dir }.join(command))
            .filter(|path| path.is_file());
        let mut first = None;
        let found = candidates.find(|path| {
            let can_run = may_execute(path).is_ok();
            if !can_run {
                first.get_or_insert(path.clone());
            }
            can_run
        });
        match found.or(first) {
            Some(path) if !command.is_empty() => Self::open(path),
            _ => Err(ProgramError::NotInPath(command.into())),
        }
    }

    fn open(path: PathBuf) -> Result<Self, ProgramError> {
        // Not to wait for whoever writes into a FIFO.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let file = match rustix::fs::open(&path, flags, Mode::empty()) {
            Ok(file) => File::from(file),
            Err(errno) => return Err(ProgramError::Open { path, source: errno.into() }),
        };
        if !file.metadata().is_ok_and(|metadata| metadata.is_file()) {
            return Err(ProgramError::NotAFile(path));
        }
        if let Err(errno) = may_execute(&path) {
            return Err(ProgramError::NotExecutable { path, source: errno.into() });
        }
        match kind(&file) {
            Ok(Kind::Elf { loader }) => Ok(Self { path, file, loader }),
            Ok(Kind::Script) => Err(ProgramError::Script(path)),
            Ok(Kind::Unknown) => Err(ProgramError::NotElf(path)),
            Err(source) => Err(ProgramError::Headers { path, source }),
        }
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The last part of its path.
    pub fn name(&self) -> &OsStr {
        // What has been opened as a regular file has one.
        self.path.file_name().unwrap_or_default()
    }

    /// An error if a jail with this root and these mounts lacks the loader that the program asks for.
    ///
    /// # Errors
    /// [`ProgramError::NoLoader`].
    pub fn check_loader(&self, root: &Root, mounts: &[Mount]) -> Result<(), ProgramError> {
        let Some(loader) = &self.loader else { return Ok(()) };
        let is_shown = mounts.iter().any(|mount| mount.target == *loader);
        let is_in_root = match root {
            Root::Empty => false,
            Root::Directory(dir) => {
                let inside = dir.join(loader.strip_prefix("/").unwrap_or(loader));
                // A link leads somewhere else from inside; whoever made it knows where.
                inside.symlink_metadata().is_ok()
            }
        };
        if is_shown || is_in_root {
            return Ok(());
        }
        Err(ProgramError::NoLoader { path: self.path.clone(), loader: loader.clone() })
    }
}

impl AsFd for Program {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn may_execute(path: &Path) -> rustix::io::Result<()> {
    match rustix::fs::accessat(CWD, path, Access::EXEC_OK, AtFlags::EACCESS) {
        // A kernel before 5.8 has no flags here; then the attempt shows it.
        Err(Errno::NOSYS) => Ok(()),
        result => result,
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Kind {
    Elf { loader: Option<PathBuf> },
    Script,
    Unknown,
}

/// What `file` is, by its first bytes and, if it is an ELF file, its program headers (elf(5)).
fn kind(file: &File) -> io::Result<Kind> {
    const PT_INTERP: u32 = 3;
    let mut header = [0; 64];
    let read = file.read_at(&mut header, 0)?;
    if header.starts_with(b"#!") {
        return Ok(Kind::Script);
    }
    // Of this class and byte order.
    if read < header.len() || !header.starts_with(b"\x7fELF\x02\x01") {
        return Ok(Kind::Unknown);
    }
    let half = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
    let (start, size, count) = (long(&header, 32), half(54), half(56));
    for index in 0..count.min(PROGRAM_HEADERS_MAX) {
        let mut entry = [0; 56];
        let at = start.saturating_add(u64::from(index) * u64::from(size));
        file.read_exact_at(&mut entry, at)?;
        if u32::from_le_bytes([entry[0], entry[1], entry[2], entry[3]]) == PT_INTERP {
            let (start, len) = (long(&entry, 8), long(&entry, 32).min(LOADER_PATH_MAX));
            let mut path = vec![0; len as usize];
            file.read_exact_at(&mut path, start)?;
            path.truncate(path.iter().position(|byte| *byte == 0).unwrap_or(path.len()));
            return Ok(Kind::Elf { loader: Some(OsString::from_vec(path).into()) });
        }
    }
    Ok(Kind::Elf { loader: None })
}

fn long(bytes: &[u8], at: usize) -> u64 {
    bytes[at..at + 8].iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An ELF file with one program header of this kind, whose content is `content`.
    fn elf(header_kind: u32, content: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; 64 + 56];
        bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
        bytes[32..40].copy_from_slice(&64_u64.to_le_bytes());
        bytes[54..56].copy_from_slice(&56_u16.to_le_bytes());
        bytes[56..58].copy_from_slice(&1_u16.to_le_bytes());
        bytes[64..68].copy_from_slice(&header_kind.to_le_bytes());
        bytes[72..80].copy_from_slice(&120_u64.to_le_bytes());
        bytes[96..104].copy_from_slice(&(content.len() as u64).to_le_bytes());
        bytes.extend(content);
        bytes
    }

    #[test]
    fn what_a_file_is_shows_in_its_headers() {
        let check = |bytes: &[u8], expected: Option<Kind>| {
            let file = tempfile::tempfile().unwrap();
            file.write_all_at(bytes, 0).unwrap();
            assert_eq!(kind(&file).ok(), expected);
        };
        let dynamic = elf(3, b"/lib/loader\0");
        let loader = |path: &str| Some(Kind::Elf { loader: Some(path.into()) });
        check(&elf(1, b""), Some(Kind::Elf { loader: None }));
        check(&dynamic, loader("/lib/loader"));
        check(&elf(3, b"/lib/loader"), loader("/lib/loader"));
        check(&dynamic[..125], None);
        check(&dynamic[..100], None);
        check(&dynamic[..63], Some(Kind::Unknown));
        check(b"#!/bin/sh\n", Some(Kind::Script));
        check(b"#", Some(Kind::Unknown));
        check(b"", Some(Kind::Unknown));
        // Headers beyond the end of all files.
        let mut far = dynamic.clone();
        far[32..40].copy_from_slice(&u64::MAX.to_le_bytes());
        check(&far, None);
    }

    #[test]
    fn a_command_is_found_as_a_shell_finds_it() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let make = |path: &str, mode| {
            let path = dir.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, elf(1, b"")).unwrap();
            std::fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
            path
        };
        let plain = make("first/command", 0o644);
        let good = make("second/command", 0o755);
        make("third/command", 0o755);
        make("fourth/other/file", 0o755);
        let search = std::env::join_paths(
            ["missing", "first", "second", "third", "fourth"].map(|name| dir.path().join(name)),
        )
        .unwrap();
        let find = |command: &OsStr, search: &OsStr| Program::find(command, Some(search));
        assert_eq!(find("command".as_ref(), &search).unwrap().path(), good);
        assert_eq!(find(good.as_ref(), "".as_ref()).unwrap().name(), "command");
        let alone = plain.parent().unwrap().as_os_str();
        for error in [find("command".as_ref(), alone), find(plain.as_ref(), &search)] {
            assert!(matches!(error, Err(ProgramError::NotExecutable { .. })), "{error:?}");
        }
        for missing in ["", "other", "nothing"] {
            let error = find(missing.as_ref(), &search);
            assert!(matches!(error, Err(ProgramError::NotInPath(_))), "{error:?}");
        }
        let error = find(dir.path().as_ref(), &search);
        assert!(matches!(error, Err(ProgramError::NotAFile(_))), "{error:?}");
        let error = find("./no/such/file".as_ref(), &search);
        assert!(matches!(error, Err(ProgramError::Open { .. })), "{error:?}");
    }

    #[test]
    fn a_loader_has_to_be_in_the_jail() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("dynamic");
        std::fs::write(&path, elf(3, b"/lib/loader\0")).unwrap();
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755))
            .unwrap();
        let program = Program::find(path.as_ref(), None).unwrap();
        let root = Root::Directory(dir.path().into());
        let shown =
            |path: &str| [Mount { source: path.into(), target: path.into(), read_only: false }];
        assert!(program.check_loader(&Root::Empty, &[]).is_err());
        assert!(program.check_loader(&Root::Empty, &shown("/lib")).is_err());
        assert!(program.check_loader(&Root::Empty, &shown("/lib/loader")).is_ok());
        assert!(program.check_loader(&root, &[]).is_err());
        std::fs::create_dir(dir.path().join("lib")).unwrap();
        std::fs::write(dir.path().join("lib/loader"), "").unwrap();
        assert!(program.check_loader(&root, &[]).is_ok());
    }
}
