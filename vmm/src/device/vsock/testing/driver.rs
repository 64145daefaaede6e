//! A guest's driver in a few lines: it kicks only when the device asked for it, looks for packets only after an interrupt,
//! and calls the backend only when its descriptor is readable, so that a notification that is missing makes a test fail.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Address, Bytes, GuestAddress};

use crate::device::virtio::{
    Driver, F_EVENT_IDX, F_IN_ORDER, F_VERSION_1, Interrupt, VirtioDevice,
};
use crate::device::vsock::packet::{
    ConnectionKey, GuestPort, HEADER_LEN, Header, HostPort, Op, SocketType,
};
use crate::device::vsock::{F_SEQPACKET, Vsock};
use crate::memory::GuestRam;

const SIZE: u16 = 256;
const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// Length of each buffer for packets to the guest, as Linux has it.
pub const BUFFER_LEN: u32 = 4096;
/// Longest payload that [`TestDriver::send`] takes.
const MAX_SEND: u64 = 1 << 16;
const TO_GUEST_BUFFERS: u64 = 0x10_0000;
const TO_HOST_BUFFERS: u64 = 0x40_0000;
pub const EVENT_BUFFERS: u64 = 0x1f0_0000;
const RAM_LEN: usize = 0x200_0000;

#[derive(Debug, Default)]
pub struct Counts {
    pub used: AtomicU32,
    pub config: AtomicU32,
}

impl Interrupt for Counts {
    fn signal_used(&self) {
        self.used.fetch_add(1, Ordering::Relaxed);
    }

    fn signal_config(&self) {
        self.config.fetch_add(1, Ordering::Relaxed);
    }
}

/// One queue from the driver's side.
#[derive(Debug)]
pub struct TestQueue {
    desc: GuestAddress,
    pub avail: GuestAddress,
    pub used: GuestAddress,
    /// Index of the next entry in the available ring.
    pub added: u16,
    /// Index of the next entry in the used ring.
    seen: u16,
    /// What `added` was when the device was last kicked or found not to want it.
    kicked: u16,
}

impl TestQueue {
    fn new(index: u16) -> (Self, Queue) {
        // Not virtio-queue's mock: its rings overlap from 16 entries on.
        let base = u32::from(index) * 0x1_0000;
        let (desc, avail, used) = (base, base + 0x2000, base + 0x3000);
        let mut queue = Queue::new(SIZE).unwrap();
        queue.set_desc_table_address(Some(desc), None);
        queue.set_avail_ring_address(Some(avail), None);
        queue.set_used_ring_address(Some(used), None);
        queue.set_ready(true);
        let at = |addr: u32| GuestAddress(addr.into());
        let driver =
            Self { desc: at(desc), avail: at(avail), used: at(used), added: 0, seen: 0, kicked: 0 };
        (driver, queue)
    }

    pub fn write_descriptor(&self, ram: &GuestRam, id: u16, desc: (u64, u32, u16, u16)) {
        let at = self.desc.unchecked_add(u64::from(id) * 16);
        ram.write_obj(desc.0, at).unwrap();
        ram.write_obj(desc.1, at.unchecked_add(8)).unwrap();
        ram.write_obj(desc.2, at.unchecked_add(12)).unwrap();
        ram.write_obj(desc.3, at.unchecked_add(14)).unwrap();
    }

    pub fn add(&mut self, ram: &GuestRam, head: u16) {
        let at = self.avail.unchecked_add(4 + u64::from(self.added % SIZE) * 2);
        ram.write_obj(head, at).unwrap();
        self.added = self.added.wrapping_add(1);
        ram.write_obj(self.added, self.avail.unchecked_add(2)).unwrap();
    }

    /// Takes the next used element: first descriptor and length.
    pub fn take_used(&mut self, ram: &GuestRam) -> Option<(u16, u32)> {
        if ram.read_obj::<u16>(self.used.unchecked_add(2)).unwrap() == self.seen {
            return None;
        }
        let at = self.used.unchecked_add(4 + u64::from(self.seen % SIZE) * 8);
        self.seen = self.seen.wrapping_add(1);
        // Ask for the next interrupt (`used_event`).
        let used_event = self.avail.unchecked_add(4 + u64::from(SIZE) * 2);
        ram.write_obj(self.seen, used_event).unwrap();
        Some((ram.read_obj::<u32>(at).unwrap() as u16, ram.read_obj(at.unchecked_add(4)).unwrap()))
    }

    fn outstanding(&self) -> u16 {
        self.added.wrapping_sub(self.seen)
    }

    /// True if the device wants to hear of what was added since the last call (virtio 1.2, section 2.7.10).
    fn kick_wanted(&mut self, ram: &GuestRam, event_idx: bool) -> bool {
        let old = std::mem::replace(&mut self.kicked, self.added);
        if event_idx {
            let at = self.used.unchecked_add(4 + u64::from(SIZE) * 8);
            let event: u16 = ram.read_obj(at).unwrap();
            self.added.wrapping_sub(event).wrapping_sub(1) < self.added.wrapping_sub(old)
        } else {
            old != self.added && ram.read_obj::<u16>(self.used).unwrap() & 1 == 0
        }
    }
}

pub struct TestDriver {
    pub vsock: Vsock,
    pub ram: GuestRam,
    pub to_guest: TestQueue,
    pub to_host: TestQueue,
    pub events: TestQueue,
    pub interrupts: Arc<Counts>,
    pub kicks: u32,
    pub backend_calls: u32,
    event_idx: bool,
    /// Interrupts that the driver has reacted to, and whether it has emptied the queue since.
    interrupts_seen: u32,
    awake: bool,
}

impl TestDriver {
    /// Drives `vsock` with all buffers posted.
    pub fn new(vsock: Vsock) -> Self {
        let mut driver = Self::without_buffers(vsock, true);
        driver.post(SIZE);
        driver
    }

    /// Drives `vsock` without a buffer posted yet.
    pub fn without_buffers(vsock: Vsock, event_idx: bool) -> Self {
        let features = F_SEQPACKET | F_IN_ORDER | if event_idx { F_EVENT_IDX } else { 0 };
        Self::with_features(vsock, features)
    }

    /// Drives `vsock` with these features, without a buffer posted yet.
    pub fn with_features(mut vsock: Vsock, features: u64) -> Self {
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), RAM_LEN)]).unwrap();
        let (to_guest, queue_0) = TestQueue::new(0);
        let (to_host, queue_1) = TestQueue::new(1);
        let (events, queue_2) = TestQueue::new(2);
        let interrupts = Arc::new(Counts::default());
        vsock.activate(Driver {
            ram: ram.clone(),
            features: F_VERSION_1 | features,
            queues: [queue_0, queue_1, queue_2].map(Into::into).into(),
            interrupt: interrupts.clone(),
        });
        let mut driver = Self {
            vsock,
            ram,
            to_guest,
            to_host,
            events,
            interrupts,
            kicks: 0,
            backend_calls: 0,
            event_idx: features & F_EVENT_IDX != 0,
            interrupts_seen: 0,
            awake: false,
        };
        // As the event loop does, which the activation has woken.
        driver.run_backend();
        driver
    }

    /// Has the driver and its RAM go on with another device, as after a restore.
    pub fn continue_with(&mut self, mut vsock: Vsock) {
        let (saved, positions) = (self.vsock.save(), self.vsock.positions());
        let queues = (0..).zip(positions).map(|(index, position)| {
            let (_, mut queue) = TestQueue::new(index);
            let position = position.expect("the device uses all queues");
            queue.set_next_avail(position.next_available);
            queue.set_next_used(position.next_used);
            queue.into()
        });
        let driver = Driver {
            ram: self.ram.clone(),
            features: F_VERSION_1 | if self.event_idx { F_EVENT_IDX } else { 0 },
            queues: queues.collect(),
            interrupt: self.interrupts.clone(),
        };
        vsock.restore(&saved, Some(driver), false).unwrap();
        self.vsock = vsock;
        self.run_backend();
    }

    /// Posts `count` more buffers for packets to the guest.
    pub fn post(&mut self, count: u16) {
        for _ in 0..count {
            let id = self.to_guest.added % SIZE;
            assert!(self.to_guest.outstanding() < SIZE);
            self.post_buffer(id);
        }
        self.kick_to_guest();
    }

    fn post_buffer(&mut self, id: u16) {
        let addr = TO_GUEST_BUFFERS + u64::from(id) * u64::from(BUFFER_LEN);
        self.to_guest.write_descriptor(&self.ram, id, (addr, BUFFER_LEN, WRITE, 0));
        self.to_guest.add(&self.ram, id);
    }

    fn kick_to_guest(&mut self) {
        if self.to_guest.kick_wanted(&self.ram, self.event_idx) {
            self.kick(0);
        }
    }

    pub fn kick_to_host(&mut self) {
        if self.to_host.kick_wanted(&self.ram, self.event_idx) {
            self.kick(1);
        }
    }

    /// Posts a buffer of `len` bytes for an event.
    pub fn post_event_buffer(&mut self, len: u32) {
        let id = self.events.added % SIZE;
        let addr = EVENT_BUFFERS + u64::from(id) * 64;
        self.events.write_descriptor(&self.ram, id, (addr, len, WRITE, 0));
        self.events.add(&self.ram, id);
        if self.events.kick_wanted(&self.ram, self.event_idx) {
            self.kick(2);
        }
    }

    fn kick(&mut self, index: u16) {
        self.kicks += 1;
        self.vsock.handle_queue(index);
    }

    /// Puts a packet into the queue to the host: header in one descriptor, payload in two more.
    pub fn add(&mut self, header: Header, payload: &[u8]) {
        let slot = self.to_host.added % 64;
        let addr = TO_HOST_BUFFERS + u64::from(slot) * (MAX_SEND + 0x1000);
        let data = addr + 0x100;
        let (first, second) = payload.split_at(payload.len() / 3);
        self.ram.write_slice(&header.to_bytes(), GuestAddress(addr)).unwrap();
        self.ram.write_slice(payload, GuestAddress(data)).unwrap();
        let id = slot * 4;
        let head_flags = if payload.is_empty() { 0 } else { NEXT };
        let split = (first.len() as u32, second.len() as u32);
        for (offset, desc) in [
            (addr, HEADER_LEN as u32, head_flags, id + 1),
            (data, split.0, NEXT, id + 2),
            (data + u64::from(split.0), split.1, 0, 0),
        ]
        .into_iter()
        .enumerate()
        {
            self.to_host.write_descriptor(&self.ram, id + offset as u16, desc);
        }
        self.to_host.add(&self.ram, id);
    }

    /// Puts a packet into the queue to the host with each byte of payload in a descriptor of its own. Takes most of the table.
    pub fn add_in_pieces(&mut self, header: Header, payload: &[u8]) {
        let addr = TO_HOST_BUFFERS;
        self.ram.write_slice(&header.to_bytes(), GuestAddress(addr)).unwrap();
        self.ram.write_slice(payload, GuestAddress(addr + 0x100)).unwrap();
        self.to_host.write_descriptor(&self.ram, 0, (addr, HEADER_LEN as u32, NEXT, 1));
        for (id, at) in (1..=payload.len() as u16).zip(addr + 0x100..) {
            let more = if usize::from(id) < payload.len() { NEXT } else { 0 };
            self.to_host.write_descriptor(&self.ram, id, (at, 1, more, id + 1));
        }
        self.to_host.add(&self.ram, 0);
    }

    /// Sends a packet, and takes back the buffers that were used.
    pub fn send(&mut self, header: Header, payload: &[u8]) {
        assert!(self.to_host.outstanding() < 64);
        self.add(header, payload);
        self.kick_to_host();
        while self.to_host.take_used(&self.ram).is_some() {}
    }

    /// Calls the backend as long as it has something to do, as an event loop would.
    pub fn run_backend(&mut self) {
        for _ in 0..10_000 {
            if !self.backend_is_ready() {
                return;
            }
            self.backend_calls += 1;
            self.vsock.handle_backend();
        }
        panic!("the backend never comes to rest");
    }

    /// True if the event loop would wake up for the device.
    pub fn backend_is_ready(&self) -> bool {
        use std::os::fd::AsFd;
        let mut fds = [PollFd::from_borrowed_fd(self.vsock.host.as_fd(), PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        // Tests share their process with others, and its signals.
        rustix::io::retry_on_intr(|| poll(&mut fds, Some(&now))).unwrap() > 0
    }

    /// Takes the next packet for the guest, if there is one, and posts its buffer again.
    pub fn try_receive(&mut self) -> Option<(Header, Vec<u8>)> {
        let packet = self.take_packet()?;
        self.kick_to_guest();
        Some(packet)
    }

    fn take_packet(&mut self) -> Option<(Header, Vec<u8>)> {
        let interrupts = self.interrupts.used.load(Ordering::Relaxed);
        self.awake |= interrupts != std::mem::replace(&mut self.interrupts_seen, interrupts);
        let used = self.awake.then(|| self.to_guest.take_used(&self.ram)).flatten();
        self.awake = used.is_some();
        let (id, len) = used?;
        let addr = TO_GUEST_BUFFERS + u64::from(id) * u64::from(BUFFER_LEN);
        let mut bytes = vec![0; len as usize];
        self.ram.read_slice(&mut bytes, GuestAddress(addr)).unwrap();
        let payload = bytes.split_off(HEADER_LEN);
        let header = Header::from_bytes(bytes.as_slice().try_into().unwrap());
        assert_eq!(header.len as usize, payload.len(), "used length and header agree");
        self.post_buffer(id);
        Some((header, payload))
    }

    /// Waits for the next packet for the guest.
    pub fn receive(&mut self) -> (Header, Vec<u8>) {
        let start = Instant::now();
        loop {
            self.run_backend();
            if let Some(packet) = self.try_receive() {
                return packet;
            }
            assert!(start.elapsed() < Duration::from_secs(5), "no packet for the guest");
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// Waits for a packet and checks what it is for.
    pub fn expect(&mut self, op: Op) -> (Header, Vec<u8>) {
        let (header, payload) = self.receive();
        assert_eq!(Op::parse(header.op), Some(op), "{header:?}");
        (header, payload)
    }

    /// Checks that there is nothing for the guest, and nothing to do either.
    pub fn expect_silence(&mut self) {
        self.run_backend();
        assert_eq!(self.try_receive(), None);
        assert!(!self.backend_is_ready());
    }

    /// A packet of a stream from the guest, with 64 KiB of buffer and nothing taken out of it.
    pub fn header(&self, key: ConnectionKey, op: Op) -> Header {
        Header {
            src_port: key.guest.0,
            dst_port: key.host.0,
            src_cid: self.vsock.host.cid.get(),
            dst_cid: 2,
            buf_alloc: 1 << 16,
            ..Header::to_guest(self.vsock.host.cid, key, SocketType::Stream, op)
        }
    }

    /// Sends a packet without payload.
    pub fn send_op(&mut self, key: ConnectionKey, op: Op) {
        let header = self.header(key, op);
        self.send(header, &[]);
    }

    /// Sends payload.
    pub fn send_data(&mut self, key: ConnectionKey, payload: &[u8]) {
        let header = Header { len: payload.len() as u32, ..self.header(key, Op::ReadWrite) };
        self.send(header, payload);
    }

    /// Answers the request that comes next.
    pub fn accept(&mut self) -> ConnectionKey {
        let (request, _) = self.expect(Op::Request);
        let key =
            ConnectionKey { host: HostPort(request.src_port), guest: GuestPort(request.dst_port) };
        self.send_op(key, Op::Response);
        key
    }

    /// Number of connections in the device's table.
    pub fn connections(&self) -> usize {
        self.vsock.host.table.iter().count()
    }

    /// Number of descriptors that the device's epoll instance watches.
    pub fn watched(&self) -> usize {
        let epoll = self.vsock.backend_fd().unwrap();
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{epoll}")).unwrap();
        info.lines().filter(|line| line.starts_with("tfd:")).count()
    }
}
