//! A reset ends what is going on before anybody else has the memory.

use super::*;

/// A request that keeps a thread busy for long: as many bytes as one may have, all into the same buffer. Its file is empty.
fn long_read() -> (NamedTempFile, TestDriver<Block>) {
    const PIECE: u32 = 4 << 20;
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(4 << 30).unwrap();
    let mut driver = driver(&file);
    driver.put(HEADER, &header(0, 0));
    let buffers = (0..SEG_MAX).map(|_| (DATA, PIECE, WRITE));
    let chain: Vec<_> = std::iter::once((HEADER, HEADER_LEN as u32, 0))
        .chain(buffers)
        .chain([(STATUS, 1, WRITE)])
        .collect();
    driver.describe_chain(0, &chain);
    driver.add(0);
    driver.notify();
    (file, driver)
}

#[test]
fn after_a_reset_no_thread_writes_into_ram() {
    let (_file, mut driver) = long_read();
    // Until the first bytes have come.
    driver.put(DATA, &[0xee; 64]);
    while driver.bytes(DATA, 64) == [0xee; 64] {
        std::thread::yield_now();
    }
    driver.device.reset();
    driver.put(DATA, &vec![0xa5; 4 << 20]);
    driver.put(STATUS, &[0xa5]);
    let TestDriver { device, ram, interrupts, .. } = driver;
    // Its threads end here, whatever they were doing.
    drop(device);
    let mut bytes = vec![0; 4 << 20];
    vm_memory::Bytes::read_slice(&ram, &mut bytes, vm_memory::GuestAddress(DATA)).unwrap();
    assert!(bytes.iter().all(|byte| *byte == 0xa5));
    let mut status = [0];
    vm_memory::Bytes::read_slice(&ram, &mut status, vm_memory::GuestAddress(STATUS)).unwrap();
    assert_eq!(status, [0xa5]);
    assert_eq!(interrupts.used.load(std::sync::atomic::Ordering::SeqCst), 0);
}

#[test]
fn requests_of_the_earlier_life_are_not_answered_in_the_next() {
    let (_file, mut driver) = long_read();
    // More than there are threads: some of them wait.
    for _ in 0..10 {
        driver.add(0);
    }
    driver.notify();
    driver.device.reset();
    let mut driver = TestDriver::new(driver.device, RING_FEATURES);
    assert_eq!(driver.run(), 0);
    assert_eq!(driver.try_take(), None);
    assert_eq!(driver.read(3, 512), [0; 512]);
    assert_eq!(driver.try_take(), None);
    assert_eq!(driver.device.stats().failed_requests, 0);
}

#[test]
fn a_disk_works_in_its_next_life() {
    let file = image();
    let mut block = block(&file, false);
    for life in 0..20_u8 {
        let features = block.features();
        let mut driver = TestDriver::new(block, features);
        assert_eq!(driver.read(1, 512), [if life == 0 { 1 } else { life - 1 }; 512]);
        assert_eq!(driver.ask(1, 1, &[life; 512], 0), (OK, 1));
        driver.device.reset();
        block = driver.device;
    }
}
