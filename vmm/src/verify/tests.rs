use agent_protocol::{
    DmaReport, ExceptionRecord, LogLine, MsrReading, NmiRecord, NmiReport, PmuCpuid, PmuReport,
    Timings,
};

use super::*;

fn report(life: u32, cause: Cause) -> Report {
    Report {
        life,
        cause: Some(cause),
        dmesg: Vec::new(),
        dmesg_dropped: 0,
        pmu: PmuReport { status: PmuStatus::Absent, cpuid: PmuCpuid::default(), msrs: Vec::new() },
        nmi: NmiReport::default(),
        exceptions: Vec::new(),
        dma: DmaReport::default(),
        timings: Timings { tsc_entry: 1000, tsc_khz: 2_000_000, ..Timings::default() },
    }
}

fn life(number: u32, cause: Cause, change: impl FnOnce(&mut Report)) -> Life {
    let mut report = report(number, cause);
    change(&mut report);
    Life { life: number, cause, hello_us: Some(900), report: Some(report), failure: None }
}

fn verdict(policy: PmuPolicy, lives: &[Life]) -> Vec<Finding> {
    let mut judge = Judge::new(Expectations { pmu: policy, kvm: KvmKind::Svm });
    lives.iter().for_each(|life| judge.hear(life));
    judge.findings().to_vec()
}

fn names(policy: PmuPolicy, lives: &[Life]) -> Vec<&'static str> {
    verdict(policy, lives).iter().map(|finding| finding.name).collect()
}

#[test]
fn clean_lives_have_no_findings() {
    let lives = [life(1, Cause::PowerOn, |_| {}), life(2, Cause::Triple, |_| {})];
    assert_eq!(verdict(PmuPolicy::Off, &lives), []);
}

#[test]
fn each_kind_of_dirt_has_its_name() {
    let check = |expected: &[&str], change: fn(&mut Report)| {
        assert_eq!(names(PmuPolicy::Off, &[life(1, Cause::PowerOn, change)]), expected);
    };
    check(&["pmu-corrupted"], |r| {
        r.pmu.status = PmuStatus::BrokenBios { msr: 0xc001_0200, value: 0x53_0076 }
    });
    check(&["pmu-visible"], |r| r.pmu.status = PmuStatus::Present { driver: "AMD".into() });
    check(&["pmu-broken"], |r| r.pmu.status = PmuStatus::Broken);
    check(&["pmu-dead"], |r| r.pmu.status = PmuStatus::PresentDead);
    check(&["unknown-nmi"], |r| {
        let record = NmiRecord { reason: 0x20, tsc: 1, rip: 2 };
        r.nmi = NmiReport { total: 1, unknown: 1, records: vec![record], ..NmiReport::default() };
    });
    check(&["serr-nmi", "iochk-nmi"], |r| {
        r.nmi = NmiReport { total: 2, serr: 1, iochk: 1, ..NmiReport::default() };
    });
    check(&["guest-exception"], |r| {
        r.exceptions.push(ExceptionRecord { vector: 13, count: 1, error_code: 0, rip: 0, cr2: 0 });
    });
    check(&["dma-violation"], |r| r.dma.violation_count = 1);
    check(&["life-mismatch"], |r| r.life = 7);
    check(&["life-mismatch"], |r| r.cause = None);
    check(&["tsc-not-reset"], |r| r.timings.tsc_entry = 6 * 2_000_000_000);
    check(&["stale-counter"], |r| {
        let text = "New overflows for inactive PMCs: 1".into();
        r.dmesg.push(LogLine { us: 0, level: 4, text });
    });
}

#[test]
fn an_expected_nmi_is_no_finding() {
    let lives = [life(1, Cause::PowerOn, |r| {
        r.nmi = NmiReport { total: 1, claimed: 1, ..NmiReport::default() };
    })];
    assert_eq!(verdict(PmuPolicy::Off, &lives), []);
}

#[test]
fn the_log_repeats_no_finding_of_the_counters() {
    let lives = [life(1, Cause::PowerOn, |r| {
        r.nmi = NmiReport { total: 1, unknown: 1, ..NmiReport::default() };
        let text = "Uhhuh. NMI received for unknown reason 20 on CPU 0.".into();
        r.dmesg.push(LogLine { us: 0, level: 0, text });
    })];
    assert_eq!(names(PmuPolicy::Off, &lives), ["unknown-nmi"]);
}

#[test]
fn with_the_host_pmu_its_absence_is_the_finding() {
    assert_eq!(names(PmuPolicy::Host, &[life(1, Cause::PowerOn, |_| {})]), ["pmu-missing"]);
    let present =
        life(1, Cause::PowerOn, |r| r.pmu.status = PmuStatus::Present { driver: "AMD".into() });
    assert_eq!(names(PmuPolicy::Host, &[present]), [""; 0]);
}

#[test]
fn a_reset_that_changes_the_machine_is_found() {
    let lives = [
        life(1, Cause::PowerOn, |_| {}),
        life(2, Cause::Host, |r| r.pmu.cpuid.leaf_80000001_ecx = 1 << 23),
    ];
    assert_eq!(names(PmuPolicy::Off, &lives), ["cpuid-changed"]);
}

#[test]
fn counters_that_all_run_are_found_though_the_boot_check_says_absent() {
    let check = |index, value, expected: &[&str]| {
        let lives = [life(1, Cause::PowerOn, |r| {
            r.pmu.msrs.push(MsrReading { index, value: Some(value) });
        })];
        assert_eq!(names(PmuPolicy::Off, &lives), expected, "{index:x} = {value:x}");
    };
    check(0xc001_0200, 0x53_0076, &["pmu-corrupted"]);
    check(0xc001_0003, 0x53_0076, &["pmu-corrupted"]);
    check(0x186, 1 << 22, &["pmu-corrupted"]);
    check(0x38d, 0x20, &["pmu-corrupted"]);
    check(0xc001_0201, 0x53_0076, &[]);
    check(0xc001_0200, 0x13_0076, &[]);
}

#[test]
fn a_counter_that_kept_its_value_is_found_though_it_does_not_run() {
    let counter = |value| MsrReading { index: 0xc001_0201, value: Some(value) };
    let lives = [
        life(1, Cause::PowerOn, |r| r.pmu.msrs.push(counter(0))),
        life(2, Cause::Host, |r| r.pmu.msrs.push(counter(77))),
    ];
    assert_eq!(names(PmuPolicy::Off, &lives), ["pmu-residue"]);
}

#[test]
fn a_life_without_report_is_a_finding_of_that_life() {
    let failure = Failure { kind: FailureKind::NoHello, detail: "nothing".into() };
    let dead =
        Life { life: 2, cause: Cause::Host, hello_us: None, report: None, failure: Some(failure) };
    let findings = verdict(PmuPolicy::Off, &[life(1, Cause::PowerOn, |_| {}), dead]);
    assert_eq!(findings, [Finding { name: "no-hello", life: 2, detail: "nothing".into() }]);
}

#[test]
fn the_time_stamp_counter_is_not_judged_where_guests_see_the_hosts() {
    let late = life(1, Cause::PowerOn, |r| r.timings.tsc_entry = u64::MAX / 2);
    let software = Expectations { pmu: PmuPolicy::Off, kvm: KvmKind::Software };
    let mut judge = Judge::new(software);
    judge.hear(&late);
    assert_eq!(judge.findings(), []);
    assert_eq!(software.unchecked()[0].0, "tsc-not-reset");
    assert_eq!(names(PmuPolicy::Off, &[late]), ["tsc-not-reset"]);
}
