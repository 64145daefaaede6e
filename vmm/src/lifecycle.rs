//! Leads a machine with an agent through its lives: hello, report, reset, and again.

mod moment;
mod trace;

use std::io::ErrorKind;
use std::time::{Duration, Instant};

use agent_protocol::{AGENT_PORT, Cause, Poisoning, Report, StateReading};

use crate::agent::{Agent, AgentError};
use crate::device::vsock::GuestPort;
use crate::machine::{Event, Handle, MachineError, NmiOutcome, NmiVia, Stop};
use crate::schedule::{Moment, Schedule, Step};
use crate::verify::{self, Failure, FailureKind, Life};
pub use trace::Trace;

/// How an agent proves that nothing of the life before is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResidueCheck {
    /// Not at all.
    Off,
    /// Everything has to be as it was at power-on, whatever the life before did to it. RAM behind the agent's image is not
    /// looked at: that would be more work than all the rest, and give each machine all of its RAM.
    Compare,
    /// The same with RAM, and all of it is poisoned before each reset.
    Poison,
}

/// What to do with a machine.
#[derive(Clone, Debug)]
pub struct Plan {
    /// How many resets.
    pub resets: u32,
    /// By what, and when.
    pub schedule: Schedule,
    /// NMIs to inject into the first life.
    pub nmis: u32,
    /// What is looked for first thing after a reset.
    pub residue: ResidueCheck,
    /// Whether the agent leaves its performance counters running and dirty before each reset.
    pub arms_pmu: bool,
    /// Whether each later life gets an NMI that was meant for the one before ([`crate::fault::Fault::NmiAfterReset`]).
    pub late_nmi: bool,
    /// How long to wait for each answer.
    pub timeout: Duration,
}

/// How far from its overflow a counter is left running before a reset: half a second or less. If it survives, the next life
/// is far enough by then to take the NMI.
const OVERFLOW_IN_CYCLES: u64 = 1 << 30;

/// How long an overflow may take to become an NMI, on a busy host: a second or less.
const DELIVERY_TICKS: u64 = 1 << 31;

/// Why a machine did not get to the end of its plan, apart from what its lives tell.
#[derive(Debug, thiserror::Error)]
pub enum LifecycleError {
    /// SIGINT, SIGTERM or SIGHUP.
    #[error("interrupted")]
    Interrupted,
    /// NMIs were wanted but the guest has disconnected its NMI pin.
    #[error("the guest has masked the NMI pin of its local APIC (LINT1), so no NMI was injected")]
    NmiMasked,
    /// The monitor's own failure.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The host's end of the conversation failed.
    #[error(transparent)]
    Agent(AgentError),
}

/// Leads `machine` through `plan`, handing each life to `on_life` when it is over, with what was done to the machine lately.
/// Ends early with a life that has no report. `started` is when the first life's clock began.
///
/// # Errors
/// [`LifecycleError`]; what a guest does is no error but a [`Failure`] of its life.
pub fn lead(
    machine: &Handle,
    plan: &Plan,
    started: Instant,
    mut on_life: impl FnMut(&Life, &Trace),
) -> Result<(), LifecycleError> {
    let mut steps = plan.schedule.steps().take(plan.resets as usize);
    let mut current = Beginning::first(machine, started);
    let trace = Trace::new(started);
    let mut leader = Leader { trace, ..Leader::new(machine, plan) };
    loop {
        let (life, next) = leader.live(current, steps.next())?;
        on_life(&life, &leader.trace);
        match next {
            Some(next) => current = next,
            None => return Ok(()),
        }
    }
}

/// When and why a life began.
#[derive(Clone, Copy, Debug)]
pub struct Beginning {
    /// Number of the life; the first is 1.
    pub life: u32,
    /// Why.
    pub cause: Cause,
    /// In the middle of what the reset came.
    pub moment: Option<Moment>,
    /// When its clock began.
    pub at: Instant,
}

impl Beginning {
    /// Of `machine`'s first life, whose clock began at `at`.
    pub fn first(machine: &Handle, at: Instant) -> Self {
        let (life, cause) = machine.first_life();
        Self { life, cause, moment: None, at }
    }
}

/// Leads a machine step by step.
pub struct Leader<'a> {
    machine: &'a Handle,
    plan: &'a Plan,
    /// The state of the first life before it was poisoned, for the residue check.
    power_on: Option<Vec<StateReading>>,
    /// What the life before was poisoned with.
    poisoned: Vec<Poisoning>,
    /// Whether its agent came to its last instructions.
    left: bool,
    trace: Trace,
}

/// A life that went wrong, or an end of everything.
enum Trouble {
    Life(Failure),
    End(LifecycleError),
}

impl From<LifecycleError> for Trouble {
    fn from(error: LifecycleError) -> Self {
        Self::End(error)
    }
}

impl<'a> Leader<'a> {
    /// Of `machine`, which has just been launched.
    pub fn new(machine: &'a Handle, plan: &'a Plan) -> Self {
        let trace = Trace::new(Instant::now());
        Self { machine, plan, power_on: None, poisoned: Vec::new(), left: false, trace }
    }
}

impl Leader<'_> {
    /// Greets the agent of a life and has it report. Without an agent the life has failed, and says why.
    ///
    /// # Errors
    /// [`LifecycleError`]; what a guest does is no error but a [`Failure`] of its life.
    pub fn greet(&mut self, beginning: Beginning) -> Result<(Life, Option<Agent>), LifecycleError> {
        let mut record = record_of(beginning);
        let greeted = self.hear(&mut record, beginning.at);
        self.settle(record, greeted)
    }

    /// Ends a life: resets the machine from outside and says how the next life began. If it did not, the life that was to
    /// end has failed.
    ///
    /// # Errors
    /// [`LifecycleError`].
    pub fn recycle(
        &mut self,
        life: Beginning,
        agent: Agent,
    ) -> Result<Result<Beginning, Life>, LifecycleError> {
        let step = Step { cause: Cause::Host, moment: Moment::Quiet, delay: Duration::ZERO };
        let mut record = record_of(life);
        let mut agent = agent;
        let reset = self.dirty(&mut agent, &mut record).and_then(|()| self.reset(agent, step));
        let (record, next) = self.settle(record, reset)?;
        Ok(next.ok_or(record))
    }

    /// What came of a part of a life.
    fn settle<T>(
        &mut self,
        mut record: Life,
        result: Result<T, Trouble>,
    ) -> Result<(Life, Option<T>), LifecycleError> {
        match result {
            Ok(value) => Ok((record, Some(value))),
            Err(Trouble::Life(failure)) => {
                self.trace.note(|| format!("life {} failed: {}", record.life, failure.kind.name()));
                record.failure = Some(failure);
                Ok((record, None))
            }
            Err(Trouble::End(error)) => Err(error),
        }
    }

    /// One life from its beginning to its reset, or to its end if there is none.
    fn live(
        &mut self,
        beginning: Beginning,
        reset: Option<Step>,
    ) -> Result<(Life, Option<Beginning>), LifecycleError> {
        let mut record = record_of(beginning);
        let lived = self.live_through(&mut record, beginning.at, reset);
        if let Some(audit) = self.machine.dma_audit() {
            // Whatever the guest posted until its end. If there is no other life, the verdict's moment is that.
            record.dma_audit = match lived {
                Ok(Some(_)) => audit.take_ended(),
                _ => audit.take_all(),
            };
        }
        let (record, next) = self.settle(record, lived)?;
        Ok((record, next.flatten()))
    }

    fn live_through(
        &mut self,
        record: &mut Life,
        began: Instant,
        reset: Option<Step>,
    ) -> Result<Option<Beginning>, Trouble> {
        let mut agent = self.hear(record, began)?;
        match reset {
            Some(step) => {
                self.dirty(&mut agent, record)?;
                self.reset(agent, step).map(Some)
            }
            None => Ok(None),
        }
    }

    /// The greeting and the report.
    fn hear(&mut self, record: &mut Life, began: Instant) -> Result<Agent, Trouble> {
        let mut agent = self.hello()?;
        record.hello_us = Some(began.elapsed().as_micros() as u64);
        self.trace.note(|| format!("hello of life {}", agent.hello().life));
        if self.plan.residue != ResidueCheck::Off {
            self.look_for_residue(&mut agent, record)?;
            self.trace.note(|| "asked for its state".into());
        }
        if record.life == 1 {
            for _ in 0..self.plan.nmis {
                self.inject_nmi(&mut agent)?;
            }
        }
        if record.life > 1 && self.plan.late_nmi {
            self.inject_nmi(&mut agent)?;
        }
        let mut report = self.report(&mut agent)?;
        if let Some(ticks) = verify::ticks_to_overflow(&report) {
            // A counter was left running. What it does in the end belongs to the verdict.
            let waited = agent.await_nmi(report.nmi.total, ticks.saturating_add(DELIVERY_TICKS));
            waited.map_err(|error| self.explain(error, FailureKind::NoReport))?;
            report = self.report(&mut agent)?;
        }
        record.report = Some(report);
        self.trace.note(|| "report".into());
        Ok(agent)
    }

    /// Leaves behind what the reset has to clean up.
    fn dirty(&mut self, agent: &mut Agent, record: &mut Life) -> Result<(), Trouble> {
        if self.plan.residue == ResidueCheck::Poison {
            let poisoned = agent.poison();
            let (poisoned, ticks) = poisoned.map_err(|e| self.explain(e, FailureKind::NoReset))?;
            (self.poisoned, record.poison_ticks) = (poisoned, Some(ticks));
            self.trace.note(|| "poisoned".into());
        }
        if self.plan.arms_pmu {
            let armed = agent.arm_pmu(OVERFLOW_IN_CYCLES);
            armed.map_err(|error| self.explain(error, FailureKind::NoReset))?;
            self.trace.note(|| "counters are running".into());
        }
        Ok(())
    }

    /// The first thing that a life is asked.
    fn look_for_residue(&mut self, agent: &mut Agent, record: &mut Life) -> Result<(), Trouble> {
        let ram = self.plan.residue == ResidueCheck::Poison;
        let state = agent.state(ram).map_err(|error| self.explain(error, FailureKind::NoReport));
        let (state, ticks) = state?;
        record.look_ticks = Some(ticks);
        match &self.power_on {
            Some(power_on) => {
                record.residue = match self.plan.residue {
                    ResidueCheck::Poison => verify::compare(power_on, &self.poisoned, &state),
                    ResidueCheck::Compare | ResidueCheck::Off => {
                        verify::differences(power_on, &state)
                    }
                };
                if !self.machine.clears_hwcr() {
                    verify::excuse(&mut record.residue, "msr.hwcr", verify::UNCLEARED_HWCR);
                }
            }
            None => self.power_on = Some(state),
        }
        Ok(())
    }

    fn hello(&self) -> Result<Agent, Trouble> {
        let stream = self.machine.connect(GuestPort(AGENT_PORT)).map_err(|error| {
            // The device of a machine that has stopped refuses.
            let error = match error.kind() {
                ErrorKind::NotConnected => AgentError::Closed,
                _ => AgentError::Io(error),
            };
            self.explain(error, FailureKind::NoHello)
        })?;
        Agent::greet(stream, self.plan.timeout).map_err(|e| self.explain(e, FailureKind::NoHello))
    }

    fn report(&self, agent: &mut Agent) -> Result<Report, Trouble> {
        agent.report().map_err(|error| self.explain(error, FailureKind::NoReport))
    }

    /// Injects one NMI and waits until the guest has run on: a second one could otherwise join the first.
    fn inject_nmi(&self, agent: &mut Agent) -> Result<(), Trouble> {
        self.machine.inject_nmi(NmiVia::Pin);
        match self.machine.next_event(self.plan.timeout) {
            Some(Event::Nmi(NmiOutcome::Queued)) => {
                agent.ping().map_err(|error| self.explain(error, FailureKind::NoReport))
            }
            Some(Event::Nmi(NmiOutcome::Masked)) => Err(LifecycleError::NmiMasked.into()),
            Some(Event::Nmi(NmiOutcome::VcpuStopped)) => {
                Err(self.explain(AgentError::Closed, FailureKind::NoReport))
            }
            Some(event) => Err(self.unexpected(event)),
            None => Err(self.failure(FailureKind::NoReport, "the vCPU took no NMI".into())),
        }
    }

    /// Why the conversation broke: often the machine knows better than the connection.
    fn explain(&self, error: AgentError, kind: FailureKind) -> Trouble {
        /// The event loop tells the cause right after the connection died.
        const EVENT_DELAY: Duration = Duration::from_secs(1);
        match error {
            AgentError::Io(_) => Trouble::End(LifecycleError::Agent(error)),
            AgentError::Closed => match self.machine.next_event(EVENT_DELAY) {
                Some(event) => self.unexpected(event),
                None => self.failure(kind, chain(&error)),
            },
            _ => match self.machine.next_event(Duration::ZERO) {
                Some(event) => self.unexpected(event),
                None => self.failure(kind, chain(&error)),
            },
        }
    }

    fn unexpected(&self, event: Event) -> Trouble {
        match event {
            Event::Reset { cause, .. } => {
                let detail = format!("a reset by {cause} that nobody asked for");
                self.failure(FailureKind::UnexpectedReset, detail)
            }
            Event::Stopped(Stop::Interrupted) => LifecycleError::Interrupted.into(),
            Event::Stopped(Stop::Failed(error)) => LifecycleError::Machine(error).into(),
            Event::Stopped(Stop::Stuck(stuck)) => {
                self.failure(FailureKind::GuestStopped, stuck.to_string())
            }
            Event::Stopped(Stop::PowerOff) => {
                self.failure(FailureKind::GuestStopped, "the guest turned the machine off".into())
            }
            Event::Rested => {
                let detail = "the agent came to rest though nobody asked for it";
                self.failure(FailureKind::GuestStopped, detail.into())
            }
            Event::Stopped(Stop::Reset(_) | Stop::Requested)
            | Event::Nmi(_)
            | Event::Paused
            | Event::Resumed
            | Event::Snapshot(_) => {
                self.failure(FailureKind::GuestStopped, "the machine stopped".into())
            }
        }
    }

    fn failure(&self, kind: FailureKind, what: String) -> Trouble {
        const TAIL_LINES: usize = 8;
        let console = self.machine.console().last_lines(TAIL_LINES);
        let detail = match console.as_slice() {
            [] => format!("{what}; the console is silent"),
            lines => format!("{what}; the console ends with: {}", lines.join(" | ")),
        };
        Trouble::Life(Failure { kind, detail })
    }
}

/// Of a life of which nothing is known yet.
fn record_of(Beginning { life, cause, moment, .. }: Beginning) -> Life {
    Life {
        life,
        cause,
        moment,
        hello_us: None,
        report: None,
        residue: Vec::new(),
        look_ticks: None,
        poison_ticks: None,
        dma_audit: Vec::new(),
        failure: None,
    }
}

/// An error and its sources, in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}
