//! virtio-blk (virtio 1.2, section 5.2): a file of the host as the guest's disk.
//!
//! This file owns the queue and runs on the event loop's thread. `request` says what the guest's bytes mean, `disk` does it to
//! the file, and `workers` are the threads that wait meanwhile: an event loop that waited for a slow disk would serve nobody
//! else. (io_uring is no faster than they are where requests have to wait for the medium, passes by the filters of system calls,
//! and is switched off on many hosts.)

mod disk;
pub(crate) mod request;
mod workers;

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;

use jailer::seccomp::RestrictError;
use serde::Serialize;
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_WRITE_ZEROES,
};

pub use self::disk::{Disk, DiskConfig, DiskError};
use self::request::{HEADER_LEN, ID_LEN, MOST_RANGE_SECTORS, MOST_RANGES, Request, SECTOR, Status};
pub use self::workers::WORKERS;
use self::workers::{Job, MOST_IN_FLIGHT, Workers};
use super::virtio::bell::Bell;
use super::virtio::chain::{Chain, Direction};
use super::virtio::ring::{BrokenRing, Ring};
use super::virtio::{
    Driver, F_EVENT_IDX, Interrupt, RING_FEATURES, RestoreError, RingPosition, SavedDevice,
    VirtioDevice,
};
use crate::memory::GuestRam;

/// Device type (virtio 1.2, section 5).
const DEVICE_ID: u32 = 2;
const QUEUE_SIZE: u16 = 256;
/// Buffers of data in one request: all of a queue but those of header and status.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;

const F_FLUSH: u64 = 1 << VIRTIO_BLK_F_FLUSH;
/// Of every disk.
const FEATURES: u64 = RING_FEATURES | 1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_BLK_SIZE;
const FEATURES_OF_READ_ONLY: u64 = 1 << VIRTIO_BLK_F_RO;
const FEATURES_OF_WRITABLE: u64 =
    F_FLUSH | 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES;

/// Discards are best aligned to this many sectors: 4 KiB, the block of most file systems.
const DISCARD_ALIGNMENT: u32 = 8;

/// Counters since the device was made; resets do not clear them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct BlockStats {
    /// Requests that were answered, whatever the answer.
    pub requests: u64,
    /// Bytes read from the file into the guest.
    pub bytes_read: u64,
    /// Bytes written from the guest to the file.
    pub bytes_written: u64,
    /// Requests in which the host failed: its disk is full or broken, or the file has become shorter.
    pub failed_requests: u64,
    /// Requests that no correct driver makes: beyond the disk's end, writes to a disk that cannot be written.
    pub bad_requests: u64,
    /// Descriptor chains that hold no request and no room for an answer.
    pub bad_chains: u64,
    /// Queues that could not be used any further, or at all.
    pub broken_rings: u64,
}

/// The device.
#[derive(Debug)]
pub struct Block {
    disk: Arc<Disk>,
    id: [u8; ID_LEN],
    bell: Arc<Bell>,
    workers: Workers,
    guest: Option<Guest>,
    needs_reset: bool,
    stats: BlockStats,
    /// The user has been told that the host failed.
    has_complained: bool,
    /// Empty but for a moment; kept so that nothing is allocated for a request.
    finished: Vec<Job>,
}

/// The guest's side while its driver runs.
#[derive(Debug)]
struct Guest {
    ram: GuestRam,
    ring: Ring,
    /// Chains for requests to come.
    spare: Vec<Chain>,
    /// Writes have to be on the medium when they are answered, since the driver cannot ask for that.
    is_durable: bool,
    interrupt: Arc<dyn Interrupt>,
}

impl Block {
    /// A device in front of `disk`, which the guest can know by its `number`. Its threads call `confine` before anything else;
    /// [`Block::wait_ready`] says what came of it.
    ///
    /// # Errors
    /// If the system refuses a descriptor or a thread.
    pub fn new(
        disk: Disk,
        number: usize,
        confine: fn() -> Result<(), RestrictError>,
    ) -> io::Result<Self> {
        let mut id = [0; ID_LEN];
        let name = format!("disk{number}");
        id[..name.len()].copy_from_slice(name.as_bytes());
        let (disk, bell) = (Arc::new(disk), Arc::new(Bell::new()?));
        let workers = Workers::start(Arc::clone(&disk), Arc::clone(&bell), confine)?;
        Ok(Self {
            disk,
            id,
            bell,
            workers,
            guest: None,
            needs_reset: false,
            stats: BlockStats::default(),
            has_complained: false,
            finished: Vec::with_capacity(MOST_IN_FLIGHT),
        })
    }

    /// Waits until the disk's threads are confined.
    ///
    /// # Errors
    /// Why one is not.
    pub fn wait_ready(&self) -> Result<(), RestrictError> {
        self.workers.wait_ready()
    }

    /// What the device has counted so far.
    pub fn stats(&self) -> BlockStats {
        self.stats
    }

    /// Answers what is finished, takes what has come, at most a queue full of it.
    fn serve(&mut self) {
        match self.answer_and_take() {
            Ok(true) => self.bell.ring(),
            Ok(false) => {}
            Err(BrokenRing) => self.give_up(),
        }
    }

    fn answer_and_take(&mut self) -> Result<bool, BrokenRing> {
        self.answer_finished()?;
        let Some(guest) = self.guest.as_mut() else { return Ok(false) };
        let more = guest.take(&self.disk, &self.id, &self.workers, &mut self.stats)?;
        guest.signal()?;
        Ok(more)
    }

    fn answer_finished(&mut self) -> Result<(), BrokenRing> {
        self.workers.take_finished(&mut self.finished);
        let Some(guest) = self.guest.as_mut() else {
            self.finished.clear();
            return Ok(());
        };
        for job in self.finished.drain(..) {
            if let Some(error) = &job.error
                && !std::mem::replace(&mut self.has_complained, true)
            {
                // Once: the guest decides how often it tries.
                let path = self.disk.path();
                eprintln!("cleanslate: disk {path:?}: {error}; the guest is told that it failed");
            }
            self.stats.count(&job);
            guest.answer(&job.chain, job.status, job.written)?;
            guest.spare.push(job.chain);
        }
        Ok(())
    }

    /// The queue cannot be used any more (`DEVICE_NEEDS_RESET`; virtio 1.2, section 2.1.2).
    fn give_up(&mut self) {
        self.needs_reset = true;
        self.stats.broken_rings += 1;
        self.workers.cancel();
        if let Some(guest) = self.guest.take() {
            guest.interrupt.signal_config();
        }
    }

    /// The configuration space (section 5.2.4).
    fn config(&self) -> [u8; 60] {
        let mut config = [0; 60];
        let mut put = |offset: usize, bytes: &[u8]| {
            config[offset..offset + bytes.len()].copy_from_slice(bytes);
        };
        put(0, &(self.disk.capacity() / SECTOR).to_le_bytes());
        put(12, &SEG_MAX.to_le_bytes());
        put(20, &(SECTOR as u32).to_le_bytes());
        if !self.disk.is_read_only() {
            put(36, &MOST_RANGE_SECTORS.to_le_bytes());
            put(40, &(MOST_RANGES as u32).to_le_bytes());
            put(44, &DISCARD_ALIGNMENT.to_le_bytes());
            put(48, &MOST_RANGE_SECTORS.to_le_bytes());
            put(52, &(MOST_RANGES as u32).to_le_bytes());
            // write_zeroes_may_unmap
            put(56, &[1]);
        }
        config
    }
}

impl BlockStats {
    fn count(&mut self, job: &Job) {
        self.requests += 1;
        match (job.request, job.status) {
            (_, Status::Failed) if job.error.is_some() => self.failed_requests += 1,
            (_, Status::Failed | Status::Unsupported) => self.bad_requests += 1,
            (Request::Read(extent), Status::Ok) => self.bytes_read += extent.len,
            (Request::Write(extent), Status::Ok) => self.bytes_written += extent.len,
            _ => {}
        }
    }
}

impl Guest {
    /// Takes requests from the queue: bad ones are answered, the others go to the disk's threads, as many as there is room
    /// for. True if there are more than it looked at.
    fn take(
        &mut self,
        disk: &Disk,
        id: &[u8; ID_LEN],
        workers: &Workers,
        stats: &mut BlockStats,
    ) -> Result<bool, BrokenRing> {
        for _ in 0..self.ring.size() {
            if self.spare.is_empty() {
                // The next answer makes room, and looks again.
                return Ok(false);
            }
            if !self.ring.take(&self.ram, HEADER_LEN + 1, &mut stats.bad_chains)? {
                if !self.ring.listen(&self.ram)? {
                    return Ok(false);
                }
                continue;
            }
            let chain = self.ring.chain();
            let mut header = [0; HEADER_LEN];
            let has_header = chain.read(&self.ram, &mut header).is_ok();
            // The last byte is for the status.
            let Some(room) = chain.writable_len().checked_sub(1).filter(|_| has_header) else {
                stats.bad_chains += 1;
                self.ring.complete(&self.ram, 0)?;
                continue;
            };
            let payload = chain.readable_len() - HEADER_LEN as u64;
            let parsed = match Request::parse(header, payload, room, disk.capacity()) {
                Ok(request) if request.changes_the_disk() && disk.is_read_only() => {
                    Err(Status::Failed)
                }
                parsed => parsed,
            };
            let (status, written) = match parsed {
                Ok(Request::GetId) => match chain.write(&self.ram, id) {
                    Ok(()) => (Status::Ok, ID_LEN as u64),
                    Err(_) => (Status::Failed, 0),
                },
                Ok(request) => {
                    // There is one: it was looked at above.
                    if let Some(spare) = self.spare.pop() {
                        let chain = self.ring.take_out(spare);
                        let is_durable = self.is_durable;
                        let (status, written) = (Status::Failed, 0);
                        workers.submit(Job {
                            request,
                            chain,
                            is_durable,
                            status,
                            written,
                            error: None,
                        });
                    }
                    continue;
                }
                Err(status) => {
                    stats.bad_requests += 1;
                    (status, 0)
                }
            };
            stats.requests += 1;
            let spare = self.spare.pop();
            if let Some(spare) = spare {
                let chain = self.ring.take_out(spare);
                self.answer(&chain, status, written)?;
                self.spare.push(chain);
            }
        }
        Ok(true)
    }

    /// Tells the driver of answers, if it wants to know.
    fn signal(&mut self) -> Result<(), BrokenRing> {
        if self.ring.must_signal(&self.ram)? {
            self.interrupt.signal_used();
        }
        Ok(())
    }

    /// Answers the request in `chain`, of which `written` bytes at the start of the writable part have been written. The length
    /// that the driver is told covers the status only if nothing before it was left out (section 2.7.8.2).
    fn answer(&mut self, chain: &Chain, status: Status, written: u64) -> Result<(), BrokenRing> {
        let last = chain.writable_len() - 1;
        // The chain was found to have room.
        let _ = chain.write_at(&self.ram, last, &[status as u8]);
        let len = if written == last { last + 1 } else { written };
        // A chain has no more than 2^32 - 1 bytes: virtio-queue ends it there.
        self.ring.complete_chain(&self.ram, chain, len as u32)
    }
}

impl VirtioDevice for Block {
    fn device_id(&self) -> u32 {
        DEVICE_ID
    }

    fn queue_max_sizes(&self) -> &'static [u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        FEATURES
            | if self.disk.is_read_only() { FEATURES_OF_READ_ONLY } else { FEATURES_OF_WRITABLE }
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.config();
        let rest = usize::try_from(offset).ok().and_then(|offset| config.get(offset..));
        let rest = rest.unwrap_or_default();
        let len = rest.len().min(data.len());
        data.fill(0);
        data[..len].copy_from_slice(&rest[..len]);
    }

    fn activate(&mut self, driver: Driver) {
        let Driver { ram, features, queues, interrupt } = driver;
        let ring = queues
            .into_iter()
            .next()
            .map(|queue| Ring::new(queue, Direction::Both, &ram, features & F_EVENT_IDX != 0));
        match ring.transpose() {
            Ok(ring) => {
                self.guest = ring.flatten().map(|ring| {
                    let spare = || Chain::new(Direction::Both, ring.size());
                    Guest {
                        spare: std::iter::repeat_with(spare).take(MOST_IN_FLIGHT).collect(),
                        is_durable: features & F_FLUSH == 0,
                        ram: ram.clone(),
                        ring,
                        interrupt,
                    }
                });
                self.workers.begin(ram);
                // Not `serve`: this may be a vCPU's thread, which must not do the event loop's work.
                self.bell.ring();
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
        Some(self.bell.as_fd().as_raw_fd())
    }

    fn handle_backend(&mut self) {
        self.serve();
    }

    fn needs_reset(&self) -> bool {
        self.needs_reset
    }

    fn settle(&mut self) {
        self.workers.wait_idle();
        let answered = self.answer_finished();
        let told = answered.and_then(|()| self.guest.as_mut().map_or(Ok(()), Guest::signal));
        if told.is_err() {
            self.give_up();
        }
        // There may be more to take when the machine goes on.
        self.bell.ring();
    }

    fn positions(&self) -> Vec<Option<RingPosition>> {
        vec![self.guest.as_ref().map(|guest| guest.ring.position())]
    }

    fn save(&self) -> SavedDevice {
        SavedDevice::Block { capacity: self.disk.capacity() }
    }

    fn restore(
        &mut self,
        saved: &SavedDevice,
        driver: Option<Driver>,
        needs_reset: bool,
    ) -> Result<(), RestoreError> {
        let here = self.disk.capacity();
        match saved {
            SavedDevice::Block { capacity } if *capacity != here => {
                return Err(RestoreError::Capacity(*capacity, here));
            }
            _ => {}
        }
        self.needs_reset = needs_reset;
        driver.into_iter().for_each(|driver| self.activate(driver));
        Ok(())
    }

    fn reset(&mut self) {
        self.workers.cancel();
        self.guest = None;
        self.needs_reset = false;
    }
}

#[cfg(test)]
mod tests;
