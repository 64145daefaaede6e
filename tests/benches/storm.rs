//! How many launches a second `cleanslate launch` makes, made for one job and recycled, and what idle sandboxes cost, beside the
//! bare KVM calls that nobody can do without, in one run.
//!
//! `cargo bench --bench storm` prints the median of several rounds, the slowest and the fastest. `-- --quick` shows in a few seconds
//! that all of it still works.

use std::process::Command;
use std::time::Instant;

use serde_json::Value;
use vmm::kvm::bare::launch_floor;

const PROGRAM: &str = env!("CARGO_BIN_EXE_cleanslate");
const MEM_MIB: usize = 128;
const ROUNDS: usize = 9;

/// A kind of launch: its name, its options, and how many of them are a round.
const KINDS: [(&str, &[&str], u64); 3] = [
    ("cold", &["--concurrency", "8"], 600),
    ("cold, 8 kept warm", &["--concurrency", "4", "--warm", "8"], 600),
    ("recycled", &["--concurrency", "4", "--from", "recycle"], 3000),
];

/// Times of a kind, in milliseconds, by the names that JSON has for them.
const TIMES: [(&str, &str, &str); 3] = [
    ("start to hello", "start_to_hello_us", "p50"),
    ("start to done", "start_to_done_us", "p50"),
    ("reset to hello", "reset_to_hello_us", "p50"),
];

fn main() {
    let quick = std::env::args().any(|arg| arg == "--quick");
    let (rounds, part, idle) = if quick { (1, 30, 10) } else { (ROUNDS, 1, 1000) };
    let cpus = std::thread::available_parallelism().expect("count the processors").get();
    let mut floors = Vec::new();
    let mut runs = KINDS.map(|_| Vec::new());
    for _ in 0..rounds {
        // Turn about, so that a noisy moment meets all alike.
        floors.push(floor(cpus, 600 / part as usize));
        for ((_, options, count), runs) in KINDS.into_iter().zip(&mut runs) {
            runs.push(launch(options, count / part));
        }
    }
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    println!("{cpus} CPUs, load {}; {MEM_MIB} MiB", load.trim());
    println!("{:<48} {:>10} {:>10} {:>10}", "", "median", "slowest", "fastest");
    row("floor: bare KVM calls, per second", floors.clone());
    for ((name, ..), runs) in KINDS.into_iter().zip(&runs) {
        let rates: Vec<_> = runs.iter().map(|json| number(&json["per_second"])).collect();
        let share = median(rates.clone()) / median(floors.clone());
        row(&format!("{name}, launches per second"), rates);
        println!("{:<48} {share:>10.2}", "  by those of the floor");
        for (what, key, at) in TIMES {
            let times: Vec<_> = runs.iter().filter_map(|json| json[key][at].as_f64()).collect();
            if !times.is_empty() {
                let times = times.into_iter().map(|us| us / 1000.0).collect();
                row(&format!("  {what}, {at}, ms"), times);
            }
        }
    }
    let json = run(&["--idle", &idle.to_string(), "--concurrency", "8"]);
    let figures = &json["idle"];
    let (host, own) = (number(&figures["host_kib"]), number(&figures["proportional_kib"]));
    println!(
        "{idle} idle sandboxes: {:.0} MiB less on the host, {:.0} KiB each",
        host / 1024.0,
        host / f64::from(idle)
    );
    println!("  of that their processes' own memory (Pss): {:.0} KiB each", own / f64::from(idle));
    println!("  wake-ups per second, all together: {}", figures["wake_ups_per_second"]);
}

/// Launches per second of bare machines, on all processors at once.
fn floor(cpus: usize, launches: usize) -> f64 {
    let began = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..cpus {
            scope.spawn(|| {
                (0..launches / cpus).for_each(|_| {
                    launch_floor(MEM_MIB).expect("launch a bare machine");
                });
            });
        }
    });
    (launches / cpus * cpus) as f64 / began.elapsed().as_secs_f64()
}

fn launch(options: &[&str], count: u64) -> Value {
    let json = run(&[&["--count", &count.to_string()], options].concat());
    assert_eq!((&json["verdict"], &json["done"]), (&"clean".into(), &count.into()), "{json}");
    json
}

fn run(options: &[&str]) -> Value {
    let output =
        Command::new(PROGRAM).args(["launch", "--json"]).args(options).output().expect("start it");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

fn number(value: &Value) -> f64 {
    value.as_f64().expect("a number")
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values[values.len() / 2]
}

fn row(name: &str, mut values: Vec<f64>) {
    values.sort_unstable_by(f64::total_cmp);
    let (least, most) = (values[0], values[values.len() - 1]);
    println!("{name:<48} {:>10.2} {least:>10.2} {most:>10.2}", median(values));
}
