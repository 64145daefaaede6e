//! How many resets a second `cleanslate soak` makes: one machine and four, with poison and without, in one run.
//!
//! `cargo bench` prints the median of several soaks of each kind, the slowest and the fastest, and the rate per processor: four
//! machines share those that there are. `-- --quick` shows in a few seconds that all of it still works.

use std::process::Command;

use serde_json::Value;

const PROGRAM: &str = env!("CARGO_BIN_EXE_cleanslate");
const ROUNDS: u64 = 5;
/// Of each machine.
const RESETS: u32 = 1000;

/// Machines, and whether their state is poisoned, as it is without an option.
const KINDS: [(u32, bool); 4] = [(1, false), (1, true), (4, false), (4, true)];

fn main() {
    let quick = std::env::args().any(|arg| arg == "--quick");
    let (rounds, resets) = if quick { (1, 10) } else { (ROUNDS, RESETS) };
    let cpus = std::thread::available_parallelism().expect("count the processors").get();
    let mut rates = KINDS.map(|_| Vec::new());
    for seed in 1..=rounds {
        // Turn about, so that a noisy moment meets all alike.
        for ((vms, poison), rates) in KINDS.into_iter().zip(&mut rates) {
            rates.push(soak(vms, poison, resets, seed));
        }
    }
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    println!("{cpus} CPUs, load {}", load.trim());
    println!(
        "{:<34} {:>9} {:>9} {:>9} {:>9}",
        "resets per second", "median", "slowest", "fastest", "per CPU"
    );
    for ((vms, poison), mut rates) in KINDS.into_iter().zip(rates) {
        rates.sort_unstable_by(f64::total_cmp);
        let median = rates[rates.len() / 2];
        // A machine's threads wait for each other: one machine is worth one processor.
        let per_cpu = median / f64::from(vms).min(cpus as f64);
        let (slowest, fastest) = (rates[0], rates[rates.len() - 1]);
        let machines = if vms == 1 { "machine" } else { "machines" };
        let check = if poison { "with poison and check" } else { "--no-poison" };
        let name = format!("{vms} {machines}, {check}");
        println!("{name:<34} {median:>9.0} {slowest:>9.0} {fastest:>9.0} {per_cpu:>9.0}");
    }
}

/// Resets per second of a soak that has to be clean, its start and its end included.
fn soak(vms: u32, poison: bool, resets: u32, seed: u64) -> f64 {
    let output = Command::new(PROGRAM)
        .args(["soak", "--json", "--vms", &vms.to_string()])
        .args((!poison).then_some("--no-poison"))
        .args(["--resets", &resets.to_string(), "--seed", &seed.to_string()])
        .output()
        .expect("start cleanslate");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).expect("text");
    let summary: Value = serde_json::from_str(text.lines().last().expect("lines")).expect("JSON");
    assert_eq!(summary["verdict"], "clean");
    assert_eq!(summary["resets"], vms * resets);
    f64::from(vms * resets) / summary["seconds"].as_f64().expect("a time")
}
