//! Builds the guest agent with the same toolchain as the monitor, but apart from its workspace, flags and lock file.

mod sources;

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

const TARGET: &str = "x86_64-unknown-linux-gnu";
const AGENT: &str = "cleanslate-agent";

/// Settings of the monitor's build that must not reach the agent's.
const FOREIGN: [&str; 7] = [
    "RUSTFLAGS",
    "CARGO_BUILD_RUSTFLAGS",
    "CARGO_BUILD_TARGET",
    "CARGO_BUILD_TARGET_DIR",
    "CARGO_TARGET_DIR",
    "RUSTC_WRAPPER",
    "RUSTC_WORKSPACE_WRAPPER",
];

fn main() {
    let here = PathBuf::from(variable("CARGO_MANIFEST_DIR"));
    let guest = here.parent().expect("the crate lies in the project").join("guest-agent");
    let out = PathBuf::from(variable("OUT_DIR"));
    // Relative to this crate: with paths from the root a copy of the project together with its `target` would go on watching
    // the sources of the original, and embed an agent that is not its own.
    for source in sources::SOURCES {
        println!("cargo:rerun-if-changed=../guest-agent/{source}");
    }
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=sources.rs");
    let digest = sources::digest(&guest).to_string();
    println!("cargo:rustc-env=AGENT_SOURCES={digest}");
    let (unikernel, target_dir) = (guest.join("unikernel"), out.join("agent"));
    // Cargo goes by times, and a file that was put back may be older than what was built since: contents decide.
    let last = out.join("sources");
    if std::fs::read_to_string(&last).is_ok_and(|last| last != digest) {
        let packages = ["-p", "unikernel", "-p", "agent-protocol"];
        run(cargo("clean", &unikernel, &target_dir).args(packages));
    }
    let image = match env::var_os("CARGO_FEATURE_FUZZING") {
        Some(_) => Vec::new(),
        None => build(&unikernel, &target_dir),
    };
    let embedded = out.join(format!("{AGENT}.elf"));
    std::fs::write(&embedded, image).unwrap_or_else(|error| panic!("write {embedded:?}: {error}"));
    std::fs::write(&last, digest).unwrap_or_else(|error| panic!("write {last:?}: {error}"));
}

/// Builds the agent and reads it.
fn build(unikernel: &Path, target_dir: &Path) -> Vec<u8> {
    let mut build = cargo("build", unikernel, target_dir);
    run(build.args(["--locked", "--bins"]));
    let built = target_dir.join(TARGET).join("release").join(AGENT);
    std::fs::read(&built).unwrap_or_else(|error| panic!("read {built:?}: {error}"))
}

fn cargo(verb: &str, unikernel: &Path, target_dir: &Path) -> Command {
    let mut cargo = Command::new(variable("CARGO"));
    cargo.args([verb, "--release", "--target", TARGET]);
    cargo.arg("--manifest-path").arg(unikernel.join("Cargo.toml"));
    cargo.arg("--target-dir").arg(target_dir).current_dir(unikernel);
    for (name, _) in env::vars_os() {
        // Profile settings of the monitor's build come as variables too.
        let name = name.to_string_lossy();
        let profile = name.starts_with("CARGO_PROFILE_") || name.starts_with("CARGO_TARGET_X86_64");
        if profile || FOREIGN.contains(&&*name) {
            cargo.env_remove(&*name);
        }
    }
    // Set though empty, this also takes precedence over the flags in the monitor's .cargo/config.toml.
    cargo.env("CARGO_ENCODED_RUSTFLAGS", "");
    cargo
}

fn run(cargo: &mut Command) {
    let output = cargo.output().unwrap_or_else(|error| panic!("run {cargo:?}: {error}"));
    if !output.status.success() {
        panic!("build the guest agent:\n{}", String::from_utf8_lossy(&output.stderr));
    }
}

fn variable(name: &str) -> String {
    env::var(name).unwrap_or_else(|error| panic!("cargo sets {name}: {error}"))
}
