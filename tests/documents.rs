//! The documents name what exists.

use std::collections::BTreeSet;
use std::path::Path;

use jailer::seccomp::{RULES, ThreadKind};

use crate::harness::run;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

fn read(name: &str) -> String {
    std::fs::read_to_string(root().join(name)).unwrap()
}

/// What stands between backquotes.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

#[test]
fn architecture_names_only_paths_that_exist() {
    let text = read("ARCHITECTURE.md");
    let is_path = |word: &&str| {
        word.contains('/') && !word.starts_with('/') && !word.contains(' ') && !word.contains("::")
    };
    let paths: Vec<_> = quoted(&text).filter(is_path).collect();
    assert!(paths.len() > 20, "only {} paths found: {paths:?}", paths.len());
    let missing: Vec<_> = paths.iter().filter(|path| !root().join(path).exists()).collect();
    assert!(missing.is_empty(), "ARCHITECTURE.md names {missing:?}");
}

#[test]
fn every_module_has_its_place_in_architecture() {
    let text = read("ARCHITECTURE.md");
    let source = root().join("vmm/src");
    for entry in std::fs::read_dir(&source).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(
            text.contains(&format!("`vmm/src/{name}")),
            "vmm/src/{name} is not in ARCHITECTURE.md"
        );
    }
}

#[test]
fn the_readme_names_only_options_that_exist() {
    let commands = [
        &["run", "--help"][..],
        &["soak", "--help"],
        &["launch", "--help"],
        &["agent", "export", "--help"],
        &["snapshot", "create", "--help"],
        &["snapshot", "restore", "--help"],
        &["doctor", "--help"],
        &["api", "--help"],
    ];
    let help: String = commands.map(|command| run(command).stdout).concat();
    let text = read("README.md");
    let lines =
        text.lines().filter(|line| line.contains("cleanslate ") || line.contains("cargo run"));
    let mut seen = 0;
    for word in lines
        .flat_map(str::split_whitespace)
        .filter(|word| word.starts_with("--") && word.len() > 2)
    {
        let option = word.trim_end_matches(['`', ',', '.', ')']);
        assert!(option == "--release" || help.contains(option), "README.md names {option}");
        seen += 1;
    }
    assert!(seen > 3, "no options found in README.md");
}

#[test]
fn architecture_lists_the_system_calls_of_the_filters() {
    let text = read("ARCHITECTURE.md");
    for (kind, firecracker) in ThreadKind::ALL.into_iter().zip([31, 50, 27, 50, 31, 50]) {
        let rules = RULES.iter().filter(|rule| rule.thread == kind && !rule.assertions);
        let calls: BTreeSet<_> = rules.map(|rule| rule.call).collect();
        let names: Vec<_> = calls.iter().map(|name| format!("`{name}`")).collect();
        let row = format!("| {kind} | {} | {firecracker} | {} |", calls.len(), names.join(", "));
        assert!(text.contains(&row), "ARCHITECTURE.md lacks the row\n{row}");
        assert!(calls.len() <= firecracker);
    }
}
