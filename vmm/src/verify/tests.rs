use agent_protocol::{
    DmaReport, ExceptionRecord, LinuxReport, LogLine, MsrReading, NmiRecord, NmiReport, PmuCpuid,
    PmuReport, PmuStatus, Timings, VsockReport,
};

use super::*;
use crate::device::virtio::audit::log::Kind;

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
        vsock: VsockReport::default(),
        timings: Timings { tsc_entry: 1000, tsc_khz: 2_000_000, ..Timings::default() },
        linux: None,
    }
}

fn life(number: u32, cause: Cause, change: impl FnOnce(&mut Report)) -> Life {
    let mut report = report(number, cause);
    change(&mut report);
    Life {
        life: number,
        cause,
        moment: None,
        hello_us: Some(900),
        report: Some(report),
        residue: Vec::new(),
        look_ticks: None,
        poison_ticks: None,
        dma_audit: Vec::new(),
        failure: None,
    }
}

fn expectations(pmu: PmuPolicy) -> Expectations {
    Expectations {
        pmu,
        kvm: KvmKind::Svm,
        dma_audit: AuditMode::Off,
        restored: false,
        clears_hwcr: true,
    }
}

fn verdict(policy: PmuPolicy, lives: &[Life]) -> Vec<Finding> {
    let mut judge = Judge::new(expectations(policy));
    for life in lives {
        judge.hear(life);
    }
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
    check(&["vsock-kept"], |r| r.vsock.stale_packets = 1);
    check(&["life-mismatch"], |r| r.life = 7);
    check(&["life-mismatch"], |r| r.cause = None);
    // The greeting came after 0.9 ms; the counter runs at 2 GHz.
    check(&["tsc-not-reset"], |r| r.timings.tsc_ready = 2_100_000_000);
    check(&[], |r| r.timings.tsc_ready = 1_900_000_000);
    check(&["stale-counter"], |r| {
        let text = "New overflows for inactive PMCs: 1".into();
        r.dmesg.push(LogLine { us: 0, level: 4, text });
    });
}

#[test]
fn a_linux_that_is_tainted_as_it_was_before_is_no_finding() {
    let lives = |taints: [u64; 2]| {
        (1..).zip(taints).map(|(number, taint)| {
            let linux = LinuxReport { taint, ..LinuxReport::default() };
            life(number, Cause::Host, |report| report.linux = Some(linux))
        })
    };
    let check = |taints, expected: &[&str]| {
        assert_eq!(names(PmuPolicy::Off, &lives(taints).collect::<Vec<_>>()), expected);
    };
    check([0, 0], &[]);
    check([512, 512], &[]);
    check([512, 0], &[]);
    check([0, 512], &["kernel-tainted"]);
    check([512, 512 | 128], &["kernel-tainted"]);
    // An unsigned module, and a register that a program wrote.
    check([0, 1 << 13 | 1 << 2], &[]);
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
fn where_a_pmu_is_wanted_its_absence_is_the_finding() {
    for policy in [PmuPolicy::Host, PmuPolicy::Emulated] {
        assert_eq!(names(policy, &[life(1, Cause::PowerOn, |_| {})]), ["pmu-missing"]);
        let present =
            life(1, Cause::PowerOn, |r| r.pmu.status = PmuStatus::Present { driver: "AMD".into() });
        assert_eq!(names(policy, &[present]), [""; 0]);
    }
}

#[test]
fn a_reset_that_changes_the_machine_is_found() {
    let lives = [
        life(1, Cause::PowerOn, |_| {}),
        life(2, Cause::Host, |r| r.pmu.cpuid.leaf_80000001_ecx = 1 << 23),
    ];
    assert_eq!(names(PmuPolicy::Off, &lives), ["cpuid-changed"]);
}

/// The findings of a life in which the agent found these registers so.
fn found_with(number: u32, registers: &[(u32, u64)]) -> Vec<&'static str> {
    let lives = [life(number, Cause::PowerOn, |r| {
        let reading =
            |(index, value): &(u32, u64)| MsrReading { index: *index, value: Some(*value) };
        r.pmu.msrs = registers.iter().map(reading).collect();
    })];
    names(PmuPolicy::Off, &lives)
}

#[test]
fn counters_that_all_run_are_found_though_the_boot_check_says_absent() {
    let check = |index, value, expected: &[&str]| {
        assert_eq!(found_with(2, &[(index, value)]), expected, "{index:x} = {value:x}");
    };
    check(0xc001_0200, 0x53_0076, &["pmu-corrupted", "pmu-not-reset"]);
    check(0xc001_0003, 0x53_0076, &["pmu-corrupted", "pmu-not-reset"]);
    check(0x186, 1 << 22, &["pmu-corrupted", "pmu-not-reset"]);
    check(0x38d, 0x20, &["pmu-corrupted", "pmu-not-reset"]);
    check(0xc001_0201, 0x53_0076, &["pmu-not-reset"]);
    check(0xc001_0200, 0x13_0076, &["pmu-not-reset"]);
    check(0xc001_0200, 0, &[]);
}

/// Six counters of PerfMonV2 as a reset leaves them, with some registers changed.
fn six_counters(changes: &[(u32, u64)]) -> Vec<(u32, u64)> {
    let clean = [(0xc000_0301, 0x3f), (0xc000_0300, 0)]
        .into_iter()
        .chain((0xc001_0200..=0xc001_020b).map(|index| (index, 0)));
    let changed = |index| changes.iter().find(|(i, _)| *i == index).map(|(_, value)| *value);
    clean.map(|(index, value)| (index, changed(index).unwrap_or(value))).collect()
}

#[test]
fn what_a_reset_left_in_the_counters_tells_what_it_left_out() {
    let check = |changes: &[(u32, u64)], expected: &[&str]| {
        assert_eq!(found_with(2, &six_counters(changes)), expected, "{changes:x?}");
    };
    check(&[], &[]);
    check(&[(0xc001_0201, 77)], &["pmu-not-reset"]);
    check(&[(0xc001_0207, 77), (0xc001_020b, 77)], &["pmu-not-reset"]);
    check(&[(0xc001_0208, 0x13_0076), (0xc001_020b, 77)], &["pmu-k7-only"]);
    check(&[(0xc000_0301, 1)], &["globals-left"]);
    check(&[(0xc000_0301, 0)], &["globals-left"]);
    check(&[(0xc000_0300, 0x20)], &["globals-left"]);
    check(&[(0xc000_0300, 0x20), (0xc001_0209, 1)], &["pmu-k7-only", "globals-left"]);
    check(&[(0xc000_0300, 0x20), (0xc001_0201, 1)], &["pmu-not-reset", "globals-left"]);
}

#[test]
fn registers_that_are_not_clear_at_power_on_are_not_the_resets_doing() {
    assert_eq!(found_with(1, &six_counters(&[(0xc001_0201, 77)])), ["pmu-residue"]);
    assert_eq!(found_with(1, &six_counters(&[(0xc000_0301, 0)])), ["pmu-residue"]);
    assert_eq!(found_with(1, &six_counters(&[])), [""; 0]);
}

/// The findings of a life with NMIs at these times, and with these registers.
fn found_with_nmis(number: u32, times: &[u64], registers: &[(u32, u64)]) -> Vec<&'static str> {
    let lives = [life(number, Cause::PowerOn, |r| {
        r.timings.tsc_ready = 5000;
        let record = |tsc: &u64| NmiRecord { reason: 0x20, tsc: *tsc, rip: 2 };
        let (total, records) = (times.len() as u32, times.iter().map(record).collect());
        r.nmi = NmiReport { total, unknown: total, records, ..NmiReport::default() };
        let reading =
            |(index, value): &(u32, u64)| MsrReading { index: *index, value: Some(*value) };
        r.pmu.msrs = registers.iter().map(reading).collect();
    })];
    names(PmuPolicy::Off, &lives)
}

#[test]
fn nmis_after_a_reset_are_told_apart_by_when_they_came_and_whose_they_can_be() {
    let running = [(0xc001_0200, 0x53_0076), (0xc001_0201, 5)];
    let counter = ["pmu-corrupted", "pmu-not-reset", "unknown-nmi"];
    let check = |times: &[u64], registers: &[(u32, u64)], expected: &[&str]| {
        assert_eq!(found_with_nmis(2, times, registers), expected, "{times:?}");
    };
    check(&[4999], &[], &["unknown-nmi", "nmi-queued"]);
    check(&[5000], &[], &["unknown-nmi", "nmi-after-reset"]);
    check(&[4000, 6000], &[], &["unknown-nmi", "nmi-queued", "nmi-after-reset"]);
    check(&[6000], &running, &counter);
    check(&[6000, 7000], &running, &[&counter[..], &["nmi-after-reset"]].concat());
    check(&[4000, 7000], &running, &[&counter[..], &["nmi-queued"]].concat());
    // A counter without interrupt explains none.
    let silent = [(0xc001_0200, 0x43_0076), (0xc001_0201, 5)];
    check(&[6000], &silent, &[&counter[..], &["nmi-after-reset"]].concat());
    assert_eq!(found_with_nmis(1, &[4000, 6000], &[]), ["unknown-nmi"], "no reset came before");
}

#[test]
fn a_counter_that_will_interrupt_soon_is_waited_for() {
    let check = |registers: &[(u32, u64)], expected| {
        let mut report = report(2, Cause::Host);
        let reading =
            |(index, value): &(u32, u64)| MsrReading { index: *index, value: Some(*value) };
        report.pmu.msrs = registers.iter().map(reading).collect();
        assert_eq!(ticks_to_overflow(&report), expected, "{registers:x?}");
    };
    let before_overflow = |ticks: u64| (1 << 48) - ticks;
    check(&six_counters(&[]), None);
    check(&[(0xc001_0200, 0x53_0076), (0xc001_0201, before_overflow(900))], Some(900));
    check(&[(0xc001_0002, 0x53_0076), (0xc001_0006, before_overflow(900))], Some(900));
    check(&[(0x186, 0x53_003c), (0xc1, before_overflow(900))], Some(900));
    check(&[(0xc001_0200, 0x43_0076), (0xc001_0201, before_overflow(900))], None);
    check(&[(0xc001_0200, 0x13_0076), (0xc001_0201, before_overflow(900))], None);
    // Nobody waits for hours.
    check(&[(0xc001_0200, 0x53_0076), (0xc001_0201, 0)], None);
    check(&[(0xc001_0200, 0x53_0076), (0xc001_0201, u64::MAX)], Some(0));
}

#[test]
fn a_report_is_judged_however_many_registers_a_guest_invents() {
    /// About as many as a frame has room for: with all pairs of them this test would take minutes.
    const MANY: usize = 60_000;
    let register = MsrReading { index: 0xc001_0200, value: Some(0x53_0076) };
    let mut invented = report(2, Cause::Host);
    invented.pmu.msrs = vec![register; MANY];
    assert_eq!(ticks_to_overflow(&invented), None);
    let lives = [
        life(1, Cause::PowerOn, |_| {}),
        life(2, Cause::Host, |r| r.pmu.msrs.clone_from(&invented.pmu.msrs)),
    ];
    assert!(names(PmuPolicy::Emulated, &lives).contains(&"pmu-not-reset"));
}

#[test]
fn a_life_without_report_is_a_finding_of_that_life() {
    let failure = Failure { kind: FailureKind::NoHello, detail: "nothing".into() };
    let dead = Life {
        life: 2,
        cause: Cause::Host,
        moment: None,
        hello_us: None,
        report: None,
        residue: Vec::new(),
        look_ticks: None,
        poison_ticks: None,
        dma_audit: Vec::new(),
        failure: Some(failure),
    };
    let findings = verdict(PmuPolicy::Off, &[life(1, Cause::PowerOn, |_| {}), dead]);
    assert_eq!(findings, [Finding { name: "no-hello", life: 2, detail: "nothing".into() }]);
}

#[test]
fn violations_of_the_dma_audit_are_findings_by_their_level() {
    let violation = |name: Kind, count| Violation {
        level: name.level(),
        name,
        device: "vsock".into(),
        queue: 0,
        descriptor: None,
        address: 0,
        len: 0,
        count,
        detail: format!("{name:?}"),
    };
    let kinds = [(Kind::OutsideRam, 1), (Kind::Unaligned, 2), (Kind::PackedEventBuffers, 1)];
    let dma_audit = kinds.map(|(kind, count)| violation(kind, count)).to_vec();
    let seen = Life { dma_audit, ..life(1, Cause::PowerOn, |_| {}) };
    let check = |dma_audit, expected: &[&str]| {
        let pmu = PmuPolicy::Off;
        let mut judge = Judge::new(Expectations { dma_audit, ..expectations(pmu) });
        let findings = judge.hear(&seen).0;
        assert!(findings.iter().all(|finding| finding.name == "dma-audit"), "{findings:?}");
        let details: Vec<_> = findings.iter().map(|finding| &finding.detail).collect();
        assert_eq!(details, expected, "{dma_audit:?}");
    };
    check(AuditMode::Off, &[]);
    check(AuditMode::Report, &["OutsideRam"]);
    check(AuditMode::Strict, &["OutsideRam", "Unaligned (2 such)"]);
}

#[test]
fn the_time_stamp_counter_is_not_judged_where_guests_see_the_hosts() {
    let late = life(1, Cause::PowerOn, |r| r.timings.tsc_ready = u64::MAX / 2);
    let software =
        Expectations { kvm: KvmKind::Software, clears_hwcr: false, ..expectations(PmuPolicy::Off) };
    let mut judge = Judge::new(software);
    judge.hear(&late);
    assert_eq!(judge.findings(), []);
    let unchecked: Vec<_> = software.unchecked().iter().map(|(name, _)| *name).collect();
    assert_eq!(unchecked, ["tsc-not-reset", "msrs-kept"]);
    assert_eq!(names(PmuPolicy::Off, &[late]), ["tsc-not-reset"]);
}

#[test]
fn of_a_restored_machine_the_next_life_is_the_first_that_began_here() {
    let late = |number, cause| life(number, cause, |r| r.timings.tsc_ready = u64::MAX / 2);
    let mut judge = Judge::new(Expectations { restored: true, ..expectations(PmuPolicy::Off) });
    judge.hear(&late(4, Cause::Host));
    assert_eq!(judge.findings(), []);
    judge.hear(&late(5, Cause::Host));
    assert_eq!(judge.findings()[0].name, "tsc-not-reset");
}
