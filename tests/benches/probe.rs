//! What vsock costs through the whole monitor, beside the shortest way that a notification and an interrupt can take.
//!
//! `cargo bench --bench probe` prints the median of the rounds, the lowest and the highest; every round has all of it, so that the
//! ratio is of figures of the same moment. `-- --quick` shows in some seconds that all of it still works. A round trip is a
//! message of 64 bytes that the agent sends back to a client of the machine's socket, as `cleanslate probe` measures it.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Duration;

use agent_protocol::AGENT_PORT;
use serde_json::Value;
use vmm::agent::Agent;

#[path = "probe/floor.rs"]
mod floor;
mod held;
#[allow(dead_code, reason = "a test wants more of it")]
#[path = "../harness/holdings.rs"]
mod holdings;

const PROGRAM: &str = env!("CARGO_BIN_EXE_cleanslate");
const GIB: f64 = (1 << 30) as f64;

/// Figures of one kind, one of each round.
#[derive(Default)]
struct Figures(Vec<(&'static str, &'static str, Vec<f64>)>);

impl Figures {
    fn add(&mut self, name: &'static str, unit: &'static str, value: f64) {
        match self.0.iter_mut().find(|(known, _, _)| *known == name) {
            Some((_, _, values)) => values.push(value),
            None => self.0.push((name, unit, vec![value])),
        }
    }

    fn print(self) {
        println!("{:<62} {:>9} {:>9} {:>9}", "", "median", "lowest", "highest");
        for (name, unit, mut values) in self.0 {
            values.sort_by(f64::total_cmp);
            let (lowest, highest) = (values[0], values[values.len() - 1]);
            let median = values[values.len() / 2];
            println!("{name:<62} {median:>9.2} {lowest:>9.2} {highest:>9.2} {unit}");
        }
    }
}

fn main() {
    let quick = std::env::args().any(|arg| arg == "--quick");
    let (rounds, trips, mib, connections, idle) =
        if quick { (1, 50, "1", "32", 100) } else { (9, 3000, "256", "4000", 3000) };
    let machine = Machine::start();
    let mut figures = Figures::default();
    for _ in 0..rounds {
        let mut floor = floor::trips(trips);
        floor.sort();
        let floor = [50, 90, 99].map(|part| floor[(trips - 1) * part / 100].as_secs_f64() * 1e6);
        let json = machine.probe(&trips.to_string(), mib, connections);
        let of = |list: &str, key: &str, value: Value| {
            let all = json[list].as_array().expect("figures").iter();
            all.filter(move |figure| figure[key] == value).cloned().collect::<Vec<_>>()
        };
        let trip = &of("round_trips", "bytes", 64.into())[0];
        let trip = ["p50", "p90", "p99"].map(|part| trip[part].as_f64().expect("ns") / 1e3);
        figures.add("notification and interrupt alone, p50", "us", floor[0]);
        figures.add("notification and interrupt alone, p90", "us", floor[1]);
        figures.add("notification and interrupt alone, p99", "us", floor[2]);
        figures.add("64 bytes there and back, p50", "us", trip[0]);
        figures.add("64 bytes there and back, p90", "us", trip[1]);
        figures.add("64 bytes there and back, p99", "us", trip[2]);
        figures.add("ratio of the p50", "", trip[0] / floor[0]);
        for (direction, names) in [
            ("to-guest", ["host to guest, 1 connection", "host to guest, 16 connections"]),
            ("to-host", ["guest to host, 1 connection", "guest to host, 16 connections"]),
        ] {
            let all = of("throughput", "direction", direction.into());
            for (name, count) in names.into_iter().zip([1, 16]) {
                let figure = all.iter().find(|figure| figure["connections"] == count);
                let rate = figure.expect("measured")["bytes_per_second"].as_f64().expect("bytes");
                figures.add(name, "GiB/s", rate / GIB);
            }
        }
        let names = [
            "connections opened and closed, 1 at a time",
            "connections opened and closed, 4 at a time",
            "connections opened and closed, 16 at a time",
        ];
        for (name, clients) in names.into_iter().zip([1, 4, 16]) {
            let rate = of("connections", "clients", clients.into())[0]["per_second"].as_f64();
            figures.add(name, "per s", rate.expect("a rate"));
        }
        let bytes = memory_of_idle(idle);
        figures.add("memory of the monitor for an idle connection", "bytes", bytes);
    }
    machine.end();
    figures.print();
}

/// A machine without a jail, whose process is therefore the one that was started.
struct Machine {
    program: Child,
    path: PathBuf,
    _dir: tempfile::TempDir,
}

impl Machine {
    fn start() -> Self {
        let dir = tempfile::tempdir().expect("make a directory");
        let path = dir.path().join("vsock");
        let mut command = Command::new(PROGRAM);
        command.args(["run", "--hold", "--no-jail", "--uds"]).arg(&path);
        let program = held::start(command);
        Self { program, path, _dir: dir }
    }

    fn probe(&self, count: &str, mib: &str, connections: &str) -> Value {
        let mut command = Command::new(PROGRAM);
        command.args(["probe", "--json", "--count", count, "--mib", mib]);
        command.args(["--connections", connections, "--uds"]).arg(&self.path);
        let output = command.output().expect("start the probe");
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{error}{}", String::from_utf8_lossy(&output.stdout));
        serde_json::from_slice(&output.stdout).expect("JSON")
    }

    fn end(mut self) {
        let program = rustix::process::Pid::from_child(&self.program);
        rustix::process::kill_process(program, rustix::process::Signal::INT).expect("end it");
        assert!(self.program.wait().expect("wait for its end").success());
    }
}

/// Bytes that a machine's process, which has had one connection before, holds for each of so many greeted ones.
fn memory_of_idle(connections: usize) -> f64 {
    let machine = Machine::start();
    let held = || holdings::Holdings::of(machine.program.id()).resident_kib;
    drop(greeted(&machine.path));
    let before = held();
    let idle: Vec<_> = (0..connections).map(|_| greeted(&machine.path)).collect();
    let bytes = 1024.0 * (held() as f64 - before as f64) / connections as f64;
    drop(idle);
    machine.end();
    bytes
}

fn greeted(path: &Path) -> Agent {
    let mut stream = UnixStream::connect(path).expect("connect");
    writeln!(stream, "CONNECT {AGENT_PORT}").expect("ask for the agent");
    let mut byte = [0];
    while byte != *b"\n" {
        stream.read_exact(&mut byte).expect("the answer to CONNECT");
    }
    Agent::greet(stream, Duration::from_secs(60)).expect("the agent's hello")
}
