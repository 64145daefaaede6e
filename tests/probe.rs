//! `cleanslate probe`: figures of a machine's vsock, and the rules that it keeps, or not.

mod ends;
mod page;
mod peer;

use agent_protocol::Report;
use serde_json::Value;

use crate::harness::held::Held;
use crate::harness::{Outcome, run, temp_dir};
use peer::Flaw;

/// Little work, for tests that are about something else.
pub const SMALL: [&str; 7] = ["probe", "--count", "5", "--mib", "1", "--connections", "16"];

/// The names of the checks that came to `result`, with the reasons.
#[track_caller]
pub fn checks<'a>(json: &'a Value, result: &str) -> Vec<(&'a str, &'a str)> {
    let all = json["checks"].as_array().expect("checks");
    let of = all.iter().filter(|check| check["result"] == result);
    let text = |value: &'a Value| value.as_str().unwrap_or_default();
    of.map(|check| (text(&check["name"]), text(&check["reason"]))).collect()
}

fn names<'a>(checks: &[(&'a str, &'a str)]) -> Vec<&'a str> {
    checks.iter().map(|(name, _)| *name).collect()
}

/// Everything that was to be measured was.
#[track_caller]
fn expect_figures(outcome: &Outcome, count: u64) {
    let json = outcome.json();
    let sizes: Vec<_> = json["round_trips"].as_array().unwrap().iter().collect();
    assert_eq!(sizes.len(), 6, "{outcome}");
    for figure in sizes {
        let times = ["p50", "p90", "p99", "p99_9", "max"].map(|name| figure[name].as_u64());
        assert!(times[0] > Some(0) && times.is_sorted(), "{figure}");
        let buckets = figure["histogram"].as_array().unwrap().iter();
        let counted: u64 = buckets.map(|bucket| bucket[2].as_u64().unwrap()).sum();
        assert_eq!((figure["count"].as_u64(), counted), (Some(count), count), "{figure}");
    }
    let throughput = json["throughput"].as_array().unwrap();
    let kinds: Vec<_> = throughput
        .iter()
        .map(|figure| {
            assert!(figure["bytes_per_second"].as_f64() > Some(0.0), "{figure}");
            assert!(figure["credit_stalls"].is_u64(), "{figure}");
            (figure["direction"].as_str().unwrap(), figure["connections"].as_u64().unwrap())
        })
        .collect();
    let expected = ["to-guest", "to-host", "both"].map(|way| [(way, 1), (way, 4), (way, 16)]);
    assert_eq!(kinds, expected.concat(), "{outcome}");
    let connections = json["connections"].as_array().unwrap().iter();
    let clients: Vec<_> = connections.map(|figure| figure["clients"].as_u64().unwrap()).collect();
    assert_eq!(clients, [1, 4, 16], "{outcome}");
}

/// What only a machine of our own shows.
const OWN: [&str; 3] = ["first-life", "guest-offences", "dma-audit"];

#[test]
fn a_machine_of_its_own_passes_every_check() {
    for arguments in [&[][..], &["--no-jail"]] {
        let outcome = run(&[&SMALL[..], &["--json"], arguments].concat()).expect_status(0);
        expect_figures(&outcome, 5);
        let json = outcome.json();
        assert_eq!((&json["verdict"], &json["own"]), (&"pass".into(), &true.into()), "{outcome}");
        let passed = names(&checks(&json, "pass"));
        assert_eq!(passed.len(), 31, "{outcome}");
        assert_eq!(passed.len(), json["checks"].as_array().unwrap().len(), "{outcome}");
        let audit = &json["dma_audit"];
        let counts = ["must", "ours", "observed"].map(|level| audit[level].as_u64());
        assert_eq!(counts, [Some(0); 3], "{outcome}");
        // Each message was at least a packet there and one back.
        let trips = 6 * (5 + 16);
        assert!(audit["chains"].as_u64() > Some(2 * trips), "{outcome}");
        assert!(json["device"]["connections_opened"].as_u64() > Some(300), "{outcome}");
    }
}

#[test]
fn all_checks_pass_with_as_many_bytes_as_users_get() {
    let few = ["probe", "--count", "1", "--connections", "16"];
    run(&[&few[..], &["--json"]].concat()).expect_status(0);
}

#[test]
fn a_machine_that_runs_already_is_probed_by_its_socket() {
    let machine = Held::start();
    let path = machine.path.to_str().unwrap();
    let outcome = run(&[&SMALL[..], &["--json", "--uds", path]].concat()).expect_status(0);
    expect_figures(&outcome, 5);
    let json = outcome.json();
    assert_eq!((&json["uds"], &json["own"]), (&path.into(), &false.into()), "{outcome}");
    let unchecked = checks(&json, "unchecked");
    assert_eq!(names(&unchecked), OWN, "{outcome}");
    assert!(unchecked.iter().all(|(_, reason)| reason.contains("somebody else's")), "{outcome}");
    assert_eq!(checks(&json, "pass").len(), 28, "{outcome}");
    // As a table, and the machine is as good as before.
    run(&[&SMALL[..], &["--uds", path]].concat())
        .expect_status(0)
        .expect_stdout("round trips, us")
        .expect_stdout("guest to host, 16 at a time")
        .expect_stdout("pass: guest-opened/half-close-by-guest")
        .expect_stdout("cannot be told: dma-audit: only a machine of our own tells")
        .expect_stdout("pass: 28 of 31 checks passed, 3 cannot be told here");
    let left: Vec<_> = std::fs::read_dir(machine.path.parent().unwrap()).unwrap().collect();
    assert_eq!(left.len(), 1, "only the machine's socket: {left:?}");
    machine.end();
}

#[test]
fn the_guest_cannot_be_asked_to_connect_where_no_port_can_be_had() {
    let machine = Held::start();
    for port in 5100..5116 {
        std::fs::write(format!("{}_{port}", machine.path.display()), "taken").unwrap();
    }
    let path = machine.path.to_str().unwrap();
    let outcome = run(&[&SMALL[..], &["--json", "--uds", path]].concat()).expect_status(0);
    let json = outcome.json();
    let unchecked = checks(&json, "unchecked");
    let (others, own) = unchecked.split_at(unchecked.len() - OWN.len());
    assert_eq!(names(own), OWN);
    assert_eq!(others.len(), 11, "{outcome}");
    for (name, reason) in others {
        assert!(name.starts_with("guest-"), "{outcome}");
        assert!(reason.contains("no port of the host could be had"), "{outcome}");
        assert!(reason.contains("the path exists"), "{outcome}");
    }
    machine.end();
}

#[test]
fn an_agent_that_packs_its_event_buffers_is_told_of_by_both_sides() {
    let agent = crate::dma_audit::packed_agent();
    let outcome = run(&[&SMALL[..], &["--json", "--agent", agent]].concat()).expect_status(1);
    let json = outcome.json();
    assert_eq!(names(&checks(&json, "fail")), ["agent-dma", "first-life"], "{outcome}");
    let violations = json["dma_audit"]["violations"].as_array().unwrap();
    let is_packed = violations.iter().any(|violation| violation["name"] == "packed-event-buffers");
    assert!(is_packed, "{outcome}");
}

/// A report as the agent makes it.
pub fn a_report() -> Report {
    let outcome = run(&["run", "--json"]).expect_status(0);
    serde_json::from_value(outcome.json()["lives"][0]["report"].clone()).expect("a report")
}

/// The names with those of the same checks on the guest's connections.
fn on_both(names: &[&str]) -> Vec<String> {
    let guests = names.iter().map(|name| format!("guest-opened/{name}"));
    names.iter().map(|name| (*name).to_string()).chain(guests).collect()
}

/// Probes a peer with this flaw, and expects that these checks fail and no others.
#[track_caller]
fn expect_failures(report: &Report, flaw: Flaw, expected: &[String]) -> Outcome {
    let dir = temp_dir();
    let path = dir.path().join("v.sock");
    let _count = peer::start(&path, flaw, report.clone());
    let more = ["--json", "--timeout", "3", "--uds", path.to_str().unwrap()];
    let outcome = run(&[&SMALL[..], &more].concat());
    let json = outcome.json();
    let failed = checks(&json, "fail");
    assert_eq!(names(&failed), expected, "{flaw:?}: {outcome}");
    assert!(failed.iter().all(|(_, reason)| !reason.is_empty()), "{flaw:?}: {outcome}");
    outcome.expect_status(i32::from(!expected.is_empty()))
}

#[test]
fn a_peer_that_breaks_a_rule_of_ports_or_bytes_fails_that_check_and_no_other() {
    let report = a_report();
    let check = |flaw, name: &str| expect_failures(&report, flaw, &[name.into()]);
    expect_failures(&report, Flaw::Nothing, &[]);
    check(Flaw::ChangesEcho, "round-trips");
    check(Flaw::ChangesTransfer(1 << 20), "transfers");
    check(Flaw::LosesBytes, "transfers");
    // 70 connections are for the figures before.
    check(Flaw::Refuses(90), "connections");
    check(Flaw::AcceptsEveryPort, "refused-port");
    check(Flaw::Refuses(150), "port-reuse");
    check(Flaw::Refuses(250), "many-connections");
    check(Flaw::GuestAlwaysConnects, "guest-refused-port");
    check(Flaw::GuestRefused(5), "guest-port-reuse");
    check(Flaw::StalePackets, "stale-packets");
    check(Flaw::DmaViolations, "agent-dma");
}

#[test]
fn a_peer_that_closes_connections_wrong_fails_that_check_and_no_other() {
    let report = a_report();
    let check = |flaw, name| expect_failures(&report, flaw, &on_both(&[name]));
    check(Flaw::ForgetsAnswer, "half-close-by-host");
    check(Flaw::ClosesBoth, "half-close-by-guest");
    check(Flaw::ReceivesAll, "no-receive-by-guest");
    check(Flaw::ForgetsCrossing, "close-by-both");
    check(Flaw::DropsLastByte, "data-before-close-to-guest");
    check(Flaw::DropsEnd, "data-before-close-to-host");
    check(Flaw::KeepsNonsense, "reset-by-guest");
    check(Flaw::ServesOne, "slow-reader");
}

#[test]
fn a_peer_that_never_ends_fails_every_check_that_waits_for_an_end() {
    let ends = ["half-close-by-host", "half-close-by-guest", "close-by-both"];
    let more = ["data-before-close-to-guest", "reset-by-guest"];
    expect_failures(&a_report(), Flaw::NeverEnds, &on_both(&[&ends[..], &more].concat()));
}

#[test]
fn a_peer_that_dies_is_not_asked_any_further() {
    let vanished = ["vanished-client".to_string()];
    let outcome = expect_failures(&a_report(), Flaw::DiesOfVanished, &vanished);
    let json = outcome.json();
    let unchecked = checks(&json, "unchecked");
    assert_eq!(unchecked.len(), 11 + OWN.len(), "{outcome}");
    assert!(unchecked[0].1.contains("the guest answers no more"), "{outcome}");
}
