//! Builds the guest agent with the same toolchain as the monitor, but apart from its workspace, flags and lock file.

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
    for sources in ["unikernel/src", "unikernel/Cargo.toml", "unikernel/Cargo.lock"] {
        println!("cargo:rerun-if-changed={}", guest.join(sources).display());
    }
    for sources in
        ["unikernel/build.rs", "unikernel/link.ld", "protocol/src", "protocol/Cargo.toml"]
    {
        println!("cargo:rerun-if-changed={}", guest.join(sources).display());
    }
    let embed = |name: &str, features: &str| {
        let image = match env::var_os("CARGO_FEATURE_FUZZING") {
            Some(_) => Vec::new(),
            None => build(&guest.join("unikernel"), &out.join("agent"), features),
        };
        std::fs::write(out.join(name), image)
            .unwrap_or_else(|error| panic!("write {name}: {error}"));
    };
    // Before the agent, so that what lies in the build directory in the end is what everybody runs.
    if env::var_os("CARGO_FEATURE_ATTACKER").is_some() {
        embed("cleanslate-attacker.elf", "attacks");
    }
    embed("cleanslate-agent.elf", "");
}

/// Builds the agent with these features and reads it.
fn build(unikernel: &Path, target_dir: &Path, features: &str) -> Vec<u8> {
    let mut cargo = Command::new(variable("CARGO"));
    cargo.args(["build", "--release", "--locked", "--bins", "--target", TARGET]);
    cargo.args(["--features", features]);
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
    let output = cargo.output().unwrap_or_else(|error| panic!("run {cargo:?}: {error}"));
    if !output.status.success() {
        panic!("build the guest agent:\n{}", String::from_utf8_lossy(&output.stderr));
    }
    let built = target_dir.join(TARGET).join("release").join(AGENT);
    std::fs::read(&built).unwrap_or_else(|error| panic!("read {built:?}: {error}"))
}

fn variable(name: &str) -> String {
    env::var(name).unwrap_or_else(|error| panic!("cargo sets {name}: {error}"))
}
