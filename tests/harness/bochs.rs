//! A Linux under Bochs, which emulates Intel's VT-x: there its KVM runs guests as on Intel's processors, nested ones too.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use images::archive::Archive;
use images::kernel::Kernel;

use super::{Started, temp_dir};

/// Many times what it takes, since others may keep the processors busy.
const PATIENCE: Duration = Duration::from_secs(900);

/// The processor: one without TSC scaling, and without compacted extended state (Haswell).
const CONFIGURATION: &str = "\
display_library: sdl2
plugin_ctrl: speaker=0, gameport=0, extfpuirq=0, iodebug=0, parallel=0
sound: waveoutdrv=dummy, waveindrv=dummy, midioutdrv=dummy
romimage: file=/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=/usr/share/bochs/VGABIOS-lgpl-latest
cpu: model=corei7_haswell_4770, count=1, ips=100000000
memory: guest=768, host=768
boot: cdrom
ata0-master: type=cdrom, path=disk.iso, status=inserted
com1: enabled=1, mode=file, dev=serial.txt
clock: sync=none
log: bochs.log
panic: action=fatal
error: action=ignore
info: action=ignore
debug: action=ignore
";

/// Behind a command's output.
const STATUS: &str = "@@ status";

const INIT: &str = "\
#!/bin/busybox sh
/bin/busybox --install -s /bin
mkdir -p /proc /sys /dev /tmp
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
dmesg -n 1
for module in /modules/*; do insmod $module; done
stty -F /dev/ttyS0 115200 raw
exec >/dev/ttyS0 2>/dev/null
sh /commands
sleep 3
poweroff -f
";

const MENU: &str = "\
set timeout=0
menuentry linux {
linux /boot/vmlinuz console=ttyS0,115200 quiet loglevel=1 mitigations=off nokaslr tsc=reliable
initrd /boot/initrd
}
";

/// What a command came to.
pub struct Done {
    pub stdout: String,
    pub status: String,
}

/// The newest kernel that is installed, or what is missing here.
pub fn find() -> Result<Kernel, &'static str> {
    for (command, lack) in [
        ("bochs", "no bochs (packages bochs, bochs-sdl, bochsbios)"),
        ("grub-mkrescue", "no grub-mkrescue (packages grub-common, grub-pc-bin, mtools)"),
        ("xorriso", "no xorriso"),
    ] {
        let asked = Command::new(command).arg("--help").stdin(Stdio::null()).output();
        asked.map_err(|_| lack)?;
    }
    Kernel::find_packed().map_err(|_| "no kernel of linux-image-cloud-amd64 in /boot")
}

/// Runs the program with each of these arguments there, one after the other.
#[track_caller]
pub fn run(kernel: &Kernel, commands: &[&str]) -> Vec<Done> {
    let dir = temp_dir();
    let boot = dir.path().join("iso/boot");
    fs::create_dir_all(boot.join("grub")).expect("make directories");
    let mut archive = Archive::default();
    archive.file("/bin/busybox", &fs::read("/bin/busybox").expect("read busybox"));
    archive.file(
        "/bin/cleanslate",
        &fs::read(env!("CARGO_BIN_EXE_cleanslate")).expect("read the program"),
    );
    let modules = kernel.modules(&["kvm_intel"]).expect("the kernel's modules");
    for (number, module) in modules.iter().enumerate() {
        // In the order in which they depend on each other.
        archive.file(format!("/modules/{number:02}-{}", module.file), &module.contents);
    }
    let script: String = commands
        .iter()
        .map(|arguments| format!("cleanslate {arguments}\necho \"{STATUS} $?\"\n"))
        .collect();
    archive.file("/commands", script.as_bytes());
    archive.file("/init", INIT.as_bytes());
    let write = |path: &Path, bytes: &[u8]| fs::write(path, bytes).expect("write a file");
    write(&boot.join("initrd"), &archive.finish());
    write(&boot.join("grub/grub.cfg"), MENU.as_bytes());
    fs::copy(&kernel.path, boot.join("vmlinuz")).expect("copy the kernel");
    let mut image = Command::new("grub-mkrescue");
    image.args(["-o", "disk.iso", "iso"]).current_dir(dir.path());
    Started::new(image).finish_within(PATIENCE, "grub-mkrescue").expect_status(0);
    write(&dir.path().join("bochsrc"), CONFIGURATION.as_bytes());
    write(&dir.path().join("go"), b"c\n");
    // It is busy for a minute and more, and other tests wait for answers.
    let mut bochs = Command::new("nice");
    bochs.args(["-n", "19", "bochs", "-q", "-f", "bochsrc", "-rc", "go"]).current_dir(dir.path());
    bochs.env("SDL_VIDEODRIVER", "dummy");
    // Its status tells nothing: it ends with the machine's power.
    let outcome = Started::new(bochs).finish_within(PATIENCE, "bochs");
    let serial = fs::read(dir.path().join("serial.txt")).unwrap_or_default();
    let serial = String::from_utf8_lossy(&serial).replace('\r', "");
    let mut done = Vec::new();
    let mut rest = serial.as_str();
    while let Some((stdout, behind)) = rest.split_once(STATUS) {
        let (status, behind) = behind.split_once('\n').unwrap_or((behind, ""));
        done.push(Done { stdout: stdout.into(), status: status.trim().into() });
        rest = behind;
    }
    let log = fs::read_to_string(dir.path().join("bochs.log")).unwrap_or_default();
    assert_eq!(
        done.len(),
        commands.len(),
        "the guest said {serial:?}, Bochs {:?} and {log:?}",
        outcome.stderr
    );
    done
}
