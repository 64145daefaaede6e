//! The measurements. Times are those of a client of the socket, with all that lies between it and the agent.

use std::time::Instant;

use agent_protocol::{Transfer, Transferred};
use serde::Serialize;

use super::dial::{Dialer, Trouble};
use crate::agent::Agent;
use crate::histogram::Histogram;

/// Most payload of a packet of a transfer, and of a write of the host's.
pub const MESSAGE: u32 = 64 * 1024;

/// Round trips of one size.
#[derive(Clone, Debug)]
pub struct RoundTrips {
    /// Bytes of the message that the agent sends back.
    pub bytes: usize,
    /// Times in nanoseconds.
    pub times: Histogram,
}

/// Where bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Direction {
    /// From host to guest.
    ToGuest,
    /// From guest to host.
    ToHost,
    /// Both at once.
    Both,
}

impl Direction {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::ToGuest, Self::ToHost, Self::Both];

    /// In words.
    pub fn words(self) -> &'static str {
        match self {
            Self::ToGuest => "host to guest",
            Self::ToHost => "guest to host",
            Self::Both => "both ways",
        }
    }
}

/// How fast bytes pass.
#[derive(Clone, Debug)]
pub struct Throughput {
    /// Where they go.
    pub direction: Direction,
    /// How many connections share them.
    pub connections: u32,
    /// Bytes in each direction of one round.
    pub bytes: u64,
    /// Bytes a second of each round, in each direction; ascending.
    pub rates: Vec<f64>,
    /// How often the agent had bytes to send and no credit, in all rounds.
    pub credit_stalls: u64,
}

impl Throughput {
    /// The median of the rounds.
    pub fn rate(&self) -> f64 {
        self.rates.get(self.rates.len() / 2).copied().unwrap_or(0.0)
    }
}

/// How fast connections are opened, greeted and closed.
#[derive(Clone, Debug)]
pub struct Connections {
    /// Clients that do so at the same time, one connection after the other.
    pub clients: u32,
    /// Connections in a second, all clients together.
    pub per_second: f64,
    /// Times of one from its request to the agent's greeting, in nanoseconds.
    pub times: Histogram,
}

/// Times so many round trips.
pub(super) fn round_trips(
    dialer: &Dialer,
    bytes: usize,
    count: u32,
) -> Result<RoundTrips, Trouble> {
    /// The first ones find cold caches, and buffers to allocate.
    const UNTIMED: u32 = 16;
    let mut agent = dialer.agent()?;
    let mut times = Histogram::default();
    let mut message: Vec<u8> = (0..bytes).map(|at| (at % 251) as u8).collect();
    for trip in 0..UNTIMED + count {
        dialer.go_on()?;
        // No answer can be that to another question.
        message[0] = trip as u8;
        let began = Instant::now();
        let answer = agent.echo(&message)?;
        let took = began.elapsed();
        if answer != message {
            let is_right = answer.iter().zip(&message).take_while(|(a, b)| a == b).count();
            return Err(Trouble::Wrong(format!(
                "{bytes} bytes came back as {}, and not the same from byte {is_right} on",
                answer.len()
            )));
        }
        if trip >= UNTIMED {
            times.add(took.as_nanos() as u64);
        }
    }
    Ok(RoundTrips { bytes, times })
}

/// Measures how fast `bytes` pass in each direction, on so many connections at the same time.
pub(super) fn throughput(
    dialer: &Dialer,
    direction: Direction,
    connections: u32,
    bytes: u64,
) -> Result<Throughput, Trouble> {
    const ROUNDS: usize = 3;
    let agents: Result<Vec<Agent>, _> = (0..connections).map(|_| dialer.agent()).collect();
    let mut agents = agents?;
    let each = (bytes / u64::from(connections)).max(1);
    let in_direction = |wanted: Direction, bytes| match direction {
        Direction::Both => bytes,
        direction if direction == wanted => bytes,
        _ => 0,
    };
    let mut round = |each: u64| -> Result<(f64, u64), Trouble> {
        dialer.go_on()?;
        let began = Instant::now();
        let stalls = std::thread::scope(|scope| {
            let transfers: Vec<_> = (0..)
                .zip(&mut agents)
                .map(|(seed, agent)| {
                    let transfer = Transfer {
                        to_host: in_direction(Direction::ToHost, each),
                        message: MESSAGE,
                        to_guest: in_direction(Direction::ToGuest, each),
                        seed,
                    };
                    scope.spawn(move || checked_transfer(agent, transfer))
                })
                .collect();
            // A panic has ended the process.
            transfers.into_iter().try_fold(0, |sum, transfer| match transfer.join() {
                Ok(result) => result.map(|result| sum + u64::from(result.credit_stalls)),
                Err(_) => Ok(sum),
            })
        })?;
        let seconds = began.elapsed().as_secs_f64();
        Ok(((each * u64::from(connections)) as f64 / seconds, stalls))
    };
    // Credit grows with the first transfer.
    round(each.min(MESSAGE.into()))?;
    let (mut rates, mut credit_stalls) = (Vec::new(), 0);
    for _ in 0..ROUNDS {
        let (rate, stalls) = round(each)?;
        rates.push(rate);
        credit_stalls += stalls;
    }
    rates.sort_by(f64::total_cmp);
    Ok(Throughput {
        direction,
        connections,
        bytes: each * u64::from(connections),
        rates,
        credit_stalls,
    })
}

/// A transfer of which both sides say that every byte arrived as it was sent.
pub(super) fn checked_transfer(
    agent: &mut Agent,
    transfer: Transfer,
) -> Result<Transferred, Trouble> {
    let result = agent.transfer_all(transfer)?;
    judge_transfer(transfer, &result)?;
    Ok(result)
}

/// What the agent says of a transfer.
pub(super) fn judge_transfer(transfer: Transfer, result: &Transferred) -> Result<(), Trouble> {
    let Transferred { to_host, to_guest, first_wrong, .. } = *result;
    if let Some(at) = first_wrong {
        return Err(Trouble::Wrong(format!("byte {at} that the guest received is a wrong one")));
    }
    if (to_host, to_guest) != (transfer.to_host, transfer.to_guest) {
        return Err(Trouble::Wrong(format!(
            "the guest received {to_guest} bytes of {} and sent {to_host} of {}",
            transfer.to_guest, transfer.to_host
        )));
    }
    Ok(())
}

/// Opens `count` connections by so many clients at the same time.
pub(super) fn connections(
    dialer: &Dialer,
    clients: u32,
    count: u32,
) -> Result<Connections, Trouble> {
    let each = count.div_ceil(clients);
    let client = || -> Result<Histogram, Trouble> {
        let mut times = Histogram::default();
        for _ in 0..each {
            dialer.go_on()?;
            let began = Instant::now();
            let agent = dialer.agent()?;
            times.add(began.elapsed().as_nanos() as u64);
            drop(agent);
        }
        Ok(times)
    };
    let began = Instant::now();
    let times = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..clients).map(|_| scope.spawn(client)).collect();
        clients.into_iter().try_fold(Histogram::default(), |mut all, client| {
            // A panic has ended the process.
            if let Ok(times) = client.join() {
                all.merge(&times?);
            }
            Ok::<_, Trouble>(all)
        })
    })?;
    let per_second = times.total() as f64 / began.elapsed().as_secs_f64();
    Ok(Connections { clients, per_second, times })
}
