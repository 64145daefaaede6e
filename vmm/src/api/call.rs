//! One request of a client, as the confined process understands it and the other takes it; and the answer.

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::model::cpu::CpuConfig;
use super::model::{
    ActionType, BootSource, Drive, DriveUpdate, Entropy, LoadSnapshot, Logger, MachineConfig,
    MachineConfigUpdate, Metrics, NewSnapshot, Own, Refusal, Serial, VmState, Vsock,
};

/// What a client does with a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Method {
    /// Asks.
    Get,
    /// Sets.
    Put,
    /// Changes.
    Patch,
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Get => "GET",
            Self::Put => "PUT",
            Self::Patch => "PATCH",
        })
    }
}

/// What a client wants.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs)]
pub enum Request {
    /// Something that is refused without a look at the machine: why, and whether it was too long.
    Refused {
        reason: String,
        too_long: bool,
    },
    GetInstance,
    GetVersion,
    GetMachineConfig,
    GetVmConfig,
    PutMachineConfig(MachineConfig),
    PatchMachineConfig(MachineConfigUpdate),
    PutBootSource(BootSource),
    PutCpuConfig(CpuConfig),
    PutDrive(Drive),
    PatchDrive(DriveUpdate),
    PutEntropy(Entropy),
    PutVsock(Vsock),
    PutLogger(Logger),
    PutMetrics(Metrics),
    PutSerial(Serial),
    PatchVm(VmState),
    PutAction(ActionType),
    CreateSnapshot(NewSnapshot),
    LoadSnapshot(LoadSnapshot),
    GetOwn,
    PutOwn(Own),
    Reset,
    Nmi,
    GetReport,
    GetVerdict,
    GetDmaAudit,
    GetConsole,
    GetMetrics,
}

impl From<Refusal> for Request {
    fn from(Refusal(reason): Refusal) -> Self {
        Self::Refused { reason, too_long: false }
    }
}

/// A request on its way from one process to the other.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Call {
    /// Its number, which the answer has too.
    pub id: u64,
    /// How it came, for the log.
    pub method: Option<Method>,
    /// The path, cut short and without control characters, for the log.
    pub path: String,
    /// What it wants.
    pub request: Request,
}

/// What becomes of a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// An HTTP status.
    pub status: u16,
    /// The body; there is none if it is empty.
    pub body: String,
    /// Whether the body is JSON; text otherwise.
    pub is_json: bool,
}

impl Answer {
    /// Done; there is nothing to say.
    pub fn done() -> Self {
        Self { status: 204, body: String::new(), is_json: true }
    }

    /// What was asked for.
    pub fn json(value: &impl Serialize) -> Self {
        match serde_json::to_string(value) {
            Ok(body) => Self { status: 200, body, is_json: true },
            Err(error) => Self::fault(500, &format!("make JSON of the answer: {error}")),
        }
    }

    /// The same as text.
    pub fn text(body: String) -> Self {
        Self { status: 200, body, is_json: false }
    }

    /// The client's mistake, or what the machine or the host cannot do.
    pub fn refused(reason: &str) -> Self {
        Self::fault(400, reason)
    }

    /// A failure with a status of its own, in Firecracker's shape.
    pub fn fault(status: u16, reason: &str) -> Self {
        Self { status, body: json!({ "fault_message": reason }).to_string(), is_json: true }
    }

    /// Whether the request was fulfilled.
    pub fn is_success(&self) -> bool {
        (200..300).contains(&self.status)
    }
}

/// An answer on its way back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reply {
    /// The request's number.
    pub id: u64,
    /// What became of it.
    pub answer: Answer,
}
