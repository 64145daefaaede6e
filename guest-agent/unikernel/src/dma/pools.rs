//! The devices' buffers. They lie behind everything else in the image (link.ld), so that the pages that a boot
//! touches are few.

use agent::vsock::HEADER_LEN;
use agent_protocol::MAX_DISK_BYTES;

use super::buffer::Pool;
use super::request_queue::RequestPool;

/// The payload of a packet as Linux sends it at most, and its header, in whole cache lines.
pub const PACKET_LEN: usize = 64 * 1024 + HEADER_LEN.next_multiple_of(64);
/// Packets that the host may send before the guest has looked.
pub const TO_GUEST_PACKETS: usize = 32;
/// Packets that the guest may send before the host has looked.
pub const TO_HOST_PACKETS: usize = 8;
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

/// The most disks that the agent drives.
pub const DISKS: usize = 2;
/// The longest payload, with a line for the header or the status.
pub const DISK_LEN: usize = MAX_DISK_BYTES as usize + 64;
/// The most random bytes at once, and a line that is the status's elsewhere.
pub const RANDOM_LEN: usize = 4096 + 64;

/// Requests to disks and their answers.
#[unsafe(link_section = ".bss.large.zdisk")]
pub static DISK: [RequestPool<DISK_LEN>; DISKS] = [const { Pool::new() }; DISKS];

/// Random bytes.
#[unsafe(link_section = ".bss.large.zrandom")]
pub static RANDOM: RequestPool<RANDOM_LEN> = Pool::new();
