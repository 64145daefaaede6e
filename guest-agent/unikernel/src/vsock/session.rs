//! What a connection's bytes mean: frames to requests, replies to bytes, and transfers between them.

use alloc::string::String;
use alloc::vec::Vec;

use agent_protocol::frame::{self, FrameError};
use agent_protocol::{Hello, Reply, Request};

use super::transfer::Progress;

/// Who answers the host.
pub trait Answer {
    /// The greeting for a new connection.
    fn hello(&self) -> Hello;

    /// Carries out one request. Those about connections and transfers do not come here.
    fn answer(&mut self, request: Request) -> Option<Reply>;

    /// Microseconds since some moment of this life.
    fn now_us(&self) -> u64;

    /// Notes the address that the device shows now.
    fn note_cid(&mut self, _cid: u64) {}

    /// Notes an event of the transport.
    fn note_event(&mut self) {}

    /// Notes a packet to this port for a connection that this life never had.
    fn note_stale(&mut self, guest_port: u32, packet: String);

    /// Logs that the host misbehaved.
    fn warn(&mut self, text: String);
}

/// What became of the bytes that have come in.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Served {
    /// Nothing can be done before something comes in or leaves.
    Nothing,
    /// A request waits until there is room for a long answer.
    Waits,
    /// A request was carried out.
    Something,
    /// The host wants a connection to a port of its own.
    Connect { host_port: u32, timeout_us: u64 },
    /// The host wants directions closed, after the reply.
    Shutdown { send: bool, receive: bool },
}

enum Doing {
    Requests,
    /// The host is owed the outcome of a `Connect`.
    Connecting,
    Transfer(Progress),
}

/// The bytes of one connection and what they are about.
pub(super) struct Session {
    inbox: Vec<u8>,
    outbox: Vec<u8>,
    sent: usize,
    doing: Doing,
    /// Nobody takes replies.
    muted: bool,
    /// Nothing more comes in.
    ended: bool,
}

impl Session {
    /// A session that begins with these bytes for the host.
    pub fn new(greeting: Vec<u8>) -> Self {
        Self {
            inbox: Vec::new(),
            outbox: greeting,
            sent: 0,
            doing: Doing::Requests,
            muted: false,
            ended: false,
        }
    }

    /// Takes payload. No more than `room` bytes wait at the same time.
    pub fn receive(&mut self, payload: &[u8], room: usize) {
        let taken = match &mut self.doing {
            Doing::Transfer(progress) => progress.take(payload),
            Doing::Requests | Doing::Connecting => 0,
        };
        let rest = &payload[taken..];
        // Twice as much each time, and never more than can come.
        let (len, needed) = (self.inbox.len(), self.inbox.len() + rest.len());
        if needed > self.inbox.capacity() {
            self.inbox.reserve_exact(needed.max(room.min(2 * len)) - len);
        }
        self.inbox.extend_from_slice(rest);
    }

    /// Carries out the next request, unless something of the one before is still to be sent: then the host has to wait. It also
    /// has to if the answer may be long and there is not `room_for_long_answer`.
    ///
    /// # Errors
    /// If the bytes can never become a request; the connection is of no more use.
    pub fn serve(
        &mut self,
        room_for_long_answer: bool,
        agent: &mut impl Answer,
    ) -> Result<Served, FrameError> {
        if let Doing::Transfer(progress) = &self.doing
            && progress.is_over()
        {
            let result = progress.result(agent.now_us());
            self.doing = Doing::Requests;
            self.reply(&Reply::Transferred(result))?;
            return Ok(Served::Something);
        }
        if self.is_busy() {
            return Ok(Served::Nothing);
        }
        let Some((request, used)) = frame::decode(&self.inbox)? else { return Ok(Served::Nothing) };
        if may_have_long_answer(&request) && !room_for_long_answer && !self.muted {
            return Ok(Served::Waits);
        }
        self.inbox.drain(..used);
        let served = match request {
            Request::Connect { host_port, timeout_ms } => {
                self.doing = Doing::Connecting;
                Served::Connect { host_port, timeout_us: u64::from(timeout_ms) * 1000 }
            }
            Request::Transfer(transfer) => {
                let mut progress = Progress::new(transfer, agent.now_us());
                let here = progress.take(&self.inbox);
                self.inbox.drain(..here);
                if self.muted {
                    progress.end_output();
                }
                if self.ended {
                    progress.end_input();
                }
                self.doing = Doing::Transfer(progress);
                Served::Something
            }
            Request::Shutdown { send, receive } => {
                self.reply(&Reply::Done)?;
                Served::Shutdown { send, receive }
            }
            request => {
                if let Some(reply) = agent.answer(request) {
                    self.reply(&reply)?;
                }
                Served::Something
            }
        };
        if self.inbox.is_empty() {
            // There may be thousands of idle connections.
            self.inbox = Vec::new();
        }
        Ok(served)
    }

    /// Carries out everything that has come in, and drops the answers. Nobody would use a connection that was asked for.
    pub fn serve_without_answers(&mut self, agent: &mut impl Answer) -> Result<(), FrameError> {
        self.mute();
        self.end_input();
        loop {
            match self.serve(true, agent)? {
                Served::Nothing | Served::Waits => return Ok(()),
                Served::Connect { .. } => self.doing = Doing::Requests,
                Served::Something | Served::Shutdown { .. } => {}
            }
        }
    }

    /// The outcome of a `Connect` that the host is owed. A broken frame cannot come of it.
    pub fn connected(&mut self, reply: &Reply) -> Result<(), FrameError> {
        self.doing = Doing::Requests;
        self.reply(reply)
    }

    /// Writes what is to be sent next into `buffer`, and returns how much that is.
    pub fn fill(&mut self, buffer: &mut [u8]) -> usize {
        let unsent = &self.outbox[self.sent..];
        if unsent.is_empty() {
            return match &mut self.doing {
                Doing::Transfer(progress) => progress.fill(buffer),
                Doing::Requests | Doing::Connecting => 0,
            };
        }
        let len = unsent.len().min(buffer.len());
        buffer[..len].copy_from_slice(&unsent[..len]);
        self.sent += len;
        if self.sent == self.outbox.len() {
            self.outbox = Vec::new();
            self.sent = 0;
        }
        len
    }

    /// Whether there is anything to send.
    pub fn has_output(&self) -> bool {
        match &self.doing {
            Doing::Transfer(progress) if progress.has_output() => true,
            _ => !self.outbox.is_empty(),
        }
    }

    /// There is, but no credit for it.
    pub fn stall(&mut self) {
        if let Doing::Transfer(progress) = &mut self.doing {
            progress.stall();
        }
    }

    /// Nothing can be sent any more: what there is and what comes is dropped.
    pub fn mute(&mut self) {
        self.muted = true;
        self.outbox = Vec::new();
        self.sent = 0;
        if let Doing::Transfer(progress) = &mut self.doing {
            progress.end_output();
        }
    }

    /// The host sends no more.
    pub fn end_input(&mut self) {
        self.ended = true;
        if let Doing::Transfer(progress) = &mut self.doing {
            progress.end_input();
        }
    }

    /// Whether the next request has to wait.
    pub fn is_busy(&self) -> bool {
        !matches!(self.doing, Doing::Requests) || !self.outbox.is_empty()
    }

    /// Bytes that have come in and wait.
    pub fn waiting(&self) -> usize {
        self.inbox.len()
    }

    /// The length of the request that comes in or has, if that is known. One that can never be a request is none.
    pub fn next_request(&self) -> Option<usize> {
        frame::total_len(&self.inbox).ok().flatten()
    }

    /// Bytes of memory that the answer takes which is not sent yet.
    pub fn answer(&self) -> usize {
        self.outbox.capacity()
    }

    /// Bytes from the host that belong to a transfer, and so will not wait.
    pub fn passing(&self) -> u64 {
        match &self.doing {
            Doing::Transfer(progress) => progress.in_left(),
            Doing::Requests | Doing::Connecting => 0,
        }
    }

    fn reply(&mut self, reply: &Reply) -> Result<(), FrameError> {
        if !self.muted {
            self.outbox = frame::encode(reply)?;
        }
        Ok(())
    }
}

/// Longer than some hundred bytes.
fn may_have_long_answer(request: &Request) -> bool {
    match request {
        Request::Echo(_)
        | Request::GetReport
        | Request::GetState
        | Request::GetStateBesideRam
        | Request::Poison
        | Request::Disk { .. }
        | Request::Random { .. }
        | Request::Job { .. } => true,
        Request::Ping(_)
        | Request::NmiSelfTest
        | Request::Reset(_)
        | Request::PowerOff
        | Request::ArmPmu { .. }
        | Request::Hold
        | Request::AwaitNmi { .. }
        | Request::Connect { .. }
        | Request::Transfer(_)
        | Request::Probe(_)
        | Request::Identify
        | Request::Shutdown { .. } => false,
    }
}
