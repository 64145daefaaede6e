//! Everything that can be read of a vCPU, by group and name, so that two moments can be compared.

use super::super::registers::in_use;
use std::collections::BTreeMap;
use std::fmt::Debug;

use kvm_ioctls::VcpuFd;

use super::super::msrs::{PV_MSRS, generic_msrs, is_clock, read_msrs};
use super::dirt;
use crate::kvm::pmu;

/// Every kind of state that a snapshot has and that any KVM lets us dirty; counters are there for no guest without a PMU.
pub const GROUPS: [&str; 12] = [
    "registers",
    "system registers",
    "extended state",
    "extended control registers",
    "debug registers",
    "local APIC",
    "run state",
    "events",
    "MSRs",
    "memory type MSRs",
    "machine check MSRs",
    "paravirtual MSRs",
];

/// A register's group, name and value in words.
pub struct Snapshot(BTreeMap<(&'static str, String), String>);

impl Snapshot {
    pub fn take(vcpu: &VcpuFd, msrs: &[u32]) -> Self {
        let mut all = Self(BTreeMap::new());
        all.add_fields("registers", &vcpu.get_regs().unwrap());
        all.add_fields("system registers", &vcpu.get_sregs().unwrap());
        for (i, word) in in_use(vcpu.get_xsave().unwrap()).region.iter().enumerate() {
            all.add("extended state", format!("byte {:#x}", 4 * i), format!("{word:#x}"));
        }
        all.add_fields("extended control registers", &vcpu.get_xcrs().unwrap());
        all.add_fields("debug registers", &vcpu.get_debug_regs().unwrap());
        for (i, register) in vcpu.get_lapic().unwrap().regs.chunks(16).enumerate() {
            all.add("local APIC", format!("{:#x}", 16 * i), format!("{register:x?}"));
        }
        all.add_fields("run state", &vcpu.get_mp_state().unwrap());
        all.add_fields("events", &vcpu.get_vcpu_events().unwrap());
        for index in msrs {
            let value = read_msrs(vcpu, &[*index]).unwrap();
            let value = value.first().map_or("refused".into(), |msr| format!("{:#x}", msr.data));
            all.add(msr_group(*index), format!("{index:#x}"), value);
        }
        all
    }

    /// Every register that is not as it was, as a sentence for messages, by group.
    pub fn differences<'a>(
        &'a self,
        before: &'a Self,
    ) -> impl Iterator<Item = (&'static str, String)> + 'a {
        assert!(self.0.keys().eq(before.0.keys()), "two snapshots of different registers");
        before.0.iter().filter(|(key, value)| self.0[*key] != **value).map(|(key, value)| {
            let (group, name) = key;
            (*group, format!("{group}: {name} was {value} and is {}", self.0[key]))
        })
    }

    /// The value of a register.
    pub fn get(&self, group: &'static str, name: &str) -> &str {
        self.0.get(&(group, name.to_owned())).map_or("not there", String::as_str)
    }

    fn add(&mut self, group: &'static str, name: String, value: String) {
        let twice = self.0.insert((group, name.clone()), value);
        assert!(twice.is_none(), "{group}: {name} is there twice");
    }

    /// Adds each field of a plain structure: the standard library prints one to a line, with its name.
    fn add_fields(&mut self, group: &'static str, value: &impl Debug) {
        let mut path: Vec<String> = Vec::new();
        let mut items = 0;
        for line in format!("{value:#x?}").lines().map(str::trim) {
            let (name, rest) = line.split_once(": ").unwrap_or(("", line));
            items += 1;
            let name = if name.is_empty() { format!("#{items}") } else { name.to_owned() };
            if rest.ends_with(['{', '[']) {
                path.push(name);
                items = 0;
            } else if rest.starts_with(['}', ']']) {
                // So that the fields of the next element of an array get another path.
                let closed = path.pop().unwrap_or_default();
                items = closed.strip_prefix('#').map_or(0, |n| n.parse().unwrap_or(0));
            } else {
                let path = path.get(1..).unwrap_or_default().join(".");
                self.add(group, format!("{path}.{name}"), rest.trim_end_matches(',').into());
            }
        }
    }
}

/// Every MSR that a reset is answerable for, except those that run.
pub fn all_msrs(listed: &[u32], mcg_cap: u64) -> Vec<u32> {
    let mut all = generic_msrs(listed, mcg_cap);
    all.extend(PV_MSRS.iter().map(|(index, _)| *index));
    all.extend(listed);
    all.retain(|index| !is_clock(*index) && !pmu::is_pmu_msr(*index));
    // Not left to the code under test: a register that it forgot has to show.
    all.extend(dirt::msrs(mcg_cap).iter().map(|(index, _)| *index));
    all.sort_unstable();
    all.dedup();
    all
}

/// Which group an MSR is in.
pub fn msr_group(index: u32) -> &'static str {
    match index {
        _ if pmu::is_pmu_msr(index) => "counters",
        _ if PV_MSRS.iter().any(|(pv, _)| *pv == index) => "paravirtual MSRs",
        0x17a | 0x17b | 0x280..=0x29f | 0x400..=0x47f => "machine check MSRs",
        0x200..=0x26f | 0x2ff => "memory type MSRs",
        _ => "MSRs",
    }
}
