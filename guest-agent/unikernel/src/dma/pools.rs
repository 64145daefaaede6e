//! The vsock device's buffers. They lie behind everything else in the image (link.ld), so that the pages that a boot
//! touches are few.

use agent::vsock::HEADER_LEN;

use super::buffer::Pool;

/// The payload of a packet as Linux sends it at most, and its header, in whole cache lines.
pub const PACKET_LEN: usize = 64 * 1024 + HEADER_LEN.next_multiple_of(64);
/// Packets that the host may send before the guest has looked.
pub const TO_GUEST_PACKETS: usize = 32;
/// Packets that the guest may send before the host has looked.
pub const TO_HOST_PACKETS: usize = 8;
/// Events that may be pending.
pub const EVENTS: usize = 8;
/// An event has four bytes; a cache line of its own keeps the device's writes apart from everything else.
pub const EVENT_LEN: usize = 64;

/// Packets from the host.
#[unsafe(link_section = ".bss.large.to_guest")]
pub static TO_GUEST: Pool<TO_GUEST_PACKETS, PACKET_LEN> = Pool::new();

/// Packets for the host.
#[unsafe(link_section = ".bss.large.to_host")]
pub static TO_HOST: Pool<TO_HOST_PACKETS, PACKET_LEN> = Pool::new();

/// Events.
#[unsafe(link_section = ".bss.large.events")]
pub static EVENT: Pool<EVENTS, EVENT_LEN> = Pool::new();
