//! A thousand resets of one machine leave no descriptor and no memory behind. In a process of its own, since it looks at
//! what the process holds.

use std::time::{Duration, Instant};

use agent_protocol::Cause;
use vmm::boot::Payload;
use vmm::device::console::ConsoleOutput;
use vmm::kvm::host::KvmKind;
use vmm::kvm::pmu::PmuPolicy;
use vmm::lifecycle::{self, Plan};
use vmm::machine::{self, Config, ResetPolicy};
use vmm::verify::{Expectations, Judge};

/// What this process holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Holdings {
    descriptors: usize,
    resident_kib: u64,
    threads: usize,
}

impl Holdings {
    fn now() -> Self {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let rss = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        Self {
            descriptors: std::fs::read_dir("/proc/self/fd").unwrap().count(),
            resident_kib: rss.trim().trim_end_matches(" kB").parse().unwrap(),
            threads: std::fs::read_dir("/proc/self/task").unwrap().count(),
        }
    }
}

fn config() -> Config {
    Config {
        payload: Payload::Agent,
        command_line: String::new(),
        mem_mib: 128,
        vcpus: 1,
        pmu: PmuPolicy::Off,
        reset_policy: ResetPolicy::InPlace,
        console: ConsoleOutput::Kept,
        vsock_path: None,
    }
}

#[test]
fn a_thousand_resets_are_clean_and_leave_nothing() {
    let started = Instant::now();
    let machine = machine::launch(&config()).unwrap();
    let plan = Plan {
        resets: 1000,
        causes: vec![Cause::Host, Cause::I8042, Cause::Cf9, Cause::Acpi, Cause::Triple],
        nmis: 0,
        timeout: Duration::from_secs(30),
    };
    let mut judge = Judge::new(Expectations { pmu: PmuPolicy::Off, kvm: KvmKind::detect() });
    let mut after_ten = None;
    let mut last = 0;
    lifecycle::lead(&machine, &plan, started, |life| {
        judge.hear(life);
        last = life.life;
        if life.life == 11 {
            after_ten = Some(Holdings::now());
        }
    })
    .unwrap();
    let (before, after) = (after_ten.unwrap(), Holdings::now());
    println!("after 10 resets {before:?}, after 1000 {after:?}");
    assert_eq!(judge.findings(), []);
    assert_eq!(last, 1001);
    assert_eq!((after.descriptors, after.threads), (before.descriptors, before.threads));
    assert!(after.resident_kib <= before.resident_kib, "{before:?} became {after:?}");
}
