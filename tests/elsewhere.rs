//! The agent's image boots in monitors of other people.

use std::process::{Command, Stdio};

use agent_protocol::{PmuStatus, Report};

use crate::harness::{Started, run, temp_dir};

#[test]
fn the_agent_reports_on_the_serial_port_under_qemu() {
    let dir = temp_dir();
    let image = dir.path().join("agent.elf");
    let image = image.to_str().unwrap();
    run(&["agent", "export", image]).expect_status(0);
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args([
        "-M",
        "microvm",
        "-accel",
        "tcg",
        "-cpu",
        "max",
        "-m",
        "128",
        "-no-reboot",
        "-nodefaults",
    ]);
    qemu.args(["-display", "none", "-serial", "stdio", "-kernel", image]);
    // The agent powers off by a register that QEMU's debug exit device answers: status (0x34 << 1) | 1.
    qemu.args(["-device", "isa-debug-exit,iobase=0x601,iosize=1"]);
    qemu.args(["-append", "agent.report=serial agent.life=7 agent.acpi_poweroff=0x601:0x34"]);
    qemu.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let outcome = Started::new(qemu).finish("qemu-system-x86_64 -M microvm").expect_status(0x69);
    let lines: Vec<_> = outcome.stdout.lines().filter(|line| line.starts_with('{')).collect();
    let [line] = lines[..] else { panic!("not one report: {outcome}") };
    let report: Report = serde_json::from_str(line).expect("the line is a report");
    assert_eq!(report.life, 7);
    assert_eq!(report.pmu.status, PmuStatus::Absent, "{outcome}");
    assert_eq!((report.nmi.total, report.exceptions.len()), (0, 0), "{outcome}");
    assert!(
        report.dmesg.iter().any(|line| line.text.starts_with("Performance Events: ")),
        "{outcome}"
    );
}
