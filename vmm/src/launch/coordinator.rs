//! The loop: makes sandboxes, gives them jobs, hears them, and judges how they end.

use std::collections::BTreeMap;
use std::io;
use std::ops::ControlFlow;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use jailer::SignalFd;

use super::cell::{Cell, Stage, judge_end};
use super::figures::{Failure, Figures};
use super::idle::{self, IdleFigures, IdlePlan};
use super::watch::{Source, Watch};
use super::{Origin, Plan, Starter, memory};
use crate::sandbox::{Answer, ChannelError, Ended, Judged, Order};

/// Why launches could not go on.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// Not even the first sandbox could be had.
    #[error(transparent)]
    Start(Box<dyn std::error::Error>),
    /// The host failed the coordinator.
    #[error("wait for sandboxes")]
    Wait(#[from] io::Error),
}

/// What a listener is told.
#[derive(Debug)]
pub enum News<'a> {
    /// The job of this launch came to this.
    Output(u64, &'a [u8]),
    /// Nothing; told every now and then.
    Tick(&'a Figures),
}

/// Who is told. If it breaks, the launches end as if by a signal.
pub type Listener<'a> = &'a mut dyn FnMut(News) -> ControlFlow<()>;

/// Longest wait for something while something is due. Time that passes in one piece beyond that, because the coordinator was stopped, is
/// nobody's silence.
const TICK: Duration = Duration::from_millis(100);

/// How many sandboxes are asked for their memory.
const MEMORY_SAMPLES: u64 = 32;

/// Leads sandboxes.
pub struct Coordinator<'a> {
    plan: &'a Plan,
    starter: Starter<'a>,
    listener: Listener<'a>,
    signals: &'a SignalFd,
    watch: Watch,
    cells: BTreeMap<u64, Cell>,
    /// How many launches have a job, or have come to nothing.
    begun: u64,
    /// What a job has to come to.
    expected: Option<Vec<u8>>,
    figures: Figures,
    is_interrupted: bool,
    looked: Instant,
}

impl<'a> Coordinator<'a> {
    /// With no sandbox yet. Ends at one of `signals`.
    ///
    /// # Errors
    /// What the kernel says when it has no descriptor left.
    pub fn new(
        plan: &'a Plan,
        starter: Starter<'a>,
        signals: &'a SignalFd,
        listener: Listener<'a>,
    ) -> io::Result<Self> {
        let watch = Watch::new()?;
        watch.add(signals, Source::Signals)?;
        Ok(Self {
            plan,
            starter,
            listener,
            signals,
            watch,
            cells: BTreeMap::new(),
            begun: 0,
            // These give back what they are given; of others the first says what the rest has to say.
            expected: ["echo", "spin"].contains(&&*plan.job).then(|| plan.input.clone()),
            figures: Figures::default(),
            is_interrupted: false,
            looked: Instant::now(),
        })
    }

    /// Has all jobs done. The second value says whether a signal ended it before.
    ///
    /// # Errors
    /// [`LaunchError`].
    pub fn launch(mut self) -> Result<(Figures, bool), LaunchError> {
        let began = Instant::now();
        loop {
            let may_start = self.fill();
            if may_start {
                self.start()?;
            }
            if self.cells.is_empty() && (self.is_interrupted || self.left() == 0) {
                break;
            }
            self.step(may_start)?;
        }
        self.figures.took = began.elapsed();
        Ok((self.figures, self.is_interrupted))
    }

    /// Has sandboxes wait for jobs that never come, and measures what that takes.
    ///
    /// # Errors
    /// [`LaunchError`].
    pub fn idle(mut self, idle: IdlePlan) -> Result<(Figures, IdleFigures, bool), LaunchError> {
        let began = Instant::now();
        let available_kib = memory::available_kib();
        // A sandbox that fails counts as one that is there.
        while !self.is_interrupted && self.made_ready() < idle.count {
            let made = self.cells.len() as u64 + self.figures.failed;
            let may_start = made < idle.count && self.preparing() < self.plan.concurrency;
            if may_start {
                self.start()?;
            }
            self.step(may_start)?;
        }
        self.figures.took = began.elapsed();
        self.rest(idle::SETTLE)?;
        let before = idle::wake_ups(&self.cells);
        self.rest(idle.span)?;
        let mut measured = idle::measure(&self.cells, before, idle.span, available_kib);
        (self.listener)(News::Tick(&self.figures)).is_break().then(|| self.interrupt());
        if idle.hold && !self.is_interrupted {
            eprintln!("cleanslate: {} sandboxes are held until Ctrl-C", measured.count);
            while !self.is_interrupted {
                self.step(false)?;
            }
            measured.held = true;
        }
        let was_interrupted = self.is_interrupted;
        self.end_all();
        while !self.cells.is_empty() {
            self.step(false)?;
        }
        Ok((self.figures, measured, was_interrupted))
    }

    fn made_ready(&self) -> u64 {
        self.count(|stage| stage == Stage::Ready) as u64 + self.figures.failed
    }

    /// Lets time pass.
    fn rest(&mut self, span: Duration) -> Result<(), LaunchError> {
        let end = Instant::now() + span;
        while !self.is_interrupted && Instant::now() < end {
            let left = end.saturating_duration_since(Instant::now());
            self.hear(Some(left))?;
        }
        Ok(())
    }

    /// Launches without a job so far.
    fn left(&self) -> u64 {
        self.plan.count - self.begun
    }

    fn count(&self, is_counted: impl Fn(Stage) -> bool) -> usize {
        self.cells.values().filter(|cell| is_counted(cell.stage)).count()
    }

    fn preparing(&self) -> usize {
        self.count(|stage| stage == Stage::Preparing)
    }

    /// Gives jobs to sandboxes that are ready. True if another sandbox is wanted.
    fn fill(&mut self) -> bool {
        let ready: Vec<u64> = self.in_stage(|stage| stage == Stage::Ready);
        let working = self.count(|stage| matches!(stage, Stage::Working(_)));
        let places = self.plan.concurrency.saturating_sub(working).min(self.left() as usize);
        for number in ready.into_iter().take(places) {
            self.give_job(number);
        }
        if self.left() == 0 || self.is_interrupted {
            for number in self.in_stage(|s| matches!(s, Stage::Ready | Stage::Preparing)) {
                self.end(number);
            }
            return false;
        }
        let waiting = self.count(|stage| matches!(stage, Stage::Ready | Stage::Preparing)) as u64;
        self.cells.len() < self.plan.concurrency + self.plan.warm && waiting < self.left()
    }

    fn in_stage(&self, is_wanted: impl Fn(Stage) -> bool) -> Vec<u64> {
        let wanted = self.cells.iter().filter(|(_, cell)| is_wanted(cell.stage));
        wanted.map(|(number, _)| *number).collect()
    }

    /// Makes a sandbox, and has it boot.
    fn start(&mut self) -> Result<(), LaunchError> {
        let number = self.figures.processes + 1;
        let began = Instant::now();
        match (self.starter)(number) {
            Ok((running, sandbox)) => {
                self.figures.processes = number;
                self.watch.add(sandbox.as_fd(), Source::Socket(number))?;
                self.watch.add(running.pidfd(), Source::End(number))?;
                let cell = Cell {
                    running,
                    sandbox,
                    stage: Stage::Preparing,
                    began,
                    handed: began,
                    jobs: 0,
                    waits_for_room: false,
                    waited: Duration::ZERO,
                };
                self.cells.insert(number, cell);
                self.order(number, &Order::Boot { greet: true });
                Ok(())
            }
            Err(error) if self.figures.processes == 0 => Err(LaunchError::Start(error)),
            Err(error) => {
                self.begun += 1;
                let text = crate::lifecycle::chain(&*error);
                self.figures.fail(Failure::new("start-failed", text));
                Ok(())
            }
        }
    }

    fn give_job(&mut self, number: u64) {
        let now = Instant::now();
        let is_first = self.plan.warm == 0;
        let launch = self.begun;
        let Some(cell) = self.cells.get_mut(&number) else { return };
        // Who waits for no warm sandbox waits for this one's beginning too.
        cell.handed = if is_first { cell.began } else { now };
        cell.enter(Stage::Working(launch));
        self.begun += 1;
        let (name, input) = (self.plan.job.clone(), self.plan.input.clone());
        self.order(number, &Order::Job { name, input });
    }

    fn order(&mut self, number: u64, order: &Order) {
        let Some(cell) = self.cells.get_mut(&number) else { return };
        let ordered = cell.sandbox.order(order);
        self.sent(number, ordered);
    }

    /// What came of sending.
    fn sent(&mut self, number: u64, result: Result<(), ChannelError>) {
        let Some(cell) = self.cells.get_mut(&number) else { return };
        match result {
            Ok(()) => {
                let (fd, wanted) = (cell.sandbox.as_fd(), cell.sandbox.has_to_flush());
                if wanted || cell.waits_for_room {
                    cell.waits_for_room = wanted;
                    let _ = self.watch.await_room(fd, Source::Socket(number), wanted);
                }
            }
            Err(error) => self.unheard(number, error),
        }
    }

    /// Nothing comes from a sandbox any more.
    fn unheard(&mut self, number: u64, error: ChannelError) {
        let Some(cell) = self.cells.get_mut(&number) else { return };
        match error {
            // The end of its process says why. If there is none, its time runs out.
            ChannelError::Closed | ChannelError::Io(_) => self.watch.remove(cell.sandbox.as_fd()),
            error => self.lose(number, Failure::new("nonsense", error.to_string())),
        }
    }

    /// Waits for something, and takes it in.
    fn step(&mut self, at_once: bool) -> Result<(), LaunchError> {
        let is_due = self.cells.values().any(|cell| cell.stage != Stage::Ready);
        let timeout = match at_once {
            true => Some(Duration::ZERO),
            false => is_due.then_some(TICK),
        };
        self.hear(timeout)?;
        self.pass_time();
        if (self.listener)(News::Tick(&self.figures)).is_break() {
            self.interrupt();
        }
        Ok(())
    }

    fn hear(&mut self, timeout: Option<Duration>) -> Result<(), LaunchError> {
        for source in self.watch.wait(timeout)? {
            match source {
                Source::Signals => {
                    self.signals.take()?;
                    self.interrupt();
                }
                Source::Socket(number) => self.hear_sandbox(number),
                Source::End(number) => {
                    // What it said before tells more than its end.
                    self.hear_sandbox(number);
                    self.ended(number)?;
                }
            }
        }
        Ok(())
    }

    fn interrupt(&mut self) {
        self.is_interrupted = true;
        self.end_all();
    }

    fn end_all(&mut self) {
        for number in self.in_stage(|stage| stage != Stage::Ending) {
            self.end(number);
        }
    }

    /// Sandboxes that take too long for what they do are lost.
    fn pass_time(&mut self) {
        let now = Instant::now();
        let passed = (now - self.looked).min(2 * TICK);
        if passed < TICK / 2 {
            return;
        }
        self.looked = now;
        let timeout = self.plan.timeout;
        let mut late = Vec::new();
        for (number, cell) in &mut self.cells {
            cell.waited += passed;
            let has_limit = matches!(cell.stage, Stage::Preparing | Stage::Working(_));
            if has_limit && cell.waited >= timeout {
                late.push((*number, cell.stage));
            }
        }
        for (number, stage) in late {
            let doing = if stage == Stage::Preparing { "hello" } else { "answer" };
            let detail = format!("no {doing} in {} s", timeout.as_secs());
            self.lose(number, Failure::new("timed-out", detail));
        }
    }

    fn hear_sandbox(&mut self, number: u64) {
        while let Some(cell) = self.cells.get_mut(&number) {
            if cell.stage == Stage::Ending {
                return;
            }
            if cell.sandbox.has_to_flush() {
                let flushed = cell.sandbox.flush();
                self.sent(number, flushed);
            }
            let Some(cell) = self.cells.get_mut(&number) else { return };
            match cell.sandbox.answer() {
                Ok(Some(answer)) => self.take_in(number, answer),
                Ok(None) => return,
                Err(error) => return self.unheard(number, error),
            }
        }
    }

    fn take_in(&mut self, number: u64, answer: Answer) {
        let Some(cell) = self.cells.get(&number) else { return };
        match (answer, cell.stage) {
            (Answer::Judged(judged), Stage::Preparing) => self.judged(number, &judged),
            (Answer::Job(output), Stage::Working(launch)) => self.done(number, launch, &output),
            (Answer::Refused(why), Stage::Working(_)) => {
                self.lose(number, Failure::new("job-refused", why));
            }
            (Answer::Reset { cause, .. }, _) => {
                let detail = format!("its guest reset the machine by {cause}");
                self.lose(number, Failure::new("guest-ended", detail));
            }
            (Answer::Ended(why), _) => self.lose(number, failure_of(why)),
            (Answer::Refused(why), _) => self.lose(number, Failure::new("refused", why)),
            (_, _) => self.lose(number, Failure::new("nonsense", "an answer to nothing".into())),
        }
    }

    fn judged(&mut self, number: u64, judged: &Judged) {
        let Some(cell) = self.cells.get_mut(&number) else { return };
        for found in &judged.findings {
            self.figures.find(Failure::new(&found.name, found.detail.clone()));
        }
        match judged.findings.first() {
            None => {
                self.figures.hello.add(cell.began.elapsed().as_micros() as u64);
                if let (true, Some(us)) = (cell.jobs > 0, judged.hello_us) {
                    self.figures.reset_hello.add(us);
                    self.figures.recycled += 1;
                }
                cell.enter(Stage::Ready);
            }
            // Its job was done; what is thrown away is the machine alone.
            Some(_) if cell.jobs > 0 => self.end(number),
            Some(found) => {
                let detail = format!("{}: {}", found.name, found.detail);
                self.lose(number, Failure::new("finding", detail));
            }
        }
    }

    fn done(&mut self, number: u64, launch: u64, output: &[u8]) {
        let Some(cell) = self.cells.get_mut(&number) else { return };
        let us = cell.handed.elapsed().as_micros() as u64;
        cell.jobs += 1;
        let expected = self.expected.get_or_insert_with(|| output.into());
        if output != expected {
            let detail = format!("{} bytes that the job should not come to", output.len());
            return self.lose(number, Failure::new("wrong-output", detail));
        }
        self.figures.done += 1;
        self.figures.done_us.add(us);
        if launch.is_multiple_of((self.plan.count / MEMORY_SAMPLES).max(1))
            && let Some(kib) = memory::proportional_kib(cell.running.pid())
        {
            self.figures.memory_kib.add(kib);
        }
        let told = (self.listener)(News::Output(launch, output));
        if self.plan.origin == Origin::Recycle && self.left() > 0 && !self.is_interrupted {
            let Some(cell) = self.cells.get_mut(&number) else { return };
            cell.enter(Stage::Preparing);
            cell.began = Instant::now();
            self.order(number, &Order::Recycle);
        } else {
            self.end(number);
        }
        if told.is_break() {
            self.interrupt();
        }
    }

    /// A sandbox is of no use any more, for this reason.
    fn lose(&mut self, number: u64, failure: Failure) {
        let Some(cell) = self.cells.get(&number) else { return };
        match (cell.stage, cell.jobs) {
            (Stage::Ending, _) => return,
            (Stage::Working(_), _) => self.figures.fail(failure),
            // It never had a job: a launch came to nothing all the same.
            (Stage::Preparing | Stage::Ready, 0) if self.begun < self.plan.count => {
                self.begun += 1;
                self.figures.fail(failure);
            }
            (Stage::Preparing | Stage::Ready, _) => self.figures.note(failure),
        }
        self.end(number);
    }

    /// Ends a sandbox: there is nothing in it that anybody wants.
    fn end(&mut self, number: u64) {
        if let Some(cell) = self.cells.get_mut(&number) {
            cell.running.kill();
            cell.enter(Stage::Ending);
            self.watch.remove(cell.sandbox.as_fd());
        }
    }

    /// Its process has ended.
    fn ended(&mut self, number: u64) -> Result<(), LaunchError> {
        let Some(cell) = self.cells.get_mut(&number) else { return Ok(()) };
        let Some(end) = cell.running.try_end()? else { return Ok(()) };
        if cell.stage != Stage::Ending {
            self.lose(number, judge_end(end));
        }
        if let Some(cell) = self.cells.remove(&number) {
            self.watch.remove(cell.running.pidfd());
            self.watch.remove(cell.sandbox.as_fd());
        }
        Ok(())
    }
}

/// What a machine's end says that nobody has ordered.
fn failure_of(ended: Ended) -> Failure {
    match ended {
        Ended::Failed(why) => Failure::new("host-failed", why),
        Ended::Interrupted => Failure::new("killed", "it was told to end by somebody else".into()),
        Ended::PowerOff => Failure::new("guest-ended", "its guest turned the machine off".into()),
        Ended::Reset(cause) => {
            Failure::new("guest-ended", format!("its guest reset the machine by {cause}"))
        }
        Ended::Stuck(why) => Failure::new("guest-ended", why),
        Ended::Ordered => Failure::new("nonsense", "it ended as nobody had told it".into()),
    }
}
