//! What may be said when, and what becomes of it: before the machine starts it is described, afterwards it is steered. Says
//! which orders a request needs; who carries them out, and how, is not known here.

use std::io;
use std::path::Path;
use std::time::Instant;

use serde_json::json;

use super::call::{Answer, Call, Request};
use super::config::{VmConfig, machine_to_json};
use super::log::Log;
use super::metrics::Metrics;
use super::model::{
    ActionType, BootSource, Drive, Instance, Level, LoadSnapshot, NewSnapshot, Refusal, VmState,
};

/// The version of Firecracker whose interface this is.
pub const FIRECRACKER_VERSION: &str = "1.14.0";

/// What the machine is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It does not exist yet.
    NotStarted,
    /// Its vCPUs run.
    Running,
    /// They do not.
    Paused,
}

impl State {
    /// In Firecracker's words.
    pub fn name(self) -> &'static str {
        match self {
            Self::NotStarted => "Not started",
            Self::Running => "Running",
            Self::Paused => "Paused",
        }
    }
}

/// What a request needs done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Order {
    /// Start the machine that is described.
    Start,
    /// Start the one of a snapshot.
    Load(LoadSnapshot),
    /// Halt its vCPUs.
    Pause,
    /// Let them run again.
    Resume,
    /// Write a snapshot.
    Snapshot(NewSnapshot),
    /// Reset it in place.
    Reset,
    /// Queue an NMI.
    Nmi,
    /// Ask the agent for its report, and judge it.
    Judge,
    /// Tell what the DMA audit saw.
    DmaAudit,
    /// Tell what the guest printed last.
    Console,
    /// Tell what its devices have counted.
    Count,
}

/// What becomes of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// This is the answer.
    Answer(Answer),
    /// Somebody has to do this first; [`Desk::done`] makes the answer.
    Order(Order),
}

/// What came of an order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outcome {
    /// What there is to tell, as JSON.
    pub told: serde_json::Value,
}

const BEFORE: &str = "The requested operation is not supported before starting the microVM.";
const AFTER: &str = "The requested operation is not supported after starting the microVM.";

/// The desk at which clients are served, one after the other.
#[derive(Debug)]
pub struct Desk {
    id: String,
    state: State,
    /// The machine, as it was described.
    pub config: VmConfig,
    /// The log.
    pub log: Log,
    /// The metrics.
    pub metrics: Metrics,
}

impl Desk {
    /// Of the instance `id`.
    pub fn new(id: String, metrics: Metrics) -> Self {
        let log = Log::new(id.clone());
        Self { id, state: State::NotStarted, config: VmConfig::default(), log, metrics }
    }

    /// What the machine is.
    pub fn state(&self) -> State {
        self.state
    }

    /// Whether a request can be answered while an order of another is carried out.
    pub fn needs_no_turn(request: &Request) -> bool {
        matches!(
            request,
            Request::Refused { .. }
                | Request::GetInstance
                | Request::GetVersion
                | Request::GetMachineConfig
                | Request::GetVmConfig
                | Request::GetOwn
        )
    }

    /// Takes a request.
    pub fn take(&mut self, call: &Call) -> Next {
        let method = call.method.map_or_else(|| "Unknown".into(), |method| method.to_string());
        let text = format!("The API server received a {method} request on {:?}.", call.path);
        self.log.line(Level::Info, module_path!(), &text);
        match self.decide(&call.request) {
            Next::Order(order) => Next::Order(order),
            Next::Answer(answer) => Next::Answer(self.account(call, answer)),
        }
    }

    /// Makes the answer to a request whose order was carried out, or was not, for this reason.
    pub fn done(
        &mut self,
        call: &Call,
        order: &Order,
        began: Instant,
        result: Result<Outcome, String>,
    ) -> Answer {
        self.metrics.note_latency(order, began.elapsed());
        let answer = match result {
            Err(reason) => Answer::refused(&reason),
            Ok(outcome) => {
                self.carry(order);
                self.answer_to(&call.request, order, outcome)
            }
        };
        self.account(call, answer)
    }

    /// The machine is the one of a snapshot, which was described so. Log and metrics are this process's.
    pub fn adopt(&mut self, described: VmConfig) {
        let VmConfig { logger, metrics, .. } = std::mem::take(&mut self.config);
        self.config = VmConfig { logger, metrics, ..described };
    }

    /// The machine runs, or is paused: a configuration file or a client has started it.
    pub fn carry(&mut self, order: &Order) {
        self.state = match order {
            Order::Start | Order::Resume => State::Running,
            Order::Load(load) if load.resume_vm => State::Running,
            Order::Load(_) | Order::Pause => State::Paused,
            _ => self.state,
        };
    }

    fn account(&mut self, call: &Call, answer: Answer) -> Answer {
        self.metrics.note_request(call.method, &call.path, answer.is_success());
        let (level, text) = match answer.is_success() {
            true => (
                Level::Info,
                format!("The request was executed successfully. Status code: {}.", answer.status),
            ),
            false => (
                Level::Error,
                format!("Received Error. Status code: {}. Message: {}", answer.status, answer.body),
            ),
        };
        self.log.line(level, module_path!(), &text);
        answer
    }

    fn decide(&mut self, request: &Request) -> Next {
        let result = match self.state {
            _ if Self::needs_no_turn(request) => return Next::Answer(self.tell(request)),
            State::NotStarted => self.describe(request),
            State::Running | State::Paused => self.steer(request),
        };
        result.unwrap_or_else(|Refusal(reason)| Next::Answer(Answer::refused(&reason)))
    }

    /// What can be told at any time.
    fn tell(&self, request: &Request) -> Answer {
        match request {
            Request::Refused { reason, too_long } => {
                Answer::fault(if *too_long { 413 } else { 400 }, reason)
            }
            Request::GetInstance => Answer::json(&Instance {
                app_name: "Cleanslate",
                id: self.id.clone(),
                state: self.state.name(),
                vmm_version: env!("CARGO_PKG_VERSION"),
            }),
            Request::GetVersion => {
                Answer::json(&json!({ "firecracker_version": FIRECRACKER_VERSION }))
            }
            Request::GetMachineConfig => Answer::json(&machine_to_json(&self.config.machine)),
            Request::GetVmConfig => Answer::json(&self.config.to_json()),
            _ => Answer::json(&self.config.own),
        }
    }

    /// Before the machine is there.
    fn describe(&mut self, request: &Request) -> Result<Next, Refusal> {
        let config = &mut self.config;
        match request.clone() {
            Request::PutMachineConfig(machine) => config.machine = machine,
            Request::PatchMachineConfig(update) => {
                config.machine = update.applied_to(&config.machine)?;
            }
            Request::PutBootSource(boot) => {
                check_boot(&boot)?;
                config.boot = Some(boot);
            }
            Request::PutCpuConfig(cpu) => config.cpu = Some(cpu),
            Request::PutDrive(drive) => {
                check_drive(&drive)?;
                config.set_drive(drive)?;
            }
            Request::PutEntropy(entropy) => config.entropy = Some(entropy),
            Request::PutVsock(vsock) => {
                check_free(&vsock.uds_path)?;
                config.vsock = Some(vsock);
            }
            Request::PutSerial(serial) => config.serial = Some(serial),
            Request::PutLogger(logger) => {
                let opened = self.log.set(logger.clone());
                opened.map_err(|error| Refusal::new(format!("open the log: {error}")))?;
                config.logger = Some(logger.over(config.logger.take().unwrap_or_default()));
            }
            Request::PutMetrics(metrics) => {
                self.metrics.open(&metrics.metrics_path)?;
                config.metrics = Some(metrics);
            }
            Request::PutOwn(own) => {
                own.uds_seqpacket_path.as_deref().map_or(Ok(()), check_free)?;
                config.own = own;
            }
            Request::PutAction(ActionType::InstanceStart) => return Ok(Next::Order(Order::Start)),
            Request::LoadSnapshot(load) => {
                return match config.describes_a_machine() {
                    true => Err(Refusal::new(
                        "Loading a microVM snapshot not allowed after configuring boot-specific resources.",
                    )),
                    false => Ok(Next::Order(Order::Load(load))),
                };
            }
            Request::GetMetrics => return Ok(Next::Answer(self.prometheus(None))),
            _ => return Err(Refusal::new(BEFORE)),
        }
        Ok(Next::Answer(Answer::done()))
    }

    /// While the machine is there.
    fn steer(&mut self, request: &Request) -> Result<Next, Refusal> {
        Ok(Next::Order(match request {
            Request::PatchVm(VmState::Paused) if self.state == State::Paused => {
                return Ok(Next::Answer(Answer::done()));
            }
            Request::PatchVm(VmState::Resumed) if self.state == State::Running => {
                return Ok(Next::Answer(Answer::done()));
            }
            Request::PatchVm(VmState::Paused) => Order::Pause,
            Request::PatchVm(VmState::Resumed) => Order::Resume,
            Request::CreateSnapshot(_) if self.state != State::Paused => {
                return Err(Refusal::new(
                    "a snapshot is taken of a machine that is paused: PATCH /vm first",
                ));
            }
            Request::CreateSnapshot(snapshot) => Order::Snapshot(snapshot.clone()),
            Request::PatchDrive(_) => {
                return Err(Refusal::new(
                    "drives: the file of a running machine's drive cannot be replaced here; give it in PUT /drives/{drive_id} \
                     before the start",
                ));
            }
            Request::PutAction(ActionType::FlushMetrics) | Request::GetMetrics => Order::Count,
            Request::PutAction(ActionType::SendCtrlAltDel) => {
                return Err(Refusal::new(
                    "SendCtrlAltDel: there is no keyboard here; ask the guest over vsock, or reset it (PUT /cleanslate/reset)",
                ));
            }
            Request::Reset => self.only_running(Order::Reset)?,
            Request::Nmi => self.only_running(Order::Nmi)?,
            Request::GetReport | Request::GetVerdict => {
                if self.config.boot.is_some() {
                    return Err(Refusal::new(
                        "the machine boots a kernel of yours, and only the embedded agent reports: leave out PUT /boot-source",
                    ));
                }
                self.only_running(Order::Judge)?
            }
            Request::GetDmaAudit => Order::DmaAudit,
            Request::GetConsole => Order::Console,
            _ => return Err(Refusal::new(AFTER)),
        }))
    }

    fn only_running(&self, order: Order) -> Result<Order, Refusal> {
        match self.state {
            State::Running => Ok(order),
            _ => Err(Refusal::new("the machine is paused: PATCH /vm first")),
        }
    }

    fn answer_to(&mut self, request: &Request, order: &Order, outcome: Outcome) -> Answer {
        let told = outcome.told;
        match (request, order) {
            (Request::GetMetrics, _) => self.prometheus(Some(&told)),
            (Request::PutAction(ActionType::FlushMetrics), _) => {
                match self.metrics.flush(Some(&told), self.log.missed) {
                    Ok(()) => Answer::done(),
                    Err(error) => Answer::refused(&format!("write the metrics: {error}")),
                }
            }
            (Request::GetReport, _) => Answer::json(&told["report"]),
            (Request::GetVerdict, _) => {
                let findings = &told["findings"];
                let is_clean = findings.as_array().is_some_and(Vec::is_empty);
                Answer::json(
                    &json!({ "clean": is_clean, "life": told["life"], "findings": findings }),
                )
            }
            (_, Order::DmaAudit | Order::Console) => Answer::json(&told),
            _ => Answer::done(),
        }
    }

    fn prometheus(&self, counted: Option<&serde_json::Value>) -> Answer {
        Answer::text(self.metrics.to_prometheus(self.state, counted))
    }
}

/// What Firecracker says at once about a kernel that is not there.
fn check_boot(boot: &BootSource) -> Result<(), Refusal> {
    check_file(&boot.kernel_image_path, "The kernel file cannot be opened")?;
    match &boot.initrd_path {
        Some(path) => check_file(path, "The initrd file cannot be opened"),
        None => Ok(()),
    }
}

fn check_file(path: &Path, words: &str) -> Result<(), Refusal> {
    let kind = std::fs::metadata(path).and_then(|metadata| match metadata.is_file() {
        true => Ok(()),
        false => Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file")),
    });
    kind.map_err(|error| Refusal::new(format!("{words}: {path:?}: {error}")))
}

/// A file or a block device; opened when the machine starts.
fn check_drive(drive: &Drive) -> Result<(), Refusal> {
    use std::os::unix::fs::FileTypeExt;

    let path = drive.path_on_host.as_deref().unwrap_or(Path::new(""));
    let kind = std::fs::metadata(path).map(|metadata| metadata.file_type());
    match kind {
        Ok(kind) if kind.is_file() || kind.is_block_device() => Ok(()),
        Ok(_) => Err(Refusal::new(format!(
            "path_on_host: {path:?} is neither a file nor a block device"
        ))),
        Err(error) => Err(Refusal::new(format!("path_on_host: {path:?}: {error}"))),
    }
}

/// Nothing is at the path; whoever is quicker later is told of then.
fn check_free(path: &Path) -> Result<(), Refusal> {
    match path.symlink_metadata() {
        Ok(_) => Err(Refusal::new(format!(
            "{path:?} exists; end the process that uses it, or remove the file if none does"
        ))),
        Err(_) => Ok(()),
    }
}
