//! virtio-vsock streams (virtio 1.3, section 5.10) as the agent uses them: either side connects, and whoever did, the host
//! asks and the agent answers. Packets in, packets out; no queue, no register, no clock.

mod connection;
mod connections;
mod credit;
mod memory;
#[cfg(feature = "fuzzing")]
#[allow(missing_docs, reason = "public for its fuzzer alone")]
pub mod packet;
#[cfg(not(feature = "fuzzing"))]
mod packet;
mod session;
mod transfer;

pub use connections::{Connections, MAX_CONNECTIONS};
pub use packet::{HEADER_LEN, HOST_CID};
pub use session::Answer;
