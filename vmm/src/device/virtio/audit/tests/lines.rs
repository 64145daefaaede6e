//! What happens in cache lines while a device has them, and the event buffers of Linux.

use super::*;

/// Address of Linux's `event_list` in its line, on 6.18: the structure is allocated at a multiple of 64, the list at 313.
const EVENT_LIST: u64 = 0x2_0000 + 313;

/// The buffer number `index` of eight, four bytes each, one behind the other.
fn event(index: u16) -> Desc {
    (EVENT_LIST + 4 * u64::from(index), 4, WRITE, 0)
}

/// A guest that has posted its events as Linux does.
fn linux() -> Guest {
    let mut guest = Guest::new();
    for index in 0..8 {
        guest.describe(EVENT, index, event(index));
        guest.add(EVENT, index);
    }
    guest.device.look();
    guest
}

#[test]
fn the_event_list_of_linux_is_known_by_name() {
    let guest = linux();
    let found = guest.found();
    let kinds: Vec<_> = found.iter().map(|violation| (violation.name, violation.count)).collect();
    let expected = [
        (Kind::Unaligned, 8),
        // 317 to 321, and two lines at 320.
        (Kind::Straddles, 1),
        (Kind::SharesLine, 7),
        (Kind::PackedEventBuffers, 1),
    ];
    assert_eq!(kinds, expected, "{found:#?}");
    let packed = found.last().unwrap();
    assert_eq!(packed.level, Level::Observed);
    assert_eq!((packed.address, packed.len), (EVENT_LIST, 32));
    let words = "is the first of 8 packed event buffers, the virtio_vsock event_list of Linux (before 7.1 beside other \
                 fields): 8 times 4 bytes, at an odd address, in 2 cache lines";
    assert!(packed.detail.contains(words), "{packed:#?}");
}

#[test]
fn events_that_keep_apart_are_not_packed() {
    let mut guest = Guest::new();
    for index in 0..8 {
        guest.post(EVENT, index, &[(0x2_0000 + 64 * u64::from(index), 4, WRITE, 0)]);
    }
    assert_eq!(guest.found(), []);
    // Nor is what lies one behind the other on another queue.
    guest.post(TO_GUEST, 0, &[(0x3_0000, 4, NEXT | WRITE, 1), (0x3_0004, 4, WRITE, 0)]);
    assert!(!guest.kinds().contains(&Kind::PackedEventBuffers));
}

#[test]
fn a_byte_that_the_guest_writes_beside_its_events_is_seen() {
    let check = |at: u64, act: fn(&mut Guest)| {
        let mut guest = linux();
        guest.found();
        guest.write(at, 1);
        act(&mut guest);
        let found = guest.found();
        assert_eq!(
            found.iter().map(|v| v.name).collect::<Vec<_>>(),
            [Kind::DirtiedLine],
            "{at:#x}"
        );
        let words = format!("the guest wrote to {at:#x} while the device had it");
        assert!(found[0].detail.contains(&words), "{found:#?}");
        assert_eq!(found[0].count, 1);
    };
    // `event_run` and `guest_cid`, when an event is used, when the device is reset, and at the end of a life.
    for at in [EVENT_LIST - 1, EVENT_LIST + 35] {
        check(at, |guest| (0..8).for_each(|head| guest.release(EVENT, head)));
        check(at, |guest| guest.device.end());
        check(at, |_| {});
    }
}

#[test]
fn what_the_device_writes_is_not_the_guests() {
    let mut guest = linux();
    guest.found();
    for round in 0..100_u16 {
        let index = round % 8;
        // The device writes all four bytes; others are still its own and it may have begun with them.
        for at in EVENT_LIST..EVENT_LIST + 32 {
            guest.write(at, round as u8);
        }
        guest.release(EVENT, index);
        guest.post(EVENT, index, &[event(index)]);
    }
    assert!(!guest.kinds().contains(&Kind::DirtiedLine));
}

#[test]
fn a_guest_that_clears_an_event_before_it_posts_it_again_dirties_the_others_line() {
    let mut guest = linux();
    guest.found();
    guest.release(EVENT, 3);
    guest.write(EVENT_LIST + 12, 0xff);
    guest.post(EVENT, 3, &[event(3)]);
    assert!(guest.kinds().contains(&Kind::DirtiedLine));
}

#[test]
fn each_write_is_told_once() {
    let guest = linux();
    guest.found();
    for round in 1..=3 {
        guest.write(EVENT_LIST - 1, round);
        assert_eq!(guest.kinds(), [Kind::DirtiedLine], "{round}");
        assert_eq!(guest.found(), []);
    }
}

#[test]
fn lines_that_nobody_has_may_be_written() {
    let mut guest = linux();
    (0..8).for_each(|head| guest.release(EVENT, head));
    guest.expect_idle();
    guest.found();
    guest.write(EVENT_LIST - 1, 9);
    guest.post(EVENT, 0, &[(0x3_0000, 64, WRITE, 0)]);
    // A whole line of the device's own is compared with nothing.
    guest.write(0x3_0000, 9);
    assert_eq!(guest.found(), []);
}

#[test]
fn used_rings_in_a_buffers_line_are_the_devices_to_write() {
    let mut guest = Guest::new();
    guest.post(TO_GUEST, 0, &[(0x2050, 8, WRITE, 0)]);
    guest.found();
    guest.write(0x2041, 1);
    assert_eq!(guest.found(), []);
    // One that comes later, too.
    guest.post(TO_GUEST, 1, &[(0x2_2050, 8, WRITE, 0)]);
    guest.audit.add_device(VIRTIO_ID_BLOCK).begin(0, &[queue(0x2_0000)]);
    guest.found();
    guest.write(0x2_2041, 1);
    assert_eq!(guest.found(), []);
    guest.write(0x2_2046, 1);
    assert_eq!(guest.kinds(), [Kind::DirtiedLine]);
}
