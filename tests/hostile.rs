//! Guests that break rules hurt only themselves.

use std::fs::Permissions;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use crate::harness::guest::Guest;
use crate::harness::{Outcome, Started, cleanslate, file, run, signal, temp_dir};

/// Registers of the vsock device.
const DEVICE: u32 = 0xd000_0000;

/// Boots `guest`, lets it print "done" and expects the machine to end by the guest's own wish.
#[track_caller]
fn survives(guest: Guest) -> Outcome {
    let dir = temp_dir();
    let kernel = file(&dir, "guest.elf", &guest.print("done").power_off().elf());
    run(&["run", "--kernel", kernel.to_str().unwrap()]).expect_status(0).expect_stdout("done")
}

/// Writes `registers` in order.
fn registers(guest: Guest, registers: &[(u32, u32)]) -> Guest {
    registers.iter().fold(guest, |guest, (offset, value)| guest.store(DEVICE + offset, *value))
}

/// A driver's way to `DRIVER_OK` with all three queues at `table`, `avail` and `used`.
fn live_queues(table: u32, avail: u32, used: u32) -> Guest {
    let mut guest =
        registers(Guest::new(), &[(0x70, 1), (0x70, 3), (0x24, 1), (0x20, 1), (0x70, 11)]);
    for queue in 0..3 {
        guest = registers(
            guest,
            &[(0x30, queue), (0x38, 16), (0x80, table), (0x90, avail), (0xa0, used), (0x44, 1)],
        );
    }
    registers(guest, &[(0x70, 15)])
}

/// Waits until the device has said that only a reset can help it.
fn broken(guest: Guest) -> Guest {
    const NEEDS_RESET: u32 = 0x40;
    guest.wait_for(DEVICE + 0x70, NEEDS_RESET)
}

fn notify_all(guest: Guest) -> Guest {
    (0..3).fold(guest, |guest, queue| registers(guest, &[(0x50, queue)]))
}

#[test]
fn junk_in_every_device_register_is_ignored() {
    let mut guest = Guest::new();
    for value in [0, 1, 0xffff_ffff] {
        for offset in (0..0x120).step_by(4) {
            guest = guest.store(DEVICE + offset, value).load(DEVICE + offset);
        }
    }
    survives(guest)
        .expect_stderr("the guest broke rules")
        .expect_stderr("forbidden writes to device registers");
}

#[test]
fn forbidden_writes_are_counted_each_whether_they_wait_or_not() {
    // QueueReady before FEATURES_OK waits, also more often than there is room for; a read-only register does not.
    let guest = (0..500).fold(Guest::new(), |guest, _| guest.store(DEVICE + 0x44, 1));
    survives(guest.store(DEVICE, 1)).expect_stderr(": 501 forbidden writes to device registers");
}

#[test]
fn junk_at_every_port_and_in_the_io_apic_is_ignored() {
    let mut guest = Guest::new();
    for port in [0x60, 0x61, 0x3f8, 0x3f9, 0x3fa, 0x3fb, 0x3fc, 0x3ff, 0x602, 0x80, 0xcf8, 0xffff] {
        // in al, dx too
        guest = guest.out(port, 0xa5).raw(&[0xec]);
    }
    for index in 0..0x48 {
        guest = guest.store(0xfec0_0000, index).store(0xfec0_0010, 0xffff_00ff).load(0xfec0_0010);
    }
    survives(guest.raw(&[0x66, 0xba, 0xfb, 0x03, 0xb0, 0x03, 0xee]));
}

#[test]
fn addresses_without_ram_are_nobody() {
    survives(Guest::new().store(0xc000_0000, 1).load(0xefff_fff0).store(0xfee0_1000, 1));
}

#[test]
fn queues_outside_ram_break_the_device_and_nothing_else() {
    survives(broken(notify_all(live_queues(0xffff_fff0, 0xffff_f000, 0xffff_e000))))
        .expect_stderr("broken rings");
}

#[test]
fn rings_on_top_of_each_other_are_survived() {
    survives(notify_all(notify_all(live_queues(0x10_0000, 0x10_0000, 0x10_0000))));
}

#[test]
fn descriptors_that_loop_or_lead_nowhere_are_survived() {
    let (table, avail, used) = (0x30_0000, 0x30_1000, 0x30_2000);
    // Descriptor 0 follows itself for ever; 1 is 4 GiB long at the end of RAM; 2 is empty.
    let descriptors =
        [(0x30_4000, 44, 1, 0), (0x7ff_fff0, 0xffff_ffff, 0, 0), (0x30_5000, 0, 2, 0)];
    let mut guest = Guest::new();
    for (i, (address, len, flags, next)) in (0..).zip(descriptors) {
        let at = table + 16 * i;
        guest = guest
            .store(at, address)
            .store(at + 4, 0)
            .store(at + 8, len)
            .store(at + 12, flags | next << 16);
    }
    // All three, and heads that do not exist.
    guest = guest.store(avail, 6 << 16).store(avail + 4, 1 << 16).store(avail + 8, 0xffff_0002);
    let live = live_queues(table, avail, used);
    let guest = notify_all(Guest::new().raw(&guest_code(&guest)).raw(&guest_code(&live)));
    // The device gives chains back by the used ring.
    survives(guest.wait_for(used, u32::MAX)).expect_stderr("broken descriptor chains");
}

#[test]
fn an_available_index_that_jumps_is_survived() {
    let (table, avail, used) = (0x30_0000, 0x30_1000, 0x30_2000);
    // More than the queue holds: flags in the lower half, the index in the upper.
    let guest = live_queues(table, avail, used).store(avail, 0xffff_0000);
    survives(broken(notify_all(guest))).expect_stderr("broken rings");
}

/// The instructions alone: behind the headers, the note and 16 zero bytes of the file.
fn guest_code(guest: &Guest) -> Vec<u8> {
    let elf = guest.elf();
    elf[64 + 2 * 56 + 20 + 16..].to_vec()
}

/// A driver's way to `DRIVER_OK` with each queue in a page of its own, and `packet` in the queue to the host.
fn with_packets(packets: &[[u32; 11]]) -> Guest {
    const RINGS: u32 = 0x30_0000;
    let queue = |index: u32| (RINGS + index * 0x3000, RINGS + index * 0x3000 + 0x1000);
    let mut guest = Guest::new();
    for (number, packet) in (0..).zip(packets) {
        let at = 0x34_0000 + number * 64;
        for (place, word) in (0..).zip(packet) {
            guest = guest.store(at + 4 * place, *word);
        }
        let (table, avail) = queue(1);
        guest = guest.store(table + 16 * number, at).store(table + 16 * number + 8, 44);
        // Two numbers of chains make a word; the last one stays.
        let both = number | if number % 2 == 1 { (number - 1) << 16 } else { 0 };
        let both = if number % 2 == 1 { both.rotate_left(16) } else { both };
        guest = guest.store(avail + 4 + 4 * (number / 2), both);
        guest = guest.store(avail, (number + 1) << 16);
    }
    guest = registers(guest, &[(0x70, 1), (0x70, 3), (0x24, 1), (0x20, 1), (0x70, 11)]);
    for index in 0..3 {
        let (table, avail) = queue(index);
        guest = registers(
            guest,
            &[
                (0x30, index),
                (0x38, 16),
                (0x80, table),
                (0x90, avail),
                (0xa0, avail + 0x1000),
                (0x44, 1),
            ],
        );
    }
    registers(guest, &[(0x70, 15), (0x50, 1)])
}

const HOST_PORT: u32 = 1234;

/// A packet for [`HOST_PORT`] (virtio 1.2, section 5.10.6).
fn packet(op: u32, flags: u32) -> [u32; 11] {
    [3, 0, 2, 0, 777, HOST_PORT, 0, 1 | op << 16, flags, 0x1_0000, 0]
}

/// Runs `guest`, which connects to [`HOST_PORT`], waits until it has closed its sending direction at least, and does
/// `afterwards` with the connection.
#[track_caller]
fn reaches_the_host(guest: Guest, afterwards: impl FnOnce(&mut UnixStream)) {
    let dir = temp_dir();
    let kernel = file(&dir, "guest.elf", &guest.halt().elf());
    let path = dir.path().join("vsock");
    let port = dir.path().join(format!("vsock_{HOST_PORT}"));
    let listener = UnixListener::bind(&port).unwrap();
    // The machine's process is nobody.
    std::fs::set_permissions(&port, Permissions::from_mode(0o777)).unwrap();
    std::fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
    let arguments = ["run", "--kernel", kernel.to_str().unwrap(), "--uds", path.to_str().unwrap()];
    let program = Started::new(cleanslate(&arguments));
    let (mut stream, _) = listener.accept().unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    afterwards(&mut stream);
    signal(&program.child, rustix::process::Signal::TERM);
    program.finish("cleanslate run --kernel --uds").expect_status(130);
}

#[test]
fn a_guest_reaches_a_port_of_the_host_and_half_closes() {
    // Request, then shutdown of sending alone. No buffers are posted for answers.
    let guest = with_packets(&[packet(1, 0), packet(4, 2)]);
    reaches_the_host(guest, |stream| stream.write_all(b"still open").unwrap());
}

#[test]
fn a_guest_that_resets_its_device_drops_its_connections() {
    // The used ring of the queue to the host counts the packet once the host is reached.
    const USED: u32 = 0x30_5000;
    let guest = with_packets(&[packet(1, 0)]).wait_for(USED, 0xffff_0000);
    reaches_the_host(registers(guest, &[(0x70, 0)]), |stream| {
        assert!(stream.write_all(b"closed").is_err());
    });
}
