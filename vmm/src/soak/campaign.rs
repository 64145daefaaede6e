//! The soak's loop: starts the machines' processes, hears them, judges how they end, and knows when it is over.

use std::io;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use super::line::{End, Found, Life, Line, Machine};
use super::process::{Process, Said};
use super::{printable, seed_of};
use crate::cli::exit;
use crate::machine::Interrupts;

/// What to do.
#[derive(Clone, Debug)]
pub struct Plan {
    /// How many machines.
    pub vms: u32,
    /// The number of the first.
    pub first_vm: u32,
    /// How many resets each; none if only the time counts.
    pub resets: Option<u32>,
    /// How long at most.
    pub duration: Option<Duration>,
    /// Whether to go on after a finding.
    pub keep_going: bool,
    /// What everything random comes from.
    pub seed: u64,
    /// How long a machine's process may say nothing.
    pub silence: Duration,
    /// Arguments of `run` that are the same for each machine.
    pub arguments: Vec<String>,
}

/// Resets of a machine that has no number of them: years.
const ENDLESS: u32 = u32::MAX - 1;

impl Plan {
    /// The command that runs a machine again up to a reset, as arguments of the program.
    pub fn replay(&self, vm: u32, process: u32, resets: u32) -> Vec<String> {
        let seed = seed_of(self.seed, vm, process);
        let own =
            ["run", "--resets", &resets.to_string(), "--seed", &seed.to_string()].map(String::from);
        [&own[..], &self.arguments].concat()
    }
}

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

/// Where something happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Which machine.
    pub vm: u32,
    /// Which of its processes; the first is 0.
    pub process: u32,
}

/// What a listener is told.
#[derive(Debug)]
pub enum News<'a> {
    /// What the machines run on; told once.
    Machine(&'a Machine),
    /// A life is over, with what was found in it.
    Life(Place, &'a Life),
    /// A machine's process ended badly: a finding of its own, in the life after the last one that it told of.
    Process(Place, &'a Life, &'a [String]),
    /// Nothing; told every now and then.
    Tick,
}

/// How a soak ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// All resets were done.
    Complete,
    /// The time was up.
    TimeUp,
    /// At the first finding.
    Finding,
    /// By a signal.
    Interrupted,
}

/// Names a process to those who hear of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Name {
    Process { slot: usize, process: u32 },
    Signals,
}

/// One machine and the process that it has now.
struct Slot {
    vm: u32,
    process: u32,
    running: Option<Process>,
    /// Lives that this process told of, and the last one's number.
    lives: u32,
    last_life: u32,
    /// Resets left to it and those after it.
    resets: u32,
    silent: Duration,
    end: Option<(End, String)>,
    verdict: bool,
    /// It was told to end, or killed.
    asked: bool,
    killed: bool,
}

/// Longest wait for news. Time that passes in one piece beyond that, because the whole program was stopped, is nobody's
/// silence.
const TICK: Duration = Duration::from_millis(200);

/// Runs a soak to its end. `listener` hears everything as it happens, and none of it is kept.
///
/// # Errors
/// [`CampaignError`]. Findings are none.
pub fn run(
    plan: &Plan,
    interrupts: Interrupts,
    listener: &mut dyn FnMut(News),
) -> Result<Ending, CampaignError> {
    let (outbox, inbox) = sync_channel(256);
    watch_signals(interrupts, outbox.clone())?;
    let slots = (0..plan.vms).map(|index| Slot::new(plan, plan.first_vm.saturating_add(index)));
    let mut campaign =
        Campaign { plan, slots: slots.collect(), outbox, listener, ending: None, machine: false };
    for slot in 0..campaign.slots.len() {
        campaign.start(slot)?;
    }
    campaign.lead(&inbox)
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
    slots: Vec<Slot>,
    outbox: SyncSender<(Name, Said)>,
    listener: &'a mut dyn FnMut(News),
    ending: Option<Ending>,
    machine: bool,
}

impl Campaign<'_> {
    /// Threads that start processes have to outlive them, so it is this one that does: a process dies with the thread that
    /// started it.
    fn start(&mut self, index: usize) -> Result<(), CampaignError> {
        let slot = &mut self.slots[index];
        let mut arguments = self.plan.replay(slot.vm, slot.process, slot.resets);
        arguments.extend(["--json-lines".into(), "--child-of".into()]);
        arguments.push(std::process::id().to_string());
        let name = Name::Process { slot: index, process: slot.process };
        let process = Process::start(&arguments, name, self.outbox.clone());
        slot.running = Some(process.map_err(CampaignError::Start)?);
        Ok(())
    }

    fn lead(&mut self, inbox: &Receiver<(Name, Said)>) -> Result<Ending, CampaignError> {
        let began = Instant::now();
        let mut before = began;
        while self.slots.iter().any(|slot| slot.running.is_some()) {
            match inbox.recv_timeout(TICK) {
                Ok((Name::Signals, _)) => self.end(Ending::Interrupted),
                Ok((Name::Process { slot, process }, said)) => {
                    // A process that was given up may still say something.
                    if self.slots[slot].process == process && self.slots[slot].running.is_some() {
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
            (self.listener)(News::Tick);
        }
        Ok(self.ending.unwrap_or(Ending::Complete))
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
        slot.silent = Duration::ZERO;
        let place = slot.place();
        match said {
            Said::Line(line) => match *line {
                Line::Machine(machine) if !self.machine => {
                    self.machine = true;
                    (self.listener)(News::Machine(&machine));
                    Ok(())
                }
                Line::Machine(_) => Ok(()),
                Line::Life(life) => {
                    slot.lives += 1;
                    slot.last_life = life.life;
                    let is_finding = !life.findings.is_empty();
                    (self.listener)(News::Life(place, &life));
                    self.found(is_finding);
                    Ok(())
                }
                Line::Verdict { .. } => {
                    slot.verdict = true;
                    Ok(())
                }
                Line::End { how, detail } => {
                    slot.end = Some((how, detail));
                    Ok(())
                }
            },
            Said::Nonsense(why) => {
                let detail = format!("it printed what is no line of a result: {why}");
                self.process_finding(index, "vm-failed", detail, &[]);
                self.kill(index);
                Ok(())
            }
            Said::Closed => self.closed(index),
        }
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
                // Not even that ended it. Its end will come when this process's does.
                slot.running = None;
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
            if name == FAILED && slot.lives == 0 {
                return Err(CampaignError::Machine(detail));
            }
            self.process_finding(index, name, detail, &errors);
        }
        let slot = &mut self.slots[index];
        let done = slot.lives.saturating_sub(1);
        slot.resets = slot.resets.saturating_sub(done);
        // One that does not get anywhere is not tried again.
        if self.ending.is_none() && slot.resets > 0 && done > 0 {
            *slot = Slot {
                resets: slot.resets,
                process: slot.process + 1,
                ..Slot::new(self.plan, slot.vm)
            };
            self.start(index)?;
        }
        Ok(())
    }

    fn process_finding(&mut self, index: usize, name: &str, detail: String, errors: &[String]) {
        let slot = &self.slots[index];
        let place = slot.place();
        let life = Life {
            life: slot.last_life + 1,
            cause: None,
            moment: None,
            hello_us: None,
            pmu: None,
            nmis: None,
            findings: vec![Found { name: name.into(), detail }],
            evidence: None,
        };
        (self.listener)(News::Process(place, &life, errors));
        self.found(true);
    }
}

/// The finding of a process that failed: the host's doing, and if there was no life at all, no finding but the end.
const FAILED: &str = "vm-failed";

impl Slot {
    fn new(plan: &Plan, vm: u32) -> Self {
        Self {
            vm,
            process: 0,
            running: None,
            lives: 0,
            last_life: 0,
            resets: plan.resets.unwrap_or(ENDLESS),
            silent: Duration::ZERO,
            end: None,
            verdict: false,
            asked: false,
            killed: false,
        }
    }

    fn place(&self) -> Place {
        Place { vm: self.vm, process: self.process }
    }

    /// What is wrong with the end of its process, as a finding.
    fn judge_end(&self, status: ExitStatus, errors: &[String]) -> Option<(&'static str, String)> {
        if self.killed {
            return None;
        }
        match &self.end {
            Some((End::OutOfMemory, detail)) => {
                return Some(("vm-out-of-memory", printable(detail)));
            }
            Some((End::Killed, detail)) => return Some(("vm-killed", printable(detail))),
            Some((End::ForbiddenCall, detail)) => {
                return Some(("vm-forbidden-call", printable(detail)));
            }
            Some((End::Failed, detail)) => return Some((FAILED, printable(detail))),
            None => {}
        }
        match (status.signal(), status.code().map(|code| code as u8)) {
            // So early that it did not catch the signal yet.
            (Some(libc::SIGTERM), _) | (_, Some(exit::INTERRUPTED)) if self.asked => None,
            (Some(signal), _) => {
                Some(("vm-killed", format!("its process was killed by signal {signal}")))
            }
            (_, Some(exit::CLEAN | exit::FINDINGS)) if self.verdict => None,
            (_, Some(exit::INTERRUPTED)) => {
                Some(("vm-killed", "its process was told to end by somebody else".into()))
            }
            (_, code) => {
                let words = errors.last().map_or("and said nothing", String::as_str);
                let words = words.strip_prefix("cleanslate: ").unwrap_or(words);
                match code {
                    Some(exit::USAGE_OR_HOST) => Some((FAILED, words.into())),
                    code => {
                        let code = code.unwrap_or_default();
                        Some((FAILED, format!("its process ended with status {code}: {words}")))
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
