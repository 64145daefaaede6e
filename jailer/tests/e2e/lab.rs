//! All other tests once more in a Linux that hosts with control groups of version 1 are not: version 2 alone, Debian's
//! kernel, and an initramfs for a root, which pivot_root(2) cannot put aside (`pivot` in `src/root.rs`). QEMU runs it without
//! acceleration, which takes no rights and no device.

mod archive;
pub mod inside;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::harness::runner::{As, Test, program, this_program};
use crate::harness::{Outcome, V2_SEEN, dynamic_shell, finish_within, not_run, temp_dir};
use archive::Archive;

/// Longest time that the machine may run: many times what it takes, since others may keep the processors busy.
const PATIENCE: Duration = Duration::from_secs(400);

pub const TESTS: &[Test] = &[Test {
    name: concat!(module_path!(), "::all_of_this_in_a_linux_with_control_groups_of_version_2"),
    who: As::Nobody,
    patience: PATIENCE.saturating_add(Duration::from_secs(60)),
    run: all_of_this_in_a_linux_with_control_groups_of_version_2,
}];

const QEMU: &str = "qemu-system-x86_64";

/// Why tests may not run there: what the kernel lacks.
const REASON: &str = "it takes Linux 6.12";

fn all_of_this_in_a_linux_with_control_groups_of_version_2() {
    let Some(kernel) = kernel() else {
        return not_run("there is no kernel in /boot of the package linux-image-cloud-amd64");
    };
    if Command::new(QEMU).arg("--version").output().is_err() {
        return not_run("there is no qemu-system-x86_64");
    }
    let dir = temp_dir();
    let initramfs = dir.path().join("initramfs");
    fs::write(&initramfs, pack()).expect("write the initramfs");
    let outcome = finish_within(PATIENCE, machine(&kernel, &initramfs));
    let outcome = Outcome { stdout: outcome.stdout.replace('\r', ""), ..outcome }.expect_status(0);
    let all = crate::tests().len();
    let outcome = outcome.expect_stdout(&format!("\n{all} tests, 0 failed []\n"));
    // A test that is about groups has found its jail's in that version.
    let outcome = outcome.expect_stdout(&format!("{V2_SEEN}\n"));
    let said = |what: &'static str| outcome.stdout.lines().filter(move |l| l.contains(what));
    let greeting =
        said(inside::GREETING).next().unwrap_or_else(|| panic!("no greeting: {outcome}"));
    println!("{greeting}\n{all} tests passed there");
    for line in said("NOT RUN") {
        assert!(line.contains(REASON), "{line:?} is no reason there: {outcome}");
        println!("there: {line}");
    }
}

/// The newest kernel of Debian's for machines in a cloud: it has all that it takes built in.
fn kernel() -> Option<PathBuf> {
    let is_one = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with("vmlinuz-") && name.ends_with("-cloud-amd64")
    };
    let all = fs::read_dir("/boot").into_iter().flatten().flatten().map(|entry| entry.path());
    all.filter(is_one).max_by_key(|path| path.metadata().and_then(|data| data.modified()).ok())
}

/// The machine's file system: this executable, which is its first process as well; the program; and what
/// the test of dynamic programs takes.
fn pack() -> Vec<u8> {
    let mut archive = Archive::default();
    let mut add = |from: &Path, to: &Path| {
        let contents = fs::read(from).unwrap_or_else(|error| panic!("read {from:?}: {error}"));
        archive.add(to, &contents);
    };
    add(&this_program(), Path::new("/init"));
    add(&program(), Path::new(inside::PROGRAM));
    for file in dynamic_shell() {
        add(&file, &file);
    }
    archive.finish()
}

fn machine(kernel: &Path, initramfs: &Path) -> Command {
    let mut qemu = Command::new(QEMU);
    // Each level of page tables costs an emulator time: not five of them.
    qemu.args(["-M", "q35", "-accel", "tcg,thread=multi", "-cpu", "max,la57=off"]);
    qemu.args(["-smp", "2", "-m", "1024", "-no-reboot"]);
    qemu.args(["-nodefaults", "-display", "none", "-serial", "stdio"]);
    qemu.arg("-kernel").arg(kernel).arg("-initrd").arg(initramfs);
    // The kernel says nothing but why it panics, so that no line of the tests is torn; a panic ends the machine. Namespaces
    // and groups, of which the tests make many, are not waited for long. The variable and the word after it are for the
    // first process.
    let words =
        "console=ttyS0 loglevel=1 panic=-1 reboot=t mitigations=off rcupdate.rcu_expedited=1";
    qemu.args(["-append", &format!("{words} PATH=/bin -- {}", inside::WORD)]);
    qemu.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    qemu
}
