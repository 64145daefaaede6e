//! Probes the vsock of a machine whose guest runs the agent: how fast it is, and whether it keeps the rules of a stream socket, rule
//! by rule.
//!
//! It is a client of the socket in Firecracker's convention, and measures all monitors from the same place. What it needs of a
//! machine of our own is in [`machine`]; [`report`] is what comes of it.

pub mod checks;
mod dial;
mod figures;
pub mod machine;
pub mod report;

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use agent_protocol::Hello;
use jailer::User;

use self::checks::{Check, Outcome};
use self::dial::Dialer;
pub use self::dial::{DialError, Trouble};
pub use self::figures::{Connections, Direction, MESSAGE, RoundTrips, Throughput};

/// What to measure, and where.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The machine's socket.
    pub path: PathBuf,
    /// Whose the machine's process is, if that has to be said.
    pub user: Option<User>,
    /// How long to wait for each answer.
    pub timeout: Duration,
    /// Round trips of each size.
    pub trips: u32,
    /// Bytes in each direction of a throughput measurement.
    pub bytes: u64,
    /// Connections to open and close.
    pub connections: u32,
}

/// What is told while it goes on.
#[derive(Debug)]
pub enum News {
    /// The agent has greeted.
    Agent(Hello),
    /// What comes next, in words.
    Stage(String),
    /// A figure.
    RoundTrips(RoundTrips),
    /// A figure.
    Throughput(Throughput),
    /// A figure.
    Connections(Connections),
    /// A check was made, or could not be.
    Check(Check),
}

/// Sizes of messages whose round trips are timed, in bytes.
pub const SIZES: [usize; 6] = [1, 64, 1 << 10, 4 << 10, 16 << 10, 64 << 10];
/// Connections that are used at a time.
pub const AT_A_TIME: [u32; 3] = [1, 4, 16];

/// Who looks for an end of it between two steps, and hears what comes of them.
struct Probe<'a> {
    plan: &'a Plan,
    dialer: Dialer<'a>,
    tell: &'a mut dyn FnMut(News),
    /// Why there is no sense in going on.
    dead: Option<String>,
}

/// Measures and checks everything, in this order: round trips, throughput, connections, rules. Comes back early, without an error, when
/// `stop` says so.
///
/// # Errors
/// [`DialError`] if there is no agent to begin with. What goes wrong later is a check that failed.
pub fn run(plan: &Plan, stop: &AtomicBool, tell: &mut dyn FnMut(News)) -> Result<(), DialError> {
    let dialer = Dialer { path: &plan.path, timeout: plan.timeout, stop };
    tell(News::Agent(dialer.agent()?.hello()));
    let mut probe = Probe { plan, dialer, tell, dead: None };
    probe.stage("round-trips", "every message came back unchanged", Probe::round_trips);
    probe.stage("transfers", "every byte arrived unchanged, both ways", Probe::transfers);
    probe.stage("connections", "every connection was opened and greeted", Probe::connections);
    let scene = checks::Scene::new(dialer, plan.user);
    for rule in checks::rules() {
        (probe.tell)(News::Stage(format!("check {}", rule.name)));
        if let Some(outcome) = probe.outcome(|_| scene.check(&rule)) {
            let (name, about) = (rule.name, rule.about);
            (probe.tell)(News::Check(Check { name, about, outcome }));
        }
    }
    Ok(())
}

impl Probe<'_> {
    /// Takes figures, which prove something too: as a check.
    fn stage(
        &mut self,
        name: &'static str,
        about: &'static str,
        work: fn(&mut Self) -> Result<(), Trouble>,
    ) {
        if let Some(outcome) = self.outcome(work) {
            (self.tell)(News::Check(Check { name: name.into(), about, outcome }));
        }
    }

    /// None if it is to end.
    fn outcome(&mut self, work: impl FnOnce(&mut Self) -> Result<(), Trouble>) -> Option<Outcome> {
        if self.dialer.stop.load(Ordering::Relaxed) {
            return None;
        }
        if let Some(why) = &self.dead {
            return Some(Outcome::Unchecked(why.clone()));
        }
        match work(self) {
            Ok(()) => Some(Outcome::Pass),
            Err(Trouble::Stopped) => None,
            Err(Trouble::Unchecked(why)) => Some(Outcome::Unchecked(why)),
            Err(Trouble::Wrong(why)) => {
                // Each of the others would wait as long.
                if let Err(error) = self.dialer.sign_of_life() {
                    self.dead = Some(format!("the guest answers no more: {error}"));
                }
                Some(Outcome::Fail(why))
            }
        }
    }

    fn round_trips(&mut self) -> Result<(), Trouble> {
        for bytes in SIZES {
            (self.tell)(News::Stage(format!("round trips of {bytes} bytes")));
            let measured = figures::round_trips(&self.dialer, bytes, self.plan.trips)?;
            (self.tell)(News::RoundTrips(measured));
        }
        Ok(())
    }

    fn transfers(&mut self) -> Result<(), Trouble> {
        for direction in Direction::ALL {
            for connections in AT_A_TIME {
                let words = direction.words();
                (self.tell)(News::Stage(format!("throughput {words}, {connections} at a time")));
                let bytes = self.plan.bytes;
                let measured = figures::throughput(&self.dialer, direction, connections, bytes)?;
                (self.tell)(News::Throughput(measured));
            }
        }
        Ok(())
    }

    fn connections(&mut self) -> Result<(), Trouble> {
        for clients in AT_A_TIME {
            (self.tell)(News::Stage(format!("connections, {clients} at a time")));
            let measured = figures::connections(&self.dialer, clients, self.plan.connections)?;
            (self.tell)(News::Connections(measured));
        }
        Ok(())
    }
}
