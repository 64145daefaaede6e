//! The lab's first file system: a Linux that runs this program under QEMU, with KVM, busybox, and what Linux guests in there
//! take.

use std::fs;
use std::path::{Path, PathBuf};

use crate::archive::Archive;
use crate::cache;
use crate::guest::LinuxGuest;
use crate::kernel::{Kernel, KernelError, read};

/// Where distributions put it.
const BUSYBOXES: [&str; 2] = ["/bin/busybox", "/usr/bin/busybox"];
/// Its place in the lab.
const BUSYBOX: &str = "/bin/busybox";
const PROGRAM: &str = "/bin/cleanslate";
/// Where commands run in the lab.
const WORK: &str = "/work";

/// What the lab itself loads: ports to this side.
const PORTS: [&str; 2] = ["virtio_pci", "virtio_console"];
/// One of them fits the processor.
const KVM: [&str; 2] = ["kvm_amd", "kvm_intel"];

/// Why there is no lab.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// No kernel for it, or one without what it takes.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// Nothing to run commands with.
    #[error("there is no static busybox at {BUSYBOX}: install the package busybox-static")]
    NoBusybox,
    /// A file of the user's has no name that it could have in the lab.
    #[error("{0:?} has no plain name")]
    Name(PathBuf),
}

/// What the lab does.
#[derive(Clone, Debug)]
pub enum Work {
    /// This program with these arguments.
    Program(Vec<String>),
    /// A shell script, which finds the program and busybox's commands.
    Script(String),
}

/// A lab that can be built.
#[derive(Clone, Debug)]
pub struct Lab {
    /// Its kernel, which is also that of its Linux guests.
    pub kernel: Kernel,
    busybox: PathBuf,
}

impl Lab {
    /// With the newest kernel that is installed.
    ///
    /// # Errors
    /// [`LabError`].
    pub fn find() -> Result<Self, LabError> {
        let kernel = Kernel::find_packed()?;
        let busybox = BUSYBOXES.iter().map(PathBuf::from).find(|path| is_static(path));
        Ok(Self { kernel, busybox: busybox.ok_or(LabError::NoBusybox)? })
    }

    /// The file system with `program`, this program, in it. It does `work` with `files` beside it, and hands back those that are
    /// called `fetched`. Ports of virtio-console take what comes of it: 1 is standard output, 2 is standard error, 3 is `status N`
    /// and a line feed, then an archive of what is fetched.
    ///
    /// # Errors
    /// [`LabError`].
    pub fn file_system(
        &self,
        program: &Path,
        work: &Work,
        files: &[PathBuf],
        fetched: &[String],
    ) -> Result<Vec<u8>, LabError> {
        let mut bytes = self.base(program)?;
        let mut archive = Archive::default();
        archive.file("/init", self.init(fetched)?.as_bytes());
        let work = match work {
            Work::Program(arguments) => {
                let words: Vec<_> = arguments.iter().map(|word| quoted(word)).collect();
                format!("exec {PROGRAM} {}\n", words.join(" "))
            }
            Work::Script(script) => script.clone(),
        };
        archive.file("/command", format!("#!{BUSYBOX} sh\n{work}").as_bytes());
        archive.directory(WORK);
        for path in files {
            let name = path.file_name().ok_or_else(|| LabError::Name(path.clone()))?;
            archive.file(Path::new(WORK).join(name), &read(path)?);
        }
        bytes.extend(archive.finish());
        Ok(bytes)
    }

    /// What is the same for all work, as the cache has it.
    fn base(&self, program: &Path) -> Result<Vec<u8>, LabError> {
        let program = read(program)?;
        let busybox = read(&self.busybox)?;
        let kernel = read(&self.kernel.path)?;
        let guest = LinuxGuest { kernel: self.kernel.clone(), kexec: None };
        let names = [&PORTS[..], &KVM, &guest.module_names()].concat();
        let modules = self.kernel.modules(&names)?;
        let lists = self.kernel.lists()?;
        let mut parts: Vec<&[u8]> = vec![&program, &busybox, &kernel];
        parts.extend(modules.iter().map(|module| module.contents.as_slice()));
        parts.extend(lists.iter().map(|(_, text)| text.as_bytes()));
        cache::cached("lab", &parts, || {
            let mut archive = Archive::default();
            archive.file(PROGRAM, &program);
            archive.file(BUSYBOX, &busybox);
            // Guests in here need not unpack theirs: nobody waits for that when it is done here.
            let (image, kind) = guest.unpacked(&kernel)?;
            let release = &self.kernel.release;
            archive.file(format!("/boot/{kind}-{release}"), &image);
            // For kexec in there.
            archive.file(format!("/boot/vmlinuz-{release}"), &kernel);
            for module in &modules {
                archive.file(&module.path, &module.contents);
            }
            for (path, text) in &lists {
                archive.file(path, text.as_bytes());
            }
            Ok(archive.finish())
        })
    }

    /// The first process: a script.
    fn init(&self, fetched: &[String]) -> Result<String, LabError> {
        let mut script = format!("#!{BUSYBOX} sh\nB={BUSYBOX}\n");
        for (kind, place) in [
            ("proc", "/proc"),
            ("sysfs", "/sys"),
            ("devtmpfs", "/dev"),
            ("tmpfs", "/tmp"),
            ("tmpfs", "/run"),
            ("cgroup2", "/sys/fs/cgroup"),
        ] {
            script += &format!("$B mkdir -p {place}; $B mount -t {kind} {kind} {place}\n");
        }
        for module in self.kernel.modules(&PORTS)? {
            script += &format!("$B insmod {}\n", module.path.display());
        }
        for name in KVM {
            // The one that does not fit says so.
            for module in self.kernel.modules(&[name])? {
                script += &format!("$B insmod {} 2>/dev/null\n", module.path.display());
            }
        }
        let names: Vec<_> = fetched.iter().map(|name| quoted(name)).collect();
        script += &format!(
            "$B --install -s /bin\nexport PATH=/bin HOME=/root\nmkdir -p /root; cd {WORK}\n\
             sh /command </dev/null >/dev/vport0p1 2>/dev/vport0p2\necho \"status $?\" >/dev/vport0p3\n\
             for name in {}; do [ -e \"$name\" ] && echo \"$name\"; done | cpio -o -H newc >/dev/vport0p3 2>/dev/null\n\
             poweroff -f\n",
            names.join(" ")
        );
        Ok(script)
    }
}

/// For a shell, as one word.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// Whether the program at `path` runs without a loader: it names none.
fn is_static(path: &Path) -> bool {
    let Ok(bytes) = fs::read(path) else { return false };
    let loader = b"/lib64/ld-linux";
    // Of the loader only the name of its segment is looked for, at the beginning where linkers put it.
    let head = &bytes[..bytes.len().min(4096)];
    bytes.starts_with(b"\x7fELF") && !head.windows(loader.len()).any(|window| window == loader)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_reach_the_command_as_they_are() {
        for word in ["plain", "two words", "it's", "$HOME `id` \\ \"x\"", "", "a\nb"] {
            let output = std::process::Command::new("sh")
                .args(["-c", &format!("printf %s {}", quoted(word))])
                .output()
                .unwrap();
            assert_eq!(String::from_utf8(output.stdout).unwrap(), word);
        }
    }

    #[test]
    fn dynamic_programs_and_no_programs_are_not_static() {
        let dir = tempfile::tempdir().unwrap();
        let check = |bytes: &[u8]| {
            let path = dir.path().join("program");
            fs::write(&path, bytes).unwrap();
            is_static(&path)
        };
        assert!(check(b"\x7fELF static"));
        assert!(!check(b"\x7fELF /lib64/ld-linux-x86-64.so.2"));
        assert!(!check(b"#!/bin/sh"));
        assert!(!is_static(&dir.path().join("missing")));
    }
}
