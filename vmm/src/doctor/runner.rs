//! Runs a check in a process of its own, for so long and no longer. It is killed then; one that even survives that, because the
//! kernel holds it, is given up.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::soak::printable;

/// The most that a check may print.
const MOST_BYTES: usize = 256 * 1024;

/// How long a killed process may take to be gone: the kernel may be busy with it.
const GRACE: Duration = Duration::from_secs(5);

/// Why there is no result.
#[derive(Debug)]
pub enum Failure {
    /// It could not be started or heard.
    Host(io::Error),
    /// It did not end in time.
    TooLong(Duration),
    /// It did not even end when it was killed.
    Undying(Duration),
    /// It was killed by this signal.
    Killed(i32),
    /// It ended with this status and these last words.
    Exited(i32, String),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host(error) => write!(f, "its process could not be run: {error}"),
            Self::TooLong(limit) => {
                write!(f, "its process did not end within {limit:?}, and was killed")
            }
            Self::Undying(limit) => write!(
                f,
                "its process did not end within {limit:?}, and not even when it was killed: the kernel holds it"
            ),
            Self::Killed(signal) => write!(f, "its process was killed by signal {signal}"),
            Self::Exited(status, words) if words.is_empty() => {
                write!(f, "its process ended with status {status}")
            }
            Self::Exited(status, words) => {
                write!(f, "its process ended with status {status}: {words}")
            }
        }
    }
}

/// Runs `command` for at most `limit`; gives what it printed.
///
/// # Errors
/// [`Failure`] unless it ended in time and with status 0.
pub fn run(mut command: Command, limit: Duration) -> Result<String, Failure> {
    let [stdout, stderr] = [(); 2].map(|()| Output::new());
    let (stdout, stderr) = (stdout.map_err(Failure::Host)?, stderr.map_err(Failure::Host)?);
    command.stdout(stdout.writer().map_err(Failure::Host)?);
    command.stderr(stderr.writer().map_err(Failure::Host)?);
    let mut child = command.spawn().map_err(Failure::Host)?;
    let status = match wait(&child, limit) {
        Ok(true) => child.wait().map_err(Failure::Host)?,
        Ok(false) => {
            end(child)?;
            return Err(Failure::TooLong(limit));
        }
        Err(error) => {
            end(child)?;
            return Err(Failure::Host(error));
        }
    };
    match (status.code(), status.signal()) {
        (Some(0), _) => stdout.text().map_err(Failure::Host),
        (Some(code), _) => {
            let text = stderr.text().map_err(Failure::Host)?;
            let words = text.lines().last().unwrap_or_default();
            let words = printable(words.trim_start_matches("cleanslate: "));
            Err(Failure::Exited(code, words))
        }
        (None, signal) => Err(Failure::Killed(signal.unwrap_or(0))),
    }
}

/// Waits for the end of `child`, but for no longer than `limit`. True if it has ended.
fn wait(child: &Child, limit: Duration) -> io::Result<bool> {
    // Nobody has waited for it yet, so the number is its own.
    let process = pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
    let timeout = Timespec::try_from(limit).map_err(io::Error::other)?;
    let mut ends = [PollFd::new(&process, PollFlags::IN)];
    let ended = rustix::io::retry_on_intr(|| poll(&mut ends, Some(&timeout)))?;
    Ok(ended > 0)
}

/// Kills a child.
fn end(mut child: Child) -> Result<(), Failure> {
    // It may have ended this very moment.
    let _ = child.kill();
    match wait(&child, GRACE) {
        Ok(true) => child.wait().map(|_| ()).map_err(Failure::Host),
        Ok(false) => Err(Failure::Undying(GRACE)),
        Err(error) => Err(Failure::Host(error)),
    }
}

/// What a process prints: in memory, of a size that nobody can change, so that whoever keeps it open keeps nobody waiting.
struct Output(File);

impl Output {
    fn new() -> io::Result<Self> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = rustix::fs::memfd_create("check-output", flags)?;
        rustix::fs::ftruncate(&file, MOST_BYTES as u64)?;
        rustix::fs::fcntl_add_seals(&file, SealFlags::GROW | SealFlags::SHRINK)?;
        Ok(Self(File::from(file)))
    }

    fn writer(&self) -> io::Result<OwnedFd> {
        self.0.as_fd().try_clone_to_owned()
    }

    /// Up to the first byte that nobody wrote.
    fn text(&self) -> io::Result<String> {
        let mut bytes = vec![0; MOST_BYTES];
        self.0.read_exact_at(&mut bytes, 0)?;
        let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
        Ok(String::from_utf8_lossy(&bytes[..end]).into_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Longer than any of these takes that end by themselves.
    const PATIENCE: Duration = Duration::from_secs(60);

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[track_caller]
    fn failed(script: &str, limit: Duration) -> String {
        run(shell(script), limit).expect_err(script).to_string()
    }

    #[test]
    fn what_a_check_prints_is_its_result() {
        assert_eq!(
            run(shell("echo it; echo words >&2; echo that"), PATIENCE).unwrap(),
            "it\nthat\n"
        );
        assert_eq!(run(shell("true"), PATIENCE).unwrap(), "");
    }

    #[test]
    fn one_that_hangs_is_killed() {
        let limit = Duration::from_millis(50);
        let dir = tempfile::tempdir().unwrap();
        let number = dir.path().join("number");
        let words = failed(&format!("echo $$ > {}; exec sleep 1000", number.display()), limit);
        assert_eq!(words, "its process did not end within 50ms, and was killed");
        // Gone, and waited for. (If the limit came before it had a number, there is nothing to look at.)
        if let Ok(text) = std::fs::read_to_string(number)
            && let Ok(number) = text.trim().parse()
        {
            let found = rustix::process::test_kill_process(Pid::from_raw(number).unwrap());
            assert_eq!(found, Err(rustix::io::Errno::SRCH));
        }
        // One that is stopped does not hear of it any other way.
        assert_eq!(failed("kill -STOP $$", limit), words);
    }

    #[test]
    fn one_that_dies_is_told_from_one_that_fails() {
        assert_eq!(failed("kill -KILL $$", PATIENCE), "its process was killed by signal 9");
        assert_eq!(failed("kill -SEGV $$", PATIENCE), "its process was killed by signal 11");
        assert_eq!(failed("exit 3", PATIENCE), "its process ended with status 3");
        let words = "its process ended with status 2: no\u{fffd} luck";
        assert_eq!(
            failed("echo first >&2; printf 'cleanslate: no\\033 luck\\n' >&2; exit 2", PATIENCE),
            words
        );
        let words = run(Command::new("/nowhere"), PATIENCE).unwrap_err().to_string();
        assert!(words.contains("could not be run: No such file"), "{words}");
    }

    #[test]
    fn one_that_prints_without_end_ends_at_the_limit_of_memory() {
        let printed = run(shell("yes || true"), PATIENCE).unwrap();
        assert_eq!(printed.len(), MOST_BYTES);
    }

    #[test]
    fn somebody_who_keeps_the_output_keeps_nobody_waiting() {
        assert_eq!(
            run(shell("sleep 1000 & echo $!"), PATIENCE)
                .map(|text| {
                    let number = text.trim().parse().unwrap();
                    let sleeper = Pid::from_raw(number).unwrap();
                    rustix::process::kill_process(sleeper, rustix::process::Signal::KILL).unwrap();
                })
                .map_err(|failure| failure.to_string()),
            Ok(())
        );
    }
}
