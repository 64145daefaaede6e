//! `cleanslate probe`: how fast and how correct a machine's vsock is.

use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use clap::Args;
use jailer::User;

use super::Error;
use super::reports::ReportFile;
use super::run::PrintError;
use crate::machine::Interrupts;
use crate::probe::machine::{OwnMachine, SocketDirectory};
use crate::probe::report::{self, Ending, Report, Target};
use crate::probe::{self, DialError, News, Plan};
use crate::soak::line::{Found, Held, Line};
use crate::soak::printable;
use crate::soak::process::Said;

/// Measure a machine's vsock, and check that it keeps the rules of stream sockets
///
/// Boots a machine of its own, in a jail and with the DMA audit on, and talks to its agent as any client would: round trips by size,
/// throughput both ways, connections per second, and how connections close, half close, are refused and reset. With --uds it probes a
/// machine that runs already, of any monitor with Firecracker's socket convention whose guest is the agent (`cleanslate agent export`).
#[derive(Debug, Args)]
#[command(after_help = "\
Exit status:
  0    all checks passed that could be made
  1    a check failed
  2    wrong usage, no agent there, or the host failed
  130  interrupted; what was measured until then is printed

Examples:
  cleanslate probe
  cleanslate probe --count 10000 --html probe.html
  cleanslate probe --uds /tmp/vm.sock --json")]
pub(super) struct Arguments {
    /// Probe the machine with this vsock socket instead of one of our own
    #[arg(long, value_name = "PATH", conflicts_with_all = ["agent", "no_jail"])]
    uds: Option<PathBuf>,

    /// User of that machine's process, which has to connect to sockets of ours; only root may name another
    /// [default: nobody for root, and otherwise your own]
    #[arg(long, value_name = "USER", requires = "uds")]
    uid: Option<String>,

    /// Round trips of each size
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    count: u32,

    /// Megabytes (MiB) in each direction of a throughput measurement
    #[arg(long, value_name = "MIB", default_value_t = 64, value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    mib: u64,

    /// Connections to open and close
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    connections: u32,

    /// How long to wait for each answer, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    timeout: u64,

    /// Print one JSON object instead of the table
    #[arg(long)]
    json: bool,

    /// Write a page with plots for a browser
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,

    /// Boot this image of the agent instead of the embedded one
    #[arg(long, value_name = "FILE")]
    agent: Option<PathBuf>,

    /// Run the machine without a jail
    #[arg(long)]
    no_jail: bool,
}

#[derive(Debug, thiserror::Error)]
enum ProbeError {
    #[error("start a thread")]
    Thread(#[source] io::Error),
    #[error("the machine's process: {0}")]
    Machine(String),
}

/// What this thread hears of.
enum Event {
    Signal,
    Machine(Said),
    Probe(News),
    /// The probe is over.
    Done(Result<(), DialError>),
}

impl From<((), Said)> for Event {
    fn from(((), said): ((), Said)) -> Self {
        Self::Machine(said)
    }
}

pub(super) fn main(arguments: &Arguments) -> Result<u8, Error> {
    let user = arguments.uid.as_deref().map(|user| User::find(user, None)).transpose()?;
    let page = arguments.html.as_deref().map(ReportFile::open).transpose()?;
    // Before there is anything that a signal could leave behind, and before there are threads.
    let interrupts = Interrupts::catch_as_started()?;
    let directory = match arguments.uds {
        None => Some(SocketDirectory::new()?),
        Some(_) => None,
    };
    let path = match (&arguments.uds, &directory) {
        (Some(path), _) => path.clone(),
        (None, Some(directory)) => directory.socket(),
        (None, None) => PathBuf::new(),
    };
    let plan = Plan {
        path,
        user,
        timeout: Duration::from_secs(arguments.timeout),
        trips: arguments.count,
        bytes: arguments.mib << 20,
        connections: arguments.connections,
    };
    let (outbox, inbox) = sync_channel(256);
    watch_signals(interrupts, outbox.clone())?;
    let report = match &arguments.uds {
        Some(path) => {
            let mut session = Session::new(Target::Socket(path.clone()), &inbox, None);
            session.probe(plan, outbox)?;
            session.report.uncheck("only a machine of our own tells; this one is somebody else's");
            session.report
        }
        None => {
            let machine = OwnMachine::start(&plan.path, &arguments.words(), outbox.clone())?;
            let mut session = Session::new(Target::Own, &inbox, Some(machine));
            if session.wait_for_machine()? {
                session.probe(plan, outbox)?;
            }
            session.end_machine()?;
            session.report
        }
    };
    finish(&report, arguments.json, page)
}

fn finish(report: &Report, json: bool, page: Option<ReportFile>) -> Result<u8, Error> {
    let text = if json { report::json(report) } else { report::table(report) };
    let mut stdout = io::stdout().lock();
    let printed = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
    if let Err(error) = printed
        // A reader that went away, as `head` does, is no error of ours.
        && error.kind() != io::ErrorKind::BrokenPipe
    {
        return Err(PrintError(error).into());
    }
    page.map_or(Ok(()), |page| page.write(&report::html(report)))?;
    Ok(report.status())
}

impl Arguments {
    /// For the machine's process.
    fn words(&self) -> Vec<String> {
        let mut words = vec!["--timeout".into(), self.timeout.to_string()];
        if let Some(agent) = &self.agent {
            words.extend(["--agent".into(), agent.to_string_lossy().into_owned()]);
        }
        if self.no_jail {
            words.push("--no-jail".into());
        }
        words
    }
}

fn watch_signals(mut interrupts: Interrupts, outbox: SyncSender<Event>) -> Result<(), ProbeError> {
    let watch = move || {
        interrupts.wait();
        // If nobody listens, everything is over already.
        let _ = outbox.send(Event::Signal);
        // Signals are caught as long as this is kept.
        loop {
            interrupts.wait();
        }
    };
    let thread = std::thread::Builder::new().name("signals".into()).spawn(watch);
    thread.map(|_| ()).map_err(ProbeError::Thread)
}

/// A probe as this thread leads it.
struct Session<'a> {
    report: Report,
    inbox: &'a Receiver<Event>,
    machine: Option<OwnMachine>,
    /// What the machine has said.
    findings: Vec<Found>,
    held: Option<Held>,
    end: Option<String>,
    is_closed: bool,
    progress: Progress,
}

/// How long the probe may take to come to a point where it can end.
const GRACE: Duration = Duration::from_secs(2);

impl<'a> Session<'a> {
    fn new(target: Target, inbox: &'a Receiver<Event>, machine: Option<OwnMachine>) -> Self {
        Self {
            report: Report::new(target),
            inbox,
            machine,
            findings: Vec::new(),
            held: None,
            end: None,
            is_closed: false,
            progress: Progress::new(),
        }
    }

    /// Waits until the machine's first life was judged. False if a signal came before.
    fn wait_for_machine(&mut self) -> Result<bool, Error> {
        self.progress.show("booting a machine");
        loop {
            match self.inbox.recv() {
                Ok(Event::Machine(Said::Line(line))) if matches!(*line, Line::Verdict { .. }) => {
                    return Ok(true);
                }
                Ok(Event::Machine(said)) => self.hear_machine(said),
                Ok(Event::Signal) => {
                    self.report.ending = Ending::Interrupted;
                    return Ok(false);
                }
                Ok(Event::Probe(_) | Event::Done(_)) => {}
                Err(_) => self.is_closed = true,
            }
            if self.is_closed {
                return Err(ProbeError::Machine(self.last_words()?).into());
            }
        }
    }

    /// Probes, and hears what comes of it.
    fn probe(&mut self, plan: Plan, outbox: SyncSender<Event>) -> Result<(), Error> {
        let stop = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&stop);
        let work = move || {
            let ended = probe::run(&plan, &told, &mut |news| {
                let _ = outbox.send(Event::Probe(news));
            });
            let _ = outbox.send(Event::Done(ended));
        };
        std::thread::Builder::new().name("probe".into()).spawn(work).map_err(ProbeError::Thread)?;
        loop {
            let event = match self.report.ending {
                Ending::Complete => self.inbox.recv().map_err(|_| RecvTimeoutError::Disconnected),
                // It may be in the middle of something that does not come to an end.
                _ => self.inbox.recv_timeout(GRACE),
            };
            match event {
                Ok(Event::Probe(news)) => {
                    if let News::Stage(words) = &news {
                        self.progress.show(words);
                    }
                    self.report.hear(news);
                }
                Ok(Event::Machine(said)) => {
                    self.hear_machine(said);
                    if self.is_closed && self.report.ending == Ending::Complete {
                        stop.store(true, Ordering::Relaxed);
                        self.fail_with_machine()?;
                    }
                }
                Ok(Event::Signal) => {
                    stop.store(true, Ordering::Relaxed);
                    self.report.ending = Ending::Interrupted;
                }
                Ok(Event::Done(ended)) => {
                    if ended.is_err() && self.report.ending == Ending::Complete {
                        // A machine that dies may be heard of by its clients first.
                        self.await_end_of_machine();
                        if self.is_closed {
                            self.fail_with_machine()?;
                        }
                    }
                    self.progress.clear();
                    return match &self.report.ending {
                        Ending::Complete => Ok(ended?),
                        _ => Ok(()),
                    };
                }
                Err(_) => {
                    self.progress.clear();
                    return Ok(());
                }
            }
        }
    }

    /// Hears the machine until it has said all, if that comes soon.
    fn await_end_of_machine(&mut self) {
        let deadline = Instant::now() + GRACE;
        while self.machine.is_some() && !self.is_closed {
            match self.inbox.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(Event::Machine(said)) => self.hear_machine(said),
                Ok(Event::Signal) => return self.report.ending = Ending::Interrupted,
                Ok(Event::Probe(_) | Event::Done(_)) => {}
                Err(_) => return,
            }
        }
    }

    /// The probe failed since its machine, which has ended, did.
    fn fail_with_machine(&mut self) -> Result<(), Error> {
        let why = ProbeError::Machine(self.last_words()?).to_string();
        self.report.ending = Ending::Failed(why);
        Ok(())
    }

    /// Has the machine end, and say what it has seen.
    fn end_machine(&mut self) -> Result<(), Error> {
        self.progress.clear();
        if let Some(machine) = &self.machine {
            machine.ask_to_end();
        }
        while !self.is_closed {
            match self.inbox.recv() {
                Ok(Event::Machine(said)) => self.hear_machine(said),
                Ok(Event::Signal) => self.report.ending = Ending::Interrupted,
                Ok(Event::Probe(_) | Event::Done(_)) => {}
                Err(_) => break,
            }
        }
        if self.report.ending == Ending::Complete && self.held.is_none() {
            self.fail_with_machine()?;
        }
        self.report.hear_machine(&self.findings, self.held.take());
        Ok(())
    }

    /// What the machine's process says is untrusted, as its guest may have taken it over.
    fn hear_machine(&mut self, said: Said) {
        match said {
            Said::Line(line) => match *line {
                Line::Notice { text } => {
                    self.progress.clear();
                    eprintln!("cleanslate: {}", printable(&text));
                }
                Line::Machine(machine) => self.report.host = Some(machine.host),
                Line::Life(life) => self.findings = life.findings,
                Line::Held(held) => self.held = Some(*held),
                Line::End { detail, .. } => self.end = Some(printable(&detail)),
                Line::Verdict { .. } => {}
            },
            Said::Nonsense(error) => self.end = Some(format!("it printed nonsense: {error}")),
            Said::Closed => self.is_closed = true,
        }
    }

    /// Why the machine's process, which has ended, did so.
    fn last_words(&mut self) -> Result<String, Error> {
        let Some(machine) = &mut self.machine else { return Ok(String::new()) };
        let (status, errors) = machine.wait()?;
        let words = self.end.clone().or_else(|| errors.last().cloned());
        let words = words.map(|words| words.trim_start_matches("cleanslate: ").to_owned());
        Ok(words.unwrap_or_else(|| format!("it ended with {status}")))
    }
}

/// What goes on, in a line on a terminal.
struct Progress {
    visible: bool,
    drawn: bool,
}

impl Progress {
    fn new() -> Self {
        Self { visible: io::stderr().is_terminal(), drawn: false }
    }

    fn show(&mut self, words: &str) {
        if self.visible {
            // Who cannot be told how far it is cannot be told that either.
            let _ = write!(io::stderr(), "\r{words}\x1b[K");
            self.drawn = true;
        }
    }

    fn clear(&mut self) {
        if std::mem::take(&mut self.drawn) {
            let _ = write!(io::stderr(), "\r\x1b[K");
        }
    }
}
