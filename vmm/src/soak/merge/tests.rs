use super::*;
use crate::soak::Place;
use crate::soak::line::{Found, Life};
use crate::soak::report::{Verdict, table};

fn header(seed: u64, first_vm: u32) -> Header {
    let arguments = vec!["--poison".into()];
    let (host, resets) = (format!("host{first_vm}"), Some(2));
    Header { host, seed, vms: 2, first_vm, resets, duration: None, arguments }
}

fn life(header: &Header, (vm, process, life): (u32, u32, u32), finding: Option<&str>) -> Record {
    let place = Place { seed: header.seed, vm, process };
    let found = |name: &str| Found { name: name.into(), detail: "seen".into() };
    let life = Life {
        life,
        cause: Some(agent_protocol::Cause::Host),
        moment: None,
        hello_us: Some(1000 * u64::from(life)),
        pmu: None,
        nmis: None,
        findings: finding.map(found).into_iter().collect(),
        evidence: None,
    };
    let (host, seed, vm_seed) = (header.host.clone(), header.seed, place.seed_of_process());
    let bundle = finding.map(|_| "kept/here".into());
    let replay = finding.map(|_| "cleanslate run".into());
    Record::Life(Box::new(LifeRecord { host, seed, vm, process, vm_seed, life, bundle, replay }))
}

fn verdict(lives: u64, resets: u64, names: &[&str]) -> Record {
    let findings = names.len() as u64;
    let verdict = Some(if findings == 0 { "clean" } else { "findings" }.into());
    let names = names.iter().map(|name| (name.to_string(), 1)).collect();
    Record::Verdict(VerdictRecord {
        hosts: Vec::new(),
        seeds: Vec::new(),
        verdict,
        ending: Ending::Complete,
        vms: 2,
        lives,
        resets,
        seconds: 2.5,
        findings,
        names,
        machine: None,
    })
}

/// The lines of a soak of two machines with three lives each.
fn soak(header: &Header) -> Vec<Record> {
    let mut records = vec![Record::Plan(header.clone())];
    for number in 1..=3 {
        for vm in header.machines() {
            records.push(life(header, (vm, 0, number), None));
        }
    }
    records.push(verdict(6, 4, &[]));
    records
}

fn text(records: &[Record]) -> String {
    records.iter().map(|record| serde_json::to_string(record).unwrap() + "\n").collect()
}

fn merged(files: &[&str]) -> Result<Report, String> {
    let mut merger = Merger::default();
    for (name, text) in ["a", "b", "c"].into_iter().zip(files) {
        merger.read(name, text.as_bytes()).map_err(|error| error.to_string())?;
    }
    Ok(merger.report())
}

#[track_caller]
fn check_refused(files: &[&str], expected: &str) {
    let message = merged(files).expect_err("it was not refused");
    assert!(message.contains(expected) && !message.contains('\n'), "{message}");
}

#[test]
fn shards_become_one_soak() {
    let (first, second) = (text(&soak(&header(7, 1))), text(&soak(&header(7, 3))));
    let report = merged(&[&first, &second]).unwrap();
    assert_eq!((report.verdict(), report.ending()), (Verdict::Clean, Ending::Complete));
    let sums = (report.vms(), report.figures.lives(), report.figures.resets());
    assert_eq!((sums, report.took().as_millis()), ((4, 12, 8), 2500));
    let table = table(&report);
    assert!(
        table.ends_with("clean: 4 machines, 12 lives, no findings; 3 resets per second; seed 7\n"),
        "{table}"
    );
    assert!(table.contains("\n4          3         0  "), "{table}");
    // It does not matter how they are cut into files, nor in which order.
    for files in [&[&*format!("{second}{first}")][..], &[&second, &first]] {
        assert_eq!(crate::soak::report::table(&merged(files).unwrap()), table);
    }
}

#[test]
fn machines_of_several_seeds_are_told_apart() {
    let report = merged(&[&text(&soak(&header(7, 1))), &text(&soak(&header(8, 1)))]).unwrap();
    let table = table(&report);
    assert!(table.contains("\n7/1 ") && table.contains("\n8/2 "), "{table}");
    assert!(table.ends_with("seeds 7, 8\n"), "{table}");
}

#[test]
fn findings_are_kept_with_their_place() {
    let header = header(7, 5);
    let mut records = soak(&header);
    records[4] = life(&header, (6, 0, 2), Some("ram-kept"));
    // Another process of the machine begins with life 1 again.
    records.insert(6, life(&header, (5, 1, 1), Some("vm-failed")));
    *records.last_mut().unwrap() = verdict(7, 4, &["ram-kept", "vm-failed"]);
    let report = merged(&[&text(&records)]).unwrap();
    assert_eq!(report.verdict(), Verdict::Findings);
    let table = table(&report);
    assert!(
        table.contains("finding in vm 6, life 2: ram-kept: seen\n  bundle: host5:kept/here"),
        "{table}"
    );
    assert_eq!(report.replays.len(), 2);
}

#[test]
fn a_shard_that_ends_in_the_middle_is_interrupted() {
    let whole = text(&soak(&header(7, 3)));
    let records = text(&soak(&header(7, 1)));
    let verdict = records.trim_end().rfind('\n').unwrap() + 1;
    // Without its verdict, in the middle of that, in the middle of a life, and after its first line.
    let first = records.find('\n').unwrap() + 1;
    for end in [verdict, verdict + 10, verdict - 10, first] {
        let report = merged(&[&records[..end], &whole]).unwrap();
        assert_eq!(report.verdict(), Verdict::Interrupted, "{end}");
        let table = table(&report);
        let remark =
            "interrupted: machines 1 to 2 of seed 7 on host1: \"a\" ends without a verdict";
        assert!(table.contains(remark), "{table}");
        assert!(table.contains("\n2    "), "its machines are in the table: {table}");
    }
    // A log that goes on with the next try.
    let log = format!("{}{whole}", &records[..verdict]);
    assert_eq!(merged(&[&log]).unwrap().verdict(), Verdict::Interrupted);
}

#[test]
fn what_does_not_fit_together_is_refused() {
    let own = header(7, 1);
    let (first, records) = (text(&soak(&own)), soak(&own));
    check_refused(&[&first, &first], "\"b\", line 1: machine 1 of seed 7 is in \"a\" already");
    check_refused(
        &[&first, &text(&soak(&header(7, 2)))],
        "machine 2 of seed 7 is in \"a\" already",
    );
    let other = Header { arguments: Vec::new(), ..header(7, 3) };
    check_refused(&[&first, &text(&soak(&other))], "ran with other options than those of \"a\"");
    check_refused(&[""], "\"a\" has no line of");
    check_refused(&["x\n"], "\"a\", line 1: no line of");
    check_refused(&[&text(&records[1..])], "line 1: a life outside of a soak");
    check_refused(&[&text(&records[7..])], "line 1: a verdict outside of a soak");
    check_refused(&[&format!("{first}garbage\n")], "line 9: no line of");
    let with = |index: usize, record: Record| {
        let mut records = soak(&header(7, 1));
        records.insert(index, record);
        text(&records)
    };
    check_refused(
        &[&with(3, life(&own, (1, 0, 1), None))],
        "line 4: life 1 of machine 1 came before",
    );
    check_refused(&[&with(3, life(&own, (3, 0, 1), None))], "line 4: a life of another soak");
    check_refused(
        &[&with(3, life(&header(8, 1), (1, 0, 2), None))],
        "line 4: a life of another soak",
    );
    let stranger = Header { host: "else".into(), ..header(7, 1) };
    check_refused(&[&with(3, life(&stranger, (1, 0, 2), None))], "line 4: a life of another soak");
    let Record::Life(mut record) = life(&own, (1, 0, 2), None) else { unreachable!() };
    record.vm_seed += 1;
    check_refused(&[&with(3, Record::Life(record))], "line 4: a life of another soak");
    // A line that was lost or changed.
    let lost = [&records[..3], &records[4..]].concat();
    check_refused(
        &[&text(&lost)],
        "the verdict is about 6 lives and 0 findings, and there are lines of 5 and 0",
    );
    let mut changed = records;
    changed[3] = life(&own, (1, 0, 2), Some("x"));
    *changed.last_mut().unwrap() = verdict(6, 4, &["y"]);
    check_refused(&[&text(&changed)], "the verdict is about");
}
