//! The host's side of the conversation with a guest agent: one request, one reply, each bounded in length and time.

mod transfer;

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use agent_protocol::frame::{self, FrameError};
use agent_protocol::{
    CheckTicks, ConnectError, DiskAnswer, DiskRequest, GuestReset, Hello, Identity,
    PROTOCOL_VERSION, Poisoning, Probe, Probed, Reply, Report, Request, StateReading, Transfer,
};
use serde::de::DeserializeOwned;

/// Why a conversation ended. A guest can cause all but [`AgentError::Io`].
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The guest or its machine closed the connection.
    #[error("the agent closed the connection")]
    Closed,
    /// Nothing came in time.
    #[error("the agent did not answer within {0:?}")]
    Timeout(Duration),
    /// Bytes that are no frame.
    #[error("the agent sent a broken frame")]
    Frame(#[from] FrameError),
    /// Another version.
    #[error("the agent speaks protocol version {0}, not {PROTOCOL_VERSION}")]
    Version(u16),
    /// A reply to another question.
    #[error("the agent answered {0}")]
    Unexpected(String),
    /// A transfer's bytes are not those that were to come.
    #[error("byte {0} of a transfer is another one than the agent was to send")]
    WrongByte(u64),
    /// The host's own end failed.
    #[error("talk to the agent")]
    Io(#[source] io::Error),
}

/// A connection to an agent that has said hello.
#[derive(Debug)]
pub struct Agent {
    stream: UnixStream,
    received: Vec<u8>,
    timeout: Duration,
    hello: Hello,
}

impl Agent {
    /// Waits for the agent's hello on `stream`. `timeout` bounds this and each later answer.
    ///
    /// # Errors
    /// [`AgentError`].
    pub fn greet(stream: UnixStream, timeout: Duration) -> Result<Self, AgentError> {
        let hello = Hello { version: 0, life: 0, tsc_entry: 0, tsc_ready: 0 };
        let mut agent = Self { stream, received: Vec::new(), timeout, hello };
        agent.hello = agent.receive()?;
        match agent.hello.version {
            PROTOCOL_VERSION => Ok(agent),
            other => Err(AgentError::Version(other)),
        }
    }

    /// What the agent said first.
    pub fn hello(&self) -> Hello {
        self.hello
    }

    /// Asks for the report of this life.
    ///
    /// # Errors
    /// [`AgentError`].
    pub fn report(&mut self) -> Result<Report, AgentError> {
        match self.ask(&Request::GetReport)? {
            Reply::Report(report) => Ok(report),
            other => Err(unexpected(&other)),
        }
    }

    /// Waits for a sign of life.
    ///
    /// # Errors
    /// [`AgentError`].
    pub fn ping(&mut self) -> Result<(), AgentError> {
        const NUMBER: u64 = 0x70_696e_6721;
        match self.ask(&Request::Ping(NUMBER))? {
            Reply::Pong(NUMBER) => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// Has the agent send these bytes back.
    ///
    /// # Errors
    /// [`AgentError`].
    pub fn echo(&mut self, bytes: &[u8]) -> Result<Vec<u8>, AgentError> {
        match self.ask(&Request::Echo(bytes.into()))? {
            Reply::Echo(bytes) => Ok(bytes),
            other => Err(unexpected(&other)),
        }
    }

    /// Has the agent close directions of this connection.
    ///
    /// # Errors
    /// [`AgentError`].
    pub fn shutdown(&mut self, send: bool, receive: bool) -> Result<(), AgentError> {
        match self.ask(&Request::Shutdown { send, receive })? {
            Reply::Done => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// Asks for the state that a reset restores, as it was before this life changed it; for that of RAM behind the agent's
    /// image if `ram` is wanted.
    ///
    /// # Errors
    /// [`AgentError`].
    pub fn state(&mut self, ram: bool) -> Result<(Vec<StateReading>, CheckTicks), AgentError> {
        let request = if ram { Request::GetState } else { Request::GetStateBesideRam };
        match self.ask(&request)? {
            Reply::State(readings, ticks) => Ok((readings, ticks)),
            other => Err(unexpected(&other)),
        }
    }

    /// Has the guest give all of that state other values.
    ///
    /// # Errors
    /// [`AgentError`].
    pub fn poison(&mut self) -> Result<(Vec<Poisoning>, CheckTicks), AgentError> {
        match self.ask(&Request::Poison)? {
            Reply::Poisoned(poisonings, ticks) => Ok((poisonings, ticks)),
            other => Err(unexpected(&other)),
        }
    }

    /// Has the guest leave its performance counters dirty, and the first one `overflow_in` cycles before an overflow that
    /// interrupts. A guest without counters refuses, which is no error.
    ///
    /// # Errors
    /// [`AgentError`].
    pub fn arm_pmu(&mut self, overflow_in: u64) -> Result<(), AgentError> {
        match self.ask(&Request::ArmPmu { overflow_in })? {
            Reply::Done | Reply::Refused(_) => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// Keeps the guest's processor busy until it has had another NMI than the `seen` first ones, or for `ticks` of its
    /// time stamp counter.
    ///
    /// # Errors
    /// [`AgentError`].
    pub fn await_nmi(&mut self, seen: u32, ticks: u64) -> Result<(), AgentError> {
        match self.ask(&Request::AwaitNmi { seen, ticks })? {
            Reply::Done => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// Has the guest do nothing more until the host resets the machine, which tells when it has come to that.
    ///
    /// # Errors
    /// [`AgentError`] if the request could not be sent.
    pub fn hold(&mut self) -> Result<(), AgentError> {
        self.send(&Request::Hold)
    }

    /// Has the guest use disk `number`; `Err` is why it has none.
    ///
    /// # Errors
    /// [`AgentError`].
    pub fn disk(
        &mut self,
        number: u8,
        request: DiskRequest,
    ) -> Result<Result<DiskAnswer, String>, AgentError> {
        match self.ask(&Request::Disk { number, request })? {
            Reply::Disk(answer) => Ok(Ok(answer)),
            Reply::Refused(why) => Ok(Err(why)),
            other => Err(unexpected(&other)),
        }
    }

    /// Random bytes of the guest's virtio-rng device, at most `bytes`; `Err` is why there are none.
    ///
    /// # Errors
    /// [`AgentError`].
    pub fn random(&mut self, bytes: u32) -> Result<Result<Vec<u8>, String>, AgentError> {
        match self.ask(&Request::Random { bytes })? {
            Reply::Random(bytes) => Ok(Ok(bytes)),
            Reply::Refused(why) => Ok(Err(why)),
            other => Err(unexpected(&other)),
        }
    }

    /// Has the guest try something on its processor; `Err` is why it cannot.
    ///
    /// # Errors
    /// [`AgentError`].
    pub fn probe(&mut self, probe: Probe) -> Result<Result<Probed, String>, AgentError> {
        match self.ask(&Request::Probe(probe))? {
            Reply::Probed(probed) => Ok(Ok(probed)),
            Reply::Refused(why) => Ok(Err(why)),
            other => Err(unexpected(&other)),
        }
    }

    /// Has the agent do a job; `Err` is why it does not.
    ///
    /// # Errors
    /// [`AgentError`].
    pub fn job(
        &mut self,
        name: String,
        input: Vec<u8>,
    ) -> Result<Result<Vec<u8>, String>, AgentError> {
        match self.ask(&Request::Job { name, input })? {
            Reply::Job(output) => Ok(Ok(output)),
            Reply::Refused(why) => Ok(Err(why)),
            other => Err(unexpected(&other)),
        }
    }

    /// Who the machine is among clones.
    ///
    /// # Errors
    /// [`AgentError`].
    pub fn identify(&mut self) -> Result<Result<Identity, String>, AgentError> {
        match self.ask(&Request::Identify)? {
            Reply::Identity(identity) => Ok(Ok(identity)),
            Reply::Refused(why) => Ok(Err(why)),
            other => Err(unexpected(&other)),
        }
    }

    /// Has the guest open a connection to `host_port`, on which it will greet like on this one. Gives its own port.
    ///
    /// # Errors
    /// [`AgentError`].
    pub fn connect(
        &mut self,
        host_port: u32,
        timeout: Duration,
    ) -> Result<Result<u32, ConnectError>, AgentError> {
        let timeout_ms = u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX);
        match self.ask(&Request::Connect { host_port, timeout_ms })? {
            Reply::Connected(outcome) => Ok(outcome),
            other => Err(unexpected(&other)),
        }
    }

    /// Begins a transfer. The stream carries its bytes both ways from here on, and behind those for the host the frame of a
    /// [`Reply::Transferred`].
    ///
    /// # Errors
    /// [`AgentError`] if the request could not be sent.
    pub fn transfer(mut self, transfer: Transfer) -> Result<UnixStream, AgentError> {
        self.send(&Request::Transfer(transfer))?;
        // The guest has answered everything, so nothing of the stream was read ahead.
        Ok(self.stream)
    }

    /// Has the guest reset its machine. The conversation ends with its life.
    ///
    /// # Errors
    /// [`AgentError`] if the request could not be sent.
    pub fn reset(&mut self, reset: GuestReset) -> Result<(), AgentError> {
        self.send(&Request::Reset(reset))
    }

    /// Waits until the guest has hung up.
    ///
    /// # Errors
    /// [`AgentError`] if it says something instead, such as that it refuses, or nothing in time.
    pub fn await_end(&mut self) -> Result<(), AgentError> {
        match self.reply() {
            Err(AgentError::Closed) => Ok(()),
            Err(error) => Err(error),
            Ok(reply) => Err(unexpected(&reply)),
        }
    }

    fn ask(&mut self, request: &Request) -> Result<Reply, AgentError> {
        self.send(request)?;
        self.reply()
    }

    /// Closes a direction of the connection, or both.
    ///
    /// # Errors
    /// [`AgentError`].
    pub fn close(&mut self, how: Shutdown) -> Result<(), AgentError> {
        self.stream.shutdown(how).map_err(|error| self.classify(error))
    }

    /// The next reply.
    ///
    /// # Errors
    /// [`AgentError`].
    pub fn reply(&mut self) -> Result<Reply, AgentError> {
        self.receive()
    }

    /// Sends a request; its reply, if it has one, is for [`Self::reply`].
    ///
    /// # Errors
    /// [`AgentError`].
    pub fn send(&mut self, request: &Request) -> Result<(), AgentError> {
        self.write(&frame::encode(request)?)
    }

    /// Sends bytes that belong to a request, or to none.
    ///
    /// # Errors
    /// [`AgentError`].
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), AgentError> {
        self.stream.set_write_timeout(Some(self.timeout)).map_err(AgentError::Io)?;
        self.stream.write_all(bytes).map_err(|error| self.classify(error))
    }

    /// Takes bytes that are no reply; none at the end of the agent's.
    ///
    /// # Errors
    /// [`AgentError`].
    pub fn read(&mut self, buffer: &mut [u8]) -> Result<usize, AgentError> {
        if !self.received.is_empty() {
            let len = self.received.len().min(buffer.len());
            buffer[..len].copy_from_slice(&self.received[..len]);
            self.received.drain(..len);
            return Ok(len);
        }
        self.stream.set_read_timeout(Some(self.timeout)).map_err(AgentError::Io)?;
        loop {
            match self.stream.read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => return result.map_err(|error| self.classify(error)),
            }
        }
    }

    fn receive<T: DeserializeOwned>(&mut self) -> Result<T, AgentError> {
        let deadline = Instant::now() + self.timeout;
        loop {
            if let Some((message, taken)) = frame::decode(&self.received)? {
                self.received.drain(..taken);
                return Ok(message);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(AgentError::Timeout(self.timeout));
            }
            self.stream.set_read_timeout(Some(left)).map_err(AgentError::Io)?;
            // `decode` refuses frames over its limit, so this buffer stays below that limit and one read.
            let mut chunk = [0; 16 * 1024];
            match self.stream.read(&mut chunk) {
                Ok(0) => return Err(AgentError::Closed),
                Ok(count) => self.received.extend_from_slice(&chunk[..count]),
                Err(error) => match self.classify(error) {
                    AgentError::Io(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    error => return Err(error),
                },
            }
        }
    }

    fn classify(&self, error: io::Error) -> AgentError {
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                AgentError::Timeout(self.timeout)
            }
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => AgentError::Closed,
            _ => AgentError::Io(error),
        }
    }
}

fn unexpected(reply: &Reply) -> AgentError {
    AgentError::Unexpected(match reply {
        Reply::Report(_) => "with a report".into(),
        Reply::Pong(_) => "with a pong".into(),
        Reply::Echo(_) => "with an echo".into(),
        Reply::NmiSelfTest { .. } => "with an NMI self-test".into(),
        Reply::State(..) => "with its state".into(),
        Reply::Poisoned(..) => "that it is poisoned".into(),
        Reply::Done => "that it is done".into(),
        Reply::Disk(_) => "for a disk".into(),
        Reply::Random(_) => "with random bytes".into(),
        Reply::Connected(_) => "with the outcome of a connection".into(),
        Reply::Transferred(_) => "with the end of a transfer".into(),
        Reply::Probed(_) => "with what came of a probe".into(),
        Reply::Job(_) => "with what came of a job".into(),
        Reply::Identity(_) => "who it is".into(),
        Reply::Refused(why) => format!("that it refuses: {why}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_millis(200);

    fn hello(version: u16) -> Vec<u8> {
        frame::encode(&Hello { version, life: 1, tsc_entry: 5, tsc_ready: 9 }).unwrap()
    }

    fn greeted_with(bytes: &[u8], close: bool) -> Result<Agent, AgentError> {
        let (host, mut guest) = UnixStream::pair().unwrap();
        guest.write_all(bytes).unwrap();
        let _open = (!close).then_some(guest);
        Agent::greet(host, SOON)
    }

    #[test]
    fn an_agent_greets_with_its_version() {
        let agent = greeted_with(&hello(PROTOCOL_VERSION), false).unwrap();
        assert_eq!(agent.hello().tsc_entry, 5);
    }

    #[test]
    fn a_bad_greeting_is_told_apart() {
        let check = |bytes: &[u8], close, expected: &str| {
            let error = greeted_with(bytes, close).unwrap_err().to_string();
            assert!(error.contains(expected), "{error:?} lacks {expected:?}");
        };
        check(&hello(7), false, "version 7");
        check(&[], true, "closed the connection");
        check(&[], false, "did not answer");
        check(&hello(1)[..5], false, "did not answer");
        check(&hello(1)[..5], true, "closed the connection");
        check(&[0xff; 8], false, "broken frame");
    }

    #[test]
    fn a_reply_to_another_question_is_an_error() {
        let (host, mut guest) = UnixStream::pair().unwrap();
        guest.write_all(&hello(PROTOCOL_VERSION)).unwrap();
        guest.write_all(&frame::encode(&Reply::Refused("busy".into())).unwrap()).unwrap();
        let mut agent = Agent::greet(host, SOON).unwrap();
        assert_eq!(
            agent.report().unwrap_err().to_string(),
            "the agent answered that it refuses: busy"
        );
    }
}
