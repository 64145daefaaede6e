//! How an instance ends: with its machine, with a signal, with whatever of it is killed; nothing is left behind.

use std::path::Path;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use super::with_agent;
use crate::harness::api::Api;
use crate::harness::guest::Guest;
use crate::harness::{cleanslate, eventually, file, run, temp_dir};
use crate::leftovers::marked_groups;

fn kill(pid: u32) {
    kill_process(Pid::from_raw(pid as i32).unwrap(), Signal::KILL).unwrap();
}

/// Starts a guest and returns how the program ended.
#[track_caller]
fn end_of(guest: Guest) -> crate::harness::Outcome {
    let dir = temp_dir();
    let kernel = file(&dir, "guest.elf", &guest.elf());
    let api = Api::start_with(dir, &[]);
    api.put("/boot-source", json!({ "kernel_image_path": kernel })).expect_done();
    api.action("InstanceStart").expect_done();
    api.finish()
}

#[test]
fn the_instance_ends_with_its_guest() {
    let off = end_of(Guest::new().print("bye\n").power_off()).expect_status(0);
    assert_eq!(off.stdout, "bye\n");
    off.expect_stderr("the guest turned the machine off");
    // As Firecracker, which knows no reset.
    end_of(Guest::new().out(0x64, 0xfe).halt()).expect_status(0).expect_stderr("a reset (i8042)");
    end_of(Guest::new().triple_fault()).expect_status(4).expect_stderr("triple fault");
}

#[test]
fn the_console_goes_where_it_is_told_to() {
    let dir = temp_dir();
    let guest = Guest::new().print("into a file\n").power_off();
    let kernel = file(&dir, "guest.elf", &guest.elf());
    let console = file(&dir, "console", b"what was there\n");
    let api = Api::start_with(dir, &[]);
    let wrong = json!({ "serial_out_path": api.dir.path() });
    api.put("/serial", wrong).expect_done();
    api.put("/boot-source", json!({ "kernel_image_path": kernel })).expect_done();
    api.action("InstanceStart").expect_refused("open ");
    api.put("/serial", json!({ "serial_out_path": console })).expect_done();
    api.action("InstanceStart").expect_done();
    crate::harness::eventually("the guest has printed", || {
        std::fs::read_to_string(&console).unwrap() == "what was there\ninto a file\n"
    });
    assert_eq!(api.finish().expect_status(0).stdout, "");
}

#[test]
fn a_configuration_file_starts_a_machine_with_and_without_clients() {
    let dir = temp_dir();
    let guest = Guest::new().print("from a file\n").power_off();
    let kernel = file(&dir, "guest.elf", &guest.elf());
    let config = json!({
        "boot-source": { "kernel_image_path": kernel },
        "machine-config": { "vcpu_count": 1, "mem_size_mib": 16 },
        "drives": [],
    });
    let config = file(&dir, "config.json", config.to_string().as_bytes());
    let config = config.to_str().unwrap();
    let outcome = run(&["api", "--no-api", "--config-file", config]).expect_status(0);
    assert_eq!(outcome.stdout, "from a file\n");

    let agent = file(
        &dir,
        "agent.json",
        json!({ "vsock": { "guest_cid": 3, "uds_path": dir.path().join("v") } })
            .to_string()
            .as_bytes(),
    );
    let agent = agent.to_str().unwrap().to_owned();
    let api = Api::start_with(dir, &["--config-file", &agent]);
    eventually("it runs", || api.get_json("/")["state"] == "Running");
    assert_eq!(api.get_json("/cleanslate/verdict")["clean"], true);
    api.end();
}

#[test]
fn a_configuration_file_that_is_none_is_one_line_and_no_machine() {
    let dir = temp_dir();
    let check = |name: &str, bytes: &[u8], text: &str| {
        let config = file(&dir, name, bytes);
        run(&["api", "--no-api", "--config-file", config.to_str().unwrap()])
            .expect_status(2)
            .expect_stderr(text)
            .expect_one_line_of_stderr();
    };
    check("empty", b"", "EOF");
    check("field", b"{\"bogus\": 1}", "unknown field `bogus`");
    check("latin1", b"{\"boot-source\": {\"kernel_image_path\": \"\xff\"}}", "invalid unicode");
    check("long", &vec![b' '; (1 << 20) + 1], "longer than");
    check("kernel", b"{\"boot-source\": {\"kernel_image_path\": \"/nowhere\"}}", "/nowhere");
    for path in [dir.path().to_str().unwrap(), "/nowhere", "/dev/zero"] {
        run(&["api", "--no-api", "--config-file", path])
            .expect_status(2)
            .expect_stderr("read the configuration file")
            .expect_one_line_of_stderr();
    }
}

#[test]
fn a_socket_that_exists_is_somebody_elses() {
    let dir = temp_dir();
    let socket = file(&dir, "api.sock", b"somebody's");
    run(&["api", "--api-sock", socket.to_str().unwrap()])
        .expect_status(2)
        .expect_stderr("the path exists")
        .expect_one_line_of_stderr();
    assert_eq!(std::fs::read(&socket).unwrap(), b"somebody's");
    let api = Api::start();
    run(&["api", "--api-sock", api.socket.to_str().unwrap()])
        .expect_status(2)
        .expect_stderr("the path exists");
    assert_eq!(api.get_json("/")["state"], "Not started");
    api.end();
}

#[test]
fn killing_the_program_takes_everything_along() {
    const ID: &str = "api-killed-test";
    let dir = temp_dir();
    let vsock = dir.path().join("vsock");
    let api = Api::start_with(dir, &["--id", ID]);
    api.put("/vsock", json!({ "guest_cid": 3, "uds_path": vsock })).expect_done();
    api.action("InstanceStart").expect_done();
    let jailed = api.jailed(2);
    assert!(vsock.exists());
    kill(api.program.child.id());
    eventually("the processes are gone", || {
        jailed.iter().all(|pid| !Path::new(&format!("/proc/{pid}")).exists())
    });
    eventually("the sockets are gone", || !api.socket.exists() && !vsock.exists());
    eventually("the control groups are gone", || marked_groups(ID).is_empty());
}

#[test]
fn the_end_of_either_process_is_told_and_is_the_end_of_the_other() {
    for (victim, words) in [
        (0, "the process that serves clients ended: was killed by signal 9"),
        (1, "the machine's process was killed by signal 9"),
    ] {
        let api = with_agent();
        let jailed = api.jailed(2);
        kill(jailed[victim]);
        api.finish().expect_status(2).expect_stderr(words);
        let other = format!("/proc/{}", jailed[1 - victim]);
        eventually("the other is gone too", || !Path::new(&other).exists());
    }
}

#[test]
fn who_waits_for_a_machine_that_ends_is_told() {
    let api = with_agent();
    let machine = Pid::from_raw(api.jailed(2)[1] as i32).unwrap();
    kill_process(machine, Signal::STOP).unwrap();
    let mut waiting = crate::harness::api::connect(&api.socket);
    let request = b"GET /cleanslate/console HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    std::io::Write::write_all(&mut waiting, request).unwrap();
    // It has been taken when a later one is answered.
    assert_eq!(api.get_json("/")["state"], "Running");
    kill_process(machine, Signal::KILL).unwrap();
    crate::harness::api::read_response(&mut waiting).expect_refused("was killed by signal 9");
    api.finish().expect_status(2);
}

#[test]
fn the_process_that_hears_clients_has_nothing_and_may_do_little() {
    let api = Api::start();
    // Whoever answers is confined.
    assert_eq!(api.get("/").status, 200);
    let pid = api.jailed(1)[0];
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let value = |name: &str| -> Vec<&str> {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.split_whitespace().collect()
    };
    assert_eq!(value("Seccomp:"), ["2"]);
    assert_eq!(value("NoNewPrivs:"), ["1"]);
    assert_eq!(value("CapEff:"), ["0000000000000000"]);
    assert_eq!(value("Threads:"), ["1"]);
    assert_eq!(std::fs::read_dir(format!("/proc/{pid}/root/")).unwrap().count(), 0);
    let namespace = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/net")).unwrap();
    assert_ne!(namespace(&pid.to_string()), namespace("self"));
    for fd in std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap() {
        let target = std::fs::read_link(fd.unwrap().path()).unwrap();
        let target = target.to_str().unwrap();
        let kinds = ["socket:", "pipe:", "anon_inode:[event", "/dev/null"];
        assert!(kinds.iter().any(|kind| target.starts_with(kind)), "{target}");
    }
    api.end();
}

#[test]
fn without_filters_the_rest_of_the_jail_stays() {
    let api = Api::start_with(temp_dir(), &["--no-seccomp"]);
    api.action("InstanceStart").expect_done();
    for pid in api.jailed(2) {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        assert!(status.contains("\nSeccomp:\t0\n"), "{status}");
        assert!(status.contains("\nNoNewPrivs:\t1\n"), "{status}");
    }
    api.end();
}

#[test]
fn a_signal_while_nothing_runs_is_the_end() {
    let dir = temp_dir();
    let socket = dir.path().join("api.sock");
    let api = Api::start_as(cleanslate(&["api"]), dir, &[]);
    assert!(socket.exists());
    api.end().expect_stderr("interrupted");
}
