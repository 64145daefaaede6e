//! The vsock device's buffers. They lie behind everything else in the image (link.ld), so that the pages that a boot
//! touches are few.

use agent::vsock::HEADER_LEN;

use super::buffer::Pool;

/// A page of payload and its header, in whole cache lines.
pub const PACKET_LEN: usize = 4096 + HEADER_LEN.next_multiple_of(64);
/// Packets that the host may send before the guest has looked.
pub const TO_GUEST_PACKETS: usize = 32;
/// Packets that the guest may send before the host has looked.
pub const TO_HOST_PACKETS: usize = 16;
/// Events that may be pending.
pub const EVENTS: usize = 8;
/// An event has four bytes; a cache line of its own keeps the device's writes apart from everything else.
#[cfg(not(feature = "packed-event-buffers"))]
pub const EVENT_LEN: usize = 64;
#[cfg(not(feature = "packed-event-buffers"))]
pub type EventBuffer = super::buffer::DmaBuffer<EVENT_LEN>;

/// Events as Linux has them, one behind the other at an odd address.
#[cfg(feature = "packed-event-buffers")]
pub const EVENT_LEN: usize = 4;
#[cfg(feature = "packed-event-buffers")]
pub type EventBuffer = super::buffer::PackedBuffer<EVENT_LEN>;

/// Packets from the host.
#[unsafe(link_section = ".bss.large.to_guest")]
pub static TO_GUEST: Pool<TO_GUEST_PACKETS, PACKET_LEN> = Pool::new();

/// Packets for the host.
#[unsafe(link_section = ".bss.large.to_host")]
pub static TO_HOST: Pool<TO_HOST_PACKETS, PACKET_LEN> = Pool::new();

/// Events.
#[unsafe(link_section = ".bss.large.events")]
pub static EVENT: Pool<EVENTS, EVENT_LEN, EventBuffer> = Pool::new();
