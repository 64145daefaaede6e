//! The lab (`cleanslate lab`): a Linux under QEMU without acceleration, whose processor has SVM, so that its KVM runs guests that
//! a KVM without hardware cannot, such as a whole Linux.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use super::{Outcome, Started, cleanslate, temp_dir};

/// Longest time that the lab may run: many times what it takes, since others may keep the processors busy.
const PATIENCE: Duration = Duration::from_secs(900);

/// What it takes on this machine.
pub struct Lab {
    /// Debian's kernel for machines in a cloud.
    pub kernel: PathBuf,
}

impl Lab {
    /// The newest kernel that is installed, or what is missing.
    pub fn find() -> Result<Self, &'static str> {
        let kernel = images::kernel::Kernel::find_packed();
        let kernel = kernel.map_err(|_| "no kernel of linux-image-cloud-amd64 in /boot")?;
        let qemu = Command::new("qemu-system-x86_64").arg("--version").output();
        qemu.map_err(|_| "no qemu-system-x86_64")?;
        images::lab::Lab::find().map_err(|_| "no static busybox")?;
        Ok(Self { kernel: kernel.path })
    }

    /// Does `commands` in the lab, with the program as `cleanslate` and at `/cleanslate`, and `files` in the working directory.
    /// The status is that of the last command.
    #[track_caller]
    pub fn run(&self, files: &[(&str, &[u8])], commands: &str) -> Outcome {
        let dir = temp_dir();
        let mut arguments = vec!["lab".to_string(), "--timeout".into(), "850".into()];
        for (name, bytes) in files {
            let path = dir.path().join(name);
            std::fs::write(&path, bytes).expect("write a file");
            arguments.extend(["--file".into(), path.to_str().unwrap().into()]);
        }
        let script = dir.path().join("script");
        let words = format!("ln -s /bin/cleanslate /cleanslate\n{commands}\n");
        std::fs::write(&script, words).expect("write a file");
        arguments.extend(["--script".into(), script.to_str().unwrap().into()]);
        self.lab(&arguments.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// `cleanslate` with these arguments, with a cache that the tests share.
    #[track_caller]
    pub fn lab(&self, arguments: &[&str]) -> Outcome {
        let command = self.command(arguments);
        Started::new(command).finish_within(PATIENCE, &arguments.join(" "))
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = cleanslate(arguments);
        command.env("XDG_CACHE_HOME", env!("CARGO_TARGET_TMPDIR"));
        command
    }
}
