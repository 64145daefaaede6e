//! A disk and its driver, as the guest sees them.

mod hostile;
mod reset;

use std::fs::File;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tempfile::NamedTempFile;
use virtio_queue::QueueT;

use super::*;
use crate::device::virtio::F_VERSION_1;
use crate::device::virtio::testing::{Events, INDIRECT, RAM_LEN, TestDriver, WRITE};

const HEADER: u64 = 0x10_0000;
const DATA: u64 = 0x20_0000;
const ANSWER: u64 = 0x30_0000;
const STATUS: u64 = 0x10_1000;
const SECTORS: u64 = 256;

const OK: u8 = Status::Ok as u8;
const FAILED: u8 = Status::Failed as u8;
const UNSUPPORTED: u8 = Status::Unsupported as u8;

impl Events for Block {
    fn events(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}

/// A file of [`SECTORS`] sectors; each byte says in which sector it is.
fn image() -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    let bytes: Vec<_> = (0..SECTORS).flat_map(|sector| [sector as u8; SECTOR as usize]).collect();
    file.as_file().write_all_at(&bytes, 0).unwrap();
    file
}

fn block(file: &NamedTempFile, read_only: bool) -> Block {
    let config = DiskConfig { path: file.path().into(), read_only };
    Block::new(Disk::open(&config).unwrap(), 7, || Ok(())).unwrap()
}

fn driver(file: &NamedTempFile) -> TestDriver<Block> {
    let block = block(file, false);
    let features = block.features();
    TestDriver::new(block, features)
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    [kind.to_le_bytes().as_slice(), &[0xff; 4], &sector.to_le_bytes()].concat()
}

impl TestDriver<Block> {
    /// Asks for something, in the way of Linux: a descriptor each for header, data and status. Gives the status and the
    /// length that the driver is told.
    fn ask(&mut self, kind: u32, sector: u64, data: &[u8], room: u32) -> (u8, u32) {
        self.put(HEADER, &header(kind, sector));
        self.put(DATA, data);
        self.put(STATUS, &[0xee]);
        let mut chain = vec![(HEADER, HEADER_LEN as u32, 0)];
        if !data.is_empty() {
            chain.push((DATA, data.len() as u32, 0));
        }
        if room > 0 {
            chain.push((ANSWER, room, WRITE));
        }
        chain.push((STATUS, 1, WRITE));
        self.describe_chain(0, &chain);
        let len = self.submit(0);
        (self.bytes(STATUS, 1)[0], len)
    }

    fn read(&mut self, sector: u64, len: u32) -> Vec<u8> {
        self.put(ANSWER, &vec![0xee; len as usize]);
        assert_eq!(self.ask(0, sector, &[], len), (OK, len + 1));
        self.bytes(ANSWER, len as usize)
    }
}

fn contents(file: &NamedTempFile, sector: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    file.as_file().read_exact_at(&mut bytes, sector * SECTOR).unwrap();
    bytes
}

#[test]
fn what_is_written_is_in_the_file_and_what_is_in_the_file_is_read() {
    let file = image();
    let all = block(&file, false).features();
    for features in [all, F_VERSION_1, F_VERSION_1 | F_FLUSH] {
        let mut driver = TestDriver::new(block(&file, false), features);
        assert_eq!(driver.device.guest.as_ref().unwrap().is_durable, features & F_FLUSH == 0);
        assert_eq!(driver.read(3, 1024), [[3; 512], [4; 512]].concat());
        assert_eq!(driver.read(SECTORS - 1, 512), [255; 512]);
        assert_eq!(driver.ask(1, 3, &[0x55; 1024], 0), (OK, 1));
        assert_eq!(
            contents(&file, 2, 2048),
            [[2; 512], [0x55; 512], [0x55; 512], [5; 512]].concat()
        );
        assert_eq!(driver.ask(4, 0, &[], 0), (OK, 1));
        assert_eq!(driver.ask(1, 3, &[[3; 512], [4; 512]].concat(), 0), (OK, 1));
        let stats = driver.device.stats();
        assert_eq!((stats.requests, stats.bytes_read, stats.bytes_written), (5, 1536, 2048));
        assert_eq!((stats.bad_requests, stats.failed_requests, stats.bad_chains), (0, 0, 0));
    }
}

#[test]
fn the_framing_is_the_drivers_business() {
    let file = image();
    let mut driver = driver(&file);
    driver.put(HEADER, &header(0, 9));
    let (middle, size) = (RAM_LEN / 2, HEADER_LEN as u32);
    // Headers in pieces, answers in pieces that are no sectors and lie across two regions of RAM, the status behind them.
    for chain in [
        &[(HEADER, 3, 0), (HEADER + 3, 0, 0), (HEADER + 3, 13, 0), (middle - 500, 1025, WRITE)][..],
        &[(HEADER, size, 0), (middle - 500, 501, WRITE), (middle + 1, 524, WRITE)],
        &[
            (HEADER, size, 0),
            (middle - 500, 1000, WRITE),
            (middle + 500, 24, WRITE),
            (STATUS, 1, WRITE),
        ],
    ] {
        driver.put(middle - 500, &[0xee; 1025]);
        driver.put(STATUS, &[0xee]);
        driver.describe_chain(0, chain);
        assert_eq!(driver.submit(0), 1025);
        assert_eq!(driver.bytes(middle - 500, 1024), [[9; 512], [10; 512]].concat());
        let (at, len, _) = chain[chain.len() - 1];
        assert_eq!(driver.bytes(at + u64::from(len) - 1, 1), [OK]);
    }
    // In a table, as Linux has it.
    let chain = [(HEADER, size, 1, 1), (ANSWER, 512, WRITE | 1, 2), (STATUS, 1, WRITE, 0)];
    for (at, entry) in (0x5000..).step_by(16).zip(chain) {
        driver.describe_at(at, entry);
    }
    driver.describe(0, (0x5000, 48, INDIRECT, 0));
    assert_eq!(driver.submit(0), 513);
    assert_eq!(driver.bytes(ANSWER, 512), [9; 512]);
    // As many buffers as a request may have.
    let buffers = (0..SEG_MAX).map(|i| (ANSWER + 512 * u64::from(i), 512, WRITE));
    driver.put(HEADER, &header(0, 0));
    let whole: Vec<_> =
        std::iter::once((HEADER, size, 0)).chain(buffers).chain([(STATUS, 1, WRITE)]).collect();
    driver.describe_chain(0, &whole);
    assert_eq!(driver.submit(0), SEG_MAX * 512 + 1);
    assert_eq!(driver.bytes(ANSWER + 512 * 253, 512), [253; 512]);
}

#[test]
fn discarded_and_zeroed_sectors_read_as_zeroes() {
    let file = image();
    let mut driver = driver(&file);
    let range = |sector: u64, sectors: u32, flags: u32| {
        [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
    };
    let two = [range(8, 8, 0), range(32, 8, 0)].concat();
    assert_eq!(driver.ask(11, 0, &two, 0), (OK, 1));
    assert_eq!(driver.read(8, 4096), [0; 4096]);
    assert_eq!(driver.read(32, 4096), [0; 4096]);
    let two = [range(64, 3, 0), range(70, 1, 1)].concat();
    assert_eq!(driver.ask(13, 0, &two, 0), (OK, 1));
    assert_eq!(driver.read(64, 1536), [0; 1536]);
    assert_eq!(driver.read(70, 512), [0; 512]);
    for sector in [7, 16, 31, 40, 63, 67, 69, 71] {
        assert_eq!(driver.read(sector, 512), [sector as u8; 512], "sector {sector}");
    }
    // All ranges are looked at before the first is touched.
    for (ranges, status) in [
        ([range(100, 1, 0), range(SECTORS, 1, 0)].concat(), FAILED),
        ([range(100, 1, 0), range(0, 1, 2)].concat(), UNSUPPORTED),
        ([range(100, 1, 0), range(0, u32::MAX, 0)].concat(), FAILED),
    ] {
        for kind in [11, 13] {
            assert_eq!(driver.ask(kind, 0, &ranges, 0), (status, 1));
        }
    }
    assert_eq!(driver.ask(11, 0, &range(100, 1, 1), 0), (UNSUPPORTED, 1));
    assert_eq!(driver.read(100, 512), [100; 512]);
    assert_eq!(driver.device.stats().bad_requests, 7);
}

#[test]
fn the_disk_has_a_name() {
    let mut driver = driver(&image());
    driver.put(ANSWER, &[0xee; 30]);
    assert_eq!(driver.ask(8, 0, &[], 20), (OK, 21));
    assert_eq!(driver.bytes(ANSWER, 21), [&b"disk7"[..], &[0; 15], &[0xee]].concat());
    assert_eq!(driver.ask(8, 0, &[], 29), (OK, 20), "and no more is written");
    assert_eq!(driver.ask(8, 0, &[], 19), (FAILED, 0));
}

#[test]
fn a_disk_for_reading_takes_no_writes() {
    let file = image();
    let block = block(&file, true);
    let features = block.features();
    assert_eq!(features & FEATURES_OF_WRITABLE, 0);
    let mut driver = TestDriver::new(block, features);
    assert_eq!(driver.read(3, 512), [3; 512]);
    let range = [0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];
    assert_eq!(driver.ask(1, 3, &[0x55; 512], 0), (FAILED, 1));
    assert_eq!(driver.ask(11, 0, &range, 0), (FAILED, 1));
    assert_eq!(driver.ask(13, 0, &range, 0), (FAILED, 1));
    assert_eq!(contents(&file, 0, 2048), [[0; 512], [1; 512], [2; 512], [3; 512]].concat());
    let stats = driver.device.stats();
    assert_eq!((stats.bad_requests, stats.failed_requests), (3, 0));
}

#[test]
fn the_configuration_says_what_the_disk_can() {
    let file = image();
    let word = |block: &Block, offset| {
        let mut bytes = [0; 4];
        block.read_config(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    };
    let check = |read_only, expected: &[(u64, u32)]| {
        let block = block(&file, read_only);
        for offset in (0..80).step_by(4) {
            let wanted = expected.iter().find(|(at, _)| *at == offset).map_or(0, |(_, word)| *word);
            assert_eq!(word(&block, offset), wanted, "offset {offset}");
        }
        assert_eq!(word(&block, u64::MAX - 3), 0);
    };
    let common = [(0, SECTORS as u32), (12, 254), (20, 512)];
    check(true, &common);
    let clearing = [(36, 1 << 21), (40, 16), (44, 8), (48, 1 << 21), (52, 16), (56, 1)];
    check(false, &[&common[..], &clearing].concat());
}

/// A driver whose disk's threads do nothing before the guard is dropped.
fn held(file: &NamedTempFile) -> (TestDriver<Block>, MutexGuard<'static, ()>) {
    static GATE: Mutex<()> = Mutex::new(());
    let closed = GATE.lock().unwrap_or_else(PoisonError::into_inner);
    let wait = || {
        drop(GATE.lock());
        Ok(())
    };
    let config = DiskConfig { path: file.path().into(), read_only: false };
    let block = Block::new(Disk::open(&config).unwrap(), 0, wait).unwrap();
    let features = block.features();
    (TestDriver::new(block, features), closed)
}

/// Makes a quarter of the queue's requests of one sector each, and returns the chains.
fn fill_queue(driver: &mut TestDriver<Block>, kind: u32) -> Vec<u16> {
    for id in 0..QUEUE_SIZE / 4 {
        let (at, buffer) = (HEADER + 32 * u64::from(id), DATA + 1024 * u64::from(id));
        driver.put(at, &header(kind, u64::from(id)));
        driver.put(buffer, &[0xa5; 512]);
        let data = (buffer, 512, if kind == 0 { WRITE } else { 0 });
        driver.describe_chain(4 * id, &[(at, 16, 0), data, (buffer + 512, 1, WRITE)]);
        driver.add(4 * id);
    }
    driver.notify();
    (0..QUEUE_SIZE).step_by(4).collect()
}

#[test]
fn a_full_queue_waits_in_the_queue_and_is_answered_whole() {
    let file = image();
    let (mut driver, closed) = held(&file);
    let chains = fill_queue(&mut driver, 1);
    driver.run();
    let spare = |driver: &TestDriver<Block>| driver.device.guest.as_ref().unwrap().spare.len();
    assert_eq!(spare(&driver), 0, "no more than there is room for");
    assert_eq!(driver.try_take(), None);
    drop(closed);
    driver.device.wait_ready().unwrap();
    let mut answered = Vec::new();
    for _ in &chains {
        let (head, len) = driver.take();
        assert_eq!(len, 1);
        assert_eq!(driver.bytes(DATA + 256 * u64::from(head) + 512, 1), [OK]);
        assert_eq!(contents(&file, u64::from(head / 4), 512), [0xa5; 512]);
        answered.push(head);
    }
    answered.sort_unstable();
    assert_eq!(answered, chains);
    assert_eq!(spare(&driver), MOST_IN_FLIGHT);
}

#[test]
fn a_file_that_becomes_shorter_fails_reads_and_nothing_else() {
    let file = image();
    let mut driver = driver(&file);
    let resize = |file: &File, sectors| file.set_len(sectors * SECTOR).unwrap();
    resize(file.as_file(), 10);
    driver.put(ANSWER, &[0xee; 1024]);
    // Two of the four sectors are left, and no more is claimed.
    assert_eq!(driver.ask(0, 8, &[], 2048), (FAILED, 1024));
    assert_eq!(driver.bytes(ANSWER, 1024), [[8; 512], [9; 512]].concat());
    assert_eq!(driver.ask(0, 200, &[], 512), (FAILED, 0));
    assert_eq!(driver.read(9, 512), [9; 512]);
    assert_eq!(driver.device.stats().failed_requests, 2);
    assert_eq!(driver.device.stats().bad_requests, 0);
    resize(file.as_file(), SECTORS);
    assert_eq!(driver.read(200, 512), [0; 512]);
}

#[test]
fn a_device_that_is_to_be_saved_answers_what_it_has_taken_and_takes_nothing_more() {
    let file = image();
    let mut driver = TestDriver::new(block(&file, true), RING_FEATURES);
    // As many as the disk's threads take at once, and more.
    for head in 0..40 {
        let at = u64::from(head) * 0x1000;
        driver.put(HEADER + at, &header(0, 3));
        let chain = [
            (HEADER + at, HEADER_LEN as u32, 0),
            (DATA + at, 512, WRITE),
            (HEADER + at + 16, 1, WRITE),
        ];
        driver.describe_chain(3 * head, &chain);
        driver.add(3 * head);
    }
    driver.device.handle_queue(0);
    driver.device.settle();
    let [Some(position)] = driver.device.positions()[..] else { panic!("no position") };
    assert_eq!(position.next_available, position.next_used, "taken and not answered");
    assert_eq!(usize::from(position.next_used), MOST_IN_FLIGHT);
    assert_eq!(driver.device.stats().requests, MOST_IN_FLIGHT as u64);

    // Another device goes on with the others.
    let block = block(&file, true);
    let saved = driver.device.save();
    let mut queue = TestDriver::<Block>::queue(256);
    queue.set_next_avail(position.next_available);
    queue.set_next_used(position.next_used);
    drop(std::mem::replace(&mut driver.device, block));
    let restored = Driver {
        ram: driver.ram.clone(),
        features: RING_FEATURES,
        queues: vec![queue.into()],
        interrupt: driver.interrupts.clone(),
    };
    driver.device.restore(&saved, Some(restored), false).unwrap();
    for head in 0..40 {
        assert_eq!(driver.take().1, 513, "request {head}");
    }
    assert_eq!(driver.bytes(DATA + 39 * 0x1000, 4), [3; 4]);
}

#[test]
fn a_disk_of_another_size_is_not_the_one_that_was_there() {
    let file = image();
    let saved = block(&file, true).save();
    file.as_file().set_len(512).unwrap();
    let error = block(&file, true).restore(&saved, None, false);
    assert_eq!(error, Err(RestoreError::Capacity(SECTORS * SECTOR, 512)));
}
