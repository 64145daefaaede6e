//! One connection: greets, then takes requests one at a time; transfers move raw bytes between request and reply.

use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use agent_protocol::frame::{self, PREFIX_LEN};
use agent_protocol::{ConnectError, Pattern, Reply, Request, Transfer, Transferred};
use vsock::{VMADDR_CID_HOST, VsockStream};

use crate::agent::Agent;

/// Bytes of raw data that are moved at once.
const CHUNK: usize = 64 * 1024;

/// Serves a connection to its end. What goes wrong with it is nobody else's business, and ends it.
pub fn serve(stream: &VsockStream, agent: &Arc<Agent>) {
    let _ = converse(stream, agent);
}

fn converse(mut stream: &VsockStream, agent: &Arc<Agent>) -> io::Result<()> {
    send(stream, &agent.hello())?;
    while let Some(request) = receive(stream)? {
        let reply = match request {
            Request::Transfer(transfer) => Reply::Transferred(move_bytes(stream, transfer)?),
            Request::Connect { host_port, timeout_ms } => {
                let timeout = Duration::from_millis(timeout_ms.into());
                Reply::Connected(connect(host_port, timeout, agent))
            }
            Request::Shutdown { send: sends, receive: receives } => {
                send(stream, &Reply::Done)?;
                let directions = match (sends, receives) {
                    (true, true) => Shutdown::Both,
                    (true, false) => Shutdown::Write,
                    (false, true) => Shutdown::Read,
                    (false, false) => continue,
                };
                stream.shutdown(directions)?;
                continue;
            }
            request => match agent.answer(request) {
                Some(reply) => reply,
                None => continue,
            },
        };
        match send(stream, &reply) {
            // That direction was closed; requests are still carried out.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => {}
            result => result?,
        }
    }
    stream.flush()
}

fn send<T: serde::Serialize>(mut stream: &VsockStream, message: &T) -> io::Result<()> {
    stream.write_all(&frame::encode(message).map_err(io::Error::other)?)
}

/// The next request; `None` at the end.
fn receive(mut stream: &VsockStream) -> io::Result<Option<Request>> {
    let mut bytes = vec![0; PREFIX_LEN];
    match stream.read_exact(&mut bytes) {
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(None),
        result => result?,
    }
    let len = frame::total_len(&bytes).map_err(io::Error::other)?.unwrap_or(PREFIX_LEN);
    bytes.resize(len, 0);
    stream.read_exact(&mut bytes[PREFIX_LEN..])?;
    let decoded = frame::decode(&bytes).map_err(io::Error::other)?;
    Ok(decoded.map(|(request, _)| request))
}

/// Opens a connection to a port of the host and serves it like one that the host has opened.
fn connect(host_port: u32, timeout: Duration, agent: &Arc<Agent>) -> Result<u32, ConnectError> {
    let (connected, outcome) = mpsc::channel();
    // The kernel waits two seconds, and there is no safe way to tell it another time.
    let asking = thread::Builder::new().spawn(move || {
        let _ = connected.send(VsockStream::connect_with_cid_port(VMADDR_CID_HOST, host_port));
    });
    asking.map_err(|_| ConnectError::TooMany)?;
    let stream = match outcome.recv_timeout(timeout) {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) if error.kind() == ErrorKind::TimedOut => {
            return Err(ConnectError::TimedOut);
        }
        Ok(Err(_)) => return Err(ConnectError::Refused),
        Err(_) => return Err(ConnectError::TimedOut),
    };
    let port = stream.local_addr().map_err(|_| ConnectError::Refused)?.port();
    let agent = Arc::clone(agent);
    let served = thread::Builder::new().spawn(move || serve(&stream, &agent));
    served.map(|_| port).map_err(|_| ConnectError::TooMany)
}

/// Both directions at once.
fn move_bytes(stream: &VsockStream, transfer: Transfer) -> io::Result<Transferred> {
    let began = Instant::now();
    let (to_host, taken) = thread::scope(|scope| {
        let sender = scope.spawn(|| send_pattern(stream, transfer));
        let taken = take_pattern(stream, transfer);
        (sender.join(), taken)
    });
    let (to_guest, first_wrong) = taken?;
    let to_host = to_host.unwrap_or_else(|_| Err(io::Error::other("the sender panicked")))?;
    let us = began.elapsed().as_micros() as u64;
    // Linux tells nobody how often it had no credit.
    Ok(Transferred { to_host, to_guest, first_wrong, credit_stalls: 0, us })
}

fn send_pattern(mut stream: &VsockStream, transfer: Transfer) -> io::Result<u64> {
    let message = (transfer.message as usize).clamp(1, CHUNK);
    let mut pattern = Pattern::to_host(transfer.seed);
    let mut bytes = vec![0; message];
    let mut left = transfer.to_host;
    while left > 0 {
        let len = message.min(usize::try_from(left).unwrap_or(message));
        pattern.fill(&mut bytes[..len]);
        match stream.write_all(&bytes[..len]) {
            // The host takes no more.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => break,
            result => result?,
        }
        left -= len as u64;
    }
    Ok(transfer.to_host - left)
}

/// How many bytes came, and where the first one is that differs.
fn take_pattern(mut stream: &VsockStream, transfer: Transfer) -> io::Result<(u64, Option<u64>)> {
    let mut pattern = Pattern::to_guest(transfer.seed);
    let mut bytes = vec![0; CHUNK];
    let (mut left, mut first_wrong) = (transfer.to_guest, None);
    while left > 0 {
        let most = CHUNK.min(usize::try_from(left).unwrap_or(CHUNK));
        let len = match stream.read(&mut bytes[..most])? {
            0 => break,
            len => len,
        };
        if let Err(at) = pattern.check(&bytes[..len]) {
            first_wrong.get_or_insert(at);
        }
        left -= len as u64;
    }
    Ok((transfer.to_guest - left, first_wrong))
}
