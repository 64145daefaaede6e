//! The threads that wait for a disk, so that nobody else does: requests in, answers out.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use jailer::seccomp::RestrictError;

use super::disk::Disk;
use super::request::{HEADER_LEN, MOST_RANGES, RANGE_LEN, Range, Request, Status};
use crate::device::virtio::bell::Bell;
use crate::device::virtio::chain::Chain;
use crate::memory::GuestRam;

/// The most requests that are taken from the queue and not answered: some for the threads, and more to follow.
pub(super) const MOST_IN_FLIGHT: usize = 4 * WORKERS;
/// Threads of one disk: enough for what a queue of requests gains on a disk that is not in the page cache.
pub const WORKERS: usize = 4;
/// Enough for the deepest call, with as much again for a panic's message.
const STACK_BYTES: usize = 128 << 10;

/// A request on its way, and what became of it.
#[derive(Debug)]
pub(super) struct Job {
    pub request: Request,
    pub chain: Chain,
    /// Writes have to be on the medium when they are answered.
    pub is_durable: bool,
    pub status: Status,
    /// Bytes at the start of the chain's writable part that have been written.
    pub written: u64,
    /// What the host said, if it failed.
    pub error: Option<io::Error>,
}

/// The threads.
#[derive(Debug)]
pub(super) struct Workers {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    disk: Arc<Disk>,
    bell: Arc<Bell>,
    jobs: Mutex<Jobs>,
    /// There is a job, or none will come any more.
    changed: Condvar,
    /// No job runs, or a thread has come to where it can run some.
    idle: Condvar,
    /// Whoever runs a job is to give it up.
    cancelled: AtomicBool,
}

#[derive(Debug, Default)]
struct Jobs {
    ram: Option<Arc<GuestRam>>,
    waiting: VecDeque<Job>,
    running: usize,
    finished: Vec<Job>,
    ended: bool,
    /// Threads that are confined, or have failed to be.
    ready: usize,
    failure: Option<RestrictError>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Jobs> {
        // Whole at every point where a thread could have died.
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Workers {
    /// Starts the threads. Each calls `confine` before anything else; [`Workers::wait_ready`] says what came of it. They ring
    /// `bell` when there are finished jobs.
    ///
    /// # Errors
    /// If the system has no thread left.
    pub fn start(
        disk: Arc<Disk>,
        bell: Arc<Bell>,
        confine: fn() -> Result<(), RestrictError>,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            disk,
            bell,
            jobs: Mutex::new(Jobs {
                waiting: VecDeque::with_capacity(MOST_IN_FLIGHT),
                finished: Vec::with_capacity(MOST_IN_FLIGHT),
                ..Jobs::default()
            }),
            changed: Condvar::new(),
            idle: Condvar::new(),
            cancelled: AtomicBool::new(false),
        });
        let mut workers = Self { shared, threads: Vec::new() };
        for _ in 0..WORKERS {
            let shared = Arc::clone(&workers.shared);
            let main = move || {
                let confined = confine();
                let may_work = confined.is_ok();
                let mut jobs = shared.lock();
                jobs.ready += 1;
                jobs.failure = confined.err().or(jobs.failure.take());
                drop(jobs);
                shared.idle.notify_all();
                if may_work {
                    work(&shared);
                }
            };
            let thread = std::thread::Builder::new()
                .name("disk".into())
                .stack_size(STACK_BYTES)
                .spawn(main)?;
            workers.threads.push(thread);
        }
        Ok(workers)
    }

    /// Waits until all threads are confined.
    ///
    /// # Errors
    /// Why one is not; it does nothing then.
    pub fn wait_ready(&self) -> Result<(), RestrictError> {
        let mut jobs = self.shared.lock();
        while jobs.ready < self.threads.len() {
            jobs = self.shared.idle.wait(jobs).unwrap_or_else(PoisonError::into_inner);
        }
        jobs.failure.take().map_or(Ok(()), Err)
    }

    /// The jobs to come are about this RAM.
    pub fn begin(&self, ram: GuestRam) {
        self.shared.lock().ram = Some(Arc::new(ram));
    }

    /// Has a job done.
    pub fn submit(&self, job: Job) {
        self.shared.lock().waiting.push_back(job);
        self.shared.changed.notify_one();
    }

    /// Moves all jobs that are finished to the end of `jobs`.
    pub fn take_finished(&self, jobs: &mut Vec<Job>) {
        self.shared.bell.clear();
        jobs.append(&mut self.shared.lock().finished);
    }

    /// Waits until all jobs are finished.
    pub fn wait_idle(&self) {
        let mut jobs = self.shared.lock();
        while jobs.running > 0 || !jobs.waiting.is_empty() {
            jobs = self.shared.idle.wait(jobs).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Drops all jobs. When this returns, no thread touches RAM any more, and none will before the next
    /// [`Workers::begin`]. A write that was going on may be done in part, as when a disk loses its power.
    pub fn cancel(&self) {
        let mut jobs = self.shared.lock();
        jobs.waiting.clear();
        self.shared.cancelled.store(true, Ordering::Relaxed);
        while jobs.running > 0 {
            jobs = self.shared.idle.wait(jobs).unwrap_or_else(PoisonError::into_inner);
        }
        self.shared.cancelled.store(false, Ordering::Relaxed);
        jobs.finished.clear();
        jobs.ram = None;
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.cancel();
        self.shared.lock().ended = true;
        self.shared.changed.notify_all();
        for thread in self.threads.drain(..) {
            // A panic has printed itself.
            let _ = thread.join();
        }
    }
}

/// What a thread does until the end.
fn work(shared: &Shared) {
    let mut jobs = shared.lock();
    loop {
        if jobs.ended {
            return;
        }
        let Some((ram, mut job)) = jobs.ram.clone().zip(jobs.waiting.pop_front()) else {
            jobs = shared.changed.wait(jobs).unwrap_or_else(PoisonError::into_inner);
            continue;
        };
        jobs.running += 1;
        drop(jobs);
        job.run(&shared.disk, &ram, &shared.cancelled);
        drop(ram);
        jobs = shared.lock();
        jobs.running -= 1;
        jobs.finished.push(job);
        if jobs.finished.len() == 1 {
            shared.bell.ring();
        }
        if jobs.running == 0 {
            shared.idle.notify_all();
        }
    }
}

impl Job {
    fn run(&mut self, disk: &Disk, ram: &GuestRam, cancelled: &AtomicBool) {
        self.status = Status::Ok;
        let result = match self.request {
            Request::Read(extent) => {
                let (read, result) = disk.read(ram, &self.chain, extent, cancelled);
                self.written = read;
                result
            }
            Request::Write(extent) => {
                let payload = (&self.chain, HEADER_LEN as u64);
                disk.write(ram, payload, extent, self.is_durable, cancelled)
            }
            Request::Flush => disk.flush(),
            // Answered before it comes here.
            Request::GetId => Ok(()),
            Request::Discard(count) => self.clear(count, true, disk, ram, cancelled),
            Request::WriteZeroes(count) => self.clear(count, false, disk, ram, cancelled),
        };
        if let Err(error) = result {
            self.status = Status::Failed;
            self.error = Some(error);
        }
    }

    /// Discards `count` ranges or writes zeroes there, if all of them are sound.
    fn clear(
        &mut self,
        count: usize,
        is_discard: bool,
        disk: &Disk,
        ram: &GuestRam,
        cancelled: &AtomicBool,
    ) -> io::Result<()> {
        let mut bytes = [0; HEADER_LEN + MOST_RANGES * RANGE_LEN];
        let bytes = &mut bytes[..HEADER_LEN + count * RANGE_LEN];
        // The chain was found to be as long. The header in front of the ranges was parsed before and is not looked at again.
        if self.chain.read(ram, bytes).is_err() {
            self.status = Status::Failed;
            return Ok(());
        }
        let (ranges, _) = bytes[HEADER_LEN..].as_chunks::<RANGE_LEN>();
        let parse = |range: &[u8; RANGE_LEN]| Range::parse(*range, is_discard, disk.capacity());
        if let Some(status) = ranges.iter().find_map(|range| parse(range).err()) {
            self.status = status;
            return Ok(());
        }
        for Range { extent, may_unmap } in ranges.iter().flat_map(parse) {
            match is_discard {
                true => disk.discard(extent)?,
                false => disk.write_zeroes(extent, may_unmap, cancelled)?,
            }
        }
        if self.is_durable { disk.flush() } else { Ok(()) }
    }
}
