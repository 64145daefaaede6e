//! What was found, for people and as JSON.

use std::fmt::Write as _;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json as object};

use super::host::{Host, HugePages};
use super::{Behaviour, Judgement, Verdict};
use crate::soak::printable;
use crate::words::milliseconds;

/// How long the bare KVM calls of a launch take.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Floor {
    /// How often they were made.
    pub launches: usize,
    /// RAM of each machine.
    pub mem_mib: usize,
    /// In microseconds.
    pub median_us: u64,
    /// The shortest, in microseconds.
    pub shortest_us: u64,
}

/// One behaviour.
#[derive(Debug)]
pub struct Finding {
    /// Which.
    pub behaviour: Behaviour,
    /// What is said of it.
    pub judgement: Judgement,
    /// What that comes from.
    pub observed: Option<Value>,
}

/// Everything.
#[derive(Debug)]
pub struct Report {
    /// The host.
    pub host: Host,
    /// The launch floor, or why it is not known.
    pub floor: Result<Floor, String>,
    /// Behaviours in the order of [`Behaviour::ALL`].
    pub findings: Vec<Finding>,
}

impl Report {
    /// How many findings have this verdict.
    pub fn count(&self, verdict: Verdict) -> usize {
        self.findings.iter().filter(|finding| finding.judgement.verdict == verdict).count()
    }
}

/// The object, as a line. Observations have the types of their checks.
pub fn json(report: &Report) -> String {
    let verdict = match report.count(Verdict::Affected) {
        _ if report.host.kvm.is_none() => "no-kvm",
        0 => "not-affected",
        _ => "affected",
    };
    let behaviours = report.findings.iter().map(|finding| {
        object!({
            "name": finding.behaviour.name(),
            "explanation": finding.behaviour.explanation(),
            "fixed_in": finding.behaviour.fixed_in(),
            "verdict": finding.judgement.verdict,
            "why": finding.judgement.why,
            "observed": finding.observed,
        })
    });
    let floor = match &report.floor {
        Ok(floor) => object!(floor),
        Err(why) => object!({ "unmeasured": why }),
    };
    let value = object!({
        "verdict": verdict,
        "host": report.host,
        "launch_floor": floor,
        "behaviours": behaviours.collect::<Vec<_>>(),
    });
    format!("{value}\n")
}

/// The table.
pub fn table(report: &Report) -> String {
    let mut text = String::new();
    for (name, words) in host_rows(&report.host) {
        let _ = writeln!(text, "{name:<18}{}", printable(&words));
    }
    let floor = match &report.floor {
        Ok(floor) => format!(
            "{}, the bare KVM calls to a guest's first instruction: median of {}",
            milliseconds(floor.median_us),
            floor.launches
        ),
        Err(why) => format!("not known: {why}"),
    };
    let _ = writeln!(text, "{:<18}{}\n", "launch floor", printable(&floor));
    for Finding { behaviour, judgement: Judgement { verdict, why }, .. } in &report.findings {
        let word = match verdict {
            Verdict::Fixed => "fixed",
            Verdict::Affected => "AFFECTED",
            Verdict::CannotTell => "cannot tell here",
        };
        let _ = writeln!(text, "{:<18}{word}: {}", behaviour.name(), printable(why));
        let (right, since) = (behaviour.explanation(), behaviour.fixed_in());
        let _ = writeln!(text, "{:<18}{right} ({since})", "");
    }
    let [fixed, affected, unknown] = [Verdict::Fixed, Verdict::Affected, Verdict::CannotTell]
        .map(|verdict| report.count(verdict));
    let _ = writeln!(text, "\n{affected} affected, {fixed} fixed, {unknown} cannot be told here");
    text
}

/// Name and words of each fact; what is missing, with its cost.
fn host_rows(host: &Host) -> Vec<(&'static str, String)> {
    let flag = |value: Option<bool>, on: &str, off: &str, unknown: &str| match value {
        Some(true) => on.to_owned(),
        Some(false) => off.to_owned(),
        None => unknown.to_owned(),
    };
    let mut rows = vec![("kernel", format!("Linux {}", host.kernel)), ("/dev/kvm", rights(host))];
    if let Some(kvm) = &host.kvm {
        rows.push(("KVM", kvm.kind.name().into()));
        rows.extend(
            kvm.capabilities
                .iter()
                .filter(|capability| capability.value <= 0)
                .map(|c| ("", format!("lacks KVM_CAP_{} ({}): {}", c.name, c.number, c.cost))),
        );
    }
    rows.push((
        "nested",
        flag(
            host.nested,
            "yes: guests may run guests",
            "no: parameter nested is off",
            "no: there is neither kvm_amd nor kvm_intel",
        ),
    ));
    rows.push((
        "kvm.enable_pmu",
        flag(
            host.enable_pmu,
            "Y: guests may have performance counters",
            "N: --pmu host has nothing to give",
            "unknown: before Linux 5.17 there is none",
        ),
    ));
    rows.push((
        "kvm.ignore_msrs",
        flag(
            host.ignore_msrs,
            "Y: accesses of guests to unknown registers look successful, and some faults cannot be seen",
            "N",
            "unknown",
        ),
    ));
    rows.push(("huge pages", huge_pages(&host.huge_pages)));
    rows.push(("control groups", control_groups(host)));
    rows.push((
        "seccomp",
        match host.seccomp {
            true => "yes".into(),
            false => {
                "no filters that tell what they forbid: machines run with --no-jail alone".into()
            }
        },
    ));
    rows.push((
        "Landlock",
        match host.landlock {
            Some(version) => format!("version {version}"),
            None => "no: one layer less around a machine's process".into(),
        },
    ));
    let namespaces = &host.user_namespaces;
    rows.push((
        "user namespaces",
        match (namespaces.most, namespaces.only_root) {
            (0, _) => "none: only root has jails".into(),
            (_, Some(why)) => format!("root's alone, as {why}: others have no jails"),
            (most, None) => format!("{most} at most"),
        },
    ));
    rows
}

fn rights(host: &Host) -> String {
    let file = &host.dev_kvm;
    let of = match (file.owner, file.mode) {
        (Some((user, group)), Some(mode)) => format!("mode {mode:o}, user {user}, group {group}"),
        _ => "is not there".into(),
    };
    match &file.problem {
        None => format!("may be opened ({of})"),
        Some(problem) => format!("{of}: {problem}"),
    }
}

fn huge_pages(pages: &HugePages) -> String {
    let of = |choice: &Option<String>| choice.clone().unwrap_or_else(|| "none".into());
    let transparent = match pages.transparent.as_deref() {
        None | Some("never") => "no transparent ones: guests with much RAM are slower".into(),
        Some(choice) => {
            format!("transparent {choice}, shared memory {}", of(&pages.shared_memory))
        }
    };
    let pools = pages.pools.iter().map(|pool| {
        let size = match pool.kib {
            kib if kib.is_multiple_of(1 << 20) => format!("{} GiB", kib >> 20),
            kib => format!("{} MiB", kib >> 10),
        };
        format!("; {} of {size} ({} free)", pool.pages, pool.free)
    });
    [transparent].into_iter().chain(pools).collect()
}

fn control_groups(host: &Host) -> String {
    let (there, missing): (Vec<_>, Vec<_>) =
        host.cgroups.iter().partition(|controller| controller.version.is_some());
    let mut parts: Vec<_> = [1, 2]
        .into_iter()
        .filter_map(|version| {
            let names: Vec<_> = there
                .iter()
                .filter(|controller| controller.version == Some(version))
                .map(|controller| controller.name)
                .collect();
            (!names.is_empty()).then(|| format!("version {version} ({})", names.join(", ")))
        })
        .collect();
    if !missing.is_empty() {
        let names: Vec<_> = missing.iter().map(|controller| controller.name).collect();
        parts.push(format!("none for {}: machines have no such limit", names.join(", ")));
    }
    parts.join("; ")
}
