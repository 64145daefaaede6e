//! Memory that devices use: rings and buffers. Nothing else in the agent gives an address to a device.
//!
//! Memory is identity-mapped, so addresses need no translation, and it is never freed.

#[cfg(feature = "attacks")]
pub mod arena;
mod buffer;
mod hal;
pub mod pools;
mod queue;
mod request_queue;
mod ring_places;

pub use buffer::Buffer;
pub use hal::report;
pub use queue::{BrokenQueue, ToGuestQueue, ToHostQueue};
pub use request_queue::{Lens, RequestPool, RequestQueue};
