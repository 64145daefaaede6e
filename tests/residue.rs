//! `--poison`: state that was dirty before a reset is clean after it, item by item.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::harness::{Outcome, run};

/// Items that every KVM lets a guest poison.
const ALWAYS: [&str; 46] = [
    "cr.cr0",
    "cr.cr2",
    "cr.cr3",
    "cr.cr4",
    "cr.efer",
    "dr0",
    "dr1",
    "dr2",
    "dr3",
    "dr6",
    "dr7",
    "fpu.control",
    "fpu.mxcsr",
    "fpu.st0",
    "fpu.tags",
    "fpu.xmm0",
    "fpu.xmm15",
    "ioapic.pin0",
    "ioapic.pin21",
    "lapic.base",
    "lapic.icr",
    "lapic.irr1",
    "lapic.lvt_lint1",
    "lapic.spurious_vector",
    "lapic.timer_count",
    "lapic.timer_lvt",
    "lapic.tpr",
    "msr.hwcr",
    "msr.kernel_gs_base",
    "msr.lstar",
    "msr.pat",
    "msr.tsc_adjust",
    "ram.pages",
    "reg.eax",
    "reg.ecx",
    "reg.edx",
    "reg.esp",
    "reg.r15",
    "reg.rbp",
    "reg.rbx",
    "seg.ds",
    "seg.fs_base",
    "seg.gdt_base",
    "seg.idt_base",
    "seg.ldtr",
    "seg.tr",
];

/// What the agent's last instructions give to XMM0, and with its number to R15.
const MARK: u64 = 0x1eaf_1eaf_1eaf_0000;

/// What became of one item before this life.
fn item<'a>(life: &'a Value, name: &str) -> &'a Value {
    let items = life["residue"].as_array().expect("a residue check");
    items.iter().find(|item| item["item"] == name).unwrap_or_else(|| panic!("no {name}"))
}

/// The outcome of each item of a life.
fn outcomes(life: &Value) -> BTreeMap<&str, &str> {
    let items = life["residue"].as_array().unwrap().iter();
    items.map(|item| (item["item"].as_str().unwrap(), item["outcome"].as_str().unwrap())).collect()
}

#[test]
fn every_item_that_was_poisoned_is_reset_whatever_the_cause() {
    let via = ["--resets", "10", "--reset-via", "host,i8042,cf9,acpi,triple"];
    let outcome = run(&[&["run", "--json", "--poison"], &via[..]].concat()).expect_status(0);
    let json = outcome.json();
    let lives = json["lives"].as_array().unwrap();
    assert_eq!(lives.len(), 11, "{outcome}");
    assert_eq!(lives[0]["residue"], Value::Null, "nothing was poisoned before it: {outcome}");
    for life in &lives[1..] {
        let outcomes = outcomes(life);
        assert!(outcomes.len() > 120, "{outcome}");
        for item in ALWAYS {
            assert_eq!(outcomes.get(item), Some(&"reset"), "{item}: {outcome}");
        }
        assert!(outcomes.values().all(|outcome| *outcome != "left"), "{outcome}");
    }
}

#[test]
fn what_cannot_be_poisoned_is_said_with_its_reason() {
    let outcome = run(&["run", "--json", "--poison", "--resets", "1"]).expect_status(0);
    let json = outcome.json();
    let items = json["lives"][1]["residue"].as_array().unwrap();
    let reasons: BTreeMap<_, _> = items
        .iter()
        .filter(|item| item["outcome"] == "not-poisonable")
        .map(|item| (item["item"].as_str().unwrap(), item["detail"].as_str().unwrap()))
        .collect();
    assert_eq!(reasons["ioapic.pin5"], "a device of the agent's uses it", "{outcome}");
    assert!(reasons.values().all(|reason| !reason.is_empty()), "{outcome}");
}

#[test]
fn values_that_were_left_are_told() {
    let arguments = ["run", "--json", "--poison", "--resets", "1", "--inject", "debugregs-kept"];
    let outcome = run(&arguments).expect_status(1);
    let json = outcome.json();
    let items = json["lives"][1]["residue"].as_array().unwrap();
    let dr3 = items.iter().find(|item| item["item"] == "dr3").unwrap();
    assert_eq!(
        (&dr3["outcome"], &dr3["detail"]),
        (&"left".into(), &0x1eaf_3000.into()),
        "{outcome}"
    );
    let detail = json["findings"][0]["detail"].as_str().unwrap();
    assert!(detail.contains("dr3 is 1eaf3000"), "{outcome}");
}

#[test]
fn all_pages_of_ram_are_stamped_as_far_as_the_agent_maps_them() {
    /// What lies between the image and its end at least.
    const AGENT_PAGES: u64 = 10 << 8;
    for mib in [64, 1152] {
        let size = mib.to_string();
        // A host that is short of large pages gives a gigabyte slowly.
        let size = ["--mem", &size, "--timeout", "120"];
        let arguments = [&["run", "--json", "--poison", "--resets", "1"], &size[..]].concat();
        let outcome = run(&[&arguments[..], &["--inject", "ram-kept"]].concat()).expect_status(1);
        let json = outcome.json();
        let items = json["lives"][1]["residue"].as_array().unwrap();
        let item = |name: &str| items.iter().find(|item| item["item"] == name);
        // The image and what is around it are restored even so.
        let left = item("ram.pages").unwrap()["detail"].as_u64().unwrap();
        let mapped = mib.min(1024) << 8;
        assert_eq!(left, mapped - AGENT_PAGES, "{outcome}");
        let beyond = item("ram.above_1gib").map(|item| item["outcome"].as_str().unwrap());
        assert_eq!(beyond, (mib > 1024).then_some("not-poisonable"), "{outcome}");
    }
}

#[test]
fn the_last_registers_hold_their_marks_whatever_the_cause() {
    for cause in ["i8042", "cf9", "acpi", "triple"] {
        let arguments = ["run", "--json", "--poison", "--resets", "1", "--reset-via", cause];
        let faults = ["--inject", "registers-kept", "--inject", "fpu-kept"];
        let outcome = run(&[&arguments[..], &faults].concat()).expect_status(1);
        let json = outcome.json();
        let items = json["lives"][1]["residue"].as_array().unwrap();
        for (name, expected) in [
            ("reg.r15", MARK + 15),
            ("reg.ecx", 0x1eaf_0001),
            ("fpu.xmm0", MARK),
            ("fpu.st7", MARK),
        ] {
            let item = items.iter().find(|item| item["item"] == name).unwrap();
            assert_eq!(item["detail"], expected, "{name} {outcome}");
        }
    }
}

/// A machine that its host resets a few times at one moment, with what more is wanted.
fn reset_by_host_at(moment: &str, more: &[&str]) -> Outcome {
    let arguments = ["run", "--json", "--poison", "--resets", "8", "--seed", "1"];
    let when = ["--reset-via", "host", "--moments", moment];
    run(&[&arguments[..], &when, more].concat())
}

#[test]
fn the_last_registers_hold_their_marks_at_any_moment_at_which_the_agent_can_be_still() {
    let faults = ["--inject", "registers-kept", "--inject", "fpu-kept"];
    for moment in ["quiet", "mid-connect", "nmi-pending"] {
        let outcome = reset_by_host_at(moment, &faults).expect_status(1);
        for life in &outcome.json()["lives"].as_array().unwrap()[1..] {
            for (name, expected) in [("reg.r15", MARK + 15), ("fpu.xmm0", MARK)] {
                assert_eq!(item(life, name)["detail"], expected, "{moment}: {name} {outcome}");
            }
        }
    }
    // Another life is between these and the look.
    for moment in ["two-causes", "mid-boot"] {
        let outcome = reset_by_host_at(moment, &[]).expect_status(0);
        for life in &outcome.json()["lives"].as_array().unwrap()[1..] {
            for name in ["reg.r15", "fpu.xmm0"] {
                assert_eq!(item(life, name)["outcome"], "reset", "{moment}: {name} {outcome}");
            }
        }
    }
}

#[test]
fn of_an_agent_that_was_at_work_the_last_registers_are_not_called_poisoned() {
    let outcome = reset_by_host_at("mid-transfer", &[]).expect_status(0);
    for life in &outcome.json()["lives"].as_array().unwrap()[1..] {
        for name in ["reg.r15", "reg.eax", "fpu.xmm0", "fpu.xmm7"] {
            let item = item(life, name);
            assert_eq!(item["outcome"], "not-poisonable", "{name} {outcome}");
            let reason = "the host reset the machine while the agent was at work";
            assert_eq!(item["detail"], reason, "{name} {outcome}");
        }
        for name in ["fpu.xmm8", "dr0", "msr.star", "cr.cr3"] {
            assert_eq!(item(life, name)["outcome"], "reset", "{name} {outcome}");
        }
    }
    let by_guest = ["--reset-via", "cf9", "--moments", "mid-transfer", "--seed", "1"];
    let arguments = ["run", "--json", "--poison", "--resets", "2"];
    let outcome = run(&[&arguments[..], &by_guest].concat()).expect_status(0);
    assert_eq!(item(&outcome.json()["lives"][1], "reg.r15")["outcome"], "reset", "{outcome}");
}

#[test]
fn a_human_reads_how_much_was_checked() {
    run(&["run", "--poison", "--resets", "2", "--vcpus", "2", "--mem", "16"])
        .expect_status(0)
        .expect_stdout("residue check of the last life: ")
        .expect_stdout(" items clean, ")
        .expect_stdout("clean: 3 lives, no findings");
}

#[test]
fn without_poison_nothing_is_looked_for() {
    let outcome = run(&["run", "--json", "--resets", "1"]).expect_status(0);
    assert_eq!(outcome.json()["lives"][1]["residue"], Value::Null, "{outcome}");
}
