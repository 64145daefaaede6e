use std::time::Duration;

use super::super::Origin;
use super::super::figures::Failure;
use super::*;

fn plan() -> Plan {
    Plan {
        count: 3,
        concurrency: 2,
        origin: Origin::Recycle,
        warm: 0,
        job: "echo".into(),
        input: b"<x>".into(),
        timeout: Duration::from_secs(1),
    }
}

fn report(plan: &Plan) -> Report<'_> {
    let mut figures = Figures { done: 3, processes: 2, recycled: 1, ..Figures::default() };
    figures.took = Duration::from_secs(2);
    [1000, 2000, 3000].into_iter().for_each(|us| figures.hello.add(us));
    figures.done_us.add(5000);
    Report { plan, mem_mib: 128, figures, idle: None, interrupted: false }
}

#[test]
fn a_report_tells_the_same_in_all_forms() {
    let plan = plan();
    let mut report = report(&plan);
    assert_eq!((report.status(), report.verdict()), (exit::CLEAN, "clean"));
    let table = report.table();
    assert!(table.contains("start to hello"), "{table}");
    assert!(table.ends_with("2 launches per second\n"), "{table}");
    assert!(!table.contains("reset to hello"), "nobody measured it: {table}");
    report.figures.find(Failure::new("ram-kept", "<page> 7".into()));
    report.figures.fail(Failure::new("killed", "by signal 9".into()));
    assert_eq!((report.status(), report.verdict()), (exit::FINDINGS, "not clean"));
    let json: serde_json::Value = serde_json::from_str(&report.json()).unwrap();
    assert_eq!(json["findings"]["ram-kept"]["count"], 1);
    assert_eq!(json["failures"]["killed"]["first"], "by signal 9");
    assert_eq!(json["start_to_hello_us"]["max"], 3000);
    assert_eq!(json["per_second"], 1.5);
    assert!(json.get("idle").is_none());
    for text in [report.table(), html(&report)] {
        assert!(text.contains("ram-kept") && text.contains("by signal 9"), "{text}");
    }
    assert!(html(&report).contains("&lt;page&gt;"));
}

#[test]
fn a_signal_ends_all_but_those_that_are_held_until_it_comes() {
    let plan = plan();
    let idle = IdleFigures { count: 2, held: true, ..IdleFigures::default() };
    let interrupted = Report { interrupted: true, ..report(&plan) };
    assert_eq!(interrupted.status(), exit::INTERRUPTED);
    let held = Report { interrupted: true, idle: Some(idle), ..report(&plan) };
    assert_eq!(held.status(), exit::CLEAN);
    assert!(held.table().contains("not known to this user"), "{}", held.table());
}
