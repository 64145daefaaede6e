//! Builds the guest agent in both personalities with the same toolchain as the monitor, but apart from its flags; the
//! unikernel also apart from its workspace and lock file.

mod sources;

use std::env;
use std::path::PathBuf;
use std::process::Command;

const TARGET: &str = "x86_64-unknown-linux-gnu";
const AGENT: &str = "cleanslate-agent";
const LINUX_AGENT: &str = "cleanslate-linux-agent";

/// Settings of the monitor's build that must not reach the agent's.
const FOREIGN: [&str; 8] = [
    "RUSTFLAGS",
    "CARGO_BUILD_RUSTFLAGS",
    "CARGO_BUILD_TARGET",
    "CARGO_BUILD_TARGET_DIR",
    "CARGO_TARGET_DIR",
    "RUSTC_WRAPPER",
    "RUSTC_WORKSPACE_WRAPPER",
    // Cannot be had together with optimization at link time.
    "CARGO_INCREMENTAL",
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
    let unikernel =
        Project { directory: guest.join("unikernel"), target: out.join("agent"), flags: "" };
    // Static, since nothing else is in the guest's file system.
    let linux = Project {
        directory: guest.join("linux"),
        target: out.join("linux-agent"),
        flags: "-Ctarget-feature=+crt-static",
    };
    // Cargo goes by times, and a file that was put back may be older than what was built since: contents decide.
    let last = out.join("sources");
    if std::fs::read_to_string(&last).is_ok_and(|last| last != digest) {
        unikernel.clean(&["unikernel", "agent-protocol"]);
        linux.clean(&["linux-agent", "unikernel", "agent-protocol"]);
    }
    for (project, name) in [(&unikernel, AGENT), (&linux, LINUX_AGENT)] {
        let image = match env::var_os("CARGO_FEATURE_FUZZING") {
            Some(_) => Vec::new(),
            None => project.build(name),
        };
        let embedded = out.join(format!("{name}.elf"));
        std::fs::write(&embedded, image).unwrap_or_else(|e| panic!("write {embedded:?}: {e}"));
    }
    std::fs::write(&last, digest).unwrap_or_else(|error| panic!("write {last:?}: {error}"));
}

/// What is built on its own.
struct Project {
    directory: PathBuf,
    target: PathBuf,
    /// For the compiler, one after the other with nothing between.
    flags: &'static str,
}

impl Project {
    /// Builds the program `name` and reads it.
    fn build(&self, name: &str) -> Vec<u8> {
        run(self.cargo("build").args(["--locked", "--bin", name]));
        let built = self.target.join(TARGET).join("release").join(name);
        std::fs::read(&built).unwrap_or_else(|error| panic!("read {built:?}: {error}"))
    }

    fn clean(&self, packages: &[&str]) {
        run(self.cargo("clean").args(packages.iter().flat_map(|name| ["-p", name])));
    }

    fn cargo(&self, verb: &str) -> Command {
        let mut cargo = Command::new(variable("CARGO"));
        cargo.args([verb, "--release", "--target", TARGET]);
        cargo.arg("--manifest-path").arg(self.directory.join("Cargo.toml"));
        cargo.arg("--target-dir").arg(&self.target).current_dir(&self.directory);
        for (name, _) in env::vars_os() {
            // Profile settings of the monitor's build come as variables too.
            let name = name.to_string_lossy();
            let profile =
                name.starts_with("CARGO_PROFILE_") || name.starts_with("CARGO_TARGET_X86_64");
            if profile || FOREIGN.contains(&&*name) {
                cargo.env_remove(&*name);
            }
        }
        // Even empty this takes precedence over the flags in the monitor's .cargo/config.toml.
        cargo.env("CARGO_ENCODED_RUSTFLAGS", self.flags);
        cargo.env("CARGO_PROFILE_RELEASE_STRIP", "true");
        cargo
    }
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
