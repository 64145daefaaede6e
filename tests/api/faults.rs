//! Clients that hang, flood or break rules hurt only themselves.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use serde_json::json;

use super::with_agent;
use crate::harness::api::{Api, connect, read_response, request};
use crate::harness::eventually;

/// Fails unless the instance still answers others.
#[track_caller]
fn expect_alive(api: &Api) {
    assert_eq!(api.get_json("/version")["firecracker_version"], "1.14.0");
}

#[test]
fn a_thousand_clients_that_hang_keep_nobody_waiting() {
    let api = Api::start();
    let mut hanging = Vec::new();
    for number in 0..1000 {
        let Ok(mut stream) = UnixStream::connect(&api.socket) else { panic!("client {number}") };
        let half: &[u8] = match number % 4 {
            0 => b"",
            1 => b"GET /ver",
            2 => b"PUT /vsock HTTP/1.1\r\nHost: x\r\n",
            _ => b"PUT /vsock HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{",
        };
        // It may have lost its place already.
        let _ = stream.write_all(half);
        hanging.push(stream);
        if number % 50 == 0 {
            expect_alive(&api);
        }
    }
    expect_alive(&api);
    let pid = api.jailed(1)[0];
    let open = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    assert!(open < 64 + 16, "{open} descriptors are open");
    drop(hanging);
    api.end();
}

#[test]
fn who_talks_keeps_the_connection_when_others_crowd_in() {
    let api = Api::start();
    let mut talker = connect(&api.socket);
    let mut crowd = Vec::new();
    for _ in 0..300 {
        crowd.push(UnixStream::connect(&api.socket).unwrap());
        talker.write_all(b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
        let mut answer = Vec::new();
        while !answer.ends_with(b"}") {
            let mut byte = [0];
            assert_eq!(talker.read(&mut byte).unwrap(), 1, "the connection was closed");
            answer.push(byte[0]);
        }
    }
    api.end();
}

#[test]
fn bodies_have_a_limit_whether_they_are_announced_or_not() {
    let api = Api::start();
    let mut stream = connect(&api.socket);
    stream
        .write_all(b"PUT /vsock HTTP/1.1\r\nHost: x\r\nContent-Length: 1073741824\r\n\r\n{")
        .unwrap();
    let response = read_response(&mut stream);
    assert_eq!(response.status, 413, "{response:?}");
    assert!(response.body.contains("limit of 51200 bytes"), "{response:?}");

    let mut stream = connect(&api.socket);
    stream
        .write_all(b"PUT /vsock HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        .unwrap();
    let chunk = [&b"1000\r\n"[..], &[b' '; 0x1000], b"\r\n"].concat();
    // 1 GiB, if it were taken.
    let sent = (0..(1 << 18)).take_while(|_| stream.write_all(&chunk).is_ok()).count();
    assert!(sent < 1000, "{sent} chunks were taken");
    assert_eq!(read_response(&mut stream).status, 413);

    let exactly = format!("{:51200}", "{}");
    let response = request(&api.socket, "PUT", "/entropy", exactly.as_bytes());
    response.expect_done();
    let response = request(&api.socket, "PUT", "/entropy", format!("{exactly} ").as_bytes());
    assert_eq!(response.status, 413, "{response:?}");
    expect_alive(&api);
    api.end();
}

#[test]
fn a_head_without_end_is_cut_off() {
    let api = Api::start();
    let mut stream = connect(&api.socket);
    stream.write_all(b"GET /version HTTP/1.1\r\n").unwrap();
    let line = format!("X-Long: {}\r\n", "x".repeat(4000));
    let sent = (0..100_000).take_while(|_| stream.write_all(line.as_bytes()).is_ok()).count();
    assert!(sent < 10_000, "{sent} lines were taken");
    expect_alive(&api);
    api.end();
}

#[test]
fn nonsense_is_answered_or_closed_and_changes_nothing() {
    let api = Api::start();
    let before = api.get_json("/vm/config");
    let put = |body: &[u8]| request(&api.socket, "PUT", "/machine-config", body);
    put(&[b'['; 50_000]).expect_refused("deserializing");
    put(b"{\"vcpu_count\":1,\"mem_size_mib\":16,\"cpu_template\":\"\xff\xfe\"}")
        .expect_refused("deserializing");
    put(b"{\"vcpu_count\":1,\"mem_size_mib\":16,\"more\":1}")
        .expect_refused("unknown field `more`");
    put(b"{\"vcpu_count\":1e99,\"mem_size_mib\":16}").expect_refused("deserializing");
    put(b"{\"vcpu_count\":1,\"vcpu_count\":1,\"mem_size_mib\":16}")
        .expect_refused("duplicate field");
    put(b"").expect_refused("Empty PUT request.");
    request(&api.socket, "GET", "/version", b"{}").expect_refused("cannot have a body");
    request(&api.socket, "PUT", "/%2e%2e/etc", b"{}").expect_refused("Invalid request");
    for bytes in [&b"\0\0\0\0\r\n\r\n"[..], b"GET /version HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\0"]
    {
        let mut stream = connect(&api.socket);
        stream.write_all(bytes).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 4"), "{answer:?}");
    }
    assert_eq!(api.get_json("/vm/config"), before);
    api.end();
}

#[test]
fn clients_are_answered_while_another_waits_for_the_machine() {
    let api = with_agent();
    assert_eq!(api.get_json("/cleanslate/verdict")["clean"], true);
    let machine = api.jailed(2)[1];
    let pid = rustix::process::Pid::from_raw(machine as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
    let mut waiting = Vec::new();
    // More than may wait.
    for _ in 0..20 {
        let mut stream = connect(&api.socket);
        stream
            .write_all(b"GET /cleanslate/console HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            .unwrap();
        waiting.push(stream);
    }
    expect_alive(&api);
    assert_eq!(api.get_json("/")["state"], "Running");
    // One that does not wait for its answer.
    drop(waiting.pop());
    rustix::process::kill_process(pid, rustix::process::Signal::CONT).unwrap();
    for mut stream in waiting {
        assert_eq!(read_response(&mut stream).status, 200);
    }
    api.end();
}

#[test]
fn many_requests_leave_nothing_behind() {
    let api = with_agent();
    let [clients, machine] = api.jailed(2)[..] else { unreachable!() };
    let open = |pid: u32| std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    let all = || [clients, machine, api.program.child.id()].map(open);
    api.get_json("/cleanslate/verdict");
    let before = all();
    for _ in 0..50 {
        api.get_json("/cleanslate/verdict");
        api.put("/cleanslate/reset", json!({})).expect_done();
        api.put("/nowhere", json!({})).expect_refused("Invalid request");
    }
    eventually("descriptors are let go of", || all() <= before);
    api.end();
}
