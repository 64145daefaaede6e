//! A monitor and its guest in one: speaks the socket convention and the agent's protocol, and breaks one rule of either, or none.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use agent_protocol::{
    AGENT_PORT, ConnectError, Hello, PROTOCOL_VERSION, Pattern, Reply, Report, Request, Transfer,
    Transferred, frame,
};

/// What it does wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flaw {
    Nothing,
    /// Changes the last byte of messages of 4 KiB.
    ChangesEcho,
    /// Changes a byte of what it sends in transfers of this size.
    ChangesTransfer(u64),
    /// Says that it received less than it was sent.
    LosesBytes,
    /// Closes the connection of this number, the first being 1.
    Refuses(u32),
    AcceptsEveryPort,
    /// Refuses the guest's connection of this number, the first being 1.
    GuestRefused(u32),
    GuestAlwaysConnects,
    /// Gives a connection up when the host has sent all.
    ForgetsAnswer,
    /// Closes both directions when it is to close one.
    ClosesBoth,
    /// Never shows that it has sent all.
    NeverEnds,
    /// Takes for nobody what it is not to receive.
    ReceivesAll,
    /// Gives a connection up that both sides half close at the same time.
    ForgetsCrossing,
    /// Says that the last byte is missing of what was sent before the host closed.
    DropsLastByte,
    /// Drops the end of what it sent before it closed.
    DropsEnd,
    /// Keeps connections on which it understands nothing.
    KeepsNonsense,
    /// Serves nobody else while somebody does not read.
    ServesOne,
    /// Serves nobody any more after a client has vanished.
    DiesOfVanished,
    StalePackets,
    DmaViolations,
}

/// What its connections have in common.
struct Peer {
    path: PathBuf,
    flaw: Flaw,
    report: Report,
    /// Connections of the host, and of the guest.
    accepted: AtomicU32,
    connected: AtomicU32,
    is_dead: AtomicBool,
    turn: Mutex<()>,
}

/// A transfer of the checks, which tells them from those of figures.
const CHECKED: u64 = 4 << 20;

/// Starts one at `path`; tells how many connections the host has opened to its agent.
pub fn start(path: &Path, flaw: Flaw, report: Report) -> impl Fn() -> u32 + use<> {
    let listener = UnixListener::bind(path).unwrap();
    let peer = Arc::new(Peer {
        path: path.into(),
        flaw,
        report,
        accepted: AtomicU32::new(0),
        connected: AtomicU32::new(0),
        is_dead: AtomicBool::new(false),
        turn: Mutex::new(()),
    });
    let told = Arc::clone(&peer);
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (peer, stream) = (Arc::clone(&peer), stream.unwrap());
            std::thread::spawn(move || peer.meet(stream));
        }
    });
    move || told.accepted.load(Ordering::Relaxed)
}

/// Reads to the line feed and no further.
pub fn read_line(stream: &mut UnixStream) -> String {
    let mut line = String::new();
    let mut byte = [0];
    while !line.ends_with('\n') && stream.read_exact(&mut byte).is_ok() {
        line.push(byte[0] as char);
    }
    line
}

pub fn hello(version: u16) -> Vec<u8> {
    frame::encode(&Hello { version, life: 1, tsc_entry: 1, tsc_ready: 2 }).unwrap()
}

impl Peer {
    /// A client of the socket. Where the client goes away, everything here just ends.
    fn meet(self: &Arc<Self>, mut stream: UnixStream) {
        let line = read_line(&mut stream);
        if line != format!("CONNECT {AGENT_PORT}\n") {
            if self.flaw == Flaw::AcceptsEveryPort {
                let _ = stream.write_all(b"OK 77\n");
            }
            return;
        }
        let number = 1 + self.accepted.fetch_add(1, Ordering::Relaxed);
        if self.flaw == Flaw::Refuses(number) || self.is_dead.load(Ordering::Relaxed) {
            return;
        }
        if stream.write_all(b"OK 1073741824\n").is_ok() {
            self.serve(stream);
        }
    }

    /// A connection, whoever opened it. None at its end.
    fn serve(self: &Arc<Self>, mut stream: UnixStream) -> Option<()> {
        stream.write_all(&hello(PROTOCOL_VERSION)).ok()?;
        let mut is_muted = false;
        loop {
            let Some(request) = self.request(&mut stream) else {
                if self.flaw == Flaw::NeverEnds {
                    std::mem::forget(stream);
                }
                return None;
            };
            if self.flaw == Flaw::ServesOne {
                drop(self.turn.lock().unwrap());
            }
            let reply = match request {
                Request::Ping(number) => Reply::Pong(number),
                Request::Echo(bytes) => self.echo(bytes)?,
                Request::GetReport => Reply::Report(self.told()),
                Request::Connect { host_port, .. } => Reply::Connected(self.connect(host_port)),
                Request::Transfer(transfer) => self.transfer(&mut stream, transfer)?,
                Request::Shutdown { send, receive } => {
                    let done = frame::encode(&Reply::Done).unwrap();
                    if self.flaw == Flaw::ForgetsCrossing && !receive && host_closes(&stream) {
                        return None;
                    }
                    stream.write_all(&done).ok()?;
                    match (send, receive, self.flaw) {
                        (true, true, _) | (.., Flaw::ClosesBoth) => return None,
                        (true, ..) if self.flaw != Flaw::NeverEnds => {
                            stream.shutdown(Shutdown::Write).unwrap();
                        }
                        (_, true, flaw) if flaw != Flaw::ReceivesAll => {
                            stream.shutdown(Shutdown::Read).unwrap();
                            // Nothing more comes; it stays open until the host goes.
                            std::thread::sleep(Duration::from_secs(1));
                            return None;
                        }
                        _ => {}
                    }
                    is_muted = true;
                    continue;
                }
                other => panic!("nobody asks for {other:?}"),
            };
            if !is_muted {
                stream.write_all(&frame::encode(&reply).unwrap()).ok()?;
            }
        }
    }

    fn request(&self, stream: &mut UnixStream) -> Option<Request> {
        let mut prefix = [0; frame::PREFIX_LEN];
        stream.read_exact(&mut prefix).ok()?;
        let Ok(total) = frame::total_len(&prefix) else {
            if self.flaw == Flaw::KeepsNonsense {
                std::io::copy(stream, &mut std::io::sink()).ok()?;
            }
            return None;
        };
        let mut bytes = prefix.to_vec();
        bytes.resize(total?, 0);
        stream.read_exact(&mut bytes[frame::PREFIX_LEN..]).ok()?;
        frame::decode(&bytes).ok()?.map(|(request, _)| request)
    }

    fn echo(&self, mut bytes: Vec<u8>) -> Option<Reply> {
        match self.flaw {
            Flaw::ChangesEcho if bytes.len() == 4096 => *bytes.last_mut()? ^= 1,
            Flaw::ForgetsAnswer if bytes.len() == 100_000 => return None,
            _ => {}
        }
        Some(Reply::Echo(bytes))
    }

    fn told(&self) -> Report {
        let mut report = self.report.clone();
        match self.flaw {
            Flaw::StalePackets => {
                report.vsock.stale_packets = 3;
                report.vsock.first = vec!["Rw from 9 to 5".into()];
            }
            Flaw::DmaViolations => {
                report.dma.violation_count = 1;
                report.dma.violations = vec!["two overlap".into()];
            }
            _ => {}
        }
        report
    }

    fn connect(self: &Arc<Self>, host_port: u32) -> Result<u32, ConnectError> {
        let number = 1 + self.connected.fetch_add(1, Ordering::Relaxed);
        if self.flaw == Flaw::GuestRefused(number) {
            return Err(ConnectError::Refused);
        }
        let path = format!("{}_{host_port}", self.path.display());
        match UnixStream::connect(path) {
            Ok(stream) => {
                let peer = Arc::clone(self);
                std::thread::spawn(move || peer.serve(stream));
                Ok(number)
            }
            Err(_) if self.flaw == Flaw::GuestAlwaysConnects => Ok(number),
            Err(_) => Err(ConnectError::Refused),
        }
    }

    fn transfer(&self, stream: &mut UnixStream, transfer: Transfer) -> Option<Reply> {
        let Transfer { to_host, to_guest, .. } = transfer;
        let is_slow = self.flaw == Flaw::ServesOne && to_host == CHECKED && to_guest == 0;
        let turn = is_slow.then(|| self.turn.lock().unwrap());
        let mut writer = stream.try_clone().unwrap();
        let sent = std::thread::scope(|scope| {
            let sending = scope.spawn(|| self.send(&mut writer, transfer));
            let received = receive(stream, transfer);
            sending.join().unwrap().and(received)
        });
        drop(turn);
        let Some(mut received) = sent else {
            if self.flaw == Flaw::DiesOfVanished {
                self.is_dead.store(true, Ordering::Relaxed);
            }
            return None;
        };
        let shortens = match self.flaw {
            Flaw::LosesBytes => to_guest > 0 && to_guest < CHECKED,
            Flaw::DropsLastByte => to_guest == CHECKED,
            _ => false,
        };
        received.to_guest -= u64::from(shortens);
        Some(Reply::Transferred(received))
    }

    fn send(&self, writer: &mut UnixStream, transfer: Transfer) -> Option<()> {
        let mut pattern = Pattern::to_host(transfer.seed);
        while pattern.position() < transfer.to_host {
            let left = transfer.to_host - pattern.position();
            let mut bytes = vec![0; left.min(64 * 1024) as usize];
            pattern.fill(&mut bytes);
            if self.flaw == Flaw::ChangesTransfer(transfer.to_host) && left <= 64 * 1024 {
                *bytes.last_mut()? ^= 1;
            }
            if self.flaw == Flaw::DropsEnd
                && transfer.to_guest == 0
                && left <= 64 * 1024
                && has_more(writer)
            {
                writer.shutdown(Shutdown::Both).ok()?;
                return None;
            }
            writer.write_all(&bytes).ok()?;
        }
        Some(())
    }
}

/// The host's part of a transfer.
fn receive(stream: &mut UnixStream, transfer: Transfer) -> Option<Transferred> {
    let mut pattern = Pattern::to_guest(transfer.seed);
    let mut first_wrong = None;
    while pattern.position() < transfer.to_guest {
        let left = transfer.to_guest - pattern.position();
        let mut bytes = vec![0; left.min(64 * 1024) as usize];
        stream.read_exact(&mut bytes).ok()?;
        if let Err(at) = pattern.check(&bytes) {
            first_wrong.get_or_insert(at);
        }
    }
    let (to_host, to_guest) = (transfer.to_host, transfer.to_guest);
    Some(Transferred { to_host, to_guest, first_wrong, credit_stalls: 0, us: 1 })
}

/// Whether the host has another request waiting.
fn has_more(stream: &UnixStream) -> bool {
    let flags = rustix::net::RecvFlags::PEEK | rustix::net::RecvFlags::DONTWAIT;
    matches!(rustix::net::recv(stream, &mut [0; 1][..], flags), Ok((1, _)))
}

/// Whether the host has sent all, or will have in a moment.
fn host_closes(stream: &UnixStream) -> bool {
    stream.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    let ended = rustix::net::recv(stream, &mut [0; 1][..], rustix::net::RecvFlags::PEEK);
    stream.set_read_timeout(None).unwrap();
    matches!(ended, Ok((0, _)))
}
