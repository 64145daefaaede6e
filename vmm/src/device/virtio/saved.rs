//! What a virtio device is at a moment, as plain data, and what such data has to be to be taken.

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueState, QueueT};

/// A device behind its registers.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SavedMmio {
    pub(super) status: u32,
    pub(super) device_features_select: u32,
    pub(super) driver_features_select: u32,
    pub(super) offered_features: u64,
    pub(super) driver_features: u64,
    pub(super) queue_select: u32,
    pub(super) queues: Vec<SavedQueue>,
    /// The interrupt status register.
    pub(super) interrupt: u32,
    pub(super) needs_reset: bool,
    pub(super) positions: Vec<Option<RingPosition>>,
    pub(super) device: SavedDevice,
}

impl SavedMmio {
    /// What the device is, in a word or two.
    pub fn name(&self) -> &'static str {
        self.device.name()
    }
}

/// What of a device is its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SavedDevice {
    /// Sockets.
    Vsock {
        /// The host's port of the next connection that it opens: the guest has forgotten none of those before.
        next_host_port: u32,
    },
    /// Random bytes.
    Rng,
    /// A disk.
    Block {
        /// Its size in bytes.
        capacity: u64,
    },
}

impl SavedDevice {
    /// In a word or two.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Vsock { .. } => "vsock",
            Self::Rng => "rng",
            Self::Block { .. } => "disk",
        }
    }
}

/// How far a device has come in a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RingPosition {
    /// The next entry of the available ring.
    pub next_available: u16,
    /// The next entry of the used ring.
    pub next_used: u16,
}

/// A queue as the driver has set it up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SavedQueue {
    size: u16,
    ready: bool,
    descriptors: u64,
    available: u64,
    used: u64,
}

impl SavedQueue {
    pub fn of(queue: &Queue) -> Self {
        Self {
            size: queue.size(),
            ready: queue.ready(),
            descriptors: queue.desc_table(),
            available: queue.avail_ring(),
            used: queue.used_ring(),
        }
    }

    /// The queue, if a driver could have made it so. Whether its rings are in RAM shows when it is used.
    pub fn restore(self, max_size: u16) -> Result<Queue, RestoreError> {
        let Self { size, ready, descriptors, available, used } = self;
        let state = QueueState {
            max_size,
            next_avail: 0,
            next_used: 0,
            event_idx_enabled: false,
            size,
            ready,
            desc_table: descriptors,
            avail_ring: available,
            used_ring: used,
        };
        Queue::try_from(state).map_err(|_| RestoreError::Queue)
    }
}

/// Why a device cannot become what another one was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RestoreError {
    /// It is another kind of device.
    #[error("it is a {0} there and a {1} here")]
    Kind(&'static str, &'static str),
    /// The disk is another, or has been changed.
    #[error("the disk had {0} bytes and has {1} now")]
    Capacity(u64, u64),
    /// Features on offer.
    #[error("it offered the features {0:#x} and offers {1:#x} here{and_read_only}", and_read_only = read_only_words(*.0, *.1))]
    Features(u64, u64),
    /// Registers that no driver could have left so.
    #[error("no driver could have left its registers so")]
    Registers,
    /// A queue that no driver could have set up.
    #[error("no driver could have set up its queues so")]
    Queue,
}

fn read_only_words(there: u64, here: u64) -> &'static str {
    use virtio_bindings::bindings::virtio_blk::VIRTIO_BLK_F_RO;
    match (there ^ here) >> VIRTIO_BLK_F_RO & 1 {
        0 => "",
        _ if here >> VIRTIO_BLK_F_RO & 1 == 0 => "; give the disk with \",ro\"",
        _ => "; give the disk without \",ro\"",
    }
}
