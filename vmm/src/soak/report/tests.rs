use super::*;
use crate::page::escape;
use crate::soak::Place;
use crate::soak::line::{Found, Life};
use crate::soak::plan::Plan;

fn shard(vms: u32, first_vm: u32, ending: Ending) -> Shard {
    let plan = Plan { vms, first_vm, ..Plan::example() };
    let (header, took) = (Header::new(&plan, "a<b".into()), Some(Duration::from_secs(2)));
    Shard { header, machine: None, ending, remark: None, took }
}

fn life(number: u32, finding: Option<&str>) -> Life {
    let found = |name: &str| Found { name: name.into(), detail: "<seen>".into() };
    Life {
        life: number,
        cause: Some(agent_protocol::Cause::Host),
        moment: None,
        hello_us: Some(700),
        pmu: None,
        nmis: None,
        findings: finding.map(found).into_iter().collect(),
        evidence: None,
    }
}

/// Two machines; the first has so many lives, and the other none.
fn report(lives: u32, finding: Option<&str>, ending: Ending) -> Report {
    let mut figures = Figures::default();
    let place = Place { seed: 42, vm: 5, process: 0 };
    (1..=lives).for_each(|n| figures.add(place, &life(n, finding.filter(|_| n == lives)), None));
    Report { shards: vec![shard(2, 5, ending)], figures, replays: Vec::new() }
}

#[test]
fn text_cannot_become_markup() {
    assert_eq!(escape("<a href='x'>\"&\u{1b}"), "&lt;a href=&#39;x&#39;&gt;&quot;&amp;\u{fffd}");
}

#[test]
fn no_finding_of_a_life_hides_another_in_the_plot() {
    let mut report = report(2, Some("a"), Ending::Finding);
    let place = Place { seed: 42, vm: 5, process: 0 };
    let mut last = life(3, Some("a"));
    last.findings.push(Found { name: "b".into(), detail: String::new() });
    report.figures.add(place, &last, None);
    let page = html(&report);
    let marks: Vec<_> = page.lines().filter(|line| line.starts_with("<circle")).collect();
    let place = |mark: &str| mark[mark.find("cx=").unwrap()..mark.find(" r=").unwrap()].to_string();
    let places: std::collections::BTreeSet<_> = marks.iter().map(|mark| place(mark)).collect();
    assert_eq!((marks.len(), places.len()), (3, 3), "{marks:?}");
}

#[test]
fn what_was_not_brought_to_its_end_is_not_clean() {
    let check = |lives, finding, ending, verdict: Verdict, status: Option<u8>| {
        let report = report(lives, finding, ending);
        assert_eq!(report.verdict(), verdict);
        assert_eq!(report.status().ok(), status);
        assert_eq!(verdict.name().is_some(), matches!(status, Some(0 | 1)));
        let xml = junit(&report);
        let errors = u32::from(verdict.name().is_none());
        assert!(xml.contains(&format!(" errors=\"{errors}\" ")), "{xml}");
        assert_eq!(xml.matches("<error ").count(), errors as usize, "{xml}");
        assert!(html(&report).contains(&format!("Soak: {}</h1>", verdict.words())));
    };
    check(3, None, Ending::Complete, Verdict::Clean, Some(0));
    check(3, None, Ending::TimeUp, Verdict::Clean, Some(0));
    check(3, Some("x"), Ending::Complete, Verdict::Findings, Some(1));
    check(3, Some("x"), Ending::Finding, Verdict::Findings, Some(1));
    check(3, None, Ending::Interrupted, Verdict::Interrupted, Some(130));
    check(3, Some("x"), Ending::Interrupted, Verdict::Interrupted, Some(130));
    check(3, None, Ending::Failed, Verdict::Failed, Some(2));
    // The first life is no reset.
    check(1, None, Ending::TimeUp, Verdict::Untested, None);
    check(0, None, Ending::TimeUp, Verdict::Untested, None);
    check(1, Some("x"), Ending::Finding, Verdict::Findings, Some(1));
}

#[test]
fn a_machine_that_did_nothing_is_skipped_and_not_passed() {
    let report = report(3, None, Ending::TimeUp);
    let xml = junit(&report);
    assert!(xml.contains("tests=\"2\" failures=\"0\" errors=\"0\" skipped=\"1\""), "{xml}");
    assert_eq!(xml.matches("<skipped ").count(), 1, "{xml}");
    let table = table(&report);
    assert!(table.contains("\n6          0         0  -"), "{table}");
    assert!(table.contains("clean: 2 machines (1 without a reset), 3 lives"), "{table}");
}

#[test]
fn the_worst_end_of_many_counts() {
    let mut both = report(3, None, Ending::Complete);
    both.shards.push(Shard { remark: Some("told\nso".into()), ..shard(1, 9, Ending::Interrupted) });
    assert_eq!((both.verdict(), both.vms()), (Verdict::Interrupted, 3));
    let told = "interrupted: machine 9 of seed 42 on a<b: told\u{fffd}so";
    assert!(table(&both).contains(told), "{}", table(&both));
    assert!(junit(&both).contains(&escape(told)), "{}", junit(&both));
    assert!(html(&both).contains(&escape(told)));
}
