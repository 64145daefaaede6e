//! The vsock device alone, without a machine: a guest's driver in a few lines on one thread, a host's client on another.
//!
//! `cargo bench --bench vsock` prints medians with the 10th and 90th percentile of several rounds; `-- --quick` shows in a second that
//! all of it still works. Nothing here includes what a guest and KVM take.

use std::alloc::{GlobalAlloc, Layout, System};
use std::io::{Read, Write};
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, poll};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm::device::virtio::{Driver, F_VERSION_1, Interrupt, VirtioDevice};
use vmm::device::vsock::{GuestCid, GuestPort, Listener, Vsock};
use vmm::memory::GuestRam;

const MIB: usize = 1 << 20;
const MESSAGE: usize = 64 * 1024;
const HEADER: usize = 44;
const SIZE: u16 = 256;
const RAM: usize = 64 * MIB;
const TO_GUEST: u64 = 0x100_0000;
const TO_HOST: u64 = 0x300_0000;
const GUEST_PORT: u32 = 1024;
/// What the guest buffers for the host, as Linux has it.
const GUEST_BUFFER: u32 = 256 * 1024;
const EVENT_IDX: u64 = 1 << 29;

/// Operations of packets (virtio 1.2, section 5.10.6).
mod op {
    pub const REQUEST: u16 = 1;
    pub const RESPONSE: u16 = 2;
    pub const RESET: u16 = 3;
    pub const SHUTDOWN: u16 = 4;
    pub const READ_WRITE: u16 = 5;
    pub const CREDIT_UPDATE: u16 = 6;
}

/// The process's heap, counted.
struct Counting;

static HEAP: AtomicUsize = AtomicUsize::new(0);

// SAFETY: all of it is the system's allocator, which keeps what it promises; the counter is beside it.
unsafe impl GlobalAlloc for Counting {
    // SAFETY: the trait's own requirements, which the caller keeps.
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        HEAP.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promises are those of the system's allocator.
        unsafe { System.alloc(layout) }
    }

    // SAFETY: the trait's own requirements, which the caller keeps.
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        HEAP.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn main() {
    let quick = std::env::args().any(|arg| arg == "--quick");
    let (rounds, bytes, trips, connections) =
        if quick { (1, 8 * MIB, 100, 200) } else { (15, 512 * MIB, 20_000, 10_000) };
    let gib = |seconds: f64| bytes as f64 / seconds / (1 << 30) as f64;
    let figure = |name: &str, unit: &str, one: &dyn Fn() -> f64| {
        let mut values: Vec<f64> = (0..rounds).map(|_| one()).collect();
        values.sort_by(f64::total_cmp);
        let at = |part: usize| values[(values.len() - 1) * part / 100];
        println!("{name:<64} {:>9.2} {:>9.2} {:>9.2} {unit}", at(50), at(10), at(90));
    };
    println!("{:<64} {:>9} {:>9} {:>9}", "", "median", "p10", "p90");
    figure("copying 64 KiB from memory to memory", "GiB/s", &|| gib(copy(bytes)));
    figure("64 KiB messages between two threads by a Unix socket", "GiB/s", &|| gib(socket(bytes)));
    figure("guest to host, 64 KiB messages", "GiB/s", &|| gib(to_host(bytes)));
    for buffer in [4096, MESSAGE + HEADER] {
        let name = format!("host to guest, 64 KiB messages, buffers of {buffer} bytes");
        figure(&name, "GiB/s", &|| gib(to_guest(bytes, buffer as u32)));
    }
    figure("64 bytes there and back by a Unix socket", "us", &|| socket_trip(trips) * 1e6);
    figure("64 bytes there and back through the device", "us", &|| trip(trips) * 1e6);
    figure("connections by host clients, opened and closed", "per s", &|| {
        connections as f64 / by_clients(connections)
    });
    figure("connections by the guest, opened and closed", "per s", &|| {
        connections as f64 / by_guest(connections)
    });
    let idle = if quick { 100 } else { 4000 };
    println!("{:<64} {:>9} bytes", "heap of the device for an idle connection", heap(idle));
}

#[derive(Debug)]
struct Nobody;

impl Interrupt for Nobody {
    fn signal_used(&self) {}
    fn signal_config(&self) {}
}

/// A queue from the driver's side.
struct Rings {
    base: u64,
    added: u16,
    seen: u16,
    kicked: u16,
}

impl Rings {
    fn new(index: u16) -> (Self, Queue) {
        let base = 0x1_0000 * (1 + u32::from(index));
        let mut queue = Queue::new(SIZE).expect("a power of two");
        queue.set_desc_table_address(Some(base), None);
        queue.set_avail_ring_address(Some(base + 0x2000), None);
        queue.set_used_ring_address(Some(base + 0x3000), None);
        queue.set_ready(true);
        (Self { base: base.into(), added: 0, seen: 0, kicked: 0 }, queue)
    }

    fn describe(&self, ram: &GuestRam, id: u16, (addr, len, flags, next): (u64, u32, u16, u16)) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        ram.write_slice(&bytes, GuestAddress(self.base + 16 * u64::from(id))).unwrap();
    }

    fn add(&mut self, ram: &GuestRam, head: u16) {
        let at = self.base + 0x2004 + 2 * u64::from(self.added % SIZE);
        ram.write_obj(head, GuestAddress(at)).unwrap();
        self.added = self.added.wrapping_add(1);
        ram.store(self.added, GuestAddress(self.base + 0x2002), Ordering::SeqCst).unwrap();
    }

    fn take(&mut self, ram: &GuestRam) -> Option<(u16, u32)> {
        let used: u16 = ram.load(GuestAddress(self.base + 0x3002), Ordering::SeqCst).unwrap();
        if used == self.seen {
            return None;
        }
        let at = self.base + 0x3004 + 8 * u64::from(self.seen % SIZE);
        self.seen = self.seen.wrapping_add(1);
        let [id, len] = ram.read_obj::<[u32; 2]>(GuestAddress(at)).unwrap();
        Some((id as u16, len))
    }

    /// Whether the device wants to hear of what was added (virtio 1.2, section 2.7.10).
    fn kick_wanted(&mut self, ram: &GuestRam) -> bool {
        let old = std::mem::replace(&mut self.kicked, self.added);
        let at = self.base + 0x3004 + 8 * u64::from(SIZE);
        let event: u16 = ram.load(GuestAddress(at), Ordering::SeqCst).unwrap();
        self.added.wrapping_sub(event).wrapping_sub(1) < self.added.wrapping_sub(old)
    }
}

/// A packet's header, without the length of a payload.
#[derive(Clone, Copy)]
struct Header {
    host: u32,
    guest: u32,
    len: u32,
    op: u16,
    flags: u32,
    forwarded: u32,
}

struct Guest {
    vsock: Vsock,
    ram: GuestRam,
    to_guest: Rings,
    to_host: Rings,
    buffer: u32,
    free: Vec<u16>,
}

impl Guest {
    /// A guest whose buffers for the host's packets have `buffer` bytes each.
    fn new(mut vsock: Vsock, buffer: u32) -> Self {
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), RAM)]).expect("map memory");
        let (to_guest, first) = Rings::new(0);
        let (to_host, second) = Rings::new(1);
        vsock.activate(Driver {
            ram: ram.clone(),
            features: F_VERSION_1 | EVENT_IDX,
            queues: [first, second, Queue::new(64).expect("a power of two")].map(Into::into).into(),
            interrupt: Arc::new(Nobody),
        });
        let free = (0..64).collect();
        let mut guest = Self { vsock, ram, to_guest, to_host, buffer, free };
        let posted = (16 * MIB as u32 / buffer.next_multiple_of(4096)).min(u32::from(SIZE)) as u16;
        for id in 0..posted {
            let at = guest.buffer_at(id);
            guest.to_guest.describe(&guest.ram, id, (at, buffer, 2, 0));
            guest.to_guest.add(&guest.ram, id);
        }
        guest.kick();
        guest
    }

    fn buffer_at(&self, id: u16) -> u64 {
        TO_GUEST + u64::from(id) * u64::from(self.buffer.next_multiple_of(4096))
    }

    /// Takes back buffers of packets that have gone. True if there is one to use.
    fn has_free(&mut self) -> bool {
        while let Some((head, _)) = self.to_host.take(&self.ram) {
            self.free.push(head / 2);
        }
        !self.free.is_empty()
    }

    /// Puts a packet into the ring; its payload is whatever lies there.
    fn send(&mut self, header: Header) {
        assert!(self.has_free(), "the device keeps all packets");
        let slot = self.free.pop().expect("one is free");
        let at = TO_HOST + u64::from(slot) * (MESSAGE as u64 + 4096);
        let mut bytes = [0; HEADER];
        bytes[0] = 3;
        bytes[8] = 2;
        for (place, word) in
            [(16, header.guest), (20, header.host), (24, header.len), (32, header.flags)]
        {
            bytes[place..place + 4].copy_from_slice(&word.to_le_bytes());
        }
        bytes[28] = 1;
        bytes[30..32].copy_from_slice(&header.op.to_le_bytes());
        bytes[36..40].copy_from_slice(&GUEST_BUFFER.to_le_bytes());
        bytes[40..44].copy_from_slice(&header.forwarded.to_le_bytes());
        self.ram.write_slice(&bytes, GuestAddress(at)).unwrap();
        let id = slot * 2;
        let chained = u16::from(header.len > 0);
        self.to_host.describe(&self.ram, id, (at, HEADER as u32, chained, id + 1));
        self.to_host.describe(&self.ram, id + 1, (at + 4096, header.len, 0, 0));
        self.to_host.add(&self.ram, id);
    }

    /// The next packet from the host; its buffer is posted again.
    fn receive(&mut self) -> Option<Header> {
        let (id, _) = self.to_guest.take(&self.ram)?;
        let mut bytes = [0; HEADER];
        self.ram.read_slice(&mut bytes, GuestAddress(self.buffer_at(id))).unwrap();
        self.to_guest.add(&self.ram, id);
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("a word"));
        Some(Header {
            host: word(16),
            guest: word(20),
            len: word(24),
            op: word(28).to_le_bytes()[2].into(),
            flags: word(32),
            forwarded: word(40),
        })
    }

    fn kick(&mut self) {
        if self.to_host.kick_wanted(&self.ram) {
            self.vsock.handle_queue(1);
        }
        if self.to_guest.kick_wanted(&self.ram) {
            self.vsock.handle_queue(0);
        }
    }

    /// Sleeps until the device has something to do, as the event loop does, and lets it.
    fn sleep(&mut self) {
        let fd = self.vsock.backend_fd().expect("the device has one");
        // SAFETY: the device, which has the descriptor, outlives the call.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], None).expect("wait");
        self.vsock.handle_backend();
    }

    /// Serves until `enough` says so: hands over each packet, sends what comes back.
    fn serve(
        &mut self,
        mut handle: impl FnMut(Header) -> Option<Header>,
        mut enough: impl FnMut() -> bool,
    ) {
        while !enough() {
            let mut idle = true;
            while let Some(packet) = self.receive() {
                idle = false;
                if let Some(answer) = handle(packet) {
                    self.send(answer);
                }
            }
            self.kick();
            if idle && !enough() {
                self.sleep();
            }
        }
    }

    /// A connection that the monitor opens: its stream and the answer to its request.
    fn connected(&mut self) -> (UnixStream, Header) {
        let stream = self.vsock.connector().connect(GuestPort(GUEST_PORT)).expect("connect");
        let mut accepted = None;
        while accepted.is_none() {
            self.sleep();
            accepted = self.receive().map(|request| Header { op: op::RESPONSE, ..request });
        }
        let accepted = accepted.expect("a request came");
        self.send(accepted);
        self.kick();
        (stream, accepted)
    }
}

fn pathless(buffer: u32) -> Guest {
    Guest::new(
        Vsock::new(GuestCid::new(3).expect("an ordinary one"), None).expect("a device"),
        buffer,
    )
}

fn reader(mut stream: UnixStream, bytes: usize) -> JoinHandle<UnixStream> {
    std::thread::spawn(move || {
        let mut buffer = vec![0; MESSAGE];
        let mut left = bytes;
        while left > 0 {
            left -= stream.read(&mut buffer).expect("read");
        }
        stream
    })
}

fn writer(mut stream: UnixStream, bytes: usize) -> JoinHandle<UnixStream> {
    std::thread::spawn(move || {
        let buffer = vec![1; MESSAGE];
        for _ in 0..bytes / MESSAGE {
            stream.write_all(&buffer).expect("write");
        }
        stream
    })
}

fn copy(bytes: usize) -> f64 {
    let (source, mut target) = (vec![1_u8; 16 * MESSAGE], vec![0; MESSAGE]);
    let began = Instant::now();
    for message in 0..bytes / MESSAGE {
        let at = message % 16 * MESSAGE;
        target.copy_from_slice(std::hint::black_box(&source[at..at + MESSAGE]));
        std::hint::black_box(&mut target);
    }
    began.elapsed().as_secs_f64()
}

fn socket(bytes: usize) -> f64 {
    let (near, far) = UnixStream::pair().expect("a pair");
    let began = Instant::now();
    let (reader, writer) = (reader(near, bytes), writer(far, bytes));
    let ends = (reader.join().expect("read"), writer.join().expect("write"));
    let seconds = began.elapsed().as_secs_f64();
    drop(ends);
    seconds
}

fn to_host(bytes: usize) -> f64 {
    let mut guest = pathless(4096);
    let (stream, connection) = guest.connected();
    let began = Instant::now();
    let reader = reader(stream, bytes);
    // The host's buffer space is in its packets' headers; this is the device's.
    let (credit, mut sent, mut forwarded) = (256 * 1024, 0usize, 0u32);
    while sent < bytes {
        let room = credit - (sent as u32).wrapping_sub(forwarded) as usize;
        if room > 0 && guest.has_free() {
            let len = MESSAGE.min(room).min(bytes - sent) as u32;
            guest.send(Header { op: op::READ_WRITE, len, ..connection });
            sent += len as usize;
            if room > MESSAGE && guest.free.len() > 48 {
                continue;
            }
        }
        guest.kick();
        let mut told = false;
        while let Some(packet) = guest.receive() {
            assert_eq!(packet.op, op::CREDIT_UPDATE);
            (forwarded, told) = (packet.forwarded, true);
        }
        if room == 0 && !told {
            guest.kick();
            guest.sleep();
        }
    }
    guest.kick();
    while !reader.is_finished() {
        // What is left waits for the reader.
        guest.vsock.handle_backend();
    }
    drop(reader.join().expect("read"));
    began.elapsed().as_secs_f64()
}

fn to_guest(bytes: usize, buffer: u32) -> f64 {
    let mut guest = pathless(buffer);
    let (stream, connection) = guest.connected();
    let began = Instant::now();
    let writer = writer(stream, bytes);
    let (mut received, mut told) = (0usize, 0usize);
    while received < bytes {
        let mut idle = true;
        while let Some(packet) = guest.receive() {
            idle = false;
            received += packet.len as usize;
            // As Linux does: an update when less than 64 KiB are left.
            if received - told > GUEST_BUFFER as usize - MESSAGE {
                told = received;
                let forwarded = received as u32;
                guest.send(Header { op: op::CREDIT_UPDATE, forwarded, ..connection });
            }
        }
        guest.kick();
        if idle && received < bytes {
            guest.sleep();
        }
    }
    drop(writer.join().expect("write"));
    began.elapsed().as_secs_f64()
}

fn ping(mut stream: UnixStream, trips: usize) -> JoinHandle<f64> {
    std::thread::spawn(move || {
        let mut bytes = [7; 64];
        let mut times: Vec<f64> = (0..trips)
            .map(|_| {
                let began = Instant::now();
                stream.write_all(&bytes).expect("write");
                stream.read_exact(&mut bytes).expect("read");
                began.elapsed().as_secs_f64()
            })
            .collect();
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    })
}

fn socket_trip(trips: usize) -> f64 {
    let (near, mut far) = UnixStream::pair().expect("a pair");
    let client = ping(near, trips);
    let mut bytes = [0; 64];
    while far.read_exact(&mut bytes).is_ok() {
        far.write_all(&bytes).expect("write");
    }
    client.join().expect("ping")
}

fn trip(trips: usize) -> f64 {
    let mut guest = pathless(4096);
    let (stream, connection) = guest.connected();
    let client = ping(stream, trips);
    let mut received = 0;
    let over = std::cell::Cell::new(false);
    let echo = |packet: Header| match packet.op {
        op::READ_WRITE => {
            received += packet.len;
            Some(Header { len: packet.len, op: op::READ_WRITE, forwarded: received, ..connection })
        }
        _ => {
            over.set(true);
            None
        }
    };
    guest.serve(echo, || over.get());
    client.join().expect("ping")
}

fn directory() -> tempfile::TempDir {
    tempfile::tempdir().expect("a directory")
}

fn listening(directory: &Path) -> Vsock {
    let (listener, file) = Listener::bind(&directory.join("vsock")).expect("listen");
    // The directory goes with all that is in it.
    std::mem::forget(file);
    Vsock::new(GuestCid::new(3).expect("an ordinary one"), Some(listener)).expect("a device")
}

fn by_clients(connections: usize) -> f64 {
    let directory = directory();
    let mut guest = Guest::new(listening(directory.path()), 4096);
    let path = directory.path().join("vsock");
    let client = std::thread::spawn(move || {
        for _ in 0..connections {
            let mut stream = UnixStream::connect(&path).expect("connect");
            stream.write_all(b"CONNECT 1024\n").expect("ask");
            let mut answer = [0; 32];
            assert!(stream.read(&mut answer).expect("hear") > 3);
        }
    });
    let began = Instant::now();
    let ended = std::cell::Cell::new(0);
    let answer = |packet: Header| match packet.op {
        op::REQUEST => Some(Header { op: op::RESPONSE, ..packet }),
        op::SHUTDOWN => {
            ended.set(ended.get() + 1);
            Some(Header { op: op::RESET, ..packet })
        }
        _ => None,
    };
    guest.serve(answer, || ended.get() == connections);
    let seconds = began.elapsed().as_secs_f64();
    client.join().expect("connect");
    seconds
}

fn by_guest(connections: usize) -> f64 {
    let directory = directory();
    let listener = std::os::unix::net::UnixListener::bind(directory.path().join("vsock_52"));
    let listener = listener.expect("listen");
    let mut guest = Guest::new(listening(directory.path()), 4096);
    let server = std::thread::spawn(move || {
        for _ in 0..connections {
            drop(listener.accept().expect("accept"));
        }
    });
    let began = Instant::now();
    let ended = std::cell::Cell::new(0);
    let request = |number: usize| Header {
        host: 52,
        guest: number as u32 + 1000,
        len: 0,
        op: op::REQUEST,
        flags: 0,
        forwarded: 0,
    };
    guest.send(request(0));
    guest.kick();
    let answer = |packet: Header| match packet.op {
        op::SHUTDOWN => Some(Header { op: op::RESET, ..packet }),
        op::RESPONSE => None,
        _ => panic!("refused"),
    };
    // One after the other, as a client would.
    for number in 1..=connections {
        guest.serve(
            |packet| {
                let reply = answer(packet);
                ended.set(ended.get() + usize::from(reply.is_some()));
                reply
            },
            || ended.get() == number,
        );
        if number < connections {
            guest.send(request(number));
            guest.kick();
        }
    }
    let seconds = began.elapsed().as_secs_f64();
    server.join().expect("accept");
    seconds
}

/// Heap that the device holds for each of `count` idle connections.
fn heap(count: usize) -> usize {
    let mut guest = pathless(4096);
    let before = HEAP.load(Ordering::Relaxed);
    let mut streams = Vec::with_capacity(count);
    let list = streams.capacity() * size_of::<(UnixStream, Header)>();
    (0..count).for_each(|_| streams.push(guest.connected()));
    (HEAP.load(Ordering::Relaxed) - before - list) / count
}
