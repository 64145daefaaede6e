//! How long a whole Linux takes: in the lab on one processor, Debian's kernel with `quiet`, from the start of the process to its
//! init and to the agent's hello, and from a reset to the next hello. And how long the lab itself takes.
//!
//! `cargo bench --bench linux` prints a table: the median of the rounds, the shortest and the longest. `-- --quick` shows
//! that all of it still works.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

const PROGRAM: &str = env!("CARGO_BIN_EXE_cleanslate");
const RESULT: &str = "round.json";

fn main() {
    let quick = std::env::args().any(|argument| argument == "--quick");
    let rounds = if quick { 1 } else { 9 };
    let dir = tempfile::tempdir().expect("make a directory");
    let (mut idle, mut to_init, mut to_hello, mut again) = (vec![], vec![], vec![], vec![]);
    for _ in 0..rounds {
        idle.push(lab(dir.path(), "true\n", &[]));
        let script =
            format!("cleanslate run --guest linux --resets 1 --timeout 300 --json >{RESULT}\n");
        lab(dir.path(), &script, &["--fetch", RESULT]);
        let text = std::fs::read_to_string(dir.path().join(RESULT)).expect("read a report");
        let report: Value = serde_json::from_str(&text).expect("a report");
        let hello = |life: usize| {
            let us = report["lives"][life]["hello_us"].as_u64();
            Duration::from_micros(us.unwrap_or_else(|| panic!("no hello: {report}")))
        };
        // The agent is init; what it does before its greeting is not the kernel's.
        let timings = &report["lives"][0]["report"]["timings"];
        let ticks = |name: &str| timings[name].as_u64().expect("ticks");
        let agent_us = (ticks("tsc_ready") - ticks("tsc_agent")) * 1000 / ticks("tsc_khz");
        to_init.push(hello(0) - Duration::from_micros(agent_us));
        to_hello.push(hello(0));
        again.push(hello(1));
    }
    println!("{rounds} rounds, a lab of one processor");
    println!("{:<56} {:>9} {:>9} {:>9}", "", "median", "shortest", "longest");
    print("the lab, up and down again", idle);
    print("in it, process start to Linux's init, 256 MiB, in its jail", to_init);
    print("in it, process start to the agent's hello", to_hello);
    print("in it, reset in place (host) to the next hello", again);
}

/// Does `script` in the lab, and says how long all of that took.
fn lab(directory: &Path, script: &str, more: &[&str]) -> Duration {
    std::fs::write(directory.join("script"), script).expect("write a file");
    let mut command = Command::new(PROGRAM);
    command.args(["lab", "--script", "script"]).args(more);
    command.current_dir(directory).env("XDG_CACHE_HOME", env!("CARGO_TARGET_TMPDIR"));
    let began = Instant::now();
    let output = command.stdin(Stdio::null()).output().expect("start the program");
    let took = began.elapsed();
    assert!(output.status.success(), "{output:?}");
    took
}

fn print(name: &str, mut times: Vec<Duration>) {
    times.sort();
    let seconds = |time: Duration| format!("{:.2} s", time.as_secs_f64());
    let (shortest, longest) = (times[0], times[times.len() - 1]);
    let median = seconds(times[times.len() / 2]);
    println!("{name:<56} {median:>9} {:>9} {:>9}", seconds(shortest), seconds(longest));
}
