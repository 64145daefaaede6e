//! Pausing, and snapshots by their two files.

use std::path::Path;

use agent_protocol::{Reply, Request};
use serde_json::{Value, json};

use super::with_agent;
use crate::harness::api::{Api, connect};
use crate::harness::client::{ask, greeted};
use crate::harness::{file, temp_dir};

/// A request for a snapshot of `api`, in its directory.
fn files(api: &Api) -> Value {
    json!({ "snapshot_path": api.path("state"), "mem_file_path": api.path("memory") })
}

/// A request to load the snapshot in `dir`.
fn load(dir: &Path, more: Value) -> Value {
    let memory = json!({ "backend_type": "File", "backend_path": dir.join("memory") });
    let mut request = json!({ "snapshot_path": dir.join("state"), "mem_backend": memory });
    request.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    request
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort_unstable();
    names
}

#[test]
fn a_paused_machine_answers_nobody_until_it_goes_on() {
    let api = with_agent();
    let (mut agent, _) = greeted(&api.path("vsock"));
    for _ in 0..2 {
        api.patch("/vm", json!({ "state": "Paused" })).expect_done();
        assert_eq!(api.get_json("/")["state"], "Paused");
    }
    api.put("/cleanslate/reset", json!({})).expect_refused("paused");
    api.get("/cleanslate/verdict").expect_refused("paused");
    assert!(api.get_json("/cleanslate/console")["lines"].is_array());
    // The connection is taken by the kernel; nobody says anything on it.
    let mut waiting = connect(&api.path("vsock"));
    std::io::Write::write_all(&mut waiting, b"CONNECT 5005\n").unwrap();
    waiting.set_read_timeout(Some(std::time::Duration::from_millis(300))).unwrap();
    let silence = std::io::Read::read(&mut waiting, &mut [0]).unwrap_err();
    assert_eq!(silence.kind(), std::io::ErrorKind::WouldBlock);
    for _ in 0..2 {
        api.patch("/vm", json!({ "state": "Resumed" })).expect_done();
        assert_eq!(api.get_json("/")["state"], "Running");
    }
    assert_eq!(ask(&mut agent, &Request::Echo(b"x".into())), Reply::Echo(b"x".into()));
    assert_eq!(api.get_json("/cleanslate/verdict")["clean"], true);
    api.end();
}

#[test]
fn a_machine_goes_on_in_another_instance_as_it_was_described() {
    let first = with_agent();
    assert_eq!(greeted(&first.path("vsock")).1.life, 1);
    first.put("/cleanslate/reset", json!({})).expect_done();
    assert_eq!(greeted(&first.path("vsock")).1.life, 2);
    first.put("/snapshot/create", files(&first)).expect_refused("paused");
    first.patch("/vm", json!({ "state": "Paused" })).expect_done();
    first.put("/snapshot/create", files(&first)).expect_done();
    // Again, over the first one; and the machine goes on.
    first.put("/snapshot/create", files(&first)).expect_done();
    first.patch("/vm", json!({ "state": "Resumed" })).expect_done();
    assert_eq!(greeted(&first.path("vsock")).1.life, 2);
    let described = first.get_json("/vm/config");
    assert_eq!(names(first.dir.path()), ["api.sock", "memory", "state", "vsock"]);

    // Where the first one still has its socket, another is needed.
    let second = Api::start();
    second.put("/snapshot/load", load(first.dir.path(), json!({}))).expect_refused("path exists");
    assert_eq!(second.get_json("/")["state"], "Not started");
    let elsewhere =
        json!({ "resume_vm": true, "vsock_override": { "uds_path": second.path("v") } });
    second.put("/snapshot/load", load(first.dir.path(), elsewhere)).expect_done();
    assert_eq!(second.get_json("/")["state"], "Running");
    assert_eq!(greeted(&second.path("v")).1.life, 2);
    assert_eq!(second.get_json("/cleanslate/verdict")["clean"], true);
    second.put("/cleanslate/reset", json!({})).expect_done();
    assert_eq!(second.get_json("/cleanslate/verdict")["life"], 3);
    second.end();

    // Paused, by itself, at the same socket.
    let Api { program, dir, .. } = first;
    crate::harness::signal(&program.child, rustix::process::Signal::INT);
    program.finish("cleanslate api").expect_status(130);
    let third = Api::start();
    third.put("/snapshot/load", load(dir.path(), json!({}))).expect_done();
    assert_eq!(third.get_json("/")["state"], "Paused");
    assert_eq!(third.get_json("/vm/config")["vsock"], described["vsock"]);
    assert_eq!(third.get_json("/machine-config"), described["machine-config"]);
    third.patch("/vm", json!({ "state": "Resumed" })).expect_done();
    assert_eq!(greeted(&dir.path().join("vsock")).1.life, 2);
    third.end();
}

#[test]
fn what_changed_is_a_snapshot_where_writes_were_tracked() {
    let api = Api::start();
    let machine = json!({ "vcpu_count": 1, "mem_size_mib": 16, "track_dirty_pages": true });
    api.put("/machine-config", machine).expect_done();
    api.action("InstanceStart").expect_done();
    assert_eq!(api.get_json("/cleanslate/verdict")["clean"], true);
    api.patch("/vm", json!({ "state": "Paused" })).expect_done();
    api.put("/snapshot/create", files(&api)).expect_done();
    api.patch("/vm", json!({ "state": "Resumed" })).expect_done();
    api.patch("/vm", json!({ "state": "Paused" })).expect_done();
    let layer = temp_dir();
    let files = json!({
        "snapshot_type": "Diff",
        "snapshot_path": layer.path().join("state"),
        "mem_file_path": layer.path().join("memory"),
    });
    api.put("/snapshot/create", files).expect_done();
    let stored = |dir: &Path| {
        use std::os::unix::fs::MetadataExt;
        dir.join("memory").metadata().unwrap().blocks()
    };
    assert!(stored(layer.path()) < stored(api.dir.path()) / 2);
    let other = Api::start();
    other.put("/snapshot/load", load(layer.path(), json!({}))).expect_refused("--base");
    other.end();
    api.end();

    let api = with_agent();
    api.patch("/vm", json!({ "state": "Paused" })).expect_done();
    let mut files = self::files(&api);
    files["snapshot_type"] = json!("Diff");
    api.put("/snapshot/create", files).expect_refused("track");
    assert_eq!(names(api.dir.path()), ["api.sock", "vsock"]);
    api.end();
}

#[test]
fn snapshots_that_cannot_be_written_or_read_are_refused_and_leave_nothing() {
    let api = with_agent();
    api.patch("/vm", json!({ "state": "Paused" })).expect_done();
    let create = |state: &Path, memory: &Path| {
        api.put("/snapshot/create", json!({ "snapshot_path": state, "mem_file_path": memory }))
    };
    create(&api.path("state"), api.dir.path()).expect_refused("");
    create(Path::new("/nowhere/state"), &api.path("memory")).expect_refused("/nowhere");
    assert_eq!(names(api.dir.path()), ["api.sock", "vsock"]);
    create(&api.path("state"), &api.path("memory")).expect_done();
    api.patch("/vm", json!({ "state": "Resumed" })).expect_done();
    assert_eq!(api.get_json("/cleanslate/verdict")["clean"], true);

    let other = Api::start();
    let state = std::fs::read(api.path("state")).unwrap();
    let dir = temp_dir();
    std::fs::copy(api.path("memory"), dir.path().join("memory")).unwrap();
    let check = |bytes: &[u8], words: &str| {
        file(&dir, "state", bytes);
        other.put("/snapshot/load", load(dir.path(), json!({}))).expect_refused(words);
    };
    check(&state[..state.len() - 1], "Load snapshot error");
    check(b"no snapshot", "Load snapshot error");
    other.put("/snapshot/load", load(Path::new("/nowhere"), json!({}))).expect_refused("/nowhere");
    let uffd = json!({ "backend_type": "Uffd", "backend_path": "/socket" });
    let vsock = json!({ "uds_path": other.path("v") });
    let uffd =
        json!({ "snapshot_path": api.path("state"), "mem_backend": uffd, "vsock_override": vsock });
    other.put("/snapshot/load", uffd).expect_refused("\"/socket\"");
    let elsewhere = json!({ "resume_vm": true, "vsock_override": { "uds_path": other.path("v") } });
    std::fs::write(dir.path().join("state"), &state).unwrap();
    std::fs::write(dir.path().join("memory"), [0; 4096]).unwrap();
    other.put("/snapshot/load", load(dir.path(), elsewhere.clone())).expect_refused("");
    // Nothing of all that is in the way of one that is whole.
    other.put("/snapshot/load", load(api.dir.path(), elsewhere)).expect_done();
    assert_eq!(other.get_json("/cleanslate/verdict")["clean"], true);
    other.end();
    api.end();
}
