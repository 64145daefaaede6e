//! Compiles the filters of system calls from their rules, so that a broken rule breaks the build and no process of ours
//! spends time on it.

use std::fmt::Write;
use std::path::Path;
use std::{env, fs};

#[path = "src/seccomp/compile.rs"]
mod compile;

use compile::{Build, Libc, THREADS};

fn main() {
    for file in ["rules.toml", "calls.txt", "compile.rs"] {
        println!("cargo::rerun-if-changed=src/seccomp/{file}");
    }
    let libc = match env::var("CARGO_CFG_TARGET_ENV").as_deref() {
        Ok("musl") => Libc::Musl,
        _ => Libc::Gnu,
    };
    let build = Build { libc, assertions: env::var_os("CARGO_CFG_DEBUG_ASSERTIONS").is_some() };
    let path = Path::new(&env::var_os("OUT_DIR").expect("cargo sets it")).join("filters.rs");
    match source(build) {
        Ok(source) => fs::write(path, source).expect("write the filters"),
        Err(error) => {
            println!("cargo::error=jailer/src/seccomp/rules.toml: {}", error.replace('\n', " "));
        }
    }
}

/// The rules and the programs as Rust.
fn source(build: Build) -> Result<String, String> {
    let read = |file: &str| {
        fs::read_to_string(Path::new("src/seccomp").join(file))
            .map_err(|error| format!("{file}: {error}"))
    };
    let rules = compile::parse(&read("rules.toml")?, &read("calls.txt")?, build)?;
    let mut text = String::from("&[\n");
    for rule in &rules {
        let arguments: Vec<_> = rule
            .arguments
            .iter()
            .map(|(index, value, text)| {
                format!("Argument {{ index: {index}, value: {value}, text: {text:?} }}")
            })
            .collect();
        let _ = writeln!(
            text,
            "Rule {{ thread: ThreadKind::ALL[{}], call: {:?}, arguments: &[{}], why: {:?}, rare: {:?}, assertions: {} }},",
            rule.thread,
            rule.call,
            arguments.join(", "),
            rule.why,
            rule.rare,
            rule.assertions
        );
    }
    let mut source = format!("/// Every rule.\npub static RULES: &[Rule] = {text}];\n");
    let _ = writeln!(source, "static PROGRAMS: [&[sock_filter]; {}] = [", THREADS.len());
    for thread in 0..THREADS.len() {
        source += "&[";
        for instruction in compile::compile(&rules, thread)? {
            let seccompiler::sock_filter { code, jt, jf, k } = instruction;
            let _ = write!(source, "sock_filter {{ code: {code}, jt: {jt}, jf: {jf}, k: {k} }},");
        }
        source += "],\n";
    }
    Ok(source + "];\n")
}
