//! What is counted: requests and their times here, what devices do in the machine's process. Given out in Firecracker's JSON,
//! when a client asks for it and at the end, and as Prometheus reads it.
//!
//! Firecracker also writes its metrics once a minute. That would wake an idle process, so it is left out: FlushMetrics writes
//! them when they are wanted.

mod firecracker;
mod prometheus;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use rustix::time::{ClockId, clock_gettime};
use serde_json::Value;

use super::call::Method;
use super::desk::{Order, State};
use super::log::open_for_lines;
use super::model::{Refusal, SnapshotType};

/// Requests of one kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Requests {
    all: u64,
    failed: u64,
}

/// The counters of an instance.
#[derive(Debug)]
pub struct Metrics {
    file: Option<File>,
    /// From the process's start to the first client.
    startup: Duration,
    /// The processor's time for that.
    startup_cpu: Duration,
    requests: BTreeMap<(&'static str, &'static str), Requests>,
    /// Microseconds that the last order of each name took.
    latencies: BTreeMap<&'static str, u64>,
    /// What was written last, since most of Firecracker's counters say what has come since then.
    flushed: BTreeMap<String, u64>,
    missed: u64,
}

/// What Firecracker's metrics call the first part of a path.
const RESOURCES: [(&str, &str); 18] = [
    ("", "instance_info"),
    ("actions", "actions"),
    ("balloon", "balloon"),
    ("boot-source", "boot_source"),
    ("cleanslate", "cleanslate"),
    ("cpu-config", "cpu_cfg"),
    ("drives", "drive"),
    ("entropy", "entropy"),
    ("hotplug", "hotplug_memory"),
    ("logger", "logger"),
    ("machine-config", "machine_cfg"),
    ("metrics", "metrics"),
    ("mmds", "mmds"),
    ("network-interfaces", "network"),
    ("pmem", "pmem"),
    ("serial", "serial"),
    ("snapshot", "snapshot"),
    ("version", "vmm_version"),
];

impl Metrics {
    /// All at zero, in a process that began at `started`.
    pub fn new(started: Instant) -> Self {
        let used = clock_gettime(ClockId::ProcessCPUTime);
        Self {
            file: None,
            startup: started.elapsed(),
            startup_cpu: Duration::new(used.tv_sec as u64, used.tv_nsec as u32),
            requests: BTreeMap::new(),
            latencies: BTreeMap::new(),
            flushed: BTreeMap::new(),
            missed: 0,
        }
    }

    /// What a jailer says: the monotonic clock and the processor's time when this process began, and what the jailer used before,
    /// in microseconds.
    pub fn start_was(&mut self, at: Option<u64>, cpu: Option<u64>, before: Option<u64>) {
        let us = |clock| {
            let now = clock_gettime(clock);
            Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
        };
        if let Some(at) = at {
            self.startup = us(ClockId::Monotonic).saturating_sub(Duration::from_micros(at));
        }
        if let Some(cpu) = cpu {
            self.startup_cpu =
                us(ClockId::ProcessCPUTime).saturating_sub(Duration::from_micros(cpu));
        }
        self.startup_cpu += Duration::from_micros(before.unwrap_or(0));
    }

    /// Where [`Metrics::flush`] is to write. Once, as with Firecracker.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn open(&mut self, path: &Path) -> Result<(), Refusal> {
        if self.file.is_some() {
            return Err(Refusal::new("Cannot initialize the metrics system twice."));
        }
        let file = open_for_lines(path)
            .map_err(|error| Refusal::new(format!("open the metrics {path:?}: {error}")))?;
        self.file = Some(file);
        Ok(())
    }

    /// Counts a request.
    pub fn note_request(&mut self, method: Option<Method>, path: &str, is_success: bool) {
        let first = path.trim_start_matches('/').split('/').next().unwrap_or_default();
        let method = match method {
            Some(Method::Get) => "get",
            Some(Method::Put) => "put",
            Some(Method::Patch) => "patch",
            None => "other",
        };
        let known = RESOURCES.iter().find(|(name, _)| *name == first);
        let resource = match first {
            "vm" => "vm",
            "vsock" => "vsock",
            _ => known.map_or("other", |(_, resource)| resource),
        };
        let requests = self.requests.entry((method, resource)).or_default();
        requests.all += 1;
        requests.failed += u64::from(!is_success);
    }

    /// Notes how long an order took.
    pub fn note_latency(&mut self, order: &Order, took: Duration) {
        let name = match order {
            Order::Pause => "pause_vm",
            Order::Resume => "resume_vm",
            Order::Load(_) => "load_snapshot",
            Order::Snapshot(snapshot) => match snapshot.snapshot_type {
                SnapshotType::Full => "full_create_snapshot",
                SnapshotType::Diff => "diff_create_snapshot",
            },
            Order::Start => "start",
            Order::Reset => "reset",
            _ => return,
        };
        self.latencies.insert(name, u64::try_from(took.as_micros()).unwrap_or(u64::MAX));
    }

    /// Writes a line of Firecracker's JSON, if there is a file. `counted` is what the machine's devices have counted.
    ///
    /// # Errors
    /// That there is no file, or that it does not take the line, which is lost then.
    pub fn flush(&mut self, counted: Option<&Value>, missed_lines: u64) -> io::Result<()> {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let mut line = self.next_line(counted, missed_lines, now).to_string();
        line.push('\n');
        let Some(file) = &mut self.file else {
            return Err(io::Error::other("no file was given for them: PUT /metrics"));
        };
        let written = file.write(line.as_bytes()).and_then(|len| match len == line.len() {
            true => Ok(()),
            false => Err(io::ErrorKind::WriteZero.into()),
        });
        self.missed += u64::from(written.is_err());
        written
    }

    /// Whether somebody wants them.
    pub fn are_wanted(&self) -> bool {
        self.file.is_some()
    }

    /// All counters in the text format of Prometheus.
    pub fn to_prometheus(&self, state: State, counted: Option<&Value>) -> String {
        let mut text = prometheus::Text::default();
        let states = [State::NotStarted, State::Running, State::Paused];
        for known in states {
            text.gauge(
                "cleanslate_machine_state",
                "1 for the state that the machine is in",
                &[("state", known.name())],
                u64::from(known == state),
            );
        }
        for ((method, resource), requests) in &self.requests {
            for (result, count) in
                [("ok", requests.all - requests.failed), ("failed", requests.failed)]
            {
                text.counter(
                    "cleanslate_api_requests_total",
                    "requests of clients",
                    &[("method", method), ("resource", resource), ("result", result)],
                    count,
                );
            }
        }
        for (order, us) in &self.latencies {
            text.gauge(
                "cleanslate_order_last_microseconds",
                "how long the last order of this kind took",
                &[("order", order)],
                *us,
            );
        }
        if let Some(counted) = counted {
            text.counters_of("cleanslate_guest", counted);
        }
        text.into_string()
    }
}
