//! The list: names, what holds, and how it is shown.

use super::{
    Scene, agent_dma, connection, many_connections, port_reuse, refused_port, service,
    stale_packets,
};
use crate::agent::Agent;
use crate::probe::Trouble;

/// A name, what holds, and how it is shown.
pub(super) type Row<T> = (&'static str, &'static str, T);

/// A check that opens its own connections.
pub(super) type OnScene = fn(&Scene) -> Result<(), Trouble>;
/// A check on a connection that was greeted.
pub(super) type OnConnection = fn(&Scene, Agent) -> Result<(), Trouble>;

/// What is shown with the guest's and the host's ports.
pub(super) const PORTS: &[Row<OnScene>] = &[
    (
        "refused-port",
        "a connection to a port where nobody listens is refused, and disturbs nobody",
        refused_port,
    ),
    ("port-reuse", "a port takes the next connection right after one was closed", port_reuse),
    (
        "many-connections",
        "a hundred connections are open at once, and each answers",
        many_connections,
    ),
    (
        "guest-refused-port",
        "the guest is refused at a port of the host where nobody listens, and goes on",
        service::refused,
    ),
    (
        "guest-port-reuse",
        "the guest connects to the same port of the host again and again",
        service::reuse,
    ),
];

/// What is shown on one connection, whoever opened it.
pub(super) const CONNECTION: &[Row<OnConnection>] = &[
    (
        "half-close-by-host",
        "when the host has sent all, the guest's answer still comes whole, and then the end",
        connection::half_close_by_host,
    ),
    (
        "half-close-by-guest",
        "when the guest has sent all, the host sees the end, and the guest still takes what comes",
        connection::half_close_by_guest,
    ),
    (
        "no-receive-by-guest",
        "when the guest takes no more, the host's writes fail",
        connection::no_receive_by_guest,
    ),
    (
        "close-by-both",
        "when both have sent all at the same time, both see the end",
        connection::close_by_both,
    ),
    (
        "data-before-close-to-guest",
        "what the host sent before it closed arrives whole",
        connection::data_before_close_to_guest,
    ),
    (
        "data-before-close-to-host",
        "what the guest sent before it closed both directions arrives whole",
        connection::data_before_close_to_host,
    ),
    (
        "reset-by-guest",
        "when the guest gives a connection up, the host's reads and writes on it end",
        connection::reset_by_guest,
    ),
    (
        "slow-reader",
        "while the host does not read, others are served; then everything is there",
        connection::slow_reader,
    ),
    (
        "vanished-client",
        "a client that goes in the middle of a transfer disturbs nobody",
        connection::vanished_client,
    ),
];

/// What is shown when everything else has been done.
pub(super) const AFTERWARDS: &[Row<OnScene>] = &[
    (
        "stale-packets",
        "no packet came to the guest for a connection that it never had",
        stale_packets,
    ),
    ("agent-dma", "the agent's own tracker saw its buffers apart from each other", agent_dma),
];
