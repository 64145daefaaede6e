//! The vsock device (virtio 1.3, section 5.10): set-up, its three queues, and when to sleep.

use core::fmt;
use core::sync::atomic::{Ordering, fence};

use agent::vsock::{Answer, Connections};

use super::transport::MmioTransport;
use crate::arch::mmio::Registers;
use crate::arch::virtio::{Refusal, VirtioSetUp};
use crate::arch::{gate, records};
use crate::dma::pools::{
    self, EVENT_LEN, EVENTS, EventBuffer, PACKET_LEN, TO_GUEST_PACKETS, TO_HOST_PACKETS,
};
use crate::dma::{BrokenQueue, Buffer, ToGuestQueue, ToHostQueue};
use crate::io_apic;

const TO_GUEST: u16 = 0;
const TO_HOST: u16 = 1;
const EVENT: u16 = 2;

const TRANSPORT_RESET: u32 = 0;

/// Section 5.10.1.
const DEVICE_TYPE: u32 = 19;
const VERSION_1: u64 = 1 << 32;

/// How often to look at the rings before sleeping: some 30 us, about what going to sleep and waking up costs.
const POLLS: u32 = 1500;

/// After so many bytes the device may begin with them.
const ENOUGH: usize = 64 * 1024;

/// Why there is no vsock.
#[derive(Clone, Copy, Debug)]
pub enum StartError {
    /// The device does not play along.
    Device(Refusal),
    /// The queues do not fit into the memory set aside for them.
    Memory(virtio_drivers::Error),
}

impl fmt::Display for StartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Device(Refusal::NotSuch) => f.write_str("no vsock device"),
            Self::Device(Refusal::Features) => {
                f.write_str("device does not accept VIRTIO_F_VERSION_1")
            }
            Self::Device(Refusal::Queue) => f.write_str("queue: missing or too small"),
            Self::Memory(error) => write!(f, "queue: {error}"),
        }
    }
}

/// The running device.
pub struct VsockDevice {
    transport: MmioTransport,
    to_guest: ToGuestQueue<TO_GUEST_PACKETS, PACKET_LEN>,
    to_host: ToHostQueue<TO_HOST_PACKETS, PACKET_LEN>,
    events: ToGuestQueue<EVENTS, EVENT_LEN, EventBuffer>,
    guest_cid: u32,
    unrouted_irq: Option<u8>,
    #[cfg(feature = "attacks")]
    noise: Option<agent::attack::Noise>,
}

impl VsockDevice {
    /// Sets up the first vsock device among these. None is no error.
    ///
    /// # Errors
    /// If the device does not play along.
    pub fn start(
        mut devices: impl Iterator<Item = (Registers, u8)>,
    ) -> Result<Option<Self>, StartError> {
        let mut to_guest =
            ToGuestQueue::new(TO_GUEST, &pools::TO_GUEST).map_err(StartError::Memory)?;
        let to_host = ToHostQueue::new(TO_HOST, &pools::TO_HOST).map_err(StartError::Memory)?;
        let mut events = ToGuestQueue::new(EVENT, &pools::EVENT).map_err(StartError::Memory)?;
        to_guest.set_interrupts(false);
        events.set_interrupts(false);
        // Streams are what a vsock device does when no feature of its own was negotiated. A device that does not offer
        // VERSION_1 must not accept it either, so the offer is not read.
        let queues = [to_guest.set_up(), to_host.set_up(), events.set_up()];
        let mut set_up = VirtioSetUp::new(DEVICE_TYPE, VERSION_1, &queues);
        let started = devices.find_map(|(registers, irq)| {
            match MmioTransport::start(registers, &mut set_up) {
                Err(Refusal::NotSuch) => None,
                result => Some((result, irq)),
            }
        });
        let Some((result, irq)) = started else { return Ok(None) };
        let (transport, guest_cid) = result.map_err(StartError::Device)?;
        let device = Self {
            transport,
            to_guest,
            to_host,
            events,
            guest_cid,
            unrouted_irq: Some(irq),
            #[cfg(feature = "attacks")]
            noise: None,
        };
        device.notify_posted(TO_GUEST, &device.to_guest);
        device.notify_posted(EVENT, &device.events);
        #[cfg(feature = "packed-event-buffers")]
        pools::EVENT.note_running();
        Ok(Some(device))
    }

    /// The same with bad packets among the good ones, if the command line wants them.
    #[cfg(feature = "attacks")]
    pub fn with_noise(mut self, params: &agent::params::Params) -> Self {
        self.noise = params.attack.noise(params.life, self.guest_cid());
        self
    }

    /// Our context id. Its upper half is reserved and zero.
    pub fn guest_cid(&self) -> u64 {
        self.guest_cid.into()
    }

    /// Hands everything that has come in to its connections.
    ///
    /// # Errors
    /// If the device broke the rules of a ring.
    pub fn receive(
        &mut self,
        connections: &mut Connections,
        agent: &mut impl Answer,
    ) -> Result<(), BrokenQueue> {
        let mut event = None;
        // Taken buffers are posted again at once, so the host could go on for ever.
        for _ in 0..EVENTS {
            let Some(id) = self.events.take(|bytes| bytes.first_chunk().copied())? else { break };
            event = id.map(u32::from_le_bytes);
            agent.note_event();
        }
        if event.is_some() {
            self.notify_posted(EVENT, &self.events);
        }
        if event == Some(TRANSPORT_RESET) {
            self.guest_cid = self.transport.config_word();
            connections.transport_reset(self.guest_cid());
            agent.note_cid(self.guest_cid());
        }
        // At most one ring's worth, so that answers get out even if the host never pauses.
        let mut taken = 0;
        while taken < TO_GUEST_PACKETS
            && self.to_guest.take(|packet| connections.receive(packet, agent))?.is_some()
        {
            taken += 1;
        }
        if taken > 0 {
            self.notify_posted(TO_GUEST, &self.to_guest);
        }
        Ok(())
    }

    /// Carries out what has come in and sends what there is to send, as far as there are free buffers. Returns whether that was
    /// anything.
    ///
    /// # Errors
    /// If the device broke the rules of the ring.
    pub fn send(
        &mut self,
        connections: &mut Connections,
        agent: &mut impl Answer,
    ) -> Result<bool, BrokenQueue> {
        #[cfg(feature = "attacks")]
        let sent = self.to_host.send(ENOUGH, |buffer| match &mut self.noise {
            Some(noise) => noise.among(buffer, |buffer| connections.next_packet(buffer, agent)),
            None => connections.next_packet(buffer, agent),
        })?;
        #[cfg(not(feature = "attacks"))]
        let sent = self.to_host.send(ENOUGH, |buffer| connections.next_packet(buffer, agent))?;
        if sent == Some(true) {
            self.transport.notify(TO_HOST);
        }
        Ok(sent.is_some())
    }

    /// Returns when there is something to do, or `for_us` microseconds have passed: polls for a while, then sleeps.
    pub fn wait(&mut self, for_us: Option<u64>) {
        for _ in 0..POLLS {
            if self.is_ready() {
                return;
            }
            core::hint::spin_loop();
        }
        // Only now: nobody sleeps before the first greeting.
        if let Some(irq) = self.unrouted_irq.take() {
            io_apic::route(irq);
        }
        let seen = records::interrupts();
        if let Some(us) = for_us {
            gate::interrupt_in(us);
        }
        self.set_interrupts(true);
        // The device must see the wish before we look for the last time (section 2.7.7.1).
        fence(Ordering::SeqCst);
        if !self.is_ready() {
            gate::wait_for_interrupt(seen, self.transport.interrupt_ack());
        }
        self.set_interrupts(false);
    }

    fn notify_posted<const SIZE: usize, const LEN: usize, B: Buffer<LEN>>(
        &self,
        index: u16,
        queue: &ToGuestQueue<SIZE, LEN, B>,
    ) {
        if queue.should_notify() {
            self.transport.notify(index);
        }
    }

    fn is_ready(&self) -> bool {
        self.to_guest.is_ready()
            || self.events.is_ready()
            || (self.to_host.is_full() && self.to_host.is_ready())
    }

    fn set_interrupts(&mut self, wanted: bool) {
        self.to_guest.set_interrupts(wanted);
        self.events.set_interrupts(wanted);
        self.to_host.set_interrupts(wanted && self.to_host.is_full());
    }
}
