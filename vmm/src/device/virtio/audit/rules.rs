//! What the specification says of each queue, and who is who: nothing here comes from a device's own code, which may be wrong
//! about it.

use std::fmt;

use virtio_bindings::virtio_ids::{VIRTIO_ID_BLOCK, VIRTIO_ID_RNG, VIRTIO_ID_VSOCK};

use crate::device::virtio::chain::Direction;

/// Bytes of a vsock event (virtio 1.2, section 5.10.6.7).
pub const EVENT_LEN: u64 = 4;

/// What a queue is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rules {
    /// The name of the queue; empty if it has none.
    pub name: &'static str,
    /// Who reads and who writes its buffers.
    pub direction: Direction,
    /// The fewest bytes that a chain has for the device to write.
    pub min_writable: u64,
}

/// The queue is vsock's for events, of which Linux has a layout that is known by name.
pub const EVENTS: Rules =
    Rules { name: "event", direction: Direction::ToGuest, min_writable: EVENT_LEN };

impl Rules {
    /// The rules of queue `queue` of a device of type `device` (virtio 1.2, section 5).
    pub fn of(device: u32, queue: u16) -> Self {
        let rules = |name, direction, min_writable| Self { name, direction, min_writable };
        match (device, queue) {
            // Section 5.10.2.
            (VIRTIO_ID_VSOCK, 0) => rules("to guest", Direction::ToGuest, 0),
            (VIRTIO_ID_VSOCK, 1) => rules("to host", Direction::ToHost, 0),
            (VIRTIO_ID_VSOCK, 2) => EVENTS,
            // Section 5.4.2.
            (VIRTIO_ID_RNG, _) => rules("requests", Direction::ToGuest, 0),
            // Section 5.2.6: a byte of status ends each request.
            (VIRTIO_ID_BLOCK, _) => rules("requests", Direction::Both, 1),
            _ => rules("", Direction::Both, 0),
        }
    }
}

/// A device by its type.
pub fn device_name(device: u32) -> &'static str {
    match device {
        VIRTIO_ID_VSOCK => "vsock",
        VIRTIO_ID_RNG => "rng",
        VIRTIO_ID_BLOCK => "block",
        _ => "device",
    }
}

impl fmt::Display for Rules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name {
            "" => Ok(()),
            name => write!(f, " ({name})"),
        }
    }
}
