//! The rules of a stream socket, checked one by one: each opens connections of its own, and says why it failed.

mod connection;
mod service;
mod table;

use agent_protocol::AGENT_PORT;
use jailer::User;
use serde::Serialize;

use super::dial::{Dialer, Trouble};
use crate::agent::Agent;
use crate::vsock_client::ClientError;
pub(super) use service::PORTS as HOST_PORTS;
use service::Service;

/// A check that was made, or could not be.
#[derive(Clone, Debug, Serialize)]
pub struct Check {
    /// Stable name: users match it.
    pub name: String,
    /// What holds if it passes.
    pub about: &'static str,
    /// What came of it.
    #[serde(flatten)]
    pub outcome: Outcome,
}

/// What came of a check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "result", content = "reason", rename_all = "kebab-case")]
pub enum Outcome {
    /// It holds.
    Pass,
    /// It does not, and how that showed.
    Fail(String),
    /// It cannot be told, and why.
    Unchecked(String),
}

/// Who opens a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    Host,
    Guest,
}

/// A check to be made.
pub(super) struct Rule {
    pub name: String,
    pub about: &'static str,
    work: Work,
}

#[derive(Clone, Copy)]
enum Work {
    /// On a fresh connection of one origin.
    Connection(fn(&Scene, Agent) -> Result<(), Trouble>, Origin),
    /// On whatever it opens.
    Ports(fn(&Scene) -> Result<(), Trouble>),
}

/// What the checks have in common.
pub(super) struct Scene<'a> {
    dialer: Dialer<'a>,
    /// A port of the host, or why there is none.
    service: Result<Service, String>,
}

/// All of them, in the order in which they are made.
pub(super) fn rules() -> Vec<Rule> {
    let of = |table: &'static [table::Row<table::OnScene>]| {
        table.iter().map(|(name, about, work)| Rule {
            name: (*name).into(),
            about,
            work: Work::Ports(*work),
        })
    };
    let on = |origin, prefix: &'static str| {
        table::CONNECTION.iter().map(move |(name, about, work)| Rule {
            name: format!("{prefix}{name}"),
            about,
            work: Work::Connection(*work, origin),
        })
    };
    let on_connections = on(Origin::Host, "").chain(on(Origin::Guest, "guest-opened/"));
    of(table::PORTS).chain(on_connections).chain(of(table::AFTERWARDS)).collect()
}

impl<'a> Scene<'a> {
    /// Listens on a port of the host, if it can.
    pub fn new(dialer: Dialer<'a>, user: Option<User>) -> Self {
        Self { dialer, service: Service::open(&dialer, user) }
    }

    /// Makes a check.
    pub fn check(&self, rule: &Rule) -> Result<(), Trouble> {
        match rule.work {
            Work::Ports(work) => work(self),
            Work::Connection(work, origin) => work(self, self.open(origin)?),
        }
    }

    fn open(&self, origin: Origin) -> Result<Agent, Trouble> {
        match origin {
            Origin::Host => Ok(self.dialer.agent()?),
            Origin::Guest => self.service()?.opened_by(&mut self.dialer.agent()?, &self.dialer),
        }
    }

    fn service(&self) -> Result<&Service, Trouble> {
        self.service.as_ref().map_err(|why| Trouble::Unchecked(why.clone()))
    }

    /// The machine serves others: on this connection, and on a new one.
    fn serves(&self, bystander: &mut Agent) -> Result<(), Trouble> {
        bystander.ping()?;
        Ok(self.dialer.agent()?.ping()?)
    }
}

/// Nobody listens there in the agent's guest.
const DEAF_PORT: u32 = AGENT_PORT - 1;

fn refused_port(scene: &Scene) -> Result<(), Trouble> {
    let mut bystander = scene.dialer.agent()?;
    match scene.dialer.port(DEAF_PORT) {
        Err(ClientError::Refused(_)) => scene.serves(&mut bystander),
        Err(error) => Err(Trouble::Wrong(crate::lifecycle::chain(&error))),
        Ok(_) => wrong(format!("port {DEAF_PORT}, where nobody listens, was connected to")),
    }
}

fn port_reuse(scene: &Scene) -> Result<(), Trouble> {
    const TIMES: usize = 100;
    for _ in 0..TIMES {
        scene.dialer.go_on()?;
        scene.dialer.agent()?.ping()?;
    }
    Ok(())
}

fn many_connections(scene: &Scene) -> Result<(), Trouble> {
    const CONNECTIONS: usize = 100;
    let agents: Result<Vec<Agent>, _> = (0..CONNECTIONS).map(|_| scene.dialer.agent()).collect();
    // In another order than they were opened in.
    Ok(agents?.iter_mut().rev().try_for_each(Agent::ping)?)
}

/// What the agent's side has seen of the device.
fn agent_dma(scene: &Scene) -> Result<(), Trouble> {
    let report = scene.dialer.agent()?.report()?.dma;
    match report.violation_count {
        0 => Ok(()),
        count => wrong(format!("{count} violations: {}", report.violations.join("; "))),
    }
}

fn stale_packets(scene: &Scene) -> Result<(), Trouble> {
    let report = scene.dialer.agent()?.report()?.vsock;
    match report.stale_packets {
        0 => Ok(()),
        count => wrong(format!("{count} such packets: {}", report.first.join("; "))),
    }
}

fn wrong<T>(why: String) -> Result<T, Trouble> {
    Err(Trouble::Wrong(why))
}
