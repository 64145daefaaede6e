//! `--dma-audit`: what is wrong with a guest's DMA buffers is found on the host as it is in the guest, and ours are as they
//! should be.

use serde_json::Value;

use crate::harness::agent;
use crate::harness::guest::Guest;
use crate::harness::{Outcome, file, run, temp_dir};

/// An agent that is built with its event buffers packed as Linux has them, beside a byte that it writes.
pub fn packed_agent() -> &'static str {
    agent::built_with("packed-event-buffers")
}

/// The names of the findings of one life.
fn findings(json: &Value, life: u64) -> Vec<&str> {
    let all = json["findings"].as_array().unwrap().iter();
    all.filter(|f| f["life"] == life).map(|f| f["name"].as_str().unwrap()).collect()
}

/// Kinds of violations, with how often each was seen.
fn violations(list: &Value) -> Vec<(&str, u64)> {
    let all = list.as_array().map(Vec::as_slice).unwrap_or_default().iter();
    all.map(|v| (v["name"].as_str().unwrap(), v["count"].as_u64().unwrap())).collect()
}

#[track_caller]
fn expect_nothing_wrong(outcome: &Outcome) {
    let json = outcome.json();
    let audit = &json["dma_audit"];
    assert_eq!(audit["mode"], "strict", "{outcome}");
    assert_eq!(violations(&audit["violations"]), [], "{outcome}");
    let counts = ["must", "ours", "observed", "unwatched"].map(|count| audit[count].as_u64());
    assert_eq!(counts, [Some(0); 4], "{outcome}");
    // Packets to the guest and events are posted in every life, and there is one packet to the host at least.
    let lives = json["lives"].as_array().unwrap().len() as u64;
    assert!(audit["chains"].as_u64().unwrap() >= lives * 41, "{outcome}");
}

#[test]
fn the_agent_does_nothing_wrong_in_any_life() {
    let resets = ["--resets", "10", "--reset-via", "host,i8042,cf9,acpi,triple"];
    let strict = ["run", "--json", "--dma-audit", "strict"];
    for more in
        [&[][..], &["--poison"], &["--pmu", "emulated", "--poison"], &["--dma-platform", "--rng"]]
    {
        let arguments = [&strict[..], &resets, more].concat();
        expect_nothing_wrong(&run(&arguments).expect_status(0));
    }
}

#[test]
fn the_agent_does_nothing_wrong_at_any_moment() {
    let soak = ["soak", "--vms", "2", "--resets", "100", "--seed", "11", "--keep-going"];
    let dir = temp_dir();
    let bundle = dir.path().join("bundle");
    let more = ["--dma-audit", "strict", "--bundle", bundle.to_str().unwrap()];
    run(&[&soak[..], &more].concat()).expect_status(0).expect_stdout("202 lives, no findings");
}

#[test]
fn nobody_looks_unless_asked_to() {
    let outcome = run(&["run", "--json", "--agent", packed_agent()]).expect_status(1);
    let json = outcome.json();
    assert_eq!(json["dma_audit"], Value::Null, "{outcome}");
    assert_eq!(json["lives"][0]["dma_audit"], Value::Null, "{outcome}");
    assert_eq!(findings(&json, 1), ["dma-violation"], "{outcome}");
}

#[test]
fn packed_event_buffers_are_seen_by_both_sides() {
    let arguments = ["run", "--json", "--agent", packed_agent(), "--resets", "1", "--dma-audit"];
    let expected = [
        ("unaligned", 8),
        ("shares-line", 7),
        // The byte beside them, when the life ends.
        ("dirtied-line", 1),
        ("packed-event-buffers", 1),
    ];
    let outcome = run(&[&arguments[..], &["strict"]].concat()).expect_status(1);
    let json = outcome.json();
    for life in [1, 2] {
        let audited = &json["lives"][life as usize - 1]["dma_audit"];
        assert_eq!(violations(audited), expected, "{outcome}");
        assert!(audited.as_array().unwrap().iter().all(|v| v["queue"] == 2), "{outcome}");
        // What is only observed is no finding; the guest's own tracker counts buffers.
        let found = ["dma-audit", "dma-audit", "dma-audit", "dma-violation"];
        assert_eq!(findings(&json, life), found, "{outcome}");
        let tracker = &json["lives"][life as usize - 1]["report"]["dma"];
        assert_eq!(tracker["violation_count"], 15, "{outcome}");
        let tracker = tracker["violations"].to_string();
        assert!(tracker.contains("is not made of whole cache lines"), "{outcome}");
        assert!(tracker.contains("shares a cache line with"), "{outcome}");
    }
    let audit = &json["dma_audit"];
    let counts = ["must", "ours", "observed"].map(|level| audit[level].as_u64());
    assert_eq!(counts, [Some(0), Some(32), Some(2)], "{outcome}");
    // A report is about what no driver may do, so that the guest's own word is left.
    let outcome = run(&[&arguments[..], &["report"]].concat()).expect_status(1);
    let json = outcome.json();
    assert_eq!(findings(&json, 1), ["dma-violation"], "{outcome}");
    assert_eq!(violations(&json["lives"][0]["dma_audit"]), expected, "{outcome}");
}

#[test]
fn a_human_reads_what_is_wrong_in_words() {
    let arguments = ["run", "--agent", packed_agent(), "--dma-audit"];
    run(&[&arguments[..], &["report"]].concat())
        .expect_status(1)
        .expect_stdout("violations: 0 must, 16 ours, 1 observed")
        .expect_stdout("seen by the DMA audit: descriptor 0 of vsock queue 2 (event), 0x")
        .expect_stdout("8 packed event buffers, the virtio_vsock event_list of Linux")
        .expect_stdout("at an odd address");
    run(&[&arguments[..], &["strict"]].concat())
        .expect_status(1)
        .expect_stdout("finding in life 1: dma-audit: descriptor 0 of vsock queue 2 (event), 0x")
        .expect_stdout("does not begin with a cache line (8 such)")
        .expect_stdout("not clean: 1 life, 4 findings");
    run(&["run", "--dma-audit", "report"])
        .expect_status(0)
        .expect_stdout("buffers, nothing wrong\n");
}

/// A kernel that posts one descriptor on the vsock device's queue `queue` before the device runs, and turns itself off.
fn posts(queue: u32, (address, len, flags): (u32, u32, u32)) -> Guest {
    const DEVICE: u32 = 0xd000_0000;
    const TABLE: u32 = 0x30_0000;
    let (available, used) = (TABLE + 0x1000, TABLE + 0x2000);
    let guest = Guest::new().store(TABLE, address).store(TABLE + 8, len).store(TABLE + 12, flags);
    let guest = guest.store(available, 1 << 16);
    let steps = [
        (0x70, 1),
        (0x70, 3),
        (0x24, 1),
        (0x20, 1),
        (0x70, 11),
        (0x30, queue),
        (0x38, 16),
        (0x80, TABLE),
        (0x90, available),
        (0xa0, used),
        (0x44, 1),
        (0x70, 15),
    ];
    let write = |guest: Guest, (offset, value)| guest.store(DEVICE + offset, value);
    steps.into_iter().fold(guest, write).power_off()
}

#[test]
fn any_kernel_is_audited_and_told_what_it_did() {
    let check = |guest: Guest, mode: &str, status, what: &str| {
        let dir = temp_dir();
        let kernel = file(&dir, "guest.elf", &guest.elf());
        run(&["run", "--kernel", kernel.to_str().unwrap(), "--dma-audit", mode])
            .expect_status(status)
            .expect_stderr("the guest turned the machine off\n")
            .expect_stderr(what);
    };
    const WRITE: u32 = 2;
    let in_order = (0x40_0000, 64, WRITE);
    check(posts(2, in_order), "strict", 0, "DMA audit: 1 chain with 1 buffer, nothing wrong\n");
    let outside = "cleanslate: dma-audit: descriptor 0 of vsock queue 2 (event), 0x7ffffff0+0x40, is not in RAM\n";
    check(posts(2, (0x7fff_fff0, 64, WRITE)), "report", 1, outside);
    let unaligned =
        "descriptor 0 of vsock queue 2 (event), 0x400021+0x4, does not begin with a cache line\n";
    let seen = format!("cleanslate: seen by the DMA audit: {unaligned}");
    check(posts(2, (0x40_0021, 4, WRITE)), "report", 0, &seen);
    let found = format!("cleanslate: dma-audit: {unaligned}");
    check(posts(2, (0x40_0021, 4, WRITE)), "strict", 1, &found);
}

#[test]
fn an_agent_in_a_file_is_led_like_ours() {
    let dir = temp_dir();
    let image = dir.path().join("agent.elf");
    let image = image.to_str().unwrap();
    run(&["agent", "export", image]).expect_status(0);
    run(&["run", "--agent", image, "--resets", "3", "--poison"])
        .expect_status(0)
        .expect_stdout("clean: 4 lives");
}
