//! `--json`: the report as one object. Times are in nanoseconds, rates in bytes a second.

use serde::Serialize;
use serde_json::{Value, json as object};

use super::{Ending, Report, Target};
use crate::histogram::Histogram;

/// The object, as a line.
pub fn json(report: &Report) -> String {
    let (own, uds) = match &report.target {
        Target::Own => (true, None),
        Target::Socket(path) => (false, Some(path.to_string_lossy())),
    };
    let round_trips = report.round_trips.iter().map(|figure| {
        let mut value = times(&figure.times);
        value["bytes"] = figure.bytes.into();
        value
    });
    let throughput = report.throughput.iter().map(|figure| {
        object!({
            "direction": figure.direction,
            "connections": figure.connections,
            "message_bytes": crate::probe::MESSAGE,
            "bytes": figure.bytes,
            "bytes_per_second": figure.rate(),
            "rounds": figure.rates,
            "credit_stalls": figure.credit_stalls,
        })
    });
    let connections = report.connections.iter().map(|figure| {
        let mut value = times(&figure.times);
        value["clients"] = figure.clients.into();
        value["per_second"] = figure.per_second.into();
        value
    });
    let ending = match &report.ending {
        Ending::Complete => ("complete", None),
        Ending::Interrupted => ("interrupted", None),
        Ending::Failed(why) => ("failed", Some(why)),
    };
    let value = object!({
        "verdict": report.verdict().1,
        "ending": ending.0,
        "failure": ending.1,
        "own": own,
        "uds": uds,
        "host": plain(&report.host),
        "agent": report.agent.map(|hello| object!({"version": hello.version, "life": hello.life})),
        "round_trips": round_trips.collect::<Vec<_>>(),
        "throughput": throughput.collect::<Vec<_>>(),
        "connections": connections.collect::<Vec<_>>(),
        "checks": plain(&report.checks),
        "dma_audit": plain(&report.dma_audit),
        "device": plain(&report.device),
    });
    format!("{value}\n")
}

fn plain(value: &impl Serialize) -> Value {
    // The types have string keys and no maps, so serializing cannot fail.
    serde_json::to_value(value).unwrap_or_default()
}

fn times(times: &Histogram) -> Value {
    object!({
        "count": times.total(),
        "p50": times.per_mille(500),
        "p90": times.per_mille(900),
        "p99": times.per_mille(990),
        "p99_9": times.per_mille(999),
        "max": times.max(),
        "histogram": times.buckets().collect::<Vec<_>>(),
    })
}
