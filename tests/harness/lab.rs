//! The lab: a Linux under QEMU without acceleration, whose processor has SVM, so that its KVM runs guests that a KVM without
//! hardware cannot, such as a whole Linux.

#[path = "../../jailer/tests/e2e/lab/archive.rs"]
mod archive;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use super::{Outcome, Started, temp_dir};
use archive::Archive;

/// Longest time that the lab may run: many times what it takes, since others may keep the processors busy.
const PATIENCE: Duration = Duration::from_secs(600);
const QEMU: &str = "qemu-system-x86_64";
const BUSYBOX: &str = "/bin/busybox";

/// What it takes on this machine.
pub struct Lab {
    /// Debian's kernel for machines in a cloud.
    pub kernel: PathBuf,
    modules: PathBuf,
    busybox: Vec<u8>,
}

impl Lab {
    /// The newest kernel that is installed, or what is missing.
    pub fn find() -> Result<Self, &'static str> {
        let names = std::fs::read_dir("/boot").into_iter().flatten().flatten();
        let versions = names.filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let version = name.strip_prefix("vmlinuz-").filter(|v| v.ends_with("-cloud-amd64"))?;
            Some((entry.metadata().ok()?.modified().ok()?, version.to_string()))
        });
        let (_, version) = versions.max().ok_or("no kernel of linux-image-cloud-amd64 in /boot")?;
        Command::new(QEMU).arg("--version").output().map_err(|_| "no qemu-system-x86_64")?;
        let places = ["/bin/busybox", "/usr/bin/busybox"];
        let busybox = places.iter().find_map(|place| std::fs::read(place).ok());
        Ok(Self {
            kernel: Path::new("/boot").join(format!("vmlinuz-{version}")),
            modules: Path::new("/lib/modules").join(version).join("kernel"),
            busybox: busybox.ok_or("no busybox")?,
        })
    }

    /// A first file system: it loads `modules`, paths below the kernel's directory of them, and does `commands`, for which `B`
    /// is busybox. `files` are at its root.
    pub fn file_system(
        &self,
        modules: &[&str],
        files: &[(&str, &[u8])],
        commands: &str,
    ) -> Vec<u8> {
        let mut archive = Archive::default();
        archive.add(Path::new(BUSYBOX), &self.busybox);
        let mut script = format!("#!{BUSYBOX} sh\nB={BUSYBOX}\n");
        for (kind, place) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
            script += &format!("$B mkdir -p {place}; $B mount -t {kind} {kind} {place}\n");
        }
        for module in modules {
            let path = self.modules.join(module);
            let bytes =
                std::fs::read(&path).unwrap_or_else(|error| panic!("read {path:?}: {error}"));
            let place = Path::new("/modules").join(path.file_name().expect("a module's name"));
            archive.add(&place, &bytes);
            script += &format!("$B insmod {}\n", place.display());
        }
        for (name, bytes) in files {
            archive.add(&Path::new("/").join(name), bytes);
        }
        // A terminal's settings change when everything is printed (TCSADRAIN), which turning off would not wait for.
        script += &format!("{commands}\n$B stty -F /dev/console -echo\n$B poweroff -f\n");
        archive.add(Path::new("/init"), script.as_bytes());
        archive.finish()
    }

    /// Does `commands` in the lab, with the program at `/cleanslate` and `files` beside it.
    #[track_caller]
    pub fn run(&self, files: &[(&str, &[u8])], commands: &str) -> Outcome {
        let program = std::fs::read(env!("CARGO_BIN_EXE_cleanslate")).expect("read the program");
        let files = [&[("cleanslate", &program[..])], files].concat();
        let modules = ["virt/lib/irqbypass.ko", "arch/x86/kvm/kvm.ko", "arch/x86/kvm/kvm-amd.ko"];
        let dir = temp_dir();
        let root = dir.path().join("root");
        std::fs::write(&root, self.file_system(&modules, &files, commands)).expect("write a file");
        let mut qemu = Command::new(QEMU);
        // Each level of page tables costs an emulator time: not five of them.
        qemu.args(["-M", "q35", "-accel", "tcg,thread=multi", "-cpu", "max,la57=off"]);
        qemu.args(["-smp", "2", "-m", "1024", "-no-reboot"]);
        qemu.args(["-nodefaults", "-display", "none", "-serial", "stdio"]);
        qemu.arg("-kernel").arg(&self.kernel).arg("-initrd").arg(&root);
        qemu.args(["-append", "console=ttyS0 loglevel=1 panic=-1 reboot=t mitigations=off"]);
        qemu.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let outcome = Started::new(qemu).finish_within(PATIENCE, &format!("lab: {commands}"));
        Outcome { stdout: outcome.stdout.replace('\r', ""), ..outcome }.expect_status(0)
    }
}
