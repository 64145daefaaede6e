//! What a guest's disk costs beside the file itself: the agent's driver with one request at a time, and plain calls on the same
//! file, turn about.
//!
//! `cargo bench --bench disk` prints a table: the median of the rounds, the slowest and the fastest, and the ratio to the
//! file. `-- --quick` shows in a few seconds that all of it still works.

mod held;

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use agent_protocol::{AGENT_PORT, DiskAnswer, DiskRequest, Sweep};
use vmm::agent::Agent;

const PROGRAM: &str = env!("CARGO_BIN_EXE_cleanslate");
const DISK_BYTES: u64 = 256 << 20;

struct Case {
    name: &'static str,
    writes: bool,
    bytes: u32,
    requests: u32,
    stride: u32,
    is_cached: bool,
}

const CASES: [Case; 5] = [
    Case {
        name: "64 KiB in sequence, read, cached",
        writes: false,
        bytes: 64 << 10,
        requests: 2000,
        stride: 1,
        is_cached: true,
    },
    Case {
        name: "64 KiB in sequence, written",
        writes: true,
        bytes: 64 << 10,
        requests: 2000,
        stride: 1,
        is_cached: true,
    },
    Case {
        name: "64 KiB in sequence, read, not cached",
        writes: false,
        bytes: 64 << 10,
        requests: 2000,
        stride: 1,
        is_cached: false,
    },
    Case {
        name: "4 KiB here and there, read, cached",
        writes: false,
        bytes: 4096,
        requests: 4000,
        stride: 7919,
        is_cached: true,
    },
    Case {
        name: "4 KiB here and there, read, not cached",
        writes: false,
        bytes: 4096,
        requests: 2000,
        stride: 7919,
        is_cached: false,
    },
];

fn main() {
    let quick = std::env::args().any(|arg| arg == "--quick");
    let (rounds, divisor) = if quick { (1, 50) } else { (9, 1) };
    let dir = tempfile::tempdir().expect("make a directory");
    let path = dir.path().join("disk");
    let file = File::options().read(true).write(true).create(true).truncate(true).open(&path);
    let file = file.expect("make a disk");
    for at in (0..DISK_BYTES).step_by(1 << 20) {
        file.write_all_at(&[0x5a; 1 << 20], at).expect("fill the disk");
    }
    let mut machine = Machine::start(&path, &dir.path().join("vsock"));
    println!("{:<42} {:>10} {:>10} {:>16} {:>10}", "", "guest", "file", "guest min-max", "x file");
    for case in CASES {
        let case = Case { requests: case.requests / divisor, ..case };
        let (mut guest, mut plain) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            prepare(&file, &case);
            guest.push(machine.sweep(&case));
            prepare(&file, &case);
            plain.push(sweep(&file, &case));
        }
        print(&case, guest, plain);
    }
    machine.end();
}

/// Has the page cache hold all of the disk, or nothing of it.
fn prepare(file: &File, case: &Case) {
    file.sync_all().expect("write the disk back");
    if case.is_cached {
        let mut buffer = vec![0; 1 << 20];
        for at in (0..DISK_BYTES).step_by(buffer.len()) {
            file.read_exact_at(&mut buffer, at).expect("read the disk");
        }
    } else {
        rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed).expect("drop the cache");
    }
}

/// The same requests, by calls on the file. How long they took.
fn sweep(file: &File, case: &Case) -> Duration {
    let mut buffer = vec![0xa5; case.bytes as usize];
    let places = DISK_BYTES / u64::from(case.bytes);
    let began = Instant::now();
    for number in 0..u64::from(case.requests) {
        let at = number * u64::from(case.stride) % places * u64::from(case.bytes);
        match case.writes {
            true => file.write_all_at(&buffer, at).expect("write"),
            false => file.read_exact_at(&mut buffer, at).expect("read"),
        }
    }
    began.elapsed()
}

fn print(case: &Case, mut guest: Vec<Duration>, mut plain: Vec<Duration>) {
    guest.sort();
    plain.sort();
    let rate = |time: Duration| {
        let per_second = f64::from(case.requests) / time.as_secs_f64();
        match case.bytes {
            4096 => (per_second, "/s"),
            bytes => (per_second * f64::from(bytes) / f64::from(1 << 20), " MiB/s"),
        }
    };
    let (of_guest, unit) = rate(guest[guest.len() / 2]);
    let (of_file, _) = rate(plain[plain.len() / 2]);
    let spread = format!("{:.0}-{:.0}", rate(guest[guest.len() - 1]).0, rate(guest[0]).0);
    let show = |value: f64| format!("{value:.0}{unit}");
    let (name, ratio) = (case.name, of_guest / of_file);
    println!("{name:<42} {:>10} {:>10} {spread:>16} {ratio:>10.2}", show(of_guest), show(of_file));
}

/// A machine with the disk, in its jail.
struct Machine {
    program: Child,
    agent: Agent,
}

impl Machine {
    fn start(disk: &Path, socket: &Path) -> Self {
        let mut command = Command::new(PROGRAM);
        command.args(["run", "--hold", "--uds"]).arg(socket).arg("--disk").arg(disk);
        let program = held::start(command);
        let mut stream = UnixStream::connect(socket).expect("connect");
        writeln!(stream, "CONNECT {AGENT_PORT}").expect("ask for the agent");
        let mut byte = [0];
        while byte != *b"\n" {
            stream.read_exact(&mut byte).expect("the answer to CONNECT");
        }
        let agent = Agent::greet(stream, Duration::from_secs(60)).expect("the agent's hello");
        Self { program, agent }
    }

    fn sweep(&mut self, case: &Case) -> Duration {
        let Case { writes, bytes, requests, stride, .. } = *case;
        let request = DiskRequest::Sweep(Sweep { writes, bytes, requests, stride });
        let began = Instant::now();
        let answer = self.agent.disk(0, request).expect("the agent's answer");
        assert_eq!(answer, Ok(DiskAnswer::Done));
        began.elapsed()
    }

    fn end(mut self) {
        let program = rustix::process::Pid::from_child(&self.program);
        rustix::process::kill_process(program, rustix::process::Signal::INT).expect("end it");
        assert!(self.program.wait().expect("wait for its end").success());
    }
}
