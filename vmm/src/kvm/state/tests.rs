//! A vCPU of the real KVM is dirtied in every way that a guest could, put back, and compared register by register.
//!
//! Needs `/dev/kvm`. What this host's KVM does not let anybody dirty is printed (`--nocapture`).

mod dirt;
mod snapshot;

use super::msrs::MSR_TSC;
use super::*;
use crate::kvm::cpuid::{self, Leaf};
use crate::kvm::host::Module;
use crate::kvm::pmu::PmuPolicy;
use crate::kvm::vcpu::Vcpu;
use crate::kvm::vm::Vm;
use crate::layout::Entry;
use crate::memory::{Backing, Memory, MemoryError, Template};
use dirt::{LATE, Variant, dirty};
use snapshot::{GROUPS, Snapshot};

/// A machine of one vCPU before its first instruction. Fields are dropped in this order.
struct Machine {
    vcpu: Vcpu,
    power_on: PowerOnState,
    xcr0: u64,
    mcg_cap: u64,
    msrs: Vec<u32>,
    _vm: Vm,
    _memory: Memory,
}

impl Machine {
    /// `pmu_absence` is what the machine is taken for; what it really is, if none.
    fn new(pmu_absence: Option<PmuAbsence>) -> Self {
        let kvm = crate::kvm::open().expect("this test needs KVM: /dev/kvm that it may open");
        let (cpuid, kind) = cpuid::supported(&kvm, Module::read(), PmuPolicy::Off).unwrap();
        let load = |_: &_| Ok::<_, MemoryError>(());
        let memory =
            Memory::map(Backing::private(&Template::build(4 << 20, load).unwrap().0).unwrap())
                .unwrap();
        let vm = Vm::new(&kvm, Module::read(), kind, &memory, PmuPolicy::Off).unwrap();
        let vcpu = vm.create_vcpu(&cpuid, 0, 1).unwrap();
        let power_on = vcpu
            .power_on(
                &kvm,
                Entry::Pvh { rip: 0x10_0000 },
                pmu_absence.unwrap_or(vm.pmu_absence()),
                &Faults::default(),
            )
            .unwrap();
        let xsave = Leaf::get(&cpuid, 0xd, 0);
        let mcg_cap = read_msrs(&vcpu.fd, &[MSR_MCG_CAP]).unwrap()[0].data;
        let listed = kvm.get_msr_index_list().unwrap();
        let msrs = snapshot::all_msrs(listed.as_slice(), mcg_cap);
        // The first three features are enough, and all that needs no permission.
        let xcr0 = u64::from(xsave.eax & 7).max(1);
        Self { vcpu, power_on, xcr0, mcg_cap, msrs, _vm: vm, _memory: memory }
    }

    fn snapshot(&self) -> Snapshot {
        Snapshot::take(&self.vcpu.fd, &self.msrs)
    }

    fn tsc(&self) -> u64 {
        read_msrs(&self.vcpu.fd, &[MSR_TSC]).unwrap()[0].data
    }
}

#[test]
fn a_restore_leaves_nothing_of_the_earlier_life() {
    check(Variant::CountingTimer, None);
}

#[test]
fn a_restore_leaves_nothing_of_an_x2apic_and_its_deadline_timer() {
    check(Variant::DeadlineTimerX2apic, None);
}

#[test]
fn a_restore_that_has_to_stop_counters_works_where_there_are_none() {
    check(Variant::CountingTimer, Some(PmuAbsence::CpuidOnly));
}

fn check(variant: Variant, pmu_absence: Option<PmuAbsence>) {
    let machine = Machine::new(pmu_absence);
    let before = machine.snapshot();

    dirty(&machine.vcpu.fd, variant, machine.xcr0, machine.mcg_cap);
    let dirtied = machine.snapshot();
    let changed: Vec<_> = dirtied.differences(&before).collect();
    println!("{variant:?}: {} registers dirtied", changed.len());
    for group in GROUPS {
        let count = changed.iter().filter(|(changed, _)| *changed == group).count();
        println!("{group}: {count} dirtied");
        assert!(count > 0, "{group}: nothing is dirty, so the restore would prove nothing");
    }
    assert_ne!(dirtied.get("events", "nmi.pending"), "0x0", "the NMI is not queued");
    print_what_stayed(&machine, &before, &dirtied);

    let tsc = machine.vcpu.zero_tsc().unwrap();
    machine.vcpu.reset(&machine.power_on, tsc).unwrap();
    let after = machine.snapshot();
    let keeps_hwcr = hwcr_cannot_be_cleared(&machine.vcpu.fd);
    if keeps_hwcr {
        println!("not proven here: HWCR; KVM before Linux 6.7 takes a write of 0 for nothing");
    }
    let left: Vec<_> = after
        .differences(&before)
        .map(|(_, difference)| difference)
        .filter(|difference| !(keeps_hwcr && difference.contains("0xc0010015")))
        .collect();
    assert!(left.is_empty(), "left of the earlier life:\n{}", left.join("\n"));
    assert_eq!(after.get("events", "nmi.pending"), "0x0", "the NMI is still queued");
    let tsc = machine.tsc();
    assert!(tsc < LATE, "the time stamp counter is at {tsc:#x}");
}

/// True on a KVM that never gives up `McStatusWrEn` again, whatever is written.
fn hwcr_cannot_be_cleared(vcpu: &VcpuFd) -> bool {
    const HWCR: u32 = 0xc001_0015;
    write_msrs(vcpu, &[entry(&(HWCR, 0))]).unwrap();
    read_msrs(vcpu, &[HWCR]).unwrap().first().is_some_and(|msr| msr.data != 0)
}

/// Names what this host's KVM did not let us change, so that nobody takes it for proven.
fn print_what_stayed(machine: &Machine, before: &Snapshot, dirtied: &Snapshot) {
    for index in dirt::msrs(machine.mcg_cap).iter().map(|(index, _)| *index) {
        let (group, name) = (snapshot::msr_group(index), format!("{index:#x}"));
        if dirtied.get(group, &name) == before.get(group, &name) {
            println!("not proven here: {group}: {name} is {}", before.get(group, &name));
        }
    }
    for name in ["exception.injected", "interrupt.injected", "interrupt.shadow", "nmi.masked"] {
        if dirtied.get("events", name) == before.get("events", name) {
            println!("not proven here: events: {name}");
        }
    }
    if machine.tsc() < LATE {
        println!("not proven here: the time stamp counter; this KVM shows the host's");
    }
}

#[test]
fn a_vcpu_comes_back_in_another_machine_register_by_register() {
    for variant in [Variant::CountingTimer, Variant::DeadlineTimerX2apic] {
        let machine = Machine::new(None);
        dirty(&machine.vcpu.fd, variant, machine.xcr0, machine.mcg_cap);
        let zero = machine.vcpu.zero_tsc().unwrap();
        let state = machine.vcpu.capture(&machine.power_on, zero).unwrap();
        let (before, tsc) = (machine.snapshot(), machine.tsc());
        assert_ne!(before.get("events", "nmi.pending"), "0x0", "the NMI is not queued");

        // As bytes, as in a file.
        let bytes = serde_json::to_vec(&state).unwrap();
        let state: VcpuState = serde_json::from_slice(&bytes).unwrap();
        let other = Machine::new(None);
        let fresh = other.snapshot();
        other.vcpu.restore(&state, &other.power_on, other.vcpu.zero_tsc().unwrap()).unwrap();
        let after = other.snapshot();
        let changed = after.differences(&fresh).count();
        println!("{variant:?}: {changed} registers came back");
        // The timer runs on.
        let is_timer = |difference: &String| difference.contains("0x390");
        let left = after.differences(&before).map(|(_, difference)| difference);
        let left: Vec<_> = left.filter(|difference| !is_timer(difference)).collect();
        assert!(left.is_empty(), "not as it was:\n{}", left.join("\n"));
        // A second is far more than passes here.
        let passed = other.tsc().wrapping_sub(tsc);
        assert!(passed < 1 << 32, "the time stamp counter went on by {passed:#x}");
    }
}

#[test]
fn a_state_of_other_registers_is_refused() {
    let machine = Machine::new(None);
    let zero = machine.vcpu.zero_tsc().unwrap();
    let state = machine.vcpu.capture(&machine.power_on, zero).unwrap();
    let whole = serde_json::to_value(&state).unwrap();
    let check = |change: &dyn Fn(&mut serde_json::Value), reason: &str| {
        let mut changed = whole.clone();
        change(&mut changed);
        let error = match serde_json::from_value::<VcpuState>(changed) {
            Err(error) => error.to_string(),
            Ok(state) => {
                let restored = machine.vcpu.restore(&state, &machine.power_on, zero);
                restored.err().map_or_else(String::new, |error| error.to_string())
            }
        };
        assert!(error.contains(reason), "{reason:?} expected, but: {error:?}");
    };
    let list = |of: &mut serde_json::Value| of.as_array().unwrap().clone();
    check(&|state| *state = whole.clone(), "");
    check(
        &|state| state["registers"]["regs"] = list(&mut state["registers"]["regs"])[1..].into(),
        "invalid length 143, expected 144 bytes",
    );
    check(
        &|state| {
            let mut longer = list(&mut state["registers"]["lapic"]);
            longer.push(0.into());
            state["registers"]["lapic"] = longer.into();
        },
        "invalid length 1025",
    );
    for (place, words) in
        [("/registers/msrs", "about the MSRs"), ("/pv", "about the paravirtual MSRs")]
    {
        let at = |state: &'_ mut serde_json::Value| list(state.pointer_mut(place).unwrap());
        check(
            &|state| {
                let fewer = at(state)[1..].to_vec();
                *state.pointer_mut(place).unwrap() = fewer.into();
            },
            words,
        );
        check(
            &|state| {
                let mut all = at(state);
                // The number comes first, lowest byte first.
                all[0][0] = 0x9b.into();
                *state.pointer_mut(place).unwrap() = all.into();
            },
            words,
        );
    }
    check(
        &|state| state["pmu"] = vec![state["pv"][0].clone()].into(),
        "about the performance counters",
    );
    check(
        &|state| state["cpuid"] = list(&mut state["cpuid"])[1..].into(),
        "CPUID leaf 0x0 differs",
    );
    check(&|state| state["nested"] = vec![0; 127].into(), "127 bytes, which cannot be");
    check(&|state| state["nested"] = vec![0; 128].into(), "128 bytes, which cannot be");
}
