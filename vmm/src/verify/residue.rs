//! The residue check: state that was poisoned before a reset, compared item by item with what it was at power-on.

use std::collections::{BTreeMap, BTreeSet};

use agent_protocol::{Poisoning, StateReading};
use serde::Serialize;

use super::Add;

/// What became of one item.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Residue {
    /// Its name.
    pub item: String,
    /// What became of it.
    #[serde(flatten)]
    pub outcome: Outcome,
}

/// What a reset did to an item.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "outcome", content = "detail", rename_all = "kebab-case")]
pub enum Outcome {
    /// It has the value again that it had at power-on.
    Reset,
    /// It has this one; none if it cannot be read any more.
    Left(Option<u64>),
    /// It cannot be told, for this reason.
    NotPoisonable(String),
}

/// Compares what was found in a life with what was there at power-on. Only what was poisoned in between proves anything.
pub fn compare(
    power_on: &[StateReading],
    poisoned: &[Poisoning],
    found: &[StateReading],
) -> Vec<Residue> {
    let (power_on, found) = (by_item(power_on), by_item(found));
    let outcome = |Poisoning { item, result, .. }: &Poisoning| {
        let value = |readings: &BTreeMap<_, _>| readings.get(item.as_str()).copied().flatten();
        let (before, now) = (value(&power_on), value(&found));
        match result {
            Err(why) => Outcome::NotPoisonable(why.clone()),
            Ok(_) if now != before => Outcome::Left(now),
            Ok(poison) if before == Some(*poison) => {
                Outcome::NotPoisonable("it is the same at power-on".into())
            }
            Ok(_) if before.is_none() => Outcome::NotPoisonable("it cannot be read".into()),
            Ok(_) => Outcome::Reset,
        }
    };
    let tried: BTreeSet<_> = poisoned.iter().map(|poisoning| poisoning.item.as_str()).collect();
    let forgotten = power_on.keys().filter(|item| !tried.contains(**item)).map(|item| Residue {
        item: (*item).into(),
        outcome: Outcome::NotPoisonable("the agent did not try".into()),
    });
    let each = |p: &Poisoning| Residue { item: p.item.clone(), outcome: outcome(p) };
    poisoned.iter().map(each).chain(forgotten).collect()
}

/// What is not as it was at power-on, whatever a life in between did to it.
pub fn differences(power_on: &[StateReading], found: &[StateReading]) -> Vec<Residue> {
    let found = by_item(found);
    let left = |reading: &&StateReading| {
        found.get(reading.item.as_str()).copied().flatten() != reading.value
    };
    let residue = |reading: &StateReading| Residue {
        item: reading.item.clone(),
        outcome: Outcome::Left(found.get(reading.item.as_str()).copied().flatten()),
    };
    power_on.iter().filter(left).map(residue).collect()
}

/// Has `item` prove nothing, for this reason, if it was left.
pub fn excuse(residue: &mut [Residue], item: &str, why: &str) {
    let of_item = residue.iter_mut().filter(|residue| residue.item == item);
    for residue in of_item.filter(|residue| matches!(residue.outcome, Outcome::Left(_))) {
        residue.outcome = Outcome::NotPoisonable(why.into());
    }
}

/// For looking up: a guest decides how many there are.
fn by_item(readings: &[StateReading]) -> BTreeMap<&str, Option<u64>> {
    readings.iter().map(|reading| (reading.item.as_str(), reading.value)).collect()
}

/// The finding for an item: what a reset does not do if the item was left.
fn finding(item: &str) -> &'static str {
    match item.split_once('.').map_or(item, |(group, _)| group) {
        "reg" | "seg" | "cr" => "registers-kept",
        "fpu" => "fpu-kept",
        "dr0" | "dr1" | "dr2" | "dr3" | "dr6" | "dr7" => "debugregs-kept",
        "ram" => "ram-kept",
        "pv" => "pv-clock-left",
        "lapic" if item.starts_with("lapic.timer") => "lapic-timer-left",
        "lapic" => "lapic-kept",
        "vsock" => "event-buffers-stale",
        "msr" => "msrs-kept",
        "ioapic" => "ioapic-kept",
        _ => "state-left",
    }
}

/// One finding of each name, with all its items.
pub(super) fn check(residue: &[Residue], add: &mut Add) {
    let mut left = BTreeMap::<_, Vec<String>>::new();
    for Residue { item, outcome } in residue {
        if let Outcome::Left(value) = outcome {
            let words = match value {
                Some(value) => format!("{item} is {value:x}"),
                None => format!("{item} cannot be read any more"),
            };
            left.entry(finding(item)).or_default().push(words);
        }
    }
    for (name, items) in left {
        add(name, format!("the reset left {}", items.join(", ")));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reading(item: &str, value: Option<u64>) -> StateReading {
        StateReading { item: item.into(), value }
    }

    #[test]
    fn an_item_counts_as_reset_only_if_it_was_dirty_in_between() {
        let check = |power_on, poisoned: Result<u64, &str>, found, expected| {
            let item = "dr0";
            let result = poisoned.map_err(Into::into);
            let poisoned = Poisoning { item: item.into(), result, last: false };
            let residue = compare(&[reading(item, power_on)], &[poisoned], &[reading(item, found)]);
            assert_eq!(residue, [Residue { item: item.into(), outcome: expected }]);
        };
        let same = || Outcome::NotPoisonable("it is the same at power-on".into());
        check(Some(0), Ok(7), Some(0), Outcome::Reset);
        check(Some(0), Ok(7), Some(7), Outcome::Left(Some(7)));
        check(Some(0), Ok(7), Some(8), Outcome::Left(Some(8)));
        check(Some(0), Ok(7), None, Outcome::Left(None));
        check(Some(7), Ok(7), Some(7), same());
        check(None, Ok(7), Some(7), Outcome::Left(Some(7)));
        check(None, Ok(7), None, Outcome::NotPoisonable("it cannot be read".into()));
        check(Some(0), Err("no"), Some(9), Outcome::NotPoisonable("no".into()));
    }

    #[test]
    fn an_item_that_the_agent_forgot_is_told() {
        let residue = compare(&[reading("dr0", Some(0))], &[], &[reading("dr0", Some(0))]);
        let expected = Outcome::NotPoisonable("the agent did not try".into());
        assert_eq!(residue, [Residue { item: "dr0".into(), outcome: expected }]);
    }

    #[test]
    fn items_that_are_left_make_one_finding_of_each_name() {
        let left = |item: &str| Residue { item: item.into(), outcome: Outcome::Left(Some(0x1eaf)) };
        let reset = Residue { item: "fpu.mxcsr".into(), outcome: Outcome::Reset };
        let residue = [left("dr7"), left("dr0"), left("pv.eoi"), reset, left("msr.star")];
        let mut found = Vec::new();
        check(&residue, &mut |name, detail| found.push((name, detail)));
        let expected = [
            ("debugregs-kept", "the reset left dr7 is 1eaf, dr0 is 1eaf"),
            ("msrs-kept", "the reset left msr.star is 1eaf"),
            ("pv-clock-left", "the reset left pv.eoi is 1eaf"),
        ];
        assert_eq!(found, expected.map(|(name, detail)| (name, detail.to_owned())));
    }

    #[test]
    fn every_item_has_its_finding() {
        let check = |item, expected| assert_eq!(finding(item), expected, "{item}");
        check("fpu.xmm15", "fpu-kept");
        check("reg.r15", "registers-kept");
        check("seg.ldtr", "registers-kept");
        check("cr.cr2", "registers-kept");
        check("dr6", "debugregs-kept");
        check("ram.pages", "ram-kept");
        check("pv.system_time", "pv-clock-left");
        check("lapic.timer_count", "lapic-timer-left");
        check("lapic.tpr", "lapic-kept");
        check("ioapic.pin20", "ioapic-kept");
        check("vsock.events", "event-buffers-stale");
        check("msr.star", "msrs-kept");
        check("something.else", "state-left");
    }
}
