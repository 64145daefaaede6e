//! Linux as a guest (`--guest linux`), in the lab: Debian's kernel with the agent as its first process.

use serde_json::Value;

use crate::harness::lab::Lab;
use crate::harness::{run, skipped, temp_dir};

fn lab() -> Option<Lab> {
    Lab::find().map_err(skipped).ok()
}

/// The reports of runs that print JSON, one after the other.
fn reports(outcome: &crate::harness::Outcome) -> Vec<Value> {
    let lines = outcome.stdout.lines().filter(|line| line.starts_with('{'));
    lines.map(|line| serde_json::from_str(line).expect("a report")).collect()
}

/// Texts of the kernel's log in a life, counted from 0.
fn log(report: &Value, life: usize) -> String {
    let lines = report["lives"][life]["report"]["dmesg"].as_array();
    let lines = lines.unwrap_or_else(|| panic!("life {life} has no report: {report}")).iter();
    lines.map(|line| line["text"].as_str().unwrap()).collect::<Vec<_>>().join("\n")
}

#[track_caller]
fn expect_in_order(text: &str, parts: &[&str]) {
    let mut rest = text;
    for part in parts {
        let place =
            rest.find(part).unwrap_or_else(|| panic!("{part:?} is not in its place: {text}"));
        rest = &rest[place + part.len()..];
    }
}

#[test]
fn linux_comes_back_clean_from_every_reset_and_the_audit_knows_its_event_buffers() {
    let Some(lab) = lab() else { return };
    let causes = "host,i8042,cf9,acpi,triple,sysrq,panic,kexec";
    let run = "run --guest linux --json --dma-audit report --timeout 300";
    let outcome = lab.lab(
        &["lab", "--timeout", "850", "--"]
            .into_iter()
            .chain(run.split(' '))
            .chain(["--resets", "8", "--reset-via", causes])
            .collect::<Vec<_>>(),
    );
    let report = outcome.json();
    assert_eq!(report["verdict"], "clean", "{outcome}");
    let lives = report["lives"].as_array().unwrap();
    let seen: Vec<_> = lives.iter().map(|life| life["cause"].as_str().unwrap()).collect();
    assert_eq!(seen.join(","), format!("power-on,{causes}"));
    for (number, life) in (1..).zip(lives) {
        assert_eq!(life["report"]["life"], number, "{life}");
        assert_eq!(life["report"]["pmu"]["status"], "absent");
        assert_eq!(life["report"]["nmi"]["total"], 0);
        let release = life["report"]["linux"]["release"].as_str().unwrap();
        assert!(lab.kernel.to_str().unwrap().ends_with(release), "{release}");
        // It was the kernel that said so, not the agent that made it up.
        let said = log(&report, number - 1);
        expect_in_order(&said, &["Linux version ", "PMU not available due to virtualization"]);
        let watchdog = "Perf NMI watchdog permanently disabled";
        assert!(said.contains(watchdog), "no {watchdog:?} in {said}");
    }
    // The panic was one.
    outcome.expect_status(0);
}

#[test]
fn the_dma_audit_names_the_packed_event_buffers_of_linux() {
    let Some(lab) = lab() else { return };
    let run = ["lab", "--", "run", "--guest", "linux", "--dma-audit", "report", "--timeout", "300"];
    let more = ["--dma-platform", "--rng", "--vcpus", "2"];
    let outcome = lab.lab(&[&run[..], &more].concat()).expect_status(0);
    outcome
        .expect_stdout("buffers; violations: 0 must, ")
        .expect_stdout("vsock queue 2 (event), 0x")
        // `event_list` is at byte 313 of a structure that begins with a cache line.
        .expect_stdout("39+0x4, does not begin with a cache line (8 such)\n")
        .expect_stdout("3d+0x4, lies in two cache lines")
        .expect_stdout(
            "39+0x20, is the first of 8 packed event buffers, the virtio_vsock event_list of Linux (before 7.1 beside \
             other fields): 8 times 4 bytes, at an odd address, in 2 cache lines\n",
        )
        .expect_stdout("clean: 1 life, no findings\n");
}

#[test]
fn linux_says_what_the_counters_and_the_nmis_of_an_earlier_life_do_to_it() {
    let Some(lab) = lab() else { return };
    let run = "cleanslate run --guest linux --json --timeout 300";
    let script = format!(
        "{run} --pmu emulated --resets 1\n echo\n{run} --pmu emulated --resets 1 --inject pmu-not-reset\n echo\n\
         {run} --nmi 2\n echo\n{run} --resets 1 --inject nmi-after-reset; echo"
    );
    let outcome = lab.run(&[], &script).expect_status(0);
    let reports = reports(&outcome);
    let [clean, corrupted, nmis, late] = reports.as_slice() else { panic!("{outcome}") };
    let findings = |report: &Value, life: u64| {
        let all = report["findings"].as_array().unwrap().iter();
        let of_life = all.filter(|finding| finding["life"] == life);
        of_life.map(|f| f["name"].as_str().unwrap().to_string()).collect::<Vec<_>>()
    };

    assert_eq!(clean["verdict"], "clean", "{clean}");
    for life in 0..2 {
        expect_in_order(
            &log(clean, life),
            &["Performance Events: ", "core perfctr, ", "AMD PMU driver."],
        );
    }

    assert!(findings(corrupted, 1).is_empty(), "{corrupted}");
    assert!(findings(corrupted, 2).contains(&"pmu-corrupted".into()), "{corrupted}");
    let complaint = "the BIOS has corrupted hw-PMU resources (MSR c0010200 is 530076)";
    expect_in_order(&log(corrupted, 1), &["Broken BIOS detected", complaint, "AMD PMU driver."]);
    let status = &corrupted["lives"][1]["report"]["pmu"]["status"]["broken_bios"];
    assert_eq!((&status["msr"], &status["value"]), (&0xc001_0200_u64.into(), &0x53_0076.into()));

    // The kernel's own count is of all of them, and its log has them too.
    assert_eq!(findings(nmis, 1), ["unknown-nmi"], "{nmis}");
    let report = &nmis["lives"][0]["report"];
    assert_eq!((&report["nmi"]["total"], &report["nmi"]["unknown"]), (&2.into(), &2.into()));
    assert_eq!(report["linux"]["nmis"][0], 2);
    expect_in_order(
        &log(nmis, 0),
        &["Uhhuh. NMI received for unknown reason ", "Dazed and confused"],
    );

    assert!(findings(late, 1).is_empty(), "{late}");
    assert_eq!(findings(late, 2), ["unknown-nmi", "nmi-after-reset"], "{late}");
}

#[test]
fn a_kernel_that_lacks_a_driver_says_so_itself_and_nobody_waits_for_it() {
    let Some(lab) = lab() else { return };
    let run = ["lab", "--", "run", "--guest", "linux", "--timeout", "300", "--cmdline"];
    let outcome = lab.lab(&[&run[..], &["module_blacklist=virtio_mmio"]].concat());
    outcome
        .expect_stdout("finding in life 1: guest-stopped: the guest turned the machine off; the console ends with: ")
        .expect_stdout("cleanslate agent: load the module virtio_mmio.ko: EPERM")
        .expect_status(1);
}

#[test]
fn a_host_that_cannot_run_linux_says_so_at_once() {
    let refused = |arguments: &[&str], words: &str| {
        run(arguments).expect_status(2).expect_one_line_of_stderr().expect_stderr(words);
    };
    if lab().is_some() && !has_hardware() {
        refused(&["run", "--guest", "linux"], "cleanslate lab -- run --guest linux");
    }
    refused(&["run", "--guest", "linux", "--poison"], "--poison is not for --guest linux");
    refused(&["run", "--resets", "1", "--reset-via", "panic"], "add --guest linux");
    refused(&["run", "--kernel", "/vmlinuz", "--json"], "--json takes an agent");
    let seeded =
        ["run", "--guest", "linux", "--resets", "1", "--reset-via", "kexec", "--seed", "1"];
    refused(&seeded, "kexec with --seed");
    refused(&["run", "--guest", "linux", "--initrd", "x", "--kernel", "y"], "cannot be used with");
    let dir = temp_dir();
    let kernel = |name: &str, bytes: &[u8]| {
        let path = crate::harness::file(&dir, name, bytes);
        refused(
            &["run", "--guest", "linux", "--kernel", path.to_str().unwrap()],
            match name {
                "truncated" => {
                    "is a bzImage whose compressed part is broken: it ends behind the end of the file"
                }
                "text" => "does not say which release of Linux it is",
                _ => {
                    "are not in /lib/modules/0.0.0-none: install the package that the kernel is from"
                }
            },
        );
    };
    if let Some(lab) = lab() {
        let whole = std::fs::read(&lab.kernel).expect("read the kernel");
        kernel("truncated", &whole[..whole.len() / 2]);
    }
    kernel("text", b"not a kernel");
    kernel("stranger", b"\x7fELF Linux version 0.0.0-none (nobody)");
    refused(&["run", "--guest", "linux", "--kernel", "/no/such"], "read \"/no/such\"");
}

fn has_hardware() -> bool {
    ["amd", "intel"]
        .iter()
        .any(|kind| std::path::Path::new(&format!("/sys/module/kvm_{kind}")).exists())
}

#[test]
fn a_whole_linux_goes_on_from_its_snapshot_with_both_its_processors() {
    let Some(lab) = lab() else { return };
    let create =
        "cleanslate snapshot create there --guest linux --vcpus 2 --rng --timeout 300 > /dev/null";
    let restore = "cleanslate snapshot restore there --cid 9 --timeout 300 --json";
    let outcome = lab.run(&[], &format!("{create} && {restore}")).expect_status(0);
    let json = outcome.json();
    assert_eq!(
        (&json["verdict"], &json["host"]["kvm"]),
        (&"clean".into(), &"svm".into()),
        "{outcome}"
    );
}
