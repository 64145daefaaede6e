//! A machine's process as the coordinator sees it: started, listened to, told to end.

use std::collections::VecDeque;
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use super::line::Line;

/// What comes from a machine's process.
#[derive(Debug)]
pub enum Said {
    /// A line.
    Line(Box<Line>),
    /// Bytes that are none.
    Nonsense(String),
    /// Nothing more will come.
    Closed,
}

/// A line with evidence has a few hundred thousand bytes.
const LONGEST_LINE: u64 = 8 << 20;

/// How long the end of stderr may come after that of the process. Its janitor has stderr too, and somebody may have stopped that.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// This program with these arguments, as the process of a machine.
pub fn command(arguments: &[String]) -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.arg0("cleanslate").args(arguments).arg("--json-lines");
    command.args(["--child-of", &std::process::id().to_string()]);
    command
}

/// A process that runs one machine.
pub struct Process {
    child: Child,
    errors: Arc<Mutex<VecDeque<String>>>,
    /// Disconnected when stderr is at its end.
    last_words: Receiver<()>,
}

impl Process {
    /// Starts `command`. What it says goes to `outbox`, each with `name`.
    ///
    /// # Errors
    /// What the kernel says when it has no process left, or the program cannot be started.
    pub fn start<N: Copy + Send + 'static, M: From<(N, Said)> + Send + 'static>(
        mut command: Command,
        name: N,
        outbox: SyncSender<M>,
    ) -> io::Result<Self> {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // A terminal's signals are for the coordinator, which tells its processes.
        command.process_group(0);
        let mut child = command.spawn()?;
        let errors = Arc::default();
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let spawn = |name: &str, work: Box<dyn FnOnce() + Send>| {
            std::thread::Builder::new().name(name.into()).spawn(work)
        };
        let kept = Arc::clone(&errors);
        let (end_of_stderr, last_words) = sync_channel(0);
        let keep = move || {
            stderr.into_iter().for_each(|s| keep(s, &kept));
            drop(end_of_stderr);
        };
        let listen = move || stdout.into_iter().for_each(|s| listen(s, name, &outbox));
        match spawn("stderr", Box::new(keep)).and_then(|_| spawn("stdout", Box::new(listen))) {
            Ok(_) => Ok(Self { child, errors, last_words }),
            Err(error) => {
                let _ = child.kill().and_then(|()| child.wait());
                Err(error)
            }
        }
    }

    /// Tells it to end as Ctrl-C does.
    pub fn ask_to_end(&self) {
        // It may have ended already, and nobody has waited for it yet, so the number is still its own.
        let _ = kill_process(Pid::from_child(&self.child), Signal::TERM);
    }

    /// Ends it, whatever it does.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
    }

    /// Waits for its end, which is near: its output is closed. Gives the last lines of its stderr too.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn wait(&mut self) -> io::Result<(ExitStatus, Vec<String>)> {
        let status = self.child.wait()?;
        // Without its end there is what has come until now.
        let _ = self.last_words.recv_timeout(LAST_WORDS);
        Ok((status, self.errors()))
    }

    /// Waits no more for one that was killed and does not end.
    pub fn give_up(self) {
        std::mem::forget(self);
    }

    /// The last lines of its stderr.
    pub fn errors(&self) -> Vec<String> {
        self.errors.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Has no effect on one that was waited for. Its janitor removes what it had.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Hands on lines until the stream ends or nobody wants them.
fn listen<N: Copy, M: From<(N, Said)>>(stream: impl Read, name: N, outbox: &SyncSender<M>) {
    let mut stream = BufReader::with_capacity(64 * 1024, stream);
    let mut bytes = Vec::new();
    loop {
        bytes.clear();
        let said = match (&mut stream).take(LONGEST_LINE).read_until(b'\n', &mut bytes) {
            Ok(0) | Err(_) => Said::Closed,
            Ok(_) => match serde_json::from_slice(&bytes) {
                Ok(line) => Said::Line(Box::new(line)),
                Err(error) => Said::Nonsense(error.to_string()),
            },
        };
        let is_last = matches!(said, Said::Closed);
        if outbox.send((name, said).into()).is_err() || is_last {
            return;
        }
    }
}

/// Keeps the last lines.
fn keep(stream: impl Read, kept: &Mutex<VecDeque<String>>) {
    const MOST_LINES: usize = 20;
    const LONGEST: u64 = 4096;
    let mut stream = BufReader::new(stream);
    let mut bytes = Vec::new();
    while let Ok(1..) = (&mut stream).take(LONGEST).read_until(b'\n', &mut bytes) {
        let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() == MOST_LINES {
            kept.pop_front();
        }
        kept.push_back(super::printable(String::from_utf8_lossy(&bytes).trim_end()));
        bytes.clear();
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::{CWD, Mode, mkfifoat};

    use super::*;

    fn heard(bytes: &[u8]) -> Vec<Said> {
        let (outbox, inbox) = sync_channel(64);
        listen(bytes, 7, &outbox);
        drop(outbox);
        inbox
            .into_iter()
            .map(|(name, said)| {
                assert_eq!(name, 7);
                said
            })
            .collect()
    }

    #[test]
    fn lines_are_told_from_nonsense() {
        let said =
            heard(b"{\"line\":\"verdict\",\"verdict\":\"clean\"}\nxyz\n{\"line\":\"life\"}\n{\"li");
        let kinds: Vec<_> = said
            .iter()
            .map(|said| match said {
                Said::Line(_) => "line",
                Said::Nonsense(_) => "nonsense",
                Said::Closed => "closed",
            })
            .collect();
        assert_eq!(kinds, ["line", "nonsense", "nonsense", "nonsense", "closed"]);
    }

    #[test]
    fn a_line_without_an_end_takes_no_more_memory_than_one_may() {
        let said = heard(&vec![b' '; LONGEST_LINE as usize + 10]);
        assert_eq!(said.len(), 3, "{said:?}");
    }

    #[test]
    fn one_that_is_given_up_is_not_waited_for() {
        let mut command = Command::new("sleep");
        command.arg("20");
        let (outbox, _inbox) = sync_channel::<(u32, Said)>(1);
        let process = Process::start(command, 7_u32, outbox).unwrap();
        let pid = Pid::from_child(&process.child);
        process.give_up();
        // Still there.
        kill_process(pid, Signal::KILL).unwrap();
    }

    #[test]
    fn whoever_keeps_the_stderr_of_one_that_has_ended_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("fifo");
        mkfifoat(CWD, &fifo, Mode::RWXU).unwrap();
        let mut command = Command::new("sh");
        // The one in the background has stderr until something comes from the FIFO.
        command.args(["-c", "read word < \"$0\" & echo last words >&2"]).arg(&fifo);
        let (outbox, _inbox) = sync_channel::<(u32, Said)>(1);
        let mut process = Process::start(command, 7_u32, outbox).unwrap();
        let (status, errors) = process.wait().unwrap();
        assert!(status.success() && errors == ["last words"], "{status}: {errors:?}");
        std::fs::write(&fifo, "end\n").unwrap();
    }

    #[test]
    fn only_the_last_errors_are_kept() {
        let kept = Mutex::default();
        keep(
            &*(0..100).fold(String::new(), |all, n| format!("{all}error {n}\n")).into_bytes(),
            &kept,
        );
        let kept = kept.into_inner().unwrap();
        assert_eq!((kept.len(), kept.back().map(String::as_str)), (20, Some("error 99")));
    }
}
