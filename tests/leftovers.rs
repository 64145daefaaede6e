//! Five hundred jailed launches, of which many are killed at random moments, leave nothing behind.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use crate::harness::{cleanslate, eventually, temp_dir};

const LAUNCHES: u32 = 500;

/// What every name in this test begins with, and nothing else on the host.
const MARK: &str = "leftovers-test";

/// A small generator (xorshift64): random moments that are the same in each run of the test.
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

/// The numbers of all processes whose command line has `mark`: a jailed process and a janitor have their caller's.
pub fn processes(mark: &str) -> Vec<i32> {
    let numbers = fs::read_dir("/proc").unwrap().filter_map(|entry| {
        entry.unwrap().file_name().to_str().and_then(|name| name.parse::<i32>().ok())
    });
    let is_marked = |pid: &i32| {
        let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        command.windows(mark.len()).any(|window| window == mark.as_bytes())
    };
    numbers.filter(is_marked).collect()
}

/// The control groups whose names begin with `mark`, in every hierarchy, wherever they are in it.
pub fn marked_groups(mark: &str) -> Vec<PathBuf> {
    fn search(dir: &Path, mark: &str, found: &mut Vec<PathBuf>) {
        let entries = fs::read_dir(dir).into_iter().flatten().filter_map(Result::ok);
        for entry in entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
            let path = entry.path();
            if entry.file_name().to_string_lossy().starts_with(mark) {
                found.push(path);
            } else {
                search(&path, mark, found);
            }
        }
    }
    let mut found = Vec::new();
    search(Path::new("/sys/fs/cgroup"), mark, &mut found);
    found
}

/// The network namespaces that processes with the mark are in and this test is not.
fn namespaces_of_jails() -> impl Iterator<Item = PathBuf> {
    let own = fs::read_link("/proc/self/ns/net").unwrap();
    let links = processes(MARK).into_iter().map(|pid| format!("/proc/{pid}/ns/net"));
    links.filter_map(|link| fs::read_link(link).ok()).filter(move |namespace| *namespace != own)
}

/// Kills the program, or one of the processes that it has started, whichever are there. One alone: when a program and its
/// janitor are killed together, nobody is left to clean.
fn kill_one(child: &Child, id: &str, random: &mut Random) {
    let all = processes(&format!("{id}\0"));
    let victim = match all.len() as u64 {
        // At its start, when it has no name yet.
        0 => child.id() as i32,
        count => all[random.below(count) as usize],
    };
    // It may have ended meanwhile.
    let _ = kill_process(Pid::from_raw(victim).unwrap(), Signal::KILL);
}

#[test]
fn five_hundred_launches_of_which_many_are_killed_leave_nothing() {
    let dir = temp_dir();
    let temporary = dir.path().join("tmp");
    fs::create_dir(&temporary).unwrap();
    let mounts_before = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let mut random = Random(0x5eed);
    let mut seen = BTreeSet::new();
    let (mut killed, mut clean) = (0, 0);
    for launch in 0..LAUNCHES {
        let socket = dir.path().join(format!("vsock-{launch}"));
        let id = format!("{MARK}-{launch}");
        let mut command = cleanslate(&["run", "--resets", "2", "--id", &id, "--uds"]);
        command.arg(&socket).env("TMPDIR", &temporary).stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        let is_killed = random.below(3) > 0;
        if is_killed {
            std::thread::sleep(Duration::from_micros(random.below(12_000)));
            if launch % 16 == 0 {
                seen.extend(namespaces_of_jails());
            }
            kill_one(&child, &id, &mut random);
            killed += 1;
        }
        let status = child.wait().unwrap();
        if !is_killed {
            assert!(status.success(), "launch {launch}: {status}");
            clean += 1;
            // Nobody was killed: it is all gone before the program ends.
            assert!(!socket.exists(), "launch {launch} left its socket");
        }
    }
    assert!(killed > 200 && clean > 100, "{killed} killed, {clean} clean");
    // The janitor of a program that was killed may still be at work.
    eventually("no process is left", || processes(MARK).is_empty());
    let groups = marked_groups(MARK);
    assert!(groups.is_empty(), "control groups were left: {groups:?}");
    let files: Vec<_> =
        fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(files, ["tmp"], "files were left");
    assert_eq!(fs::read_dir(&temporary).unwrap().count(), 0, "temporary files were left");
    assert_eq!(fs::read_to_string("/proc/self/mountinfo").unwrap(), mounts_before);
    // A namespace is gone when no process is in it and nothing keeps it by a mount.
    assert!(!mounts_before.contains(" - nsfs "), "a namespace is kept by a mount: {mounts_before}");
    assert!(!seen.is_empty(), "no jail was ever seen");
}
