//! `cleanslate api` and a client of it: HTTP by hand, one request a connection, so that tests can also do it wrong.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use super::{Outcome, Started, cleanslate, eventually, temp_dir};

/// An answer.
#[derive(Debug)]
pub struct Response {
    pub status: u16,
    pub head: String,
    pub body: String,
}

impl Response {
    /// Parses what a server sent before it closed the connection.
    fn parse(text: &str) -> Option<Self> {
        let (head, body) = text.split_once("\r\n\r\n")?;
        let status = head.strip_prefix("HTTP/1.1 ")?.split(' ').next()?.parse().ok()?;
        Some(Self { status, head: head.into(), body: body.into() })
    }

    #[track_caller]
    pub fn json(&self) -> Value {
        match serde_json::from_str(&self.body) {
            Ok(value) => value,
            Err(error) => panic!("no JSON ({error}): {self:?}"),
        }
    }

    /// Fails the test unless the request was fulfilled without anything to say.
    #[track_caller]
    pub fn expect_done(self) {
        assert!(self.status == 204 && self.body.is_empty(), "{self:?}");
    }

    /// Fails the test unless the request was refused with a reason that has `text`.
    #[track_caller]
    pub fn expect_refused(self, text: &str) {
        let reason = self.json()["fault_message"].as_str().unwrap_or_default().to_owned();
        assert!(self.status == 400 && reason.contains(text), "not refused for {text:?}: {self:?}");
    }
}

/// Connects and does not wait for ever for an answer.
pub fn connect(socket: &Path) -> UnixStream {
    let stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    stream.set_write_timeout(Some(Duration::from_secs(60))).unwrap();
    stream
}

/// Sends a whole request and reads to the end of the connection.
#[track_caller]
pub fn request(socket: &Path, method: &str, path: &str, body: &[u8]) -> Response {
    let mut stream = connect(socket);
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(&[head.as_bytes(), body].concat()).unwrap();
    read_response(&mut stream)
}

/// Reads to the end of the connection.
#[track_caller]
pub fn read_response(stream: &mut UnixStream) -> Response {
    let mut bytes = Vec::new();
    // A server that closes before it has read all that was sent resets the connection behind its answer.
    let _ = stream.read_to_end(&mut bytes);
    let text = String::from_utf8_lossy(&bytes).into_owned();
    Response::parse(&text).unwrap_or_else(|| panic!("no answer: {text:?}"))
}

/// An instance that serves clients.
pub struct Api {
    pub program: Started,
    pub socket: PathBuf,
    pub dir: tempfile::TempDir,
}

impl Api {
    #[track_caller]
    pub fn start() -> Self {
        Self::start_with(temp_dir(), &[])
    }

    /// With a directory that has something already, and with more arguments.
    #[track_caller]
    pub fn start_with(dir: tempfile::TempDir, arguments: &[&str]) -> Self {
        Self::start_as(cleanslate(&["api"]), dir, arguments)
    }

    /// By a command that is the API.
    #[track_caller]
    pub fn start_as(mut command: Command, dir: tempfile::TempDir, arguments: &[&str]) -> Self {
        let socket = dir.path().join("api.sock");
        command.arg("--api-sock").arg(&socket).args(arguments);
        let mut program = Started::new(command);
        let mut ended = false;
        eventually("clients can connect", || {
            ended = program.child.try_wait().unwrap().is_some();
            ended || UnixStream::connect(&socket).is_ok()
        });
        if ended {
            panic!("{}", program.finish("cleanslate api"));
        }
        Self { program, socket, dir }
    }

    /// A path in its directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    #[track_caller]
    pub fn get(&self, path: &str) -> Response {
        request(&self.socket, "GET", path, b"")
    }

    /// A successful answer's JSON.
    #[track_caller]
    pub fn get_json(&self, path: &str) -> Value {
        let response = self.get(path);
        assert_eq!(response.status, 200, "{response:?}");
        response.json()
    }

    #[track_caller]
    pub fn put(&self, path: &str, body: Value) -> Response {
        request(&self.socket, "PUT", path, body.to_string().as_bytes())
    }

    #[track_caller]
    pub fn patch(&self, path: &str, body: Value) -> Response {
        request(&self.socket, "PATCH", path, body.to_string().as_bytes())
    }

    #[track_caller]
    pub fn action(&self, action: &str) -> Response {
        self.put("/actions", serde_json::json!({ "action_type": action }))
    }

    /// Ends it as Ctrl-C does.
    #[track_caller]
    pub fn end(self) -> Outcome {
        super::signal(&self.program.child, rustix::process::Signal::INT);
        let outcome = self.program.finish("cleanslate api").expect_status(130);
        assert!(!self.socket.exists(), "the socket was left behind");
        outcome
    }

    /// Waits for its end.
    #[track_caller]
    pub fn finish(self) -> Outcome {
        let outcome = self.program.finish("cleanslate api");
        assert!(!self.socket.exists(), "the socket was left behind");
        outcome
    }

    /// The numbers of the jailed processes: that with the clients first, then the machine's.
    #[track_caller]
    pub fn jailed(&self, count: usize) -> Vec<u32> {
        let mut found = Vec::new();
        eventually("there are jailed processes", || {
            found = jailed_children(self.program.child.id());
            found.len() == count
        });
        found
    }
}

/// The children of a process that have a second number, in a namespace of their own, oldest first.
fn jailed_children(parent: u32) -> Vec<u32> {
    let parent = parent.to_string();
    let pids = std::fs::read_dir("/proc").unwrap().filter_map(|entry| {
        entry.unwrap().file_name().to_str().and_then(|name| name.parse::<u32>().ok())
    });
    let mut found: Vec<_> = pids
        .filter_map(|pid| {
            let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
            let values = |name| {
                let line = status.lines().find_map(|line| line.strip_prefix(name));
                line.unwrap_or_default().split_whitespace()
            };
            let is_jailed = values("PPid:").eq([parent.as_str()]) && values("NSpid:").count() == 2;
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            // Field 22, behind the name, which may have spaces.
            let start = stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse::<u64>().ok()?;
            is_jailed.then_some((start, pid))
        })
        .collect();
    found.sort_unstable();
    found.into_iter().map(|(_, pid)| pid).collect()
}
