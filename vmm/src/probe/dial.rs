//! Connections to the agent through the machine's socket, and what can go wrong with one.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use agent_protocol::AGENT_PORT;

use crate::agent::{Agent, AgentError};
use crate::lifecycle::chain;
use crate::vsock_client::{self, ClientError};

/// Why there is no conversation with an agent.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// No connection.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// A connection to somebody else, or to an agent that says nothing.
    #[error("the guest's port {AGENT_PORT}")]
    Agent(#[from] AgentError),
}

/// Why a step came to nothing.
#[derive(Debug)]
pub enum Trouble {
    /// The user wants an end.
    Stopped,
    /// This host or this machine cannot show it.
    Unchecked(String),
    /// It is not as it should be.
    Wrong(String),
}

impl From<DialError> for Trouble {
    fn from(error: DialError) -> Self {
        Self::Wrong(chain(&error))
    }
}

impl From<AgentError> for Trouble {
    fn from(error: AgentError) -> Self {
        Self::Wrong(chain(&error))
    }
}

/// Opens connections.
#[derive(Clone, Copy)]
pub(super) struct Dialer<'a> {
    /// The machine's socket.
    pub path: &'a Path,
    /// How long to wait for each answer.
    pub timeout: Duration,
    /// Set when the user wants an end.
    pub stop: &'a AtomicBool,
}

impl Dialer<'_> {
    /// A connection to the agent, greeted.
    pub fn agent(&self) -> Result<Agent, DialError> {
        Ok(Agent::greet(self.port(AGENT_PORT)?, self.timeout)?)
    }

    /// A connection to any port of the guest.
    pub fn port(&self, port: u32) -> Result<UnixStream, ClientError> {
        vsock_client::connect(self.path, port, Some(self.timeout)).map(Into::into)
    }

    /// Whether the agent answers on a new connection.
    pub fn sign_of_life(&self) -> Result<(), String> {
        let asked = self.agent().and_then(|mut agent| Ok(agent.ping()?));
        asked.map_err(|error| chain(&error))
    }

    /// An error if the user wants an end.
    pub fn go_on(&self) -> Result<(), Trouble> {
        match self.stop.load(Ordering::Relaxed) {
            true => Err(Trouble::Stopped),
            false => Ok(()),
        }
    }
}
