//! A port of the host for connections that the guest opens.

use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use agent_protocol::ConnectError;
use jailer::User;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::retry_on_intr;

use super::{Scene, wrong};
use crate::agent::Agent;
use crate::device::vsock::{SocketFile, SocketType};
use crate::lifecycle::chain;
use crate::probe::dial::{Dialer, Trouble};
use crate::vsock_client;

/// The ports that are tried, one after the other: several may probe the same machine at the same time.
pub const PORTS: Range<u32> = 5100..5116;
/// Nobody of ours listens there.
const DEAF_PORT: u32 = PORTS.end;

/// A listener at a port of the host.
pub(super) struct Service {
    listener: OwnedFd,
    port: u32,
    _file: SocketFile,
}

impl Service {
    /// Listens, or says why it cannot.
    pub fn open(dialer: &Dialer, user: Option<User>) -> Result<Self, String> {
        let mut why = String::new();
        for port in PORTS {
            match vsock_client::listen(dialer.path, port, SocketType::Stream, user) {
                Ok((listener, file)) => return Ok(Self { listener, port, _file: file }),
                Err(error) => why = chain(&error),
            }
        }
        Err(format!("no port of the host could be had for the guest's connections: {why}"))
    }

    /// A connection that the guest opens as `asker` is told, greeted.
    pub fn opened_by(&self, asker: &mut Agent, dialer: &Dialer) -> Result<Agent, Trouble> {
        match asker.connect(self.port, dialer.timeout)? {
            Ok(_) => {}
            Err(ConnectError::Refused) => {
                return wrong(format!(
                    "the guest was refused at port {} of the host, where a service listens",
                    self.port
                ));
            }
            Err(error) => return wrong(format!("the guest could not connect: {error:?}")),
        }
        Ok(Agent::greet(self.accept(dialer)?, dialer.timeout)?)
    }

    fn accept(&self, dialer: &Dialer) -> Result<UnixStream, Trouble> {
        let timeout = Timespec::try_from(dialer.timeout).ok();
        let mut ready = [PollFd::new(&self.listener, PollFlags::IN)];
        let polled = retry_on_intr(|| poll(&mut ready, timeout.as_ref()));
        let accepted = polled.and_then(|_| rustix::net::accept(&self.listener));
        match accepted {
            Ok(socket) => Ok(socket.into()),
            Err(rustix::io::Errno::AGAIN) => {
                wrong("the guest says that it is connected, and no connection came".into())
            }
            Err(errno) => wrong(format!("accept the guest's connection: {errno}")),
        }
    }
}

pub(super) fn refused(scene: &Scene) -> Result<(), Trouble> {
    // The machine could not tell a port without a service from a directory that it cannot see.
    scene.service()?;
    let mut agent = scene.dialer.agent()?;
    match agent.connect(DEAF_PORT, scene.dialer.timeout)? {
        Err(ConnectError::Refused) => scene.serves(&mut agent),
        Err(error) => wrong(format!("the guest was not refused: {error:?}")),
        Ok(_) => wrong(format!("the guest is connected to port {DEAF_PORT}, where nobody listens")),
    }
}

pub(super) fn reuse(scene: &Scene) -> Result<(), Trouble> {
    const TIMES: usize = 20;
    let mut asker = scene.dialer.agent()?;
    for _ in 0..TIMES {
        scene.dialer.go_on()?;
        scene.service()?.opened_by(&mut asker, &scene.dialer)?.ping()?;
    }
    Ok(())
}
