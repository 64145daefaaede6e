//! What a launch and a reset cost, beside the bare KVM calls that nobody can do without, and what the jail adds to a launch and
//! the residue check to a life, in one run.
//!
//! `cargo bench` prints a table: median, p90, p99, and the ratio of the medians to the floor. `-- --quick` shows in a few
//! seconds that all of it still works.

use std::io::Read;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use vmm::kvm::bare::launch_floor;

const PROGRAM: &str = env!("CARGO_BIN_EXE_cleanslate");
const LAUNCHES: usize = 300;
const RESETS: usize = 2000;
const MEM_MIB: usize = 128;

fn main() {
    let quick = std::env::args().any(|arg| arg == "--quick");
    let (launches, resets) = if quick { (3, 10) } else { (LAUNCHES, RESETS) };
    let [mut floor, mut jailed, mut unjailed, mut jail, mut whole, mut whole_unjailed] =
        [const { Vec::new() }; 6];
    let [mut restored, mut restored_here, mut launched_here] = [const { Vec::new() }; 3];
    let directory = tempfile::tempdir().expect("make a directory");
    let snapshot = directory.path().join("snapshot");
    let snapshot = snapshot.to_str().expect("UTF-8");
    json(&["snapshot", "create", snapshot, "--json"]);
    let original = here::config(snapshot);
    for _ in 0..launches {
        // Turn about, so that a noisy moment meets all alike.
        floor.push(milliseconds(launch_floor(MEM_MIB).expect("launch a bare machine")));
        let (with, with_run) = launch(&[]);
        let (without, without_run) = launch(&["--no-jail"]);
        jail.push(with - without);
        jailed.push(with);
        unjailed.push(without);
        whole.push(with_run);
        whole_unjailed.push(without_run);
        restored.push(hello(&json(&["snapshot", "restore", snapshot, "--json"])["lives"][0]));
        restored_here.push(here::hello(&original));
        launched_here.push(here::hello(&here::config_without_snapshot(MEM_MIB)));
    }
    let floor = Figure::new("floor: bare KVM calls to a guest's first out", floor);
    println!("{}", machine());
    println!("{:<58} {:>9} {:>9} {:>9} {:>8}", "", "median", "p90", "p99", "x floor");
    floor.print(&floor);
    Figure::new("process start to the agent's hello, 128 MiB", jailed).print(&floor);
    Figure::new("the same with --no-jail", unjailed).print(&floor);
    Figure::new("what the jail adds, launch by launch", jail).print(&floor);
    Figure::new("restore of a snapshot, process start to hello", restored).print(&floor);
    Figure::new("the same in a process that runs, order to hello", restored_here).print(&floor);
    Figure::new("a cold launch in a process that runs", launched_here).print(&floor);
    Figure::new("spawn to exit with report and verdict, from outside", whole).print(&floor);
    Figure::new("the same with --no-jail", whole_unjailed).print(&floor);
    for cause in ["host", "i8042", "cf9", "acpi", "triple"] {
        let times = reset_times(cause, resets);
        Figure::new(&format!("reset in place ({cause}) to the next hello"), times).print(&floor);
    }
    let (mut added, mut agents) = (Vec::new(), Vec::new());
    for _ in 0..launches.div_ceil(10) {
        let pass = residue_pass(resets.div_ceil(20));
        added.push(pass.added);
        agents.extend(pass.agents);
    }
    Figure::new("what --poison adds to a life, without RAM", added).print(&floor);
    Figure::new("of that the agent's work", agents).print(&floor);
    let (whole, guest) = resident();
    println!(
        "memory beyond the guest's own: {} KiB (three processes {whole}, guest {guest})",
        whole - guest
    );
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Machines in this process, without a jail.
mod here {
    use std::path::Path;
    use std::sync::Arc;
    use std::time::{Duration, Instant};

    use agent_protocol::AGENT_PORT;
    use vmm::agent::Agent;
    use vmm::boot::Payload;
    use vmm::device::vsock::GuestPort;
    use vmm::machine::{Config, Interrupts, RamSource, Resources, Restore, launch};
    use vmm::snapshot::{open, read_header, read_state};

    pub fn config_without_snapshot(mem_mib: usize) -> Config {
        Config::new(Payload::Agent(None), mem_mib as u64)
    }

    /// A machine like that in the directory `snapshot`.
    pub fn config(snapshot: &str) -> Config {
        let directory = Path::new(snapshot);
        let file = open(&directory.join("state")).expect("open the state");
        let host = read_header(&file).expect("a header").host;
        let snapshot = read_state(&file, &host).expect("a state");
        let layers = vec![(snapshot.header.clone(), directory.join("memory"))];
        let state: Arc<vmm::machine::MachineState> = Arc::new(snapshot.state);
        let payload = Payload::Agent(None);
        let config = state.description().configure(config_without_snapshot(0), payload);
        let restore = Restore { header: snapshot.header, state, ram: RamSource::Files(layers) };
        Config { restore: Some(restore), ..config }
    }

    /// From the order to the hello, in milliseconds.
    pub fn hello(config: &Config) -> f64 {
        let interrupts = Interrupts::catch().expect("catch signals");
        let began = Instant::now();
        let (resources, _) = Resources::open(config).expect("open files");
        let machine = launch(config, resources, interrupts).expect("launch a machine");
        let stream = machine.connect(GuestPort(AGENT_PORT)).expect("connect");
        Agent::greet(stream, Duration::from_secs(10)).expect("hello");
        super::milliseconds(began.elapsed())
    }
}

fn run_json(arguments: &[&str]) -> Value {
    json(&[&["run", "--json"], arguments].concat())
}

fn json(arguments: &[&str]) -> Value {
    let output = Command::new(PROGRAM).args(arguments).output().expect("start cleanslate");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

/// Time to hello as the program measures it, and the whole run as seen from outside, both in milliseconds.
fn launch(arguments: &[&str]) -> (f64, f64) {
    let began = Instant::now();
    let json = run_json(arguments);
    (hello(&json["lives"][0]), milliseconds(began.elapsed()))
}

/// Times from a reset's cause to the next hello, in milliseconds.
fn reset_times(cause: &str, resets: usize) -> Vec<f64> {
    let json = run_json(&["--resets", &resets.to_string(), "--reset-via", cause]);
    assert_eq!(json["verdict"], "clean");
    json["lives"].as_array().expect("lives").iter().skip(1).map(hello).collect()
}

/// What the residue check costs a life, in milliseconds, without the agent's work on RAM.
struct Pass {
    /// By how much it makes a life longer as seen from outside: two runs that differ in nothing else.
    added: f64,
    /// The agent's own account, life by life.
    agents: Vec<f64>,
}

/// Of a machine that has little RAM behind the agent's image: what RAM costs the host is in no account.
fn residue_pass(resets: usize) -> Pass {
    let run = |options: &[&str]| {
        let number = resets.to_string();
        let began = Instant::now();
        let json = run_json(&[&["--mem", "12", "--resets", &number], options].concat());
        (milliseconds(began.elapsed()), json)
    };
    let (plain, _) = run(&[]);
    let (poisoned, json) = run(&["--poison"]);
    assert_eq!(json["verdict"], "clean");
    let lives = json["lives"].as_array().expect("lives");
    // The first life is looked at and poisoned, the last one only looked at.
    let ms = |life: &Value, part: &str| {
        let khz = life["report"]["timings"]["tsc_khz"].as_f64().expect("a frequency");
        let ticks = |pass| life[pass][part].as_f64().unwrap_or(0.0);
        (ticks("look_ticks") + ticks("poison_ticks")) / khz
    };
    let ram: f64 = lives.iter().map(|life| ms(life, "ram")).sum();
    Pass {
        added: (poisoned - plain - ram) / resets as f64,
        agents: lives[..resets].iter().map(|life| ms(life, "state")).collect(),
    }
}

fn hello(life: &Value) -> f64 {
    life["hello_us"].as_u64().expect("a hello") as f64 / 1e3
}

/// Resident memory in KiB of the processes that hold a machine, their shares of what they share (`Pss`, proc(5)), and the part
/// of it that is guest RAM.
fn resident() -> (u64, u64) {
    let dir = tempfile::tempdir().expect("make a directory");
    let path = dir.path().join("vsock");
    let mut child = Command::new(PROGRAM)
        .args(["run", "--resets", "10", "--hold", "--uds", path.to_str().expect("UTF-8")])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("start cleanslate");
    let mut stdout = child.stdout.take().expect("piped");
    let mut text = Vec::new();
    while !String::from_utf8_lossy(&text).contains("clean:") {
        let mut chunk = [0; 4096];
        let count = stdout.read(&mut chunk).expect("read the verdict");
        assert_ne!(count, 0, "{}", String::from_utf8_lossy(&text));
        text.extend_from_slice(&chunk[..count]);
    }
    let maps: Vec<_> = processes_of(child.id())
        .iter()
        .map(|pid| std::fs::read_to_string(format!("/proc/{pid}/smaps")).expect("read smaps"))
        .collect();
    rustix::process::kill_process(
        rustix::process::Pid::from_child(&child),
        rustix::process::Signal::INT,
    )
    .expect("end cleanslate");
    child.wait().expect("wait");
    let (mut whole, mut guest) = (0, 0);
    // Only its beginning is in a file.
    let (mut guest_end, mut in_guest) = (0, false);
    for line in maps.iter().flat_map(|maps| maps.lines()) {
        if let Some(share) = line.strip_prefix("Pss:") {
            let kib: u64 = share.trim().trim_end_matches(" kB").parse().expect("a number");
            whole += kib;
            guest += if in_guest { kib } else { 0 };
        } else if let Some((start, _)) = line.split(' ').next().and_then(|w| w.split_once('-'))
            && let Ok(start) = usize::from_str_radix(start, 16)
        {
            if line.contains("guest-template") {
                guest_end = start + (MEM_MIB << 20);
            }
            in_guest = start < guest_end;
        }
    }
    (whole, guest)
}

/// A process and its children.
fn processes_of(parent: u32) -> Vec<u32> {
    let all = std::fs::read_dir("/proc")
        .expect("read /proc")
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
    let is_child = |pid: &u32| {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        status.lines().any(|line| line == format!("PPid:\t{parent}"))
    };
    [parent].into_iter().chain(all.filter(is_child)).collect()
}

/// One row: times in milliseconds.
struct Figure {
    name: String,
    times: Vec<f64>,
}

impl Figure {
    fn new(name: &str, mut times: Vec<f64>) -> Self {
        times.sort_unstable_by(f64::total_cmp);
        Self { name: name.into(), times }
    }

    fn at(&self, percent: usize) -> f64 {
        self.times[(self.times.len() * percent / 100).min(self.times.len() - 1)]
    }

    fn print(&self, floor: &Self) {
        let ratio = self.at(50) / floor.at(50);
        let (p50, p90, p99) = (self.at(50), self.at(90), self.at(99));
        println!("{:<58} {p50:>6.2} ms {p90:>6.2} ms {p99:>6.2} ms {ratio:>8.2}", self.name);
    }
}

fn machine() -> String {
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    let cpuinfo = read("/proc/cpuinfo");
    let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name\t: ")).unwrap_or("?");
    let cpus = cpuinfo.lines().filter(|line| line.starts_with("processor")).count();
    let host = &run_json(&[])["host"];
    format!("{model}, {cpus} CPUs, Linux {}, KVM: {}", host["kernel"], host["kvm"])
}
