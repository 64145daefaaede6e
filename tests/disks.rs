//! `--disk` and `--rng`: devices that a guest uses, and what becomes of them when files or users are wrong.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use agent_protocol::{DiskAnswer, DiskDescription, DiskRequest, GuestReset, Sweep};
use vmm::agent::Agent;

use crate::harness::held::Held;
use crate::harness::{Started, cleanslate, eventually, file, run, skipped, temp_dir};

const SECTOR: usize = 512;
const SECTORS: u64 = 4096;

/// An image of [`SECTORS`] sectors; each byte says in which sector it is.
fn image(dir: &tempfile::TempDir, name: &str) -> PathBuf {
    let bytes: Vec<_> = (0..SECTORS).flat_map(|sector| [sector as u8; SECTOR]).collect();
    file(dir, name, &bytes)
}

#[track_caller]
fn ask(agent: &mut Agent, number: u8, request: DiskRequest) -> DiskAnswer {
    agent.disk(number, request).unwrap().unwrap()
}

#[track_caller]
fn read(agent: &mut Agent, number: u8, sector: u64, bytes: u32) -> Vec<u8> {
    match ask(agent, number, DiskRequest::Read { sector, bytes }) {
        DiskAnswer::Bytes(bytes) => bytes,
        other => panic!("sector {sector}: {other:?}"),
    }
}

fn contents(path: &Path, sector: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    File::open(path).unwrap().read_exact_at(&mut bytes, sector * SECTOR as u64).unwrap();
    bytes
}

#[track_caller]
fn expect_no_dma_violation(agent: &mut Agent) {
    let dma = agent.report().unwrap().dma;
    assert_eq!((dma.violation_count, dma.violations), (0, vec![]));
}

#[test]
fn a_guest_reads_writes_flushes_discards_and_zeroes_its_disk() {
    let dir = temp_dir();
    let path = image(&dir, "disk");
    let machine = Held::start_with(&["--disk", path.to_str().unwrap()]);
    let mut agent = machine.agent(1);
    let agent = &mut agent;
    let DiskAnswer::Description(description) = ask(agent, 0, DiskRequest::Describe) else {
        panic!("no description");
    };
    let DiskDescription { sectors, name, features } = description;
    assert_eq!((sectors, name.as_str()), (SECTORS, "disk0"));
    // SEG_MAX, BLK_SIZE, FLUSH, DISCARD, WRITE_ZEROES, indirect descriptors, event index, VERSION_1.
    assert_eq!(
        features,
        1 << 2 | 1 << 6 | 1 << 9 | 1 << 13 | 1 << 14 | 1 << 28 | 1 << 29 | 1 << 32
    );
    assert_eq!(read(agent, 0, 7, 1024), [[7; SECTOR], [8; SECTOR]].concat());
    assert_eq!(read(agent, 0, SECTORS - 128, 64 << 10), contents(&path, SECTORS - 128, 64 << 10));

    let bytes: Vec<_> = (0..64 << 10).map(|i: u32| (i * 7 % 251) as u8).collect();
    assert_eq!(
        ask(agent, 0, DiskRequest::Write { sector: 100, bytes: bytes.clone() }),
        DiskAnswer::Done
    );
    assert_eq!(ask(agent, 0, DiskRequest::Flush), DiskAnswer::Done);
    assert_eq!(contents(&path, 100, 64 << 10), bytes);
    assert_eq!(contents(&path, 99, SECTOR), [99; SECTOR]);
    assert_eq!(read(agent, 0, 100, 64 << 10), bytes);

    let blocks = || File::open(&path).unwrap().metadata().unwrap().blocks();
    let before = blocks();
    assert_eq!(
        ask(agent, 0, DiskRequest::Discard { sector: 1024, sectors: 1024 }),
        DiskAnswer::Done
    );
    assert!(blocks() <= before - 1000, "{} blocks of {before} are left", blocks());
    assert_eq!(read(agent, 0, 1024, 4096), [0; 4096]);
    for (sector, may_unmap) in [(3000, false), (3100, true)] {
        let request = DiskRequest::WriteZeroes { sector, sectors: 3, may_unmap };
        assert_eq!(ask(agent, 0, request), DiskAnswer::Done);
        assert_eq!(read(agent, 0, sector, 1536), [0; 1536]);
        assert_eq!(read(agent, 0, sector + 3, 512), [(sector + 3) as u8; 512]);
    }
    for writes in [false, true] {
        let sweep = Sweep { writes, bytes: 4096, requests: 50, stride: 7 };
        assert_eq!(ask(agent, 0, DiskRequest::Sweep(sweep)), DiskAnswer::Done);
    }
    expect_no_dma_violation(agent);
    machine.end();
}

#[test]
fn what_a_disk_does_not_have_or_may_not_do_fails_for_the_guest_alone() {
    let dir = temp_dir();
    let (first, second) = (image(&dir, "first"), image(&dir, "second"));
    let read_only = format!("{},ro", second.display());
    let machine = Held::start_with(&["--disk", first.to_str().unwrap(), "--disk", &read_only]);
    let mut agent = machine.agent(1);
    let agent = &mut agent;
    let failed = DiskAnswer::Status(1);
    let beyond = [
        DiskRequest::Read { sector: SECTORS, bytes: 512 },
        DiskRequest::Read { sector: u64::MAX, bytes: 512 },
        DiskRequest::Write { sector: SECTORS - 1, bytes: vec![1; 1024] },
        DiskRequest::Read { sector: 0, bytes: 100 },
        DiskRequest::Discard { sector: SECTORS, sectors: 1 },
        DiskRequest::WriteZeroes { sector: 0, sectors: u32::MAX, may_unmap: false },
    ];
    for request in beyond {
        assert_eq!(ask(agent, 0, request.clone()), failed, "{request:?}");
    }
    assert_eq!(ask(agent, 1, DiskRequest::Write { sector: 0, bytes: vec![1; 512] }), failed);
    assert_eq!(ask(agent, 1, DiskRequest::Discard { sector: 0, sectors: 8 }), failed);
    assert_eq!(read(agent, 1, 0, 512), [0; 512]);
    assert_eq!(contents(&second, 0, SECTOR), [0; SECTOR]);
    assert_eq!(read(agent, 0, SECTORS - 1, 512), [255; 512]);
    assert!(agent.disk(2, DiskRequest::Flush).unwrap().is_err());
    assert!(agent.random(64).unwrap().unwrap_err().contains("no device 0 of type 4"));
    expect_no_dma_violation(agent);
    machine.end();
}

#[test]
fn random_bytes_are_the_hosts_and_never_the_same() {
    let machine = Held::start_with(&["--rng"]);
    let mut seen = Vec::new();
    for life in 1..=2 {
        let mut agent = machine.agent(life);
        for wanted in [32, 256, 4096] {
            let bytes = agent.random(wanted).unwrap().unwrap();
            assert_eq!(bytes.len(), wanted.min(256) as usize, "of {wanted}");
            seen.push(bytes[..32].to_vec());
        }
        expect_no_dma_violation(&mut agent);
        agent.reset(GuestReset::I8042).unwrap();
    }
    seen.sort();
    seen.dedup();
    assert_eq!(seen.len(), 6);
    machine.end();
}

#[test]
fn a_reset_keeps_the_disk_and_forgets_its_driver() {
    let dir = temp_dir();
    let path = image(&dir, "disk");
    let machine = Held::start_with(&["--rng", "--disk", path.to_str().unwrap()]);
    for life in 1..=10_u8 {
        let mut agent = machine.agent(life.into());
        assert_eq!(read(&mut agent, 0, 5, 512), [if life == 1 { 5 } else { life - 1 }; 512]);
        let write = DiskRequest::Write { sector: 5, bytes: vec![life; 512] };
        assert_eq!(ask(&mut agent, 0, write), DiskAnswer::Done);
        agent.random(1).unwrap().unwrap();
        agent.reset(if life % 2 == 0 { GuestReset::I8042 } else { GuestReset::Triple }).unwrap();
    }
    machine.end();
}

#[test]
fn a_machine_has_the_devices_that_were_asked_for_and_no_others() {
    let dir = temp_dir();
    let path = image(&dir, "disk");
    let disk = path.to_str().unwrap();
    let check = |arguments: &[&str], devices, rng: bool, disks: usize| {
        let outcome = run(&[&["run", "--json"], arguments].concat()).expect_status(0);
        let json = outcome.json();
        let lines = json["lives"][0]["report"]["dmesg"].as_array().unwrap();
        let registered =
            lines.iter().filter(|line| line.to_string().contains("Registering device")).count();
        assert_eq!(registered, devices, "{outcome}");
        assert_eq!(json["guest"].get("rng").is_some(), rng, "{outcome}");
        let counted = json["guest"].get("disks").map_or(0, |disks| disks.as_array().unwrap().len());
        assert_eq!(counted, disks, "{outcome}");
    };
    check(&[], 1, false, 0);
    check(&["--rng"], 2, true, 0);
    check(&["--disk", disk], 2, false, 1);
    check(&["--rng", "--disk", disk, "--dma-platform", "--no-jail"], 3, true, 1);
    let read_only = format!("{disk},ro");
    let many: Vec<_> = std::iter::repeat_n(["--disk", &read_only], 17).flatten().collect();
    check(&[&many[..], &["--rng", "--resets", "2", "--poison"]].concat(), 19, true, 17);
}

#[test]
fn a_file_that_becomes_shorter_fails_the_guest_and_not_the_machine() {
    let dir = temp_dir();
    let path = image(&dir, "disk");
    let machine = Held::start_with(&["--disk", path.to_str().unwrap()]);
    let mut agent = machine.agent(1);
    assert_eq!(read(&mut agent, 0, 3000, 512), [3000_u32 as u8; 512]);
    File::options().write(true).open(&path).unwrap().set_len(100 * SECTOR as u64).unwrap();
    for sector in [3000, 2000] {
        let request = DiskRequest::Read { sector, bytes: 512 };
        assert_eq!(ask(&mut agent, 0, request), DiskAnswer::Status(1));
    }
    assert_eq!(read(&mut agent, 0, 99, 512), [99; 512]);
    agent.ping().unwrap();
    rustix::process::kill_process(
        rustix::process::Pid::from_child(machine.child()),
        rustix::process::Signal::INT,
    )
    .unwrap();
    let outcome =
        machine.outcome().expect_status(0).expect_stderr("the guest is told that it failed");
    assert_eq!(outcome.stderr.matches("is told").count(), 1, "{outcome}");
}

#[test]
fn a_file_that_may_not_grow_or_a_full_disk_fails_the_guest_and_not_the_machine() {
    let dir = temp_dir();
    let path = dir.path().join("disk");
    File::create(&path).unwrap().set_len(256 << 20).unwrap();
    // RAM is a file as well, of 128 MiB.
    let limit = ["--resource-limit", "fsize=209715200"];
    let machine = Held::start_with(&[&["--disk", path.to_str().unwrap()], &limit[..]].concat());
    let mut agent = machine.agent(1);
    let write = |sector| DiskRequest::Write { sector, bytes: vec![0xa5; 512] };
    assert_eq!(ask(&mut agent, 0, write(409_600)), DiskAnswer::Status(1));
    assert_eq!(ask(&mut agent, 0, write(409_599)), DiskAnswer::Done);
    assert_eq!(read(&mut agent, 0, 409_600, 512), [0; 512]);
    machine.end();

    if !rustix::process::geteuid().is_root() {
        return skipped("a full disk takes a file system of its own, and root to mount it");
    }
    let small = dir.path().join("small");
    std::fs::create_dir(&small).unwrap();
    let socket = dir.path().join("vsock");
    let script = "mount -t tmpfs -o size=1m none \"$1\" && truncate -s 64M \"$1/disk\" && exec \"$2\" run --hold --uds \
                  \"$3\" --disk \"$1/disk\"";
    let program = cleanslate(&[]);
    let mut command = Command::new("unshare");
    command.args(["-m", "sh", "-c", script, "sh"]).arg(&small);
    command.arg(program.get_program()).arg(&socket);
    command.stdin(std::process::Stdio::null());
    command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    let started = Started::new(command);
    eventually("the machine has a socket", || socket.exists());
    let mut agent = crate::harness::held::agent_at(&socket, 1);
    let write = |sector| DiskRequest::Write { sector, bytes: vec![0xa5; 64 << 10] };
    let full =
        (0..64).map(|i| ask(&mut agent, 0, write(i * 128))).position(|a| a != DiskAnswer::Done);
    assert!((1..17).contains(&full.expect("1 MiB has no room for 4")), "{full:?}");
    // What is there can be read, and what is given back can be used again.
    assert_eq!(read(&mut agent, 0, 0, 512), [0xa5; 512]);
    let discard = DiskRequest::Discard { sector: 0, sectors: 1024 };
    assert_eq!(ask(&mut agent, 0, discard), DiskAnswer::Done);
    assert_eq!(ask(&mut agent, 0, write(100_000)), DiskAnswer::Done);
    crate::harness::signal(&started.child, rustix::process::Signal::INT);
    let outcome = started.finish("unshare … cleanslate run --hold").expect_status(0);
    outcome.expect_stderr("No space left on device");
}

#[test]
fn files_that_are_no_disks_are_refused_in_one_line() {
    let dir = temp_dir();
    let path = image(&dir, "disk");
    let disk = path.to_str().unwrap();
    let check = |arguments: &[&str], message: &str| {
        let outcome = run(&[&["run"], arguments].concat()).expect_status(2);
        let outcome = outcome.expect_stderr(message).expect_one_line_of_stderr();
        assert!(outcome.stdout.is_empty(), "{outcome}");
    };
    let missing = dir.path().join("missing");
    check(&["--disk", missing.to_str().unwrap()], "missing\": No such file or directory");
    check(&["--disk", dir.path().to_str().unwrap()], "neither a regular file nor a block device");
    check(&["--disk", "/dev/zero,ro"], "neither a regular file nor a block device");
    check(&["--disk", file(&dir, "odd", &[0; 700]).to_str().unwrap()], "has 700 bytes");
    check(&["--disk", file(&dir, "none", &[]).to_str().unwrap()], "has 0 bytes");
    check(&["--disk", "/sys/kernel/notes"], "\",ro\" behind the path lets the guest only read it");
    check(&["--disk", ",ro"], "the path is missing");
    check(&["--disk", disk, "--disk", disk], "is in use");
    let read_only = format!("{disk},ro");
    check(&["--disk", &read_only, "--disk", disk], "is in use");
    let many: Vec<_> = std::iter::repeat_n(["--disk", &read_only], 18).flatten().collect();
    check(&many, "--disk is given 18 times; a machine has 17 disks at most");

    let machine = Held::start_with(&["--disk", disk]);
    check(&["--disk", disk], "is in use");
    check(&["--disk", &read_only], "is in use");
    machine.end();
    run(&["run", "--disk", disk, "--disk", file(&dir, "other", &[0; 512]).to_str().unwrap()])
        .expect_status(0);
}
