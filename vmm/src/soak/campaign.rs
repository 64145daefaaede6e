//! The soak's loop: starts the machines' processes, hears them, judges how they end, and knows when it is over.

use std::io;
use std::ops::ControlFlow;
use std::process::Command;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::Place;
use super::line::{Found, Life, Line, Machine};
use super::plan::Plan;
use super::process::{self, Process, Said};
use super::slot::{FAILED, Slot};
use crate::machine::Interrupts;

/// Why a soak could not go on.
#[derive(Debug, thiserror::Error)]
pub enum CampaignError {
    /// No process could be had.
    #[error("start a process for a machine")]
    Start(#[source] io::Error),
    /// A machine's process said why it cannot run one.
    #[error("{0}")]
    Machine(String),
    /// A process could not be waited for.
    #[error("wait for a machine's process")]
    Wait(#[source] io::Error),
}

/// What a listener is told.
#[derive(Debug)]
pub enum News<'a> {
    /// What the user should know, before a machine runs.
    Notice(&'a str),
    /// What the machines run on; told once.
    Machine(&'a Machine),
    /// A life is over, with what was found in it.
    Life(Place, &'a Life),
    /// A machine's process ended badly: a finding of its own, in the life after the last one that it told of.
    Process(Place, &'a Life, &'a [String]),
    /// Nothing; told every now and then.
    Tick,
}

/// Who is told. If it breaks, there is nobody to tell any more, and the soak ends as if by a signal.
pub type Listener<'a> = &'a mut dyn FnMut(News) -> ControlFlow<()>;

/// How a soak ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ending {
    /// All resets were done.
    Complete,
    /// The time was up.
    TimeUp,
    /// At the first finding.
    Finding,
    /// By a signal, or since nobody was there any more to be told.
    Interrupted,
    /// The host failed it.
    Failed,
}

impl Ending {
    /// The name that JSON and reports use.
    pub fn name(self) -> &'static str {
        match self {
            Self::Complete => "complete",
            Self::TimeUp => "time-up",
            Self::Finding => "finding",
            Self::Interrupted => "interrupted",
            Self::Failed => "failed",
        }
    }
}

/// Names a process to those who hear of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Name {
    Process { slot: usize, process: u32 },
    Signals,
}

/// Longest wait for news. Time that passes in one piece beyond that, because the whole program was stopped, is nobody's
/// silence.
const TICK: Duration = Duration::from_millis(200);

/// Lines of a process besides that of a life after each reset.
const MOST_OTHER_LINES: u32 = 64;

/// Runs a soak to its end. `listener` hears everything as it happens, and none of it is kept.
///
/// # Errors
/// [`CampaignError`]. Findings are none.
pub fn run(
    plan: &Plan,
    interrupts: Interrupts,
    listener: Listener,
) -> Result<Ending, CampaignError> {
    let (outbox, inbox) = sync_channel(256);
    watch_signals(interrupts, outbox.clone())?;
    Campaign::new(plan, process::command, outbox, listener).lead(&inbox)
}

fn watch_signals(
    mut interrupts: Interrupts,
    outbox: SyncSender<(Name, Said)>,
) -> Result<(), CampaignError> {
    let watch = move || {
        interrupts.wait();
        // If nobody listens, everything is over already.
        let _ = outbox.send((Name::Signals, Said::Closed));
        // Signals are caught as long as this is kept.
        loop {
            interrupts.wait();
        }
    };
    let thread = std::thread::Builder::new().name("signals".into()).spawn(watch);
    thread.map(|_| ()).map_err(CampaignError::Start)
}

struct Campaign<'a> {
    plan: &'a Plan,
    command: fn(&[String]) -> Command,
    slots: Vec<Slot>,
    outbox: SyncSender<(Name, Said)>,
    listener: Listener<'a>,
    ending: Option<Ending>,
    /// Whether it was told what the machines run on, and of a life.
    has_machine: bool,
    has_lived: bool,
}

impl<'a> Campaign<'a> {
    /// No process runs yet. `command` makes one of its arguments.
    fn new(
        plan: &'a Plan,
        command: fn(&[String]) -> Command,
        outbox: SyncSender<(Name, Said)>,
        listener: Listener<'a>,
    ) -> Self {
        let slots = plan.machines().map(|vm| Slot::new(plan, vm)).collect();
        let (ending, has_machine, has_lived) = (None, false, false);
        Self { plan, command, slots, outbox, listener, ending, has_machine, has_lived }
    }

    /// Threads that start processes have to outlive them, so it is this one that does: a process dies with the thread that
    /// started it.
    fn start(&mut self, index: usize) -> io::Result<()> {
        let slot = &mut self.slots[index];
        let Place { vm, process, .. } = slot.place;
        let arguments = self.plan.replay(vm, process, slot.resets);
        let name = Name::Process { slot: index, process };
        slot.running = Some(Process::start((self.command)(&arguments), name, self.outbox.clone())?);
        Ok(())
    }

    fn lead(&mut self, inbox: &Receiver<(Name, Said)>) -> Result<Ending, CampaignError> {
        let began = Instant::now();
        let mut before = began;
        for slot in 0..self.slots.len() {
            self.start(slot).map_err(CampaignError::Start)?;
        }
        while self.slots.iter().any(|slot| slot.running.is_some()) {
            match inbox.recv_timeout(TICK) {
                Ok((Name::Signals, _)) => self.end(Ending::Interrupted),
                Ok((Name::Process { slot, process }, said)) => {
                    // A process that was given up may still say something.
                    if self.slots[slot].place.process == process
                        && self.slots[slot].running.is_some()
                    {
                        self.hear(slot, said)?;
                    }
                }
                // This end of the channel has a sender itself, so there is no other error.
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {}
            }
            let now = Instant::now();
            self.pass((now - before).min(2 * TICK));
            before = now;
            if self.plan.duration.is_some_and(|duration| now - began >= duration) {
                self.end(Ending::TimeUp);
            }
            self.tell(News::Tick);
        }
        Ok(self.ending.unwrap_or(Ending::Complete))
    }

    fn tell(&mut self, news: News) {
        if (self.listener)(news).is_break() {
            self.end(Ending::Interrupted);
        }
    }

    /// Ends the soak: all processes are told to.
    fn end(&mut self, ending: Ending) {
        // A signal may come while others are ending for a lesser reason.
        if self.ending.is_none() || ending == Ending::Interrupted {
            self.ending = Some(ending);
        }
        for slot in self.slots.iter_mut().filter(|slot| !slot.asked) {
            if let Some(process) = &slot.running {
                process.ask_to_end();
                (slot.asked, slot.silent) = (true, Duration::ZERO);
            }
        }
    }

    fn hear(&mut self, index: usize, said: Said) -> Result<(), CampaignError> {
        let slot = &mut self.slots[index];
        if !slot.asked && !slot.killed {
            slot.silent = Duration::ZERO;
        }
        slot.said = slot.said.saturating_add(1);
        let place = slot.place;
        let said = match said {
            Said::Line(_) if slot.said > slot.resets.saturating_add(MOST_OTHER_LINES) => {
                Said::Nonsense("there are more lines than lives".into())
            }
            said => said,
        };
        match said {
            Said::Closed => return self.closed(index),
            // What was on its way when it was killed is not believed any more.
            _ if slot.killed => {}
            Said::Line(line) => match *line {
                Line::Notice { text } => self.tell(News::Notice(&text)),
                Line::Machine(machine) if !self.has_machine => {
                    self.has_machine = true;
                    self.tell(News::Machine(&machine));
                }
                Line::Machine(_) => {}
                Line::Life(life) => {
                    self.has_lived = true;
                    slot.lives += 1;
                    slot.last_life = life.life;
                    self.tell(News::Life(place, &life));
                    self.found(!life.findings.is_empty());
                }
                Line::Verdict { .. } => slot.verdict = true,
                // Its machines are not held.
                Line::Held(_) => {}
                Line::End { how, detail } => slot.end = Some((how, detail)),
            },
            Said::Nonsense(why) => {
                let detail = format!("it printed what is no line of a result: {why}");
                self.kill(index);
                self.process_finding(index, FAILED, detail, &[]);
            }
        }
        Ok(())
    }

    fn found(&mut self, is_finding: bool) {
        if is_finding && !self.plan.keep_going {
            self.end(Ending::Finding);
        }
    }

    fn kill(&mut self, index: usize) {
        let slot = &mut self.slots[index];
        if let Some(process) = &mut slot.running {
            process.kill();
        }
        (slot.killed, slot.silent) = (true, Duration::ZERO);
    }

    /// Time has passed, and all have said nothing in it.
    fn pass(&mut self, time: Duration) {
        for index in 0..self.slots.len() {
            let slot = &mut self.slots[index];
            slot.silent += time;
            if slot.running.is_none() || slot.silent < self.plan.silence {
                continue;
            }
            if slot.killed {
                // Not even that ended it: the kernel holds it.
                slot.running.take().into_iter().for_each(Process::give_up);
                continue;
            }
            let seconds = self.plan.silence.as_secs();
            let detail = match slot.asked {
                false => format!("its process said nothing for {seconds} s, and was killed"),
                true => format!("its process did not end within {seconds} s, and was killed"),
            };
            let errors = slot.running.as_ref().map(Process::errors).unwrap_or_default();
            self.kill(index);
            self.process_finding(index, "vm-hung", detail, &errors);
        }
    }

    /// A process has ended, or will at once. Was that as it should be, and is there anything left for another one to do?
    fn closed(&mut self, index: usize) -> Result<(), CampaignError> {
        let slot = &mut self.slots[index];
        let Some(mut process) = slot.running.take() else { return Ok(()) };
        let (status, errors) = process.wait().map_err(CampaignError::Wait)?;
        if let Some((name, detail)) = slot.judge_end(status, &errors) {
            // Nothing ran at all: a slip of the user's more often than not.
            if name == FAILED && !self.has_lived {
                return Err(CampaignError::Machine(detail));
            }
            self.process_finding(index, name, detail, &errors);
        }
        if self.ending.is_none()
            && let Some(next) = self.slots[index].next(self.plan)
        {
            self.slots[index] = next;
            if let Err(error) = self.start(index) {
                let detail = format!("no other process could be started for it: {error}");
                self.process_finding(index, FAILED, detail, &[]);
            }
        }
        Ok(())
    }

    fn process_finding(&mut self, index: usize, name: &str, detail: String, errors: &[String]) {
        let Slot { place, last_life, .. } = self.slots[index];
        let life = Life {
            life: last_life.saturating_add(1),
            cause: None,
            moment: None,
            hello_us: None,
            pmu: None,
            nmis: None,
            findings: vec![Found { name: name.into(), detail }],
            evidence: None,
        };
        self.tell(News::Process(place, &life, errors));
        self.found(true);
    }
}

#[cfg(test)]
mod tests;
