//! Messages: the greeting, what the host asks, what the agent answers, and the names of reset causes.

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;
use core::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::frame::MAX_PAYLOAD;
use crate::{CheckTicks, DiskAnswer, DiskRequest, GENERATION_LEN, Poisoning, Report, StateReading};

/// The agent's first frame on every connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`crate::PROTOCOL_VERSION`] of the agent.
    pub version: u16,
    /// The life number that the agent was started with (`agent.life=`), 0 if it was told none.
    pub life: u32,
    /// Guest TSC at the kernel entry point.
    pub tsc_entry: u64,
    /// Guest TSC when the vsock driver was ready.
    pub tsc_ready: u64,
}

/// What the host asks of the agent. One at a time; each but `Reset`, `PowerOff` and `Hold` gets one [`Reply`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Send the [`Report`] of this life.
    GetReport,
    /// Answer with the same number.
    Ping(u64),
    /// Answer with the same bytes.
    Echo(Vec<u8>),
    /// Send an NMI to yourself through the local APIC and say whether the handler ran.
    NmiSelfTest,
    /// Reset the machine this way. No reply: the connection dies with the life.
    Reset(GuestReset),
    /// Power the machine off. No reply.
    PowerOff,
    /// Leave every PMU register dirty and the first counter running, for a reset to clean up.
    ArmPmu {
        /// In how many cycles the running counter overflows, with its interrupt enabled.
        overflow_in: u64,
    },
    /// Send the state that a reset restores, as it was before this life changed it.
    GetState,
    /// Give all of that state values that it does not have after a reset.
    Poison,
    /// Keep the processor busy until another NMI has come than those seen, or for so many cycles.
    AwaitNmi {
        /// How many NMIs the host knows of.
        seen: u32,
        /// How long to wait, in ticks of the time stamp counter.
        ticks: u64,
    },
    /// Do nothing but wait for the host to reset the machine, with a mark in every register. No reply: a write to port 0x80
    /// says when it has come to that.
    Hold,
    /// Open a connection to a port of the host. It is greeted and served like one that the host has opened.
    Connect {
        /// The host's port.
        host_port: u32,
        /// How long to wait for the host's answer, in milliseconds.
        timeout_ms: u32,
    },
    /// Move raw bytes on this connection, then reply.
    Transfer(Transfer),
    /// Reply, then close directions of this connection.
    Shutdown {
        /// The agent sends no more. It still carries out what it is asked, and what it would reply is dropped.
        send: bool,
        /// The agent takes no more: what still comes is dropped.
        receive: bool,
    },
    /// Use a disk.
    Disk {
        /// Which of them, from 0 on.
        number: u8,
        /// For what.
        request: DiskRequest,
    },
    /// Send so many random bytes of the virtio-rng device, or as many as it gives at once.
    Random {
        /// How many.
        bytes: u32,
    },
    /// Try something on the processor, and say what came of it.
    Probe(Probe),
    /// Do a job: bytes in, bytes out.
    Job {
        /// Which one.
        name: String,
        /// What it is given, up to [`MAX_JOB_BYTES`].
        input: Vec<u8>,
    },
    /// Say who you are among clones.
    Identify,
    /// The same as [`Request::GetState`] without what RAM holds. Looking at that gives the machine all of its RAM.
    GetStateBesideRam,
}

/// Longest input and longest output of a job, in bytes: a frame holds them, and its name.
pub const MAX_JOB_BYTES: usize = MAX_PAYLOAD - 1024;

/// Who a machine is among those that began as the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// What the host wrote for this machine's present beginning; see [`GENERATION_LEN`].
    pub generation: [u8; GENERATION_LEN],
    /// The address of its vsock device, as it shows it now.
    pub cid: u64,
    /// The next bytes of the agent's generator of random numbers.
    pub random: [u8; 32],
}

/// What the processor is tried with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Probe {
    /// `vmrun` of an empty control block, which has to fail (AMD64 Architecture Programmer's Manual volume 2, section 15.5.1).
    FailedVmrun,
    /// `vmread` of every field that there could be (Intel SDM volume 3, appendix B).
    VmcsFields,
}

/// Which fields of a VMCS can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmcsFields {
    /// IA32_VMX_VMCS_ENUM as the guest reads it.
    pub vmcs_enum: u64,
    /// How many.
    pub readable: u32,
    /// The encoding of the one with the highest index.
    pub highest: u32,
    /// Whether TSC_MULTIPLIER (0x2032) is among them.
    pub tsc_multiplier: bool,
    /// The VM-instruction error after a `vmread` of that: 12 for a field that is not supported.
    pub error: u64,
}

/// What came of a [`Probe`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Probed {
    /// Of [`Probe::FailedVmrun`].
    FailedVmrun {
        /// EXITCODE of the control block before.
        before: u64,
        /// The same afterwards.
        after: u64,
    },
    /// Of [`Probe::VmcsFields`].
    VmcsFields(VmcsFields),
}

/// Raw bytes in either direction, or in both at the same time: right behind the request those for the guest, right before the
/// reply those for the host. They are patterns that either side can check: [`crate::Pattern`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Transfer {
    /// How many bytes the agent sends.
    pub to_host: u64,
    /// Most payload of each of its packets, in bytes. Buffers and credit can make them shorter.
    pub message: u32,
    /// How many bytes the agent takes and checks.
    pub to_guest: u64,
    /// What both patterns come from.
    pub seed: u64,
}

/// How a [`Transfer`] went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Transferred {
    /// Bytes sent: fewer than asked for if the host takes no more.
    pub to_host: u64,
    /// Bytes taken: fewer than announced if the host has closed this direction.
    pub to_guest: u64,
    /// Where in the bytes taken the first one is that differs from the pattern.
    pub first_wrong: Option<u64>,
    /// How often the agent had bytes to send and no credit.
    pub credit_stalls: u32,
    /// How long it took, in microseconds of the guest.
    pub us: u64,
}

/// Why a connection to the host was not opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ConnectError {
    /// The host said no.
    Refused,
    /// The host did not answer in time.
    TimedOut,
    /// The agent has as many connections as it can hold.
    TooMany,
}

/// What the agent answers.
#[expect(clippy::large_enum_variant, reason = "one reply exists at a time, and is encoded at once")]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// To [`Request::GetReport`].
    Report(Report),
    /// To [`Request::Ping`].
    Pong(u64),
    /// To [`Request::Echo`].
    Echo(Vec<u8>),
    /// To [`Request::NmiSelfTest`]: whether the NMI handler saw the NMI. The NMI is counted as claimed.
    NmiSelfTest {
        /// True if the handler ran.
        delivered: bool,
    },
    /// To [`Request::GetState`] and [`Request::GetStateBesideRam`].
    State(Vec<StateReading>, CheckTicks),
    /// To [`Request::Poison`].
    Poisoned(Vec<Poisoning>, CheckTicks),
    /// To [`Request::ArmPmu`], [`Request::AwaitNmi`] and [`Request::Shutdown`].
    Done,
    /// The request could not be carried out; the connection stays usable.
    Refused(String),
    /// To [`Request::Disk`].
    Disk(DiskAnswer),
    /// To [`Request::Random`].
    Random(Vec<u8>),
    /// To [`Request::Connect`]: the guest's port of the new connection.
    Connected(Result<u32, ConnectError>),
    /// To [`Request::Transfer`].
    Transferred(Transferred),
    /// To [`Request::Probe`].
    Probed(Probed),
    /// To [`Request::Job`]: what came out of it.
    Job(Vec<u8>),
    /// To [`Request::Identify`].
    Identity(Identity),
}

/// A reset that the guest itself can cause.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GuestReset {
    /// Keyboard controller: 0xfe to port 0x64.
    I8042,
    /// Reset control register: 0x06 to port 0xcf9.
    Cf9,
    /// The ACPI reset register of the command line (`agent.acpi_reset=PORT:VALUE`).
    Acpi,
    /// An exception with no way to deliver it.
    Triple,
    /// Linux alone: the magic key `b`, which resets without a word to anybody (Documentation/admin-guide/sysrq.rst).
    Sysrq,
    /// Linux alone: a panic, after which the command line (`panic=-1`) has it reset at once.
    Panic,
    /// Linux alone: another kernel without a reset of the machine (kexec(8)).
    Kexec,
}

/// Why a life of the machine began.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cause {
    /// The machine was just created.
    PowerOn,
    /// The host reset it.
    Host,
    /// See [`GuestReset::I8042`].
    I8042,
    /// See [`GuestReset::Cf9`].
    Cf9,
    /// See [`GuestReset::Acpi`].
    Acpi,
    /// See [`GuestReset::Triple`].
    Triple,
    /// See [`GuestReset::Sysrq`].
    Sysrq,
    /// See [`GuestReset::Panic`].
    Panic,
    /// See [`GuestReset::Kexec`].
    Kexec,
}

impl Cause {
    /// Every cause with the name that options, tables and JSON use.
    pub const NAMES: [(Self, &'static str); 9] = [
        (Self::PowerOn, "power-on"),
        (Self::Host, "host"),
        (Self::I8042, "i8042"),
        (Self::Cf9, "cf9"),
        (Self::Acpi, "acpi"),
        (Self::Triple, "triple"),
        (Self::Sysrq, "sysrq"),
        (Self::Panic, "panic"),
        (Self::Kexec, "kexec"),
    ];

    /// What the machine sees of it: Linux's own ways to a reset end at the keyboard controller, where the agent sends them.
    pub fn seen_by_machine(self) -> Self {
        match self {
            Self::Sysrq | Self::Panic => Self::I8042,
            cause => cause,
        }
    }

    /// The name that options, tables, the guest's command line and JSON use.
    pub fn name(self) -> &'static str {
        Self::NAMES.iter().find(|(cause, _)| *cause == self).map_or("", |(_, name)| name)
    }
}

impl From<GuestReset> for Cause {
    fn from(reset: GuestReset) -> Self {
        match reset {
            GuestReset::I8042 => Self::I8042,
            GuestReset::Cf9 => Self::Cf9,
            GuestReset::Acpi => Self::Acpi,
            GuestReset::Triple => Self::Triple,
            GuestReset::Sysrq => Self::Sysrq,
            GuestReset::Panic => Self::Panic,
            GuestReset::Kexec => Self::Kexec,
        }
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A word that names no [`Cause`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ParseCauseError;

impl fmt::Display for ParseCauseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("not a reset cause")
    }
}

impl core::error::Error for ParseCauseError {}

impl FromStr for Cause {
    type Err = ParseCauseError;

    fn from_str(word: &str) -> Result<Self, Self::Err> {
        let found = Self::NAMES.iter().find(|(_, name)| *name == word);
        found.map(|(cause, _)| *cause).ok_or(ParseCauseError)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_have_one_name_everywhere() {
        for (cause, name) in Cause::NAMES {
            assert_eq!(cause.name(), name);
            assert_eq!(name.parse(), Ok(cause));
            assert_eq!(serde_json::to_string(&cause).unwrap(), alloc::format!("\"{name}\""));
        }
        assert_eq!("Triple".parse::<Cause>(), Err(ParseCauseError));
        assert_eq!("".parse::<Cause>(), Err(ParseCauseError));
    }
}
