//! What the DMA audit costs: the same work with it and without it, turn about in one run.
//!
//! `cargo bench --bench audit` prints medians and the median of the ratios, pair by pair, with its 10th and 90th percentile;
//! `-- --quick` shows in a few seconds that all of it still works. `-- --beside PROGRAM` compares with another build of
//! cleanslate instead, without the audit on either side.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use agent_protocol::{AGENT_PORT, Hello, Reply, Request, frame};
use serde_json::Value;

const PROGRAM: &str = env!("CARGO_BIN_EXE_cleanslate");
const ECHO: usize = 200_000;

/// A build of the program and how it is run.
#[derive(Clone)]
struct Side {
    program: String,
    arguments: &'static [&'static str],
}

fn main() {
    let mut arguments = std::env::args().skip(1).skip_while(|word| word != "--beside").skip(1);
    let own = |arguments| Side { program: PROGRAM.into(), arguments };
    let (names, sides) = match arguments.next() {
        Some(program) => (["other", "this"], [Side { program, arguments: &[] }, own(&[])]),
        None => (["off", "report"], [own(&[]), own(&["--dma-audit", "report"])]),
    };
    let quick = std::env::args().any(|word| word == "--quick");
    let (launches, resets, rounds) = if quick { (2, 5, 2) } else { (200, 1000, 200) };
    println!("{:<44} {:>10} {:>10} {:>8} {:>16}", "", names[0], names[1], "ratio", "p10 to p90");
    let launch = |side: &Side| hello(&run(side, &[])["lives"][0]);
    compare("process start to hello, ms", launches, || sides.each_ref().map(launch));
    let passes = if quick { 1 } else { 20 };
    let mut lives = Vec::new();
    for _ in 0..passes {
        let times = sides.each_ref().map(|side| reset_times(side, resets / passes));
        lives.extend(std::iter::zip(&times[0], &times[1]).map(|(one, two)| [*one, *two]));
    }
    let mut lives = lives.into_iter();
    compare("reset to hello, ms", lives.len(), || lives.next().expect("one for each"));
    let mut machines = sides.each_ref().map(Held::start);
    compare("there and back, 200,000 bytes, ms", rounds, || {
        machines.each_mut().map(|machine| machine.ask(&Request::Echo(vec![7; ECHO])))
    });
    compare("there and back, a ping, ms", rounds * 10, || {
        machines.each_mut().map(|machine| machine.ask(&Request::Ping(1)))
    });
}

/// Prints a line of what `pair` measures, both sides each time.
fn compare(name: &str, times: usize, mut pair: impl FnMut() -> [f64; 2]) {
    let pairs: Vec<_> = (0..times).map(|_| pair()).collect();
    let at = |percent: usize, value: fn(&[f64; 2]) -> f64| {
        let mut values: Vec<_> = pairs.iter().map(value).collect();
        values.sort_unstable_by(f64::total_cmp);
        values[values.len() * percent / 100]
    };
    let ratio: fn(&[f64; 2]) -> f64 = |[one, two]| two / one;
    let (one, two) = (at(50, |pair| pair[0]), at(50, |pair| pair[1]));
    let spread = format!("{:.2} to {:.2}", at(10, ratio), at(90, ratio));
    println!("{name:<44} {one:>10.3} {two:>10.3} {:>8.2} {spread:>16}", at(50, ratio));
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn run(side: &Side, more: &[&str]) -> Value {
    let mut command = Command::new(&side.program);
    command.args(["run", "--json"]).args(side.arguments).args(more);
    let output = command.output().expect("start cleanslate");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

fn hello(life: &Value) -> f64 {
    life["hello_us"].as_u64().expect("a hello") as f64 / 1e3
}

fn reset_times(side: &Side, resets: usize) -> Vec<f64> {
    let json = run(side, &["--resets", &resets.to_string(), "--reset-via", "host"]);
    json["lives"].as_array().expect("lives").iter().skip(1).map(hello).collect()
}

/// A machine that is kept running, and a connection to its agent.
struct Held {
    child: Child,
    stream: BufReader<UnixStream>,
    _dir: tempfile::TempDir,
}

impl Held {
    fn start(side: &Side) -> Self {
        let dir = tempfile::tempdir().expect("make a directory");
        let path = dir.path().join("vsock");
        let mut command = Command::new(&side.program);
        command.args(["run", "--hold", "--uds"]).arg(&path).args(side.arguments);
        command.stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().expect("start cleanslate");
        let lines = BufReader::new(child.stdout.as_mut().expect("piped")).lines();
        // The verdict.
        assert!(lines.map_while(Result::ok).any(|line| line.starts_with("clean:")));
        let mut stream = UnixStream::connect(&path).expect("connect");
        writeln!(stream, "CONNECT {AGENT_PORT}").expect("connect");
        let mut held = Self { child, stream: BufReader::new(stream), _dir: dir };
        let mut answer = String::new();
        held.stream.read_line(&mut answer).expect("connect");
        held.receive::<Hello>();
        held
    }

    fn receive<T: serde::de::DeserializeOwned>(&mut self) -> T {
        let mut bytes = vec![0; frame::PREFIX_LEN];
        self.stream.read_exact(&mut bytes).expect("read");
        bytes.resize(frame::total_len(&bytes).expect("a frame").expect("a prefix"), 0);
        self.stream.read_exact(&mut bytes[frame::PREFIX_LEN..]).expect("read");
        frame::decode(&bytes).expect("a message").expect("a whole one").0
    }

    /// How long an answer takes, in milliseconds.
    fn ask(&mut self, request: &Request) -> f64 {
        let bytes = frame::encode(request).expect("short enough");
        let began = Instant::now();
        self.stream.get_mut().write_all(&bytes).expect("write");
        self.receive::<Reply>();
        milliseconds(began.elapsed())
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::INT);
        let _ = self.child.wait();
    }
}
