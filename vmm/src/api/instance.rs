//! The process that has the machine: takes requests from the one that has the clients, has the machine's process carry out
//! orders, and hears of the end of either. One loop, which sleeps while nobody wants anything.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::time::Instant;

use agent_protocol::Cause;
use jailer::{End, Running, SignalFd};
use rustix::event::{PollFd, PollFlags, poll};
use serde_json::{Value, json};

use super::call::{Answer, Call, Reply};
use super::config::VmConfig;
use super::desk::{Desk, Next, Order, Outcome};
use super::log::open_for_lines;
use super::model::{Level, LoadSnapshot, NewSnapshot, SnapshotType};
use super::snapshot;
use crate::exit;
use crate::lifecycle::chain;
use crate::machine::Config;
use crate::sandbox::{self, Channel, ChannelError, Ended, Judged, Sandbox};
use crate::snapshot::Drafts;

/// The most requests that wait for their turn. What is more waits in the socket.
const MOST_WAITING: usize = 64;

/// How much of the console is told.
const CONSOLE_LINES: u32 = 1000;

/// The way to the process that has the clients.
pub type Clients = Channel<Reply, Call>;

/// A process and what it is told over.
pub struct Machine {
    /// Orders and answers.
    pub sandbox: Sandbox,
    /// The process.
    pub process: Running,
    /// What is removed when it is over: files of sockets.
    pub files: Vec<crate::device::vsock::SocketFile>,
}

/// Why there was no machine, or no instance any more.
pub type Error = Box<dyn std::error::Error>;

/// How a machine's process comes to be, with a file in place of standard output.
pub type Starter<'a> = dyn FnMut(Config, Option<File>) -> Result<Machine, Error> + 'a;

/// An instance: a desk, its clients, and a machine once there is one.
pub struct Instance<'a> {
    desk: Desk,
    clients: Option<(Clients, Running)>,
    start: Box<Starter<'a>>,
    signals: SignalFd,
    machine: Option<Machine>,
    /// What is being carried out.
    current: Option<Current>,
    waiting: VecDeque<Call>,
    /// The machine has said that it is over, and why.
    ended: Option<Ended>,
    /// How the machine that is being loaded was described.
    loaded: Option<VmConfig>,
    /// The files of the snapshot that is being written.
    drafts: Option<Drafts>,
}

/// An order under way, and whose it is; nobody's if the configuration file wants the machine started.
struct Current {
    call: Option<Call>,
    order: Order,
    began: Instant,
}

/// What has happened.
#[derive(Default)]
struct Ready {
    interrupted: bool,
    clients: bool,
    clients_ended: bool,
    machine: bool,
    machine_ended: bool,
}

impl<'a> Instance<'a> {
    /// Of a desk, with the process that has its clients, if it has any.
    pub fn new(
        desk: Desk,
        clients: Option<(Clients, Running)>,
        signals: SignalFd,
        start: Box<Starter<'a>>,
    ) -> Self {
        let (current, waiting) = (None, VecDeque::new());
        Self {
            desk,
            clients,
            start,
            signals,
            machine: None,
            current,
            waiting,
            ended: None,
            loaded: None,
            drafts: None,
        }
    }

    /// Serves clients until the machine is over, and gives the exit status. With `starts`, the machine that the desk knows is
    /// started first, and it is an error if it cannot be.
    ///
    /// # Errors
    /// What the host says, and that the process with the clients ended.
    pub fn run(mut self, starts: bool) -> Result<u8, Error> {
        if starts {
            self.begin(None, Order::Start)?;
        }
        loop {
            let ready = self.wait()?;
            if ready.machine {
                self.hear_machine()?;
            }
            if ready.machine_ended
                && let Some(status) = self.take_end()?
            {
                return Ok(status);
            }
            if ready.interrupted {
                return self.interrupt();
            }
            if ready.clients {
                self.hear_clients()?;
            }
            if ready.clients_ended
                && let Some((_, process)) = &mut self.clients
                && let Some(end) = process.try_end()?
            {
                return Err(
                    format!("the process that serves clients ended: {}", describe(&end)).into()
                );
            }
        }
    }

    fn wait(&self) -> io::Result<Ready> {
        let events =
            |to_flush| if to_flush { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN };
        let mut polled = vec![PollFd::new(&self.signals, PollFlags::IN)];
        if let Some((clients, process)) = &self.clients {
            // Whoever does not take answers gives no more requests, and neither does one who has given many.
            let wanted = match (clients.has_to_flush(), self.waiting.len() < MOST_WAITING) {
                (true, _) => PollFlags::OUT,
                (false, true) => PollFlags::IN,
                (false, false) => PollFlags::empty(),
            };
            polled.push(PollFd::from_borrowed_fd(clients.as_fd(), wanted));
            polled.push(PollFd::from_borrowed_fd(process.pidfd(), PollFlags::IN));
        }
        let of_machine = polled.len();
        if let Some(Machine { sandbox, process, .. }) = &self.machine {
            polled.push(PollFd::from_borrowed_fd(sandbox.as_fd(), events(sandbox.has_to_flush())));
            polled.push(PollFd::from_borrowed_fd(process.pidfd(), PollFlags::IN));
        }
        match poll(&mut polled, None) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return Ok(Ready::default()),
            Err(errno) => return Err(errno.into()),
        }
        let came = |place: usize| polled.get(place).is_some_and(|fd| !fd.revents().is_empty());
        Ok(Ready {
            interrupted: came(0),
            clients: of_machine > 1 && came(1),
            clients_ended: of_machine > 1 && came(2),
            machine: came(of_machine),
            machine_ended: came(of_machine + 1),
        })
    }

    /// Takes requests until there is no more, or enough.
    fn hear_clients(&mut self) -> Result<(), Error> {
        while self.waiting.len() < MOST_WAITING {
            let Some((clients, _)) = &mut self.clients else { return Ok(()) };
            let call = match clients.flush().and_then(|()| clients.receive()) {
                Ok(Some((call, _))) => call,
                Ok(None) => return Ok(()),
                // Its end says more.
                Err(ChannelError::Closed | ChannelError::Io(_)) => return Ok(()),
                Err(error) => return Err(error.into()),
            };
            match self.current.is_some() && !Desk::needs_no_turn(&call.request) {
                true => self.waiting.push_back(call),
                false => self.take(call)?,
            }
            if self.clients.as_ref().is_some_and(|(clients, _)| clients.has_to_flush()) {
                return Ok(());
            }
        }
        Ok(())
    }

    fn take(&mut self, call: Call) -> Result<(), Error> {
        match self.desk.take(&call) {
            Next::Answer(answer) => {
                self.reply(call.id, answer);
                Ok(())
            }
            Next::Order(order) => self.begin(Some(call), order),
        }
    }

    fn reply(&mut self, id: u64, answer: Answer) {
        let Some((clients, _)) = &mut self.clients else { return };
        if let Err(ChannelError::Frame(error)) = clients.send(&Reply { id, answer }) {
            let answer = Answer::fault(500, &format!("the answer is too long: {error}"));
            // If the process is gone, its end says so.
            let _ = clients.send(&Reply { id, answer });
        }
    }

    /// Gives an order to the machine's process, after there is one.
    fn begin(&mut self, call: Option<Call>, order: Order) -> Result<(), Error> {
        self.current = Some(Current { call, order: order.clone(), began: Instant::now() });
        let given = match (&order, &mut self.machine) {
            (Order::Start, _) => self.start_machine(),
            (Order::Load(wanted), _) => self.load_machine(wanted),
            (Order::Snapshot(wanted), Some(_)) => self.write_snapshot(wanted),
            (order, Some(machine)) => give(machine, order),
            (_, None) => Err("there is no machine".into()),
        };
        match given {
            Ok(()) => Ok(()),
            Err(reason) => self.finish(Err(reason)),
        }
    }

    fn start_machine(&mut self) -> Result<(), String> {
        let config = self.desk.config.machine().map_err(|refusal| refusal.to_string())?;
        self.boot(config)
    }

    fn load_machine(&mut self, wanted: &LoadSnapshot) -> Result<(), String> {
        let (described, config) = snapshot::load(wanted)?;
        self.loaded = Some(described);
        self.boot(config)
    }

    /// Has the machine's process write to files of which nobody knows before they are whole.
    fn write_snapshot(&mut self, wanted: &NewSnapshot) -> Result<(), String> {
        let drafts = Drafts::create(&wanted.snapshot_path, &wanted.mem_file_path);
        let drafts = drafts.map_err(|error| chain(&error))?;
        let targets = drafts.targets().map_err(|error| chain(&error))?;
        let order = sandbox::Order::Snapshot { layer: wanted.snapshot_type == SnapshotType::Diff };
        let files = [targets.state.as_fd(), targets.memory.as_fd()];
        let machine = self.machine.as_mut().ok_or("there is no machine")?;
        machine.sandbox.order_with(&order, &files).map_err(|error| error.to_string())?;
        self.drafts = Some(drafts);
        Ok(())
    }

    fn boot(&mut self, config: Config) -> Result<(), String> {
        let console = match self.desk.config.console_path() {
            Some(path) => Some(open_for_lines(path).map_err(|e| format!("open {path:?}: {e}"))?),
            None => None,
        };
        let started = (self.start)(config, console);
        let machine = self.machine.insert(started.map_err(|error| chain(&*error))?);
        let boot = sandbox::Order::Boot { greet: false };
        machine.sandbox.order(&boot).map_err(|error| error.to_string())
    }

    /// The order under way is done, or cannot be.
    fn finish(&mut self, result: Result<Outcome, String>) -> Result<(), Error> {
        let Some(Current { call, order, began }) = self.current.take() else { return Ok(()) };
        // Files that are not whole go with this.
        let drafts = self.drafts.take();
        let result = match (drafts, result) {
            (Some(drafts), Ok(outcome)) => {
                drafts.commit().map(|_| outcome).map_err(|error| chain(&error))
            }
            (_, result) => result,
        };
        if let (Some(described), Ok(_)) = (self.loaded.take(), &result) {
            self.desk.adopt(described);
        }
        match (call, result) {
            (Some(call), result) => {
                let answer = self.desk.done(&call, &order, began, result);
                self.reply(call.id, answer);
            }
            (None, Ok(_)) => self.desk.carry(&order),
            (None, Err(reason)) => return Err(reason.into()),
        }
        while self.current.is_none()
            && let Some(call) = self.waiting.pop_front()
        {
            self.take(call)?;
        }
        Ok(())
    }

    /// Takes what the machine's process says.
    fn hear_machine(&mut self) -> Result<(), Error> {
        loop {
            let Some(machine) = &mut self.machine else { return Ok(()) };
            let answer = match machine.sandbox.flush().and_then(|()| machine.sandbox.answer()) {
                Ok(Some(answer)) => answer,
                Ok(None) => return Ok(()),
                // Its end says more.
                Err(ChannelError::Closed | ChannelError::Io(_)) => return Ok(()),
                Err(error) => {
                    machine.process.kill();
                    return Err(format!("the machine's process: {error}").into());
                }
            };
            let result = match answer {
                sandbox::Answer::Reset { life, cause } => {
                    let text = format!("reset in place ({cause}), life {life}");
                    self.desk.log.line(Level::Info, module_path!(), &text);
                    continue;
                }
                sandbox::Answer::Ended(ended) => {
                    self.ended = Some(ended);
                    continue;
                }
                sandbox::Answer::Refused(reason) => Err(reason),
                sandbox::Answer::Done | sandbox::Answer::Job(_) => Ok(Value::Null),
                sandbox::Answer::Judged(judged) => Ok(tell_judged(&judged)),
                sandbox::Answer::Json(text) => {
                    serde_json::from_str(&text).map_err(|error| error.to_string())
                }
                sandbox::Answer::Console(lines) => Ok(json!({ "lines": lines })),
            };
            self.finish(result.map(|told| Outcome { told }))?;
        }
    }

    /// The machine's process has ended. The status, if the instance ends with it: it does unless the machine never ran.
    fn take_end(&mut self) -> Result<Option<u8>, Error> {
        // What it said last comes first.
        self.hear_machine()?;
        let Some(machine) = &mut self.machine else { return Ok(None) };
        let Some(end) = machine.process.try_end()? else { return Ok(None) };
        self.machine = None;
        let ended = self.ended.take();
        let is_start =
            matches!(&self.current, Some(Current { order: Order::Start | Order::Load(_), .. }));
        let (words, status) = match (&ended, &end) {
            (Some(ended), End::Exited(_)) => describe_end(ended),
            (_, end) => (format!("the machine's process {}", describe(end)), exit::USAGE_OR_HOST),
        };
        if is_start {
            // Firecracker's client may mend what was wrong and try again.
            self.finish(Err(words))?;
            return Ok(None);
        }
        self.leave(&words)?;
        Ok(Some(status))
    }

    /// Tells everybody who waits that it is over, and writes the last metrics.
    fn leave(&mut self, words: &str) -> Result<(), Error> {
        eprintln!("cleanslate: {words}");
        self.desk.log.line(Level::Info, module_path!(), words);
        while self.current.is_some() {
            self.finish(Err(words.to_owned()))?;
        }
        if self.desk.metrics.are_wanted()
            && let Err(error) = self.desk.metrics.flush(None, self.desk.log.missed)
        {
            eprintln!("cleanslate: write the last metrics: {error}");
        }
        if let Some((mut clients, process)) = self.clients.take() {
            // It has what it is to say when this is sent, and goes when the channel closes.
            let _ = clients.flush();
            drop(clients);
            let moment = rustix::event::Timespec { tv_sec: 1, tv_nsec: 0 };
            let pidfd = process.pidfd();
            let _ = poll(&mut [PollFd::from_borrowed_fd(pidfd, PollFlags::IN)], Some(&moment));
        }
        Ok(())
    }

    /// A signal asks this process to end: the machine is told, and waited for until the next signal.
    fn interrupt(mut self) -> Result<u8, Error> {
        self.signals.take()?;
        if let Some(machine) = &mut self.machine {
            let _ = machine.sandbox.order(&sandbox::Order::End);
            let mut polled = [
                PollFd::from_borrowed_fd(machine.process.pidfd(), PollFlags::IN),
                PollFd::new(&self.signals, PollFlags::IN),
            ];
            rustix::io::retry_on_intr(|| poll(&mut polled, None))?;
        }
        self.leave("interrupted")?;
        Ok(exit::INTERRUPTED)
    }
}

/// Tells the machine's process what to do.
fn give(machine: &mut Machine, order: &Order) -> Result<(), String> {
    let order = match order {
        Order::Pause => sandbox::Order::Pause,
        Order::Resume => sandbox::Order::Resume,
        Order::Reset => sandbox::Order::Reset,
        Order::Nmi => sandbox::Order::Nmi,
        Order::Judge => sandbox::Order::Verdict,
        Order::DmaAudit => sandbox::Order::DmaAudit,
        Order::Console => sandbox::Order::Console { lines: CONSOLE_LINES },
        Order::Count => sandbox::Order::Stats,
        Order::Start | Order::Load(_) | Order::Snapshot(_) => {
            unreachable!("they need more than an order")
        }
    };
    machine.sandbox.order(&order).map_err(|error| error.to_string())
}

fn tell_judged(judged: &Judged) -> Value {
    let findings: Vec<_> = judged
        .findings
        .iter()
        .map(|found| json!({ "name": found.name, "life": found.life, "detail": found.detail }))
        .collect();
    json!({ "life": judged.life, "findings": findings, "report": judged.report })
}

/// How a machine ended, in words and as an exit status. A guest that resets the machine ends Firecracker as one that turns it
/// off does.
fn describe_end(ended: &Ended) -> (String, u8) {
    match ended {
        Ended::Ordered => ("the machine was stopped".into(), exit::CLEAN),
        Ended::PowerOff => ("the guest turned the machine off".into(), exit::CLEAN),
        Ended::Reset(Cause::Triple) => {
            ("the guest died of a triple fault".into(), exit::GUEST_TRIPLE_FAULT)
        }
        Ended::Reset(cause) => (format!("the guest asked for a reset ({cause})"), exit::CLEAN),
        Ended::Stuck(words) => (format!("the guest cannot go on: {words}"), exit::GUEST_STUCK),
        Ended::Interrupted => ("interrupted".into(), exit::INTERRUPTED),
        Ended::Failed(words) => (words.clone(), exit::USAGE_OR_HOST),
    }
}

fn describe(end: &End) -> String {
    match end {
        End::Exited(status) => format!("exited with status {status}"),
        End::Forbidden(violation) => {
            format!("made a system call that its filter forbids, and was ended: {violation}")
        }
        End::OutOfMemory => "used more memory than its control group may, and was killed".into(),
        End::Killed(signal) => format!("was killed by signal {signal}"),
    }
}
