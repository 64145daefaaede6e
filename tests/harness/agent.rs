//! The guest agent built with a feature that no user's has.

use std::collections::HashMap;
use std::path::Path;
use std::process::Command;
use std::sync::{LazyLock, Mutex};

/// The path of an image of the agent that is built with `feature`; built once.
pub fn built_with(feature: &'static str) -> &'static str {
    static BUILT: LazyLock<Mutex<HashMap<&str, &str>>> = LazyLock::new(Mutex::default);
    // All are built in one directory, one after the other; what they have in common is built once.
    let mut built = BUILT.lock().unwrap();
    built.entry(feature).or_insert_with(|| build(feature).leak())
}

fn build(feature: &str) -> String {
    const TARGET: &str = "x86_64-unknown-linux-gnu";
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("../guest-agent/unikernel");
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("agents");
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["build", "--release", "--locked", "--bins", "--target", TARGET]);
    cargo.args(["--features", feature, "--target-dir"]).arg(&target);
    // A rustup in front of the compiler would follow what a dependency's sources say of toolchains, unless it was told (as it is
    // below `cargo test`).
    cargo.env("RUSTC", Path::new(env!("CARGO")).with_file_name("rustc"));
    // As images/build.rs has it: the flags are for another kind of program.
    cargo.env("CARGO_ENCODED_RUSTFLAGS", "").current_dir(sources);
    let output = cargo.output().expect("run cargo");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let image = target.join(format!("{feature}.elf"));
    std::fs::copy(target.join(TARGET).join("release/cleanslate-agent"), &image).unwrap();
    image.into_os_string().into_string().expect("UTF-8")
}
