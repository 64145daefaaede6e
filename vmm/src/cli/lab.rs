//! `cleanslate lab`: a command of this program in a Linux under QEMU.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use images::lab::{Lab as FileSystem, Work};

use super::Error;
use crate::exit;
use crate::lab::{self, Accelerator, Lab, RunError};
use crate::machine::Interrupts;

/// Run a command of this program in the lab: a Linux under QEMU whose KVM has hardware virtualization
///
/// The lab is there for what a host's KVM cannot do: a whole Linux as the guest, nested virtualization, AMD's SVM. It takes
/// QEMU, a kernel with its modules and a static busybox, and about five seconds to come up; with --accel tcg no rights and no
/// /dev/kvm. The command's output and exit status come back as if it had run here. Its standard input is empty, and its working
/// directory holds the files of --file alone.
#[derive(Debug, Args)]
#[command(after_help = "\
Exit status: that of the command; 2 if there was none, 130 if interrupted.

Examples:
  cleanslate lab -- run --resets 3
  cleanslate lab -- run --guest linux --resets 1
  cleanslate lab --file agent.elf -- run --agent agent.elf
  cleanslate lab --fetch soak.html -- soak --vms 2 --resets 20 --html soak.html
  cleanslate lab --accel kvm -- doctor")]
pub(super) struct Arguments {
    /// What carries the lab
    #[arg(long, value_enum, value_name = "HOW", default_value_t)]
    accel: Accelerator,

    /// Put this file into the command's working directory; may be repeated
    #[arg(long, value_name = "FILE")]
    file: Vec<PathBuf>,

    /// Bring the file NAME of that directory back into this one; may be repeated
    #[arg(long, value_name = "NAME")]
    fetch: Vec<String>,

    /// Do what is in this shell script instead, with cleanslate and busybox's commands
    #[arg(long, value_name = "FILE", conflicts_with = "command")]
    script: Option<PathBuf>,

    /// RAM in MiB
    #[arg(long, value_name = "MIB", default_value_t = 1024, value_parser = clap::value_parser!(u64).range(256..=1 << 20))]
    mem: u64,

    /// Number of processors. With more than one the lab can hang: KVM changes the scheduler's code when the first machine is made, and
    /// QEMU's emulation of several processors does not always survive that
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    vcpus: u32,

    /// How long it may take, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    timeout: u64,

    /// Become this program, and die with the process of this number
    #[arg(long, value_name = "PID", hide = true)]
    machine_of: Option<u32>,

    /// The command, such as run --resets 3
    #[arg(last = true, value_name = "COMMAND", required_unless_present = "script")]
    command: Vec<String>,
}

/// Input of the user's that is wrong.
#[derive(Debug, thiserror::Error)]
enum UsageError {
    #[error("--script {0:?} is no text in UTF-8")]
    Script(PathBuf),
    #[error(
        "the lab's files have {files} MiB, and --mem {mem} has no room for them and their unpacked \
         copy; give it at least {least}"
    )]
    Room { files: u64, mem: u64, least: u64 },
    #[error("--fetch {0:?} is no file's name")]
    Fetch(String),
    #[error("--file names two files {0:?}, and the lab has one directory for all")]
    SameName(OsString),
}

pub(super) fn main(arguments: Arguments) -> Result<u8, Error> {
    if let Some(parent) = arguments.machine_of {
        return Err(lab::become_machine(parent, &arguments.command).into());
    }
    if arguments.script.is_none() {
        // What is wrong with it is said here and now.
        super::check(&arguments.command)?;
    }
    let work = match arguments.script {
        Some(path) => {
            let text = String::from_utf8(images::kernel::read(&path)?);
            Work::Script(text.map_err(|_| UsageError::Script(path))?)
        }
        None => Work::Program(arguments.command),
    };
    let mut seen = BTreeSet::new();
    let mut names = arguments.file.iter().filter_map(|path| path.file_name());
    if let Some(name) = names.find(|name| !seen.insert(*name)) {
        return Err(UsageError::SameName(name.into()).into());
    }
    let is_none = |name: &&String| {
        name.is_empty() || name.ends_with(['/', '.']) || name.contains(char::is_control)
    };
    if let Some(name) = arguments.fetch.iter().find(is_none) {
        return Err(UsageError::Fetch(name.clone()).into());
    }
    let interrupts = Interrupts::catch_as_started()?;
    let found = FileSystem::find()?;
    let program = Path::new("/proc/self/exe");
    let file_system = found.file_system(program, &work, &arguments.file, &arguments.fetch)?;
    let least = least_mem(file_system.len() as u64);
    if arguments.mem < least {
        let files = file_system.len() as u64 >> 20;
        return Err(UsageError::Room { files, mem: arguments.mem, least }.into());
    }
    let lab = Lab {
        kernel: found.kernel,
        file_system,
        accelerator: arguments.accel,
        vcpus: arguments.vcpus,
        mem_mib: arguments.mem,
        timeout: Duration::from_secs(arguments.timeout),
    };
    match lab.run(interrupts) {
        Ok(answer) => {
            lab::fetch(&answer.files, &arguments.fetch)?;
            Ok(answer.status)
        }
        Err(RunError::Interrupted) => {
            eprintln!("cleanslate: interrupted");
            Ok(exit::INTERRUPTED)
        }
        Err(error) => Err(error.into()),
    }
}

/// MiB of RAM that a lab of so many bytes takes: as they come and unpacked, both at once, and Linux itself. With less the kernel
/// panics over what it could not unpack, or hangs before it has a console. Linux 6.1 with 76 MiB: 272 are too few, 288 enough.
fn least_mem(file_system: u64) -> u64 {
    const LINUX_MIB: u64 = 136;
    2 * file_system.div_ceil(1 << 20) + LINUX_MIB
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_there_twice_while_linux_unpacks_them() {
        assert_eq!(least_mem(0), 136);
        assert_eq!(least_mem(1), 138);
        assert_eq!(least_mem(900 << 20), 1936);
    }
}
