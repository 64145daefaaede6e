//! What the device counts.

use serde::{Deserialize, Serialize};

/// Counters since the device was made; resets do not clear them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockStats {
    /// Packets taken from the guest, bad ones included.
    pub packets_to_host: u64,
    /// Packets put into the guest's buffers.
    pub packets_to_guest: u64,
    /// Payload taken from the guest, in bytes.
    pub bytes_to_host: u64,
    /// Payload put into the guest's buffers, in bytes.
    pub bytes_to_guest: u64,
    /// Connections that both sides agreed on.
    pub connections_opened: u64,
    /// Connections that one side asked for and did not get.
    pub connections_refused: u64,
    /// Connections that ended by an RST outside the orderly shutdown, whoever sent it.
    pub connections_reset: u64,
    /// Descriptor chains that described no usable buffer.
    pub bad_chains: u64,
    /// Queues that could not be used any further, or at all.
    pub broken_rings: u64,
    /// Packets that have no meaning, or none at this point of their connection.
    pub bad_packets: u64,
    /// Packets that broke the rules of flow control.
    pub credit_violations: u64,
}
