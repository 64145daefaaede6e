//! The same kernel once more, without a reset of the machine (kexec_file_load(2)): memory, devices and the processor are as this
//! kernel leaves them.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use cpio::newc::{Builder, trailer};
use nix::sys::reboot::{RebootMode, reboot};

/// What `images` puts there for guests that are to do this: a bzImage.
const KERNEL: &str = "/kernel";
/// Where the next kernel's first file system is kept meanwhile.
const FILE_SYSTEM: &str = "/next";

/// Starts it as life `life`. Comes back only if that failed.
///
/// # Errors
/// In words.
pub fn start(command_line: &str, life: u32) -> Result<(), String> {
    let open = |path: &str| File::open(path).map_err(|error| format!("open {path}: {error}"));
    pack().map_err(|error| format!("pack the next file system: {error}"))?;
    let (kernel, file_system) = (open(KERNEL)?, open(FILE_SYSTEM)?);
    let words = CString::new(next_command_line(command_line, life)).map_err(|e| e.to_string())?;
    let bytes = words.as_bytes_with_nul();
    // SAFETY: the descriptors are open and the text has as many bytes as is said, its zero among them; the kernel copies it.
    let result = unsafe {
        libc::syscall(
            libc::SYS_kexec_file_load,
            kernel.as_raw_fd(),
            file_system.as_raw_fd(),
            bytes.len(),
            bytes.as_ptr(),
            0,
        )
    };
    if result != 0 {
        return Err(format!("kexec_file_load: {}", io::Error::last_os_error()));
    }
    let Err(error) = reboot(RebootMode::RB_KEXEC);
    Err(format!("kexec: {error}"))
}

/// The same words but for life and cause.
fn next_command_line(line: &str, life: u32) -> String {
    let stays = |word: &&str| !word.starts_with("agent.life=") && !word.starts_with("agent.cause=");
    let mut words: Vec<_> = line.split_whitespace().filter(stays).map(String::from).collect();
    words.push(format!("agent.life={life}"));
    words.push("agent.cause=kexec".into());
    words.join(" ")
}

/// What this kernel has unpacked at its start, as an archive again.
fn pack() -> io::Result<()> {
    let mut bytes = Vec::new();
    for directory in ["dev", "modules"] {
        entry(&mut bytes, Path::new(directory), 0o040_755, &[])?;
    }
    let modules = fs::read_dir("/modules").into_iter().flatten().flatten();
    let files = modules.map(|entry| entry.path()).chain(["/init", KERNEL].map(PathBuf::from));
    for path in files {
        let name = path.strip_prefix("/").unwrap_or(&path);
        entry(&mut bytes, name, 0o100_755, &fs::read(&path)?)?;
    }
    fs::write(FILE_SYSTEM, trailer(bytes)?)
}

fn entry(bytes: &mut Vec<u8>, name: &Path, mode: u32, contents: &[u8]) -> io::Result<()> {
    let size = u32::try_from(contents.len()).map_err(io::Error::other)?;
    let mut writer = Builder::new(&name.to_string_lossy()).mode(mode).nlink(1).write(bytes, size);
    writer.write_all(contents)?;
    writer.finish().map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::next_command_line;

    #[test]
    fn the_next_life_is_told_its_number_and_its_cause() {
        let line = "quiet agent.life=4 agent.cause=host panic=-1";
        let next = "quiet panic=-1 agent.life=5 agent.cause=kexec";
        assert_eq!(next_command_line(line, 5), next);
    }
}
