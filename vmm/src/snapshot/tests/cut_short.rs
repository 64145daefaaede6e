//! A snapshot that was cut short, by a signal or for want of room, is never taken for a whole one.

use std::os::unix::fs::symlink;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tempfile::TempDir;

use super::*;

/// Where the child below writes, and which word is in the guest's RAM.
const DIRECTORY: &str = "SNAPSHOT_TEST_DIRECTORY";
const WORD: &str = "SNAPSHOT_TEST_WORD";

/// Names of a snapshot in a directory.
fn names(directory: &Path) -> (PathBuf, PathBuf) {
    (directory.join("state"), directory.join("memory"))
}

/// Writes a snapshot whose RAM has `word` in several places.
fn save(directory: &Path, word: &str) -> Result<Header, Box<dyn std::error::Error>> {
    let ram = GuestRam::from_ranges(&[(GuestAddress(0), RAM as usize)])?;
    put(&ram, &[(0x1000, word), (0x8000, word), (0x10_0000, word)]);
    let (state_name, memory_name) = names(directory);
    let drafts = Drafts::create(&state_name, &memory_name)?;
    write(&drafts.targets()?, host(), &state(), &ram, Pages::All)?;
    Ok(drafts.commit()?)
}

/// The word of the snapshot in a directory, if there is one that is taken.
fn load(directory: &Path) -> Option<String> {
    let (state_name, memory_name) = names(directory);
    let header = read_header(&open(&state_name).ok()?).ok()?;
    let template = template(&[(&header, &open(&memory_name).ok()?)]).ok()?;
    let words: Vec<_> = words_in(&template);
    assert_eq!(words.len(), 3, "{words:?}");
    assert!(words.iter().all(|(_, word)| *word == words[0].1), "{words:?}");
    Some(words[0].1.clone())
}

#[test]
#[ignore = "the other tests run it in processes of their own"]
fn child() {
    crate::memory::prepare_process();
    let directory = std::env::var_os(DIRECTORY).expect("run by another test");
    let word = std::env::var(WORD).expect("run by another test");
    if let Err(error) = save(Path::new(&directory), &word) {
        let mut causes = vec![error.to_string()];
        let mut cause = error.source();
        while let Some(error) = cause {
            causes.push(error.to_string());
            cause = error.source();
        }
        panic!("not saved: {}", causes.join(": "));
    }
}

/// A command that ends with the child's.
fn child_under(program: &str, arguments: &[&str], directory: &Path, word: &str) -> Output {
    let mut command = Command::new(program);
    command.args(arguments).arg(std::env::current_exe().unwrap());
    command.args(["--ignored", "--exact", "snapshot::tests::cut_short::child", "--nocapture"]);
    command.args(["--test-threads", "1"]);
    command.env(DIRECTORY, directory).env(WORD, word);
    command.output().unwrap_or_else(|error| panic!("start {program}: {error}"))
}

/// Kills the child at its call number `nth` of `call`, before the kernel does anything; tells whether it came so far.
fn killed_at(call: &str, nth: u32, directory: &Path, word: &str) -> bool {
    let trace = format!("trace={call}");
    let inject = format!("inject={call}:signal=SIGKILL:when={nth}");
    let arguments = ["-f", "-qq", "-o", "/dev/null", "-e", &trace, "-e", &inject];
    let output = child_under("strace", &arguments, directory, word);
    let was_killed = output.status.signal() == Some(9);
    assert!(was_killed || output.status.success(), "{output:?}");
    was_killed
}

/// Every call that changes what is on the disk, and how a snapshot of these names is found after a writer was killed at each of them
/// in turn: `.` if the old one is there, `-` if none is, `+` if the new one is.
const CALLS: [(&str, &str); 6] = [
    ("flock", ".."),
    // Of both files, and once more when it is known how long that one will be.
    ("ftruncate", "..."),
    // Three pieces of RAM, and the state.
    ("pwrite64", "...."),
    // Both files; the directory without the old state, with the new memory, with the new state.
    ("fsync", "..--+"),
    ("unlink", "."),
    ("rename", "--"),
];

#[test]
fn a_writer_killed_at_any_moment_leaves_the_old_snapshot_or_none_or_the_new_one() {
    let directory = TempDir::new().unwrap();
    let path = directory.path();
    save(path, "old").unwrap();
    for (call, expected) in CALLS {
        let mut found = String::new();
        let mut nth = 1;
        while killed_at(call, nth, path, "new") {
            found.push(match load(path).as_deref() {
                Some("old") => '.',
                None => '-',
                Some("new") => '+',
                Some(other) => panic!("{other} after a writer that was killed at {call} {nth}"),
            });
            // What was left does not keep anybody from the same names.
            save(path, "old").unwrap();
            assert_eq!(load(path).as_deref(), Some("old"));
            let left = std::fs::read_dir(path).unwrap().count();
            assert_eq!(left, 2, "files after a writer that was killed at {call} {nth}");
            nth += 1;
        }
        assert_eq!(found, expected, "{call}");
        assert_eq!(load(path).as_deref(), Some("new"), "the writer that was not killed");
        save(path, "old").unwrap();
    }
}

/// The disk is full at each write in turn, as in the kernel's answer and then for good.
#[test]
fn a_disk_that_is_full_leaves_the_old_snapshot() {
    let directory = TempDir::new().unwrap();
    let path = directory.path();
    save(path, "old").unwrap();
    let mut nth = 1;
    loop {
        let inject = format!("inject=pwrite64:error=ENOSPC:when={nth}+");
        let arguments = ["-f", "-qq", "-o", "/dev/null", "-e", "trace=pwrite64", "-e", &inject];
        let output = child_under("strace", &arguments, path, "new");
        if output.status.success() {
            break;
        }
        let text = String::from_utf8_lossy(&output.stderr);
        let expected = ["memory", "state"]
            .map(|file| format!("not saved: write the {file} file: No space left on device"));
        assert!(expected.iter().any(|line| text.contains(line)), "{text}");
        assert_eq!(load(path).as_deref(), Some("old"));
        assert_eq!(std::fs::read_dir(path).unwrap().count(), 2, "files of the one that failed");
        nth += 1;
    }
    assert_eq!(nth, 5, "three pieces of RAM and the state");
    assert_eq!(load(path).as_deref(), Some("new"));
}

#[test]
fn a_file_system_without_room_is_told_and_keeps_nothing() {
    let directory = TempDir::new().unwrap();
    // Room for two pages and the directory. What it holds is copied out, for the file system goes away with the process.
    let script = "mount -t tmpfs -o size=8k none \"$SNAPSHOT_TEST_DIRECTORY\" && { \"$@\"; ls -A \
                  \"$SNAPSHOT_TEST_DIRECTORY\"; }";
    let arguments = ["-rm", "sh", "-c", script, "sh"];
    let output = child_under("unshare", &arguments, directory.path(), "new");
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("not saved: write the memory file: No space left on device"), "{text}");
    let files = String::from_utf8_lossy(&output.stdout);
    assert!(!files.contains("state") && !files.contains("memory"), "{files}");
}

#[test]
fn files_that_may_not_be_so_large_are_told_and_not_kept() {
    let directory = TempDir::new().unwrap();
    let path = directory.path();
    save(path, "old").unwrap();
    let output = child_under("prlimit", &["--fsize=65536"], path, "new");
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("not saved: give the memory file its length: File too large"), "{text}");
    assert_eq!(load(path).as_deref(), Some("old"));
    assert_eq!(std::fs::read_dir(path).unwrap().count(), 2);
}

#[test]
fn what_was_not_written_whole_is_not_given_a_name() {
    let directory = TempDir::new().unwrap();
    let (state_name, memory_name) = names(directory.path());
    let check = |spoil: fn(&Targets), expected: &str| {
        let drafts = Drafts::create(&state_name, &memory_name).unwrap();
        let targets = drafts.targets().unwrap();
        let memory = ram_with(&[(0x1000, "x")]);
        write(&targets, host(), &state(), memory.ram(), Pages::All).unwrap();
        spoil(&targets);
        let error = drafts.commit().unwrap_err();
        let source = std::error::Error::source(&error).unwrap().to_string();
        assert!(source.contains(expected), "{error}: {source}");
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    };
    check(|targets| targets.state.set_len(50).unwrap(), "cut short");
    check(|targets| targets.memory.set_len(4096).unwrap(), "memory file has 4096 bytes");
}

#[test]
fn two_writers_cannot_have_the_same_names_at_once() {
    let directory = TempDir::new().unwrap();
    let (state_name, memory_name) = names(directory.path());
    let first = Drafts::create(&state_name, &memory_name).unwrap();
    let check = |state: &Path, memory: &Path, expected: &str| {
        let error = Drafts::create(state, memory).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    };
    check(&state_name, &memory_name, "is being written by another process");
    // Who is refused removes nothing of the other's.
    assert!(state_name.with_file_name("state.partial").exists());
    drop(first);
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    check(&state_name, &state_name, "cannot be both");
    check(&state_name, directory.path(), "no regular file");
    check(&state_name, Path::new("/"), "no file name");
    symlink("/etc/passwd", &memory_name).unwrap();
    check(&state_name, &memory_name, "no regular file");
    symlink("elsewhere", directory.path().join("state.partial")).unwrap();
    check(&state_name, &directory.path().join("other"), "create");
    assert!(!directory.path().join("elsewhere").exists());
}

#[test]
fn only_files_are_opened_as_snapshots() {
    let directory = TempDir::new().unwrap();
    let check = |path: &Path, expected: &str| {
        let error = open(path).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    };
    check(directory.path(), "no regular file");
    check(Path::new("/dev/null"), "no regular file");
    check(&directory.path().join("absent"), "open");
    let pipe = directory.path().join("pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    check(&pipe, "no regular file");
}

#[test]
fn nobody_else_may_read_a_snapshot() {
    use std::os::unix::fs::MetadataExt;
    let directory = TempDir::new().unwrap();
    save(directory.path(), "x").unwrap();
    let (state_name, memory_name) = names(directory.path());
    for name in [state_name, memory_name] {
        assert_eq!(std::fs::metadata(name).unwrap().mode() & 0o777, 0o600);
    }
}

#[test]
fn nothing_of_what_a_killed_writer_left_comes_into_a_snapshot() {
    let directory = TempDir::new().unwrap();
    for name in ["state.partial", "memory.partial"] {
        std::fs::write(directory.path().join(name), vec![0xa5; 2 * RAM as usize]).unwrap();
    }
    save(directory.path(), "new").unwrap();
    assert_eq!(load(directory.path()).as_deref(), Some("new"));
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 2);
}
