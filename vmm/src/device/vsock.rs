//! virtio-vsock (virtio 1.2, section 5.10): sockets for streams and for messages between the guest and Unix sockets of the host.
//!
//! This file owns the queues and decides when which side is served. `virtio::ring` and `virtio::chain` find a packet's
//! bytes; from there to the host, `packet` gives them names, `connection` with `credit` says what they mean, `endpoint`
//! with `payload` ties a connection to a socket, `host` with `table`, `clients` and `connector` owns the sockets. `packet`,
//! `credit` and `connection` know no descriptor and no queue.

mod backlog;
mod clients;
mod connection;
mod connector;
mod credit;
mod endpoint;
mod host;
pub(crate) mod packet;
mod payload;
mod poll;
mod stats;
mod table;
mod traffic;
pub(crate) mod unix;

use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

pub use self::connector::{Acceptance, VsockConnector};
use self::host::Host;
use self::packet::HEADER_LEN;
pub use self::packet::{GuestCid, GuestPort, HostPort, SocketType};
pub use self::stats::VsockStats;
pub use self::unix::{Listener, MAX_LINE, SocketFile, VsockError, listen_on_host_port};
use super::virtio::chain::{Chain, Direction};
use super::virtio::ring::{BrokenRing, Ring};
use super::virtio::{
    Driver, F_EVENT_IDX, F_IN_ORDER, Interrupt, RING_FEATURES, RestoreError, RingPosition,
    SavedDevice, VirtioDevice,
};
use crate::memory::GuestRam;

/// Device type (virtio 1.2, section 5).
const DEVICE_ID: u32 = 19;

/// Sockets for messages (section 5.10.3). Those for streams are implied; Linux's devices do not offer their bit either.
const F_SEQPACKET: u64 = 1 << 1;

/// Queues (virtio 1.2, section 5.10.2): packets to the guest, packets to the host, events.
const QUEUE_MAX_SIZES: [u16; 3] = [256, 256, 64];

/// Number of the queue for events.
pub const EVENT_QUEUE: usize = 2;
/// The event `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET` (section 5.10.6.7).
pub const TRANSPORT_RESET: [u8; 4] = [0; 4];

/// How long a guest may take to answer a request or a shutdown, and a client to finish its line.
const PATIENCE: Duration = Duration::from_secs(5);

/// The device.
#[derive(Debug)]
pub struct Vsock {
    host: Host,
    guest: Option<Guest>,
    needs_reset: bool,
}

/// An event that the guest has to be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Due {
    Nothing,
    /// Its connections are gone.
    Reset,
    /// It was told so and has not taken note yet: it has posted no more than this on the queue for events. What it was sent
    /// now would perhaps reach it before the event, and die of that.
    Noting(u16),
}

/// The guest's side while its driver runs.
#[derive(Debug)]
struct Guest {
    ram: GuestRam,
    to_guest: Ring,
    to_host: Ring,
    /// Drivers need not set it up.
    events: Option<Ring>,
    due: Due,
    /// Chains that were taken for packets to the guest, those that are kept for that, and lengths: the memory stays.
    taken: Vec<Chain>,
    spare: Vec<Chain>,
    lens: Vec<u32>,
    interrupt: Arc<dyn Interrupt>,
}

/// Connections that were taken out of a device.
#[derive(Debug)]
pub struct Connections(table::Table);

/// Why a queue is left alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pause {
    /// There is nothing to do.
    Done,
    /// The guest has to post buffers first.
    NoBuffers,
    /// Enough for one call.
    Enough,
}

impl Vsock {
    /// A device for the guest `cid`. With a `listener`, clients reach the guest through it, and the guest reaches the
    /// host's port N at its path with `_N` appended; without one, only [`Vsock::connector`] connects.
    ///
    /// # Errors
    /// [`VsockError::Events`] if the system refuses a descriptor.
    pub fn new(cid: GuestCid, listener: Option<Listener>) -> Result<Self, VsockError> {
        Self::with_patience(cid, listener, PATIENCE)
    }

    fn with_patience(
        cid: GuestCid,
        listener: Option<Listener>,
        patience: Duration,
    ) -> Result<Self, VsockError> {
        Ok(Self { host: Host::new(cid, listener, patience)?, guest: None, needs_reset: false })
    }

    /// A handle that opens connections to the guest from any thread.
    pub fn connector(&self) -> VsockConnector {
        self.host.connector()
    }

    /// Ends all connections and refuses new ones, since nobody will serve them any more.
    pub fn shut_down(&mut self) {
        self.reset();
        self.host.shut_down();
    }

    /// Ends all connections, and tells the guest so by the event `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET` (virtio 1.2, section
    /// 5.10.6.7) as soon as it has posted a buffer for it: the guest's sockets end, and those that listen stay. For a guest
    /// whose host side is another than it was, as after a restore.
    pub fn reset_transport(&mut self) {
        // What is on its way belongs to the connections that end.
        self.serve();
        self.host.drop_connections();
        if let Some(guest) = &mut self.guest {
            guest.owe_reset();
        }
        self.serve();
    }

    /// The machine stood still for this long: nobody's time has run meanwhile.
    pub fn prolong(&mut self, by: Duration) {
        self.host.prolong(by);
    }

    /// Takes all connections out of the device, as if there were none, for [`Vsock::put_back_connections`].
    pub fn take_connections(&mut self) -> Connections {
        Connections(std::mem::replace(&mut self.host.table, table::Table::new()))
    }

    /// Has the device go on with connections that it had before: the fault that a reset rules out by letting go of them.
    pub fn put_back_connections(&mut self, Connections(table): Connections) {
        self.host.table = table;
    }

    /// What the device has counted so far.
    pub fn stats(&self) -> VsockStats {
        self.host.stats
    }

    /// Moves packets both ways until there is nothing to move, or enough was moved for one call.
    fn serve(&mut self) {
        let served = self.guest.as_mut().map(|guest| guest.serve(&mut self.host));
        self.host.park();
        match served {
            Some(Ok(true)) => self.host.wake(),
            Some(Ok(false)) | None => {}
            Some(Err(BrokenRing)) => self.give_up(),
        }
    }

    /// The queues cannot be used any more (`DEVICE_NEEDS_RESET`; virtio 1.2, section 2.1.2).
    fn give_up(&mut self) {
        self.needs_reset = true;
        self.host.stats.broken_rings += 1;
        self.host.reset();
        if let Some(guest) = self.guest.take() {
            guest.interrupt.signal_config();
        }
    }
}

impl Guest {
    /// Takes over what the driver has set up. `None` if it left out a queue that carries packets.
    fn new(driver: Driver) -> Result<Option<Self>, BrokenRing> {
        let Driver { ram, features, queues, interrupt } = driver;
        let event_idx = features & F_EVENT_IDX != 0;
        let mut queues = queues.into_iter();
        let mut ring = |direction| match queues.next() {
            Some(queue) => Ring::new(queue, direction, &ram, event_idx),
            None => Ok(None),
        };
        let to_guest = ring(Direction::ToGuest)?;
        let to_host = ring(Direction::ToHost)?;
        let events = ring(Direction::ToGuest)?;
        Ok(to_guest.zip(to_host).map(|(to_guest, to_host)| Self {
            ram,
            to_guest,
            to_host,
            events,
            due: Due::Nothing,
            taken: Vec::new(),
            spare: Vec::new(),
            lens: Vec::new(),
            interrupt,
        }))
    }

    /// From now on the guest is owed the event, if its driver wants events at all.
    fn owe_reset(&mut self) {
        if self.events.is_some() {
            self.due = Due::Reset;
        }
    }

    /// Serves each queue once. True if there is more to do, so that other devices get their turn first.
    fn serve(&mut self, host: &mut Host) -> Result<bool, BrokenRing> {
        let told = self.tell_events(host)?;
        let to_host = self.drain(host)?;
        let to_guest = match self.due {
            Due::Nothing | Due::Reset => self.fill(host)?,
            Due::Noting(_) => Pause::NoBuffers,
        };
        let events = match &mut self.events {
            Some(events) => events.must_signal(&self.ram)?,
            None => false,
        };
        if self.to_host.must_signal(&self.ram)? | self.to_guest.must_signal(&self.ram)? | events {
            self.interrupt.signal_used();
        }
        // Without buffers for what the guest is owed, it is the guest's move.
        let resume = to_host == Pause::NoBuffers && to_guest == Pause::Done;
        Ok([told, to_host, to_guest].contains(&Pause::Enough) || resume)
    }

    /// Tells the guest what is due, if it has posted a buffer for it; otherwise it does so with its next one. That the guest has
    /// taken note shows by yet another.
    fn tell_events(&mut self, host: &mut Host) -> Result<Pause, BrokenRing> {
        let Some(events) = self.events.as_mut() else { return Ok(Pause::Done) };
        match self.due {
            Due::Nothing => return Ok(Pause::Done),
            Due::Noting(posted) => {
                if events.listen_beyond(&self.ram, posted)? {
                    self.due = Due::Nothing;
                }
                return Ok(Pause::Done);
            }
            Due::Reset => {}
        }
        let posted = events.posted(&self.ram)?;
        if !events.take(&self.ram, TRANSPORT_RESET.len(), &mut host.stats.bad_chains)? {
            let came_meanwhile = events.listen(&self.ram)?;
            return Ok(if came_meanwhile { Pause::Enough } else { Pause::NoBuffers });
        }
        // What it has opened while it did not know is lost to it as well.
        host.drop_guest_connections();
        // The chain was checked for room and for being in RAM.
        if events.chain().write(&self.ram, &TRANSPORT_RESET).is_ok() {
            events.complete(&self.ram, TRANSPORT_RESET.len() as u32)?;
        }
        self.due = Due::Noting(posted);
        let noted = events.listen_beyond(&self.ram, posted)?;
        Ok(if noted { Pause::Enough } else { Pause::NoBuffers })
    }

    /// Takes packets from the guest, at most a ring full of them.
    fn drain(&mut self, host: &mut Host) -> Result<Pause, BrokenRing> {
        for _ in 0..self.to_host.size() {
            if host.must_wait() {
                return Ok(Pause::NoBuffers);
            }
            if self.to_host.take(&self.ram, HEADER_LEN, &mut host.stats.bad_chains)? {
                host.receive(&self.ram, self.to_host.chain());
                self.to_host.complete(&self.ram, 0)?;
            } else if !self.to_host.listen(&self.ram)? {
                return Ok(Pause::Done);
            }
        }
        Ok(Pause::Enough)
    }

    /// Gives packets to the guest, at most a ring full of them.
    fn fill(&mut self, host: &mut Host) -> Result<Pause, BrokenRing> {
        for _ in 0..self.to_guest.size() {
            if !host.has_packet() {
                return Ok(Pause::Done);
            }
            self.take_buffers(host)?;
            if self.taken.is_empty() {
                if self.to_guest.listen(&self.ram)? {
                    continue;
                }
                return Ok(Pause::NoBuffers);
            }
            host.send(&self.ram, &self.taken, &mut self.lens);
            let (used, unused) = self.taken.split_at(self.lens.len());
            unused.iter().for_each(|_| self.to_guest.put_back());
            for (chain, len) in used.iter().zip(self.lens.drain(..)) {
                self.to_guest.complete_chain(&self.ram, chain, len)?;
            }
            self.spare.append(&mut self.taken);
        }
        Ok(Pause::Enough)
    }

    /// Takes as many buffers as the next packets can use.
    fn take_buffers(&mut self, host: &mut Host) -> Result<(), BrokenRing> {
        // A buffer without room for a byte of payload would block the queue.
        const LEAST: usize = HEADER_LEN + 1;
        for number in 0..host.buffers_wanted() {
            let is_taken = match number {
                0 => self.to_guest.take(&self.ram, LEAST, &mut host.stats.bad_chains)?,
                _ => self.to_guest.take_sound(&self.ram, LEAST)?,
            };
            if !is_taken {
                break;
            }
            let new = || Chain::new(Direction::ToGuest, self.to_guest.size());
            let spare = self.spare.pop().unwrap_or_else(new);
            self.taken.push(self.to_guest.take_out(spare));
        }
        Ok(())
    }
}

impl VirtioDevice for Vsock {
    fn device_id(&self) -> u32 {
        DEVICE_ID
    }

    fn queue_max_sizes(&self) -> &'static [u16] {
        &QUEUE_MAX_SIZES
    }

    fn features(&self) -> u64 {
        RING_FEATURES | F_IN_ORDER | F_SEQPACKET
    }

    /// `guest_cid`, 8 bytes, little-endian (virtio 1.2, section 5.10.4).
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.host.cid.get().to_le_bytes();
        for (index, byte) in (offset..).zip(data) {
            *byte = usize::try_from(index).ok().and_then(|i| config.get(i)).copied().unwrap_or(0);
        }
    }

    fn activate(&mut self, driver: Driver) {
        let interrupt = driver.interrupt.clone();
        self.host.start(driver.features & F_SEQPACKET != 0);
        match Guest::new(driver) {
            // Not `serve`: this may be a vCPU's thread, which must not do the event loop's work.
            Ok(guest) => {
                self.guest = guest;
                self.host.wake();
            }
            Err(BrokenRing) => {
                self.give_up();
                interrupt.signal_config();
            }
        }
    }

    fn handle_queue(&mut self, _index: u16) {
        self.serve();
    }

    fn backend_fd(&self) -> Option<RawFd> {
        Some(self.host.as_fd().as_raw_fd())
    }

    fn handle_backend(&mut self) {
        self.host.handle_events();
        self.serve();
    }

    fn needs_reset(&self) -> bool {
        self.needs_reset
    }

    fn positions(&self) -> Vec<Option<RingPosition>> {
        let guest = self.guest.as_ref();
        let of = |ring: fn(&Guest) -> Option<&Ring>| guest.and_then(ring).map(Ring::position);
        vec![
            of(|guest| Some(&guest.to_guest)),
            of(|guest| Some(&guest.to_host)),
            of(|guest| guest.events.as_ref()),
        ]
    }

    fn save(&self) -> SavedDevice {
        SavedDevice::Vsock { next_host_port: self.host.table.next_host_port() }
    }

    /// Connections do not come along: the guest is told that they are gone.
    fn restore(
        &mut self,
        saved: &SavedDevice,
        driver: Option<Driver>,
        needs_reset: bool,
    ) -> Result<(), RestoreError> {
        if let SavedDevice::Vsock { next_host_port } = saved {
            self.host.table.continue_from(*next_host_port);
        }
        self.needs_reset = needs_reset;
        driver.into_iter().for_each(|driver| self.activate(driver));
        self.guest.iter_mut().for_each(Guest::owe_reset);
        Ok(())
    }

    fn reset(&mut self) {
        self.guest = None;
        self.needs_reset = false;
        self.host.reset();
    }
}

#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
