//! `cleanslate api`: Firecracker's interface for what a machine has, and our own beside it.

mod description;
mod ends;
mod faults;
mod openapi;
mod snapshots;

use std::io::Read;
use std::os::unix::fs::symlink;
use std::process::{Command, Stdio};

use agent_protocol::{Reply, Request};
use serde_json::json;

use crate::harness::api::Api;
use crate::harness::client::{ask, greeted};
use crate::harness::{cleanslate, run, temp_dir};

/// An instance that runs the embedded agent with a socket for its ports.
fn with_agent() -> Api {
    let api = Api::start();
    api.put("/machine-config", json!({ "vcpu_count": 1, "mem_size_mib": 16 })).expect_done();
    let socket = api.path("vsock");
    api.put("/vsock", json!({ "guest_cid": 3, "uds_path": socket })).expect_done();
    api.action("InstanceStart").expect_done();
    api
}

#[test]
fn the_embedded_agent_boots_is_judged_and_is_reset_in_place() {
    let api = with_agent();
    assert_eq!(api.get_json("/")["state"], "Running");
    let (mut agent, hello) = greeted(&api.path("vsock"));
    assert_eq!(hello.life, 1);
    assert_eq!(ask(&mut agent, &Request::Echo(b"x".into())), Reply::Echo(b"x".into()));
    let verdict = api.get_json("/cleanslate/verdict");
    assert_eq!(verdict, json!({ "clean": true, "life": 1, "findings": [] }));
    api.put("/cleanslate/reset", json!({})).expect_done();
    // Connections die with a life.
    assert_eq!(agent.read(&mut [0]).unwrap_or(0), 0);
    assert_eq!(api.get_json("/cleanslate/verdict")["life"], 2);
    assert_eq!(api.get_json("/cleanslate/report")["life"], 2);
    assert_eq!(greeted(&api.path("vsock")).1.life, 2);
    let outcome = api.end();
    assert!(outcome.stderr.contains("interrupted"), "{outcome}");
}

#[test]
fn an_injected_nmi_is_a_finding() {
    let api = with_agent();
    assert_eq!(api.get_json("/cleanslate/verdict")["clean"], true);
    api.put("/cleanslate/nmi", json!({})).expect_done();
    let verdict = api.get_json("/cleanslate/verdict");
    assert_eq!(verdict["clean"], false);
    assert_eq!(verdict["findings"][0]["name"], "unknown-nmi");
    api.end();
}

#[test]
fn the_dma_audit_and_the_console_are_told() {
    let api = Api::start();
    api.put("/cleanslate/machine", json!({ "dma_audit": "strict" })).expect_done();
    api.action("InstanceStart").expect_done();
    assert_eq!(api.get_json("/cleanslate/verdict")["clean"], true);
    let audit = api.get_json("/cleanslate/dma-audit");
    assert_eq!(audit["violations"], json!([]), "{audit}");
    assert!(api.get_json("/cleanslate/console")["lines"].is_array());
    api.end();
}

#[test]
fn metrics_are_written_when_they_are_wanted_and_at_the_end() {
    let dir = temp_dir();
    let [metrics, log] = ["metrics", "log"].map(|name| dir.path().join(name));
    let arguments = ["--metrics-path", metrics.to_str().unwrap(), "--id", "some-name"];
    let api = Api::start_with(dir, &arguments);
    api.put("/logger", json!({ "log_path": log, "level": "Info", "show_level": true }))
        .expect_done();
    api.put("/metrics", json!({ "metrics_path": "/x" })).expect_refused("twice");
    api.action("InstanceStart").expect_done();
    api.get_json("/cleanslate/verdict");
    api.action("FlushMetrics").expect_done();
    let first = std::fs::read_to_string(&metrics).unwrap();
    let first: serde_json::Value = serde_json::from_str(first.trim_end()).unwrap();
    assert_eq!(first["put_api_requests"]["metrics_fails"], 1);
    assert_eq!(first["put_api_requests"]["actions_count"], 1);
    assert!(first["vsock"]["tx_bytes_count"].as_u64() > Some(0), "the report came over vsock");
    let text = api.get("/cleanslate/metrics");
    assert!(text.head.contains("content-type: text/plain; version=0.0.4"), "{text:?}");
    assert!(text.body.contains("cleanslate_machine_state{state=\"Running\"} 1\n"), "{text:?}");
    assert!(text.body.contains("cleanslate_guest_vsock_connections_opened_total 1\n"), "{text:?}");
    let dir = api.dir.path().to_owned();
    assert_eq!(std::fs::read_to_string(&log).unwrap().matches(":ERROR] ").count(), 1);
    // Kept until the files were read.
    let Api { program, dir: kept, .. } = api;
    crate::harness::signal(&program.child, rustix::process::Signal::INT);
    program.finish("cleanslate api").expect_status(130);
    let lines = std::fs::read_to_string(dir.join("metrics")).unwrap();
    assert_eq!(lines.lines().count(), 2, "{lines}");
    let log = std::fs::read_to_string(log).unwrap();
    assert!(log.lines().all(|line| line.contains(" [some-name:api:")), "{log}");
    assert!(log.contains("PUT request on \"/metrics\""), "{log}");
    drop(kept);
}

#[test]
fn an_idle_instance_never_wakes_up() {
    let api = with_agent();
    greeted(&api.path("vsock"));
    api.get_json("/cleanslate/verdict");
    let mut processes = api.jailed(2);
    processes.push(api.program.child.id());
    let switches = || -> Vec<_> {
        let of = |pid: &u32| {
            let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
            let each = tasks.map(|task| {
                let status = std::fs::read_to_string(task.unwrap().path().join("status")).unwrap();
                let line = status.lines().find(|line| line.starts_with("voluntary_ctxt_switches"));
                line.unwrap().split_whitespace().last().unwrap().parse::<u64>().unwrap()
            });
            each.sum::<u64>()
        };
        processes.iter().map(of).collect()
    };
    // A connection that has ended keeps its timers for a moment.
    crate::harness::eventually("nobody wakes up for two seconds", || {
        let before = switches();
        std::thread::sleep(std::time::Duration::from_secs(2));
        switches() == before
    });
    api.end();
}

#[test]
fn by_the_name_of_firecracker_the_program_is_the_api() {
    let dir = temp_dir();
    let firecracker = dir.path().join("firecracker");
    symlink(cleanslate(&[]).get_program(), &firecracker).unwrap();
    if std::env::var_os(crate::harness::TRACES).is_some() {
        // The tracer has the program's place.
        return;
    }
    let version = Command::new(&firecracker).arg("--version").output().unwrap();
    let version = String::from_utf8(version.stdout).unwrap();
    assert!(version.starts_with("Firecracker v1."), "{version}");
    let mut command = Command::new(&firecracker);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let api = Api::start_as(command, dir, &["--id", "by-another-name", "--level", "Warning"]);
    assert_eq!(api.get_json("/")["id"], "by-another-name");
    let told = api.get_json("/version")["firecracker_version"].as_str().unwrap().to_owned();
    assert!(version.starts_with(&format!("Firecracker v{told}\n")), "{version}");
    api.end();
}

#[test]
fn options_that_cannot_be_honoured_are_refused_with_a_reason() {
    let check = |arguments: &[&str], text: &str| {
        run(&[&["api"], arguments].concat())
            .expect_status(2)
            .expect_stderr(text)
            .expect_one_line_of_stderr();
    };
    check(&["--boot-timer"], "no boot timer");
    check(&["--enable-pci"], "virtio-mmio");
    check(&["--seccomp-filter", "/f"], "part of the program");
    check(&["--metadata", "/m"], "no metadata service");
    check(&["--mmds-size-limit", "1"], "no metadata service");
    check(&["--no-jail"], "--no-jail");
    check(&["--no-api"], "--config-file");
    check(&["--level", "loud"], "loud");
    check(&["--http-api-max-payload-size", "0"], "http-api-max-payload-size");
    check(&["--id", "a_b"], "letters, digits or hyphens");
    check(&["--log-path", "/"], "open the log");
    check(&["--metrics-path", "/"], "open the metrics");
}
