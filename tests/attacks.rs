//! An agent that is after its monitor (`guest-agent/unikernel/src/attack.rs`): before each reset it attacks every virtio device, and
//! after it everything has to be as the ordinary agent wants it.

use std::collections::VecDeque;
use std::fs::Permissions;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::thread;

use agent_protocol::{GuestReset, Reply, Request, frame};
use serde_json::Value;
use tempfile::TempDir;

use crate::harness::agent;
use crate::harness::client::{ask, greeted, try_greeted};
use crate::harness::held::Held;
use crate::harness::holdings::Holdings;
use crate::harness::{eventually, file, run, temp_dir};

/// The host's port that attacks find somebody at.
const HOST_PORT: u32 = 1234;
/// Resets by the guest, so that it knows of them beforehand.
const BY_GUEST: &str = "i8042,cf9,acpi,triple";

/// A directory with a disk and a listener for the guest's connections.
struct Field {
    dir: TempDir,
    image: &'static str,
    disk: PathBuf,
}

const DISK_LEN: usize = 64 << 10;

impl Field {
    fn new() -> Self {
        let dir = temp_dir();
        // The machine's process is nobody.
        std::fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
        let image = agent::built_with("attacks");
        let disk = file(&dir, "disk.img", &[0x5a; DISK_LEN]);
        let port = dir.path().join(format!("vsock_{HOST_PORT}"));
        let listener = UnixListener::bind(&port).unwrap();
        std::fs::set_permissions(&port, Permissions::from_mode(0o777)).unwrap();
        thread::spawn(move || {
            // Some are kept for a while and never read from.
            let mut kept = VecDeque::new();
            for stream in listener.incoming().map_while(Result::ok) {
                kept.push_back(stream);
                if kept.len() > 20 {
                    kept.pop_front();
                }
            }
        });
        Self { image, dir, disk }
    }

    /// Arguments for a machine with every device, whose agent attacks with `orders`.
    fn arguments(&self, orders: &str) -> Vec<String> {
        let disk = self.disk.to_str().unwrap();
        ["--agent", self.image, "--rng", "--disk", disk, "--cmdline", orders]
            .map(String::from)
            .to_vec()
    }

    /// Runs such a machine, with these arguments as well.
    #[track_caller]
    fn run(&self, orders: &str, arguments: &[&str]) -> (Option<i32>, Value) {
        let socket = self.dir.path().join("vsock");
        let own = self.arguments(orders);
        let mut all = vec!["run", "--json", "--uds", socket.to_str().unwrap()];
        all.extend(own.iter().map(String::as_str));
        all.extend(arguments);
        let outcome = run(&all);
        (outcome.status, outcome.json())
    }
}

/// A counter in what the guest did wrong: `vsock.bad_chains`.
fn counter(json: &Value, path: &str) -> u64 {
    let value = path.split('.').fold(&json["guest"], |value, key| match key.parse::<usize>() {
        Ok(index) => &value[index],
        Err(_) => &value[key],
    });
    value.as_u64().unwrap_or_else(|| panic!("no {path} in {}", json["guest"]))
}

#[test]
fn after_each_attack_the_next_life_is_clean_and_every_offence_was_counted() {
    const SEEDS: u64 = 4;
    let field = Field::new();
    let mut counted = Vec::new();
    for seed in 0..SEEDS {
        let orders = format!("attack.seed={seed} attack.rounds=20");
        let (status, json) = field.run(&orders, &["--resets", "4", "--reset-via", BY_GUEST]);
        assert_eq!(json["findings"], Value::Array(Vec::new()), "seed {seed}");
        assert_eq!((status, json["lives"].as_array().unwrap().len()), (Some(0), 5), "seed {seed}");
        counted.push(json);
    }
    for offence in [
        "refused_register_writes",
        "vsock.bad_chains",
        "vsock.broken_rings",
        "vsock.bad_packets",
        "vsock.credit_violations",
        "rng.bad_chains",
        "rng.broken_rings",
        "disks.0.bad_chains",
        "disks.0.broken_rings",
        "disks.0.bad_requests",
    ] {
        let count: u64 = counted.iter().map(|json| counter(json, offence)).sum();
        assert!(count > 0, "{offence}");
    }
    assert_eq!(std::fs::metadata(&field.disk).unwrap().len(), DISK_LEN as u64);
}

#[test]
fn an_attack_that_the_host_cuts_short_leaves_nothing_dirty() {
    let field = Field::new();
    let arguments = ["--poison", "--resets", "3", "--reset-via", "host,i8042"];
    // More rounds than there is time for until the host's reset comes.
    let (status, json) = field.run("attack.seed=5 attack.rounds=100", &arguments);
    assert_eq!(json["findings"], Value::Array(Vec::new()));
    assert_eq!(status, Some(0));
    assert!(counter(&json, "vsock.bad_chains") > 0);
}

#[test]
fn the_audit_of_what_an_attacker_posts_finds_it_and_nothing_breaks() {
    let field = Field::new();
    let arguments = ["--dma-audit", "report", "--resets", "2", "--reset-via", BY_GUEST];
    let (status, json) = field.run("attack.seed=6 attack.rounds=30", &arguments);
    assert_eq!(json["lives"].as_array().unwrap().len(), 3);
    let names: Vec<_> = json["findings"].as_array().unwrap().iter().map(|f| &f["name"]).collect();
    assert!(!names.is_empty() && names.iter().all(|name| **name == "dma-audit"), "{names:?}");
    assert_eq!(status, Some(1));
}

#[test]
fn bad_packets_touch_no_connection_but_their_own() {
    let field = Field::new();
    let (status, json) = field.run("attack.seed=7 attack.packets=8", &["--resets", "5"]);
    assert_eq!(json["findings"], Value::Array(Vec::new()));
    assert_eq!(status, Some(0));
    assert!(counter(&json, "vsock.bad_packets") > 20);

    let own = field.arguments("attack.seed=8 attack.packets=8");
    let machine = Held::start_with(&own.iter().map(String::as_str).collect::<Vec<_>>());
    let mut clients: Vec<_> = (0..8).map(|_| greeted(&machine.path).0).collect();
    for size in [0, 1, 4096, 65_537, 200_000] {
        for (number, client) in (0..).zip(&mut clients) {
            let bytes: Vec<u8> = (0..size).map(|i| ((i + number) * 7 % 251) as u8).collect();
            assert!(ask(client, &Request::Echo(bytes.clone())) == Reply::Echo(bytes), "{size}");
        }
    }
    machine.end();
}

#[test]
fn an_attacker_knows_packets_of_an_earlier_life_from_answers_to_its_own() {
    let field = Field::new();
    let arguments = ["--resets", "3", "--inject", "vsock-kept"];
    let (status, json) = field.run("attack.seed=7 attack.packets=8", &arguments);
    let findings = json["findings"].as_array().unwrap();
    let of_life = |life: u64| findings.iter().any(|finding| finding["life"] == life);
    assert!((2..=4).all(of_life) && !of_life(1), "{findings:?}");
    assert!(findings.iter().all(|finding| finding["name"] == "vsock-kept"), "{findings:?}");
    assert_eq!(status, Some(1));
}

#[test]
fn attacks_make_the_monitor_hold_nothing_more() {
    let field = Field::new();
    let own = field.arguments("attack.seed=9 attack.rounds=10");
    let machine = Held::start_with(&own.iter().map(String::as_str).collect::<Vec<_>>());
    let process = machine.process();
    let mut life = 1;
    let (mut stream, _) = greeted(&machine.path);
    let mut attacked = |times: u32| {
        for _ in 0..times {
            life += 1;
            stream = attack(&machine, stream.get_mut(), life);
        }
        assert_eq!(ask(&mut stream, &Request::Ping(1)), Reply::Pong(1));
    };
    attacked(5);
    let before = Holdings::of(process);
    // Of each attack a leak would have to be smaller than ten kilobytes.
    attacked(25);
    machine.expect_no_more(before);
    machine.end();
}

/// Has the agent attack and reset its machine, and gives a connection to life `life`.
fn attack(machine: &Held, stream: &mut UnixStream, life: u32) -> std::io::BufReader<UnixStream> {
    stream.write_all(&frame::encode(&Request::Reset(GuestReset::I8042)).unwrap()).unwrap();
    let mut next = None;
    eventually("the next life has begun", || {
        next = try_greeted(&machine.path).filter(|(_, hello)| hello.life == life);
        next.is_some()
    });
    next.expect("it was there").0
}
