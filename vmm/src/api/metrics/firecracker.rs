//! Firecracker's JSON of metrics: its groups and their fields. What this program does not count is 0, as Firecracker's own
//! is for devices that a machine lacks, so that clients who expect every field find it.

use std::time::Duration;

use serde_json::{Map, Value, json};

use super::Metrics;

/// Each group with the counters in it.
const GROUPS: [(&str, &str); 17] = [
    (
        "balloon",
        "activate_fails inflate_count stats_updates_count stats_update_fails deflate_count event_fails",
    ),
    (
        "block",
        "activate_fails cfg_fails no_avail_buffer event_fails execute_fails invalid_reqs_count flush_count queue_event_count \
         rate_limiter_event_count update_count update_fails read_bytes write_bytes read_count write_count \
         rate_limiter_throttled_events io_engine_throttled_events remaining_reqs_count",
    ),
    ("deprecated_api", "deprecated_http_api_calls deprecated_cmd_line_api_calls"),
    (
        "get_api_requests",
        "instance_info_count machine_cfg_count mmds_count vmm_version_count hotplug_memory_count",
    ),
    (
        "patch_api_requests",
        "drive_count drive_fails network_count network_fails machine_cfg_count machine_cfg_fails mmds_count mmds_fails \
         hotplug_memory_count hotplug_memory_fails",
    ),
    (
        "put_api_requests",
        "actions_count actions_fails boot_source_count boot_source_fails drive_count drive_fails logger_count logger_fails \
         machine_cfg_count machine_cfg_fails cpu_cfg_count cpu_cfg_fails metrics_count metrics_fails network_count \
         network_fails mmds_count mmds_fails vsock_count vsock_fails pmem_count pmem_fails serial_count serial_fails \
         hotplug_memory_count hotplug_memory_fails",
    ),
    (
        "i8042",
        "error_count missed_read_count missed_write_count read_count reset_count write_count",
    ),
    (
        "uart",
        "error_count flush_count missed_read_count missed_write_count read_count write_count rate_limiter_dropped_bytes",
    ),
    (
        "mmds",
        "rx_accepted rx_accepted_err rx_accepted_unusual rx_bad_eth rx_invalid_token rx_no_token rx_count tx_bytes tx_count \
         tx_errors tx_frames connections_created connections_destroyed",
    ),
    (
        "net",
        "activate_fails cfg_fails mac_address_updates no_rx_avail_buffer no_tx_avail_buffer event_fails rx_queue_event_count \
         rx_event_rate_limiter_count rx_rate_limiter_throttled rx_tap_event_count rx_bytes_count rx_packets_count rx_fails \
         rx_count tap_read_fails tap_write_fails tx_bytes_count tx_malformed_frames tx_fails tx_count tx_packets_count \
         tx_queue_event_count tx_rate_limiter_event_count tx_rate_limiter_throttled tx_spoofed_mac_count \
         tx_remaining_reqs_count",
    ),
    ("seccomp", "num_faults"),
    ("vcpu", "exit_io_in exit_io_out exit_mmio_read exit_mmio_write failures kvmclock_ctrl_fails"),
    ("vmm", "panic_count"),
    ("signals", "sigbus sigsegv sigxfsz sigxcpu sigpipe sighup sigill"),
    (
        "vsock",
        "activate_fails cfg_fails rx_queue_event_fails tx_queue_event_fails ev_queue_event_fails muxer_event_fails \
         conn_event_fails rx_queue_event_count tx_queue_event_count rx_bytes_count tx_bytes_count rx_packets_count \
         tx_packets_count conns_added conns_killed conns_removed killq_resync tx_flush_fails tx_write_fails rx_read_fails",
    ),
    (
        "entropy",
        "activate_fails entropy_event_fails entropy_event_count entropy_bytes host_rng_fails entropy_rate_limiter_throttled \
         rate_limiter_event_count",
    ),
    ("logger", "missed_metrics_count metrics_fails missed_log_count log_fails"),
];

/// Durations that Firecracker tells the least, the greatest and the sum of.
const AGGREGATES: [(&str, &str); 7] = [
    ("block", "read_agg"),
    ("block", "write_agg"),
    ("net", "tap_write_agg"),
    ("vcpu", "exit_io_in_agg"),
    ("vcpu", "exit_io_out_agg"),
    ("vcpu", "exit_mmio_read_agg"),
    ("vcpu", "exit_mmio_write_agg"),
];

const LATENCIES: [&str; 5] =
    ["full_create_snapshot", "diff_create_snapshot", "load_snapshot", "pause_vm", "resume_vm"];

impl Metrics {
    /// The line of this moment, with what has come since the last one.
    pub(super) fn next_line(
        &mut self,
        counted: Option<&Value>,
        missed_lines: u64,
        now: Duration,
    ) -> Value {
        let totals = self.totals(counted, missed_lines);
        let mut line = Map::new();
        line.insert("utc_timestamp_ms".into(), json!(now.as_millis() as u64));
        line.insert(
            "api_server".into(),
            json!({
                "process_startup_time_us": self.startup.as_micros() as u64,
                "process_startup_time_cpu_us": self.startup_cpu.as_micros() as u64,
            }),
        );
        for (group, names) in GROUPS {
            let mut fields = Map::new();
            for name in names.split_whitespace() {
                let key = format!("{group}.{name}");
                let total = totals.iter().find(|(known, _)| *known == key).map_or(0, |(_, n)| *n);
                // A machine that has taken another's place counts from zero.
                let before = self.flushed.insert(key, total).unwrap_or(0);
                fields.insert(name.into(), json!(total.saturating_sub(before)));
            }
            for (_, name) in AGGREGATES.iter().filter(|(of, _)| *of == group) {
                fields.insert((*name).into(), json!({ "min_us": 0, "max_us": 0, "sum_us": 0 }));
            }
            line.insert(group.into(), fields.into());
        }
        let mut latencies = Map::new();
        for name in LATENCIES {
            let us = self.latencies.get(name).copied().unwrap_or(0);
            latencies.insert(name.into(), json!(us));
            latencies.insert(format!("vmm_{name}"), json!(us));
        }
        line.insert("latencies_us".into(), latencies.into());
        line.into()
    }

    /// What was counted since the beginning, by Firecracker's names.
    fn totals(&self, counted: Option<&Value>, missed_lines: u64) -> Vec<(String, u64)> {
        let mut totals = vec![
            ("logger.missed_log_count".to_owned(), missed_lines),
            ("logger.missed_metrics_count".to_owned(), self.missed),
        ];
        for ((method, resource), requests) in &self.requests {
            totals.push((format!("{method}_api_requests.{resource}_count"), requests.all));
            totals.push((format!("{method}_api_requests.{resource}_fails"), requests.failed));
        }
        let Some(counted) = counted else { return totals };
        let sum_of_disks = |field: &str| -> u64 {
            let disks = counted["disks"].as_array().into_iter().flatten();
            disks.filter_map(|disk| disk[field].as_u64()).sum()
        };
        let number = |group: &str, field: &str| counted[group][field].as_u64().unwrap_or(0);
        // Firecracker's view is the device's: it receives (rx) what goes to the guest.
        let of_devices = [
            ("vsock.rx_bytes_count", number("vsock", "bytes_to_guest")),
            ("vsock.tx_bytes_count", number("vsock", "bytes_to_host")),
            ("vsock.rx_packets_count", number("vsock", "packets_to_guest")),
            ("vsock.tx_packets_count", number("vsock", "packets_to_host")),
            ("vsock.conns_added", number("vsock", "connections_opened")),
            ("vsock.conns_killed", number("vsock", "connections_reset")),
            ("entropy.entropy_event_count", number("rng", "requests")),
            ("entropy.entropy_bytes", number("rng", "bytes")),
            ("entropy.entropy_event_fails", number("rng", "bad_chains")),
            ("block.read_bytes", sum_of_disks("bytes_read")),
            ("block.write_bytes", sum_of_disks("bytes_written")),
            ("block.execute_fails", sum_of_disks("failed_requests")),
            ("block.invalid_reqs_count", sum_of_disks("bad_requests")),
        ];
        totals.extend(of_devices.map(|(name, count)| (name.to_owned(), count)));
        totals
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::super::Method;
    use super::*;

    #[test]
    fn counters_say_what_has_come_since_the_last_line() {
        let mut metrics = Metrics::new(Instant::now());
        let counted = |bytes: u64| json!({ "vsock": { "bytes_to_guest": bytes }, "disks": [{ "bytes_read": 1 }, { "bytes_read": 2 }] });
        metrics.note_request(Some(Method::Put), "/vsock", true);
        metrics.note_request(Some(Method::Put), "/vsock", false);
        let first = metrics.next_line(Some(&counted(100)), 3, Duration::from_millis(7));
        assert_eq!(first["utc_timestamp_ms"], 7);
        assert_eq!(first["put_api_requests"]["vsock_count"], 2);
        assert_eq!(first["put_api_requests"]["vsock_fails"], 1);
        assert_eq!(first["vsock"]["rx_bytes_count"], 100);
        assert_eq!(first["block"]["read_bytes"], 3);
        assert_eq!(first["logger"]["missed_log_count"], 3);
        assert_eq!(first["net"]["tap_write_agg"]["sum_us"], 0);
        metrics.note_request(Some(Method::Put), "/vsock", true);
        let second = metrics.next_line(Some(&counted(150)), 3, Duration::ZERO);
        assert_eq!(second["put_api_requests"]["vsock_count"], 1);
        assert_eq!(second["put_api_requests"]["vsock_fails"], 0);
        assert_eq!(second["vsock"]["rx_bytes_count"], 50);
        assert_eq!(second["logger"]["missed_log_count"], 0);
    }
}
