//! virtio-vsock streams (virtio 1.3, section 5.10) as the agent uses them: the host connects, the agent listens.
//! Packets in, packets out; no queue, no register, no clock.

mod connection;
mod credit;
mod listener;
#[cfg(feature = "fuzzing")]
pub mod packet;
#[cfg(not(feature = "fuzzing"))]
mod packet;
mod session;

pub use listener::{Listener, MAX_CONNECTIONS};
pub use packet::{HEADER_LEN, HOST_CID};
pub use session::Answer;
