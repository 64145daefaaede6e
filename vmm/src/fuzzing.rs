//! What the fuzzer's targets (`fuzz/`) reach and nobody else does: parsers of what a guest or a client has written.
//!
//! Only with the feature `fuzzing`.

/// Requests to a disk.
pub mod block {
    pub use crate::device::block::request::{
        Extent, HEADER_LEN, ID_LEN, MOST_RANGE_SECTORS, MOST_RANGES, RANGE_LEN, Range, Request,
        SECTOR, Status,
    };
}

pub use crate::device::virtio::chain::{BadChain, Chain, Direction};
pub use crate::device::virtio::ring::{BrokenRing, Ring};
pub use crate::device::vsock::unix::parse_connect;
pub use crate::device::vsock::{GuestPort, HostPort};
pub use crate::memory::GuestRam;

/// Headers of vsock packets.
pub mod packet {
    pub use crate::device::vsock::packet::{
        ConnectionKey, GuestCid, HEADER_LEN, HOST_CID, Header, Op, Parsed, Shutdown, SocketType,
    };
}

/// Snapshots' state files.
pub mod snapshot {
    pub use crate::snapshot::{Extent, Header, Kind, PAGE, Snapshot, SnapshotError, VERSION};
    pub use crate::snapshot::{encode, parse};
}
