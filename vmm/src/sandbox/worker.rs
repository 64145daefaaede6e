//! The machine's process: carries out orders, one after the other, and tells what happens in between.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use agent_protocol::{AGENT_PORT, Cause};
use rustix::event::{PollFd, PollFlags, poll};

use super::channel::{Channel, ChannelError};
use super::protocol::{Answer, Ended, Found, Judged, Order};
use crate::agent::{Agent, AgentError};
use crate::device::vsock::GuestPort;
use crate::lifecycle::{Beginning, Leader, LifecycleError, Plan, ResidueCheck, chain};
use crate::machine::{
    self, Config, Event, Handle, Interrupts, MachineError, NmiOutcome, NmiVia, Resources,
    SnapshotKind, Stop,
};
use crate::schedule::Schedule;
use crate::snapshot::Targets;
use crate::verify::{Expectations, Judge, Life};

/// How a sandbox's machine is led.
#[derive(Clone, Copy, Debug)]
pub struct Guidance {
    /// What a recycled machine has to prove.
    pub residue: ResidueCheck,
    /// How long the agent has for each answer.
    pub timeout: Duration,
}

/// Why a sandbox ended without being told to.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// Nobody gives orders any more, or nonsense.
    #[error("take orders for the sandbox")]
    Channel(#[from] ChannelError),
    /// The host failed.
    #[error(transparent)]
    Machine(#[from] MachineError),
}

impl From<io::Error> for WorkerError {
    fn from(error: io::Error) -> Self {
        ChannelError::Io(error).into()
    }
}

/// Longer than anything takes.
const FOREVER: Duration = Duration::from_secs(u32::MAX as u64);

type Orders = Channel<Answer, Order>;

/// Carries out the orders that come over `socket` until one ends the machine, until the machine is over, or until nobody
/// orders any more.
///
/// # Errors
/// [`WorkerError`]. Whoever orders has been told as well, if it could be.
pub fn serve(
    socket: UnixStream,
    config: &Config,
    guidance: Guidance,
    resources: Resources,
    interrupts: Interrupts,
) -> Result<(), WorkerError> {
    let mut orders = Orders::new(socket)?;
    let greet = loop {
        match next_order(&mut orders)? {
            Order::Boot { greet } => break greet,
            Order::End => return answer(&mut orders, Answer::Ended(Ended::Ordered)),
            _ => answer(&mut orders, Answer::Refused("the machine has not been booted".into()))?,
        }
    };
    let began = Instant::now();
    let config = Config { rings: true, ..config.clone() };
    let machine = match machine::launch(&config, resources, interrupts) {
        Ok(machine) => machine,
        Err(error) => {
            answer(&mut orders, Answer::Ended(Ended::Failed(chain(&error))))?;
            return Err(error.into());
        }
    };
    let plan = Plan {
        resets: 0,
        schedule: Schedule::InTurn(vec![Cause::Host]),
        nmis: 0,
        residue: guidance.residue,
        arms_pmu: false,
        late_nmi: false,
        timeout: guidance.timeout,
    };
    let expectations = Expectations {
        pmu: config.pmu,
        kvm: machine.kvm_kind(),
        dma_audit: config.dma_audit,
        restored: machine.is_restored(),
        clears_hwcr: machine.clears_hwcr(),
    };
    let worker = Worker {
        machine: &machine,
        timeout: guidance.timeout,
        leader: Leader::new(&machine, &plan),
        judge: Judge::new(expectations),
        life: Beginning::first(&machine, began),
        agent: None,
        orders,
    };
    worker.run(greet)
}

/// Says over `socket` why there is no machine and will be none. It may be that nobody hears it.
pub fn refuse(socket: UnixStream, why: String) {
    if let Ok(mut orders) = Orders::new(socket) {
        let _ = answer(&mut orders, Answer::Ended(Ended::Failed(why)));
    }
}

/// Waits for the next order. Descriptors are for those that say so.
fn next_order(orders: &mut Orders) -> Result<Order, ChannelError> {
    loop {
        if let Some((order, _)) = orders.receive()? {
            return Ok(order);
        }
        wait(&mut [PollFd::new(orders, PollFlags::IN)])?;
    }
}

fn wait(descriptors: &mut [PollFd<'_>]) -> io::Result<()> {
    match poll(descriptors, None) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// Says something, and waits until it is said.
fn answer(orders: &mut Orders, answer: Answer) -> Result<(), WorkerError> {
    match orders.send(&answer) {
        // What is too long for one message is told to be so; nothing of it was sent.
        Err(ChannelError::Frame(error)) => orders.send(&Answer::Refused(error.to_string()))?,
        result => result?,
    }
    while orders.has_to_flush() {
        wait(&mut [PollFd::new(orders, PollFlags::OUT)])?;
        orders.flush()?;
    }
    Ok(())
}

struct Worker<'a> {
    machine: &'a Handle,
    timeout: Duration,
    leader: Leader<'a>,
    judge: Judge,
    /// The present life.
    life: Beginning,
    /// The connection to its agent, once there is one.
    agent: Option<Agent>,
    orders: Orders,
}

/// What an order comes to.
enum Outcome {
    Answer(Answer),
    /// The machine is over.
    Ended(Ended),
}

impl From<Answer> for Outcome {
    fn from(answer: Answer) -> Self {
        Self::Answer(answer)
    }
}

impl Worker<'_> {
    fn run(mut self, greet: bool) -> Result<(), WorkerError> {
        let mut outcome = match greet {
            true => self.verdict(),
            false => Answer::Done.into(),
        };
        loop {
            match outcome {
                Outcome::Answer(what) => answer(&mut self.orders, what)?,
                Outcome::Ended(why) => return answer(&mut self.orders, Answer::Ended(why)),
            }
            outcome = match self.next()? {
                Next::Order(order, files) => self.carry_out(order, files),
                Next::Tell(outcome) => outcome,
            };
        }
    }

    /// Waits for an order or for an event that nobody ordered.
    fn next(&mut self) -> Result<Next, WorkerError> {
        loop {
            for event in self.machine.take_events() {
                if let Some(outcome) = self.hear(event) {
                    return Ok(Next::Tell(outcome));
                }
            }
            if let Some((order, files)) = self.orders.receive()? {
                return Ok(Next::Order(order, files));
            }
            let events = self.machine.events_ready().expect("the configuration has it ring");
            wait(&mut [
                PollFd::new(&self.orders, PollFlags::IN),
                PollFd::from_borrowed_fd(events, PollFlags::IN),
            ])?;
        }
    }

    fn carry_out(&mut self, order: Order, files: Vec<OwnedFd>) -> Outcome {
        match order {
            Order::Boot { .. } => Answer::Refused("the machine runs already".into()).into(),
            Order::Job { name, input } => self.job(name, input),
            Order::Recycle => self.recycle(),
            Order::Verdict => self.verdict(),
            Order::Pause => {
                self.machine.pause();
                self.await_event(|event| matches!(event, Event::Paused))
            }
            Order::Resume => {
                self.machine.resume();
                self.await_event(|event| matches!(event, Event::Resumed))
            }
            Order::Snapshot { layer } => self.snapshot(layer, files),
            Order::Reset => {
                self.machine.reset();
                self.await_event(|event| matches!(event, Event::Reset { .. }))
            }
            Order::Nmi => {
                self.machine.inject_nmi(NmiVia::Pin);
                self.await_event(|event| matches!(event, Event::Nmi(_)))
            }
            Order::Stats => json(&self.machine.guest_stats()).into(),
            Order::Console { lines } => {
                Answer::Console(self.machine.console().last_lines(lines as usize)).into()
            }
            Order::DmaAudit => match self.machine.dma_audit() {
                Some(audit) => json(&audit.summary()).into(),
                None => Answer::Refused("the machine has no DMA audit".into()).into(),
            },
            Order::End => Outcome::Ended(Ended::Ordered),
        }
    }

    /// Greets the agent of this life, has it report, and judges that.
    fn verdict(&mut self) -> Outcome {
        match self.leader.greet(self.life) {
            Ok((life, agent)) => {
                self.agent = agent;
                self.judged(life)
            }
            Err(error) => Outcome::Ended(ended(error)),
        }
    }

    fn judged(&mut self, mut life: Life) -> Outcome {
        if let Some(audit) = self.machine.dma_audit() {
            life.dma_audit = audit.take_all();
        }
        let (findings, _) = self.judge.hear(&life);
        let findings = findings.iter().map(Found::from).collect();
        let Life { life, cause, hello_us, report, .. } = life;
        let report = report.map(Box::new);
        Answer::Judged(Judged { life, cause, hello_us, findings, report }).into()
    }

    /// Waits until it is written, however long the host takes.
    fn snapshot(&mut self, layer: bool, files: Vec<OwnedFd>) -> Outcome {
        let Ok([state, memory]) = <[OwnedFd; 2]>::try_from(files) else {
            return Answer::Refused("a snapshot takes two files".into()).into();
        };
        let kind = if layer { SnapshotKind::Layer } else { SnapshotKind::Full };
        self.machine.snapshot(Targets { state: state.into(), memory: memory.into() }, kind);
        self.await_event_for(FOREVER, |event| matches!(event, Event::Snapshot(_)))
    }

    fn recycle(&mut self) -> Outcome {
        let Some(agent) = self.agent.take() else {
            return Answer::Refused("no agent has said hello in this life".into()).into();
        };
        match self.leader.recycle(self.life, agent) {
            Ok(Ok(next)) => {
                self.life = next;
                self.verdict()
            }
            Ok(Err(life)) => self.judged(life),
            Err(error) => Outcome::Ended(ended(error)),
        }
    }

    fn job(&mut self, name: String, input: Vec<u8>) -> Outcome {
        let agent = match self.agent.take().map_or_else(|| self.connect(), Ok) {
            Ok(agent) => self.agent.insert(agent),
            Err(error) => return Answer::Refused(chain(&error)).into(),
        };
        match agent.job(name, input) {
            Ok(Ok(output)) => Answer::Job(output).into(),
            Ok(Err(why)) => Answer::Refused(why).into(),
            Err(error) => {
                // What comes later would be taken for the answer to something else.
                self.agent = None;
                Answer::Refused(chain(&error)).into()
            }
        }
    }

    fn connect(&self) -> Result<Agent, AgentError> {
        let stream = self.machine.connect(GuestPort(AGENT_PORT)).map_err(AgentError::Io)?;
        Agent::greet(stream, self.timeout)
    }

    /// Waits for what an order leads to.
    fn await_event(&mut self, is_awaited: impl Fn(&Event) -> bool) -> Outcome {
        self.await_event_for(self.timeout, is_awaited)
    }

    fn await_event_for(
        &mut self,
        timeout: Duration,
        is_awaited: impl Fn(&Event) -> bool,
    ) -> Outcome {
        loop {
            let Some(event) = self.machine.next_event(timeout) else {
                return Answer::Refused(format!("nothing came of it in {timeout:?}")).into();
            };
            let awaited = is_awaited(&event);
            match self.hear(event) {
                Some(Outcome::Answer(Answer::Reset { .. })) if awaited => {
                    return Answer::Done.into();
                }
                Some(outcome) if awaited => return outcome,
                Some(Outcome::Ended(why)) => return Outcome::Ended(why),
                // A reset of the guest's own came before. Whoever ordered this one does not care for the other.
                Some(Outcome::Answer(_)) | None => {}
            }
        }
    }

    /// What is to be told of an event.
    fn hear(&mut self, event: Event) -> Option<Outcome> {
        match event {
            Event::Reset { life, cause, at } => {
                self.life = Beginning { life, cause, moment: None, at };
                self.agent = None;
                Some(Answer::Reset { life, cause }.into())
            }
            Event::Nmi(outcome) => Some(match outcome {
                NmiOutcome::Queued => Answer::Done.into(),
                NmiOutcome::Masked => {
                    let why = "the guest has masked the NMI pin of its local APIC (LINT1)";
                    Answer::Refused(why.into()).into()
                }
                NmiOutcome::VcpuStopped => {
                    Answer::Refused("the vCPU stopped before the NMI".into()).into()
                }
            }),
            Event::Paused | Event::Resumed => Some(Answer::Done.into()),
            Event::Snapshot(written) => Some(match *written {
                Ok(_) => Answer::Done.into(),
                Err(error) => Answer::Refused(chain(&error)).into(),
            }),
            Event::Rested => None,
            Event::Stopped(stop) => Some(Outcome::Ended(match stop {
                Stop::PowerOff => Ended::PowerOff,
                Stop::Reset(cause) => Ended::Reset(cause),
                Stop::Stuck(stuck) => Ended::Stuck(stuck.to_string()),
                Stop::Interrupted => Ended::Interrupted,
                Stop::Requested => Ended::Ordered,
                Stop::Failed(error) => Ended::Failed(chain(&error)),
            })),
        }
    }
}

/// What wakes a worker.
enum Next {
    Order(Order, Vec<OwnedFd>),
    Tell(Outcome),
}

fn ended(error: LifecycleError) -> Ended {
    match error {
        LifecycleError::Interrupted => Ended::Interrupted,
        error => Ended::Failed(chain(&error)),
    }
}

fn json(value: &impl serde::Serialize) -> Answer {
    match serde_json::to_string(value) {
        Ok(text) => Answer::Json(text),
        Err(error) => Answer::Refused(error.to_string()),
    }
}
