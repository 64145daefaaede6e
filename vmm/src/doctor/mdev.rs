//! Mediated devices: what the host has. Their fix is one of a comment in the kernel, which nothing shows.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::Judgement;
use crate::words::plural;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Observed {
    parents: Vec<Parent>,
}

/// A device that can be divided (Linux `Documentation/driver-api/vfio-mediated-device.rst`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Parent {
    device: String,
    types: Vec<Type>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Type {
    id: String,
    name: Option<String>,
    /// How many more of it can be made.
    available: Option<u32>,
}

/// More than any host has; what the kernel lists is bounded by what it found, but nothing says by how much.
const MOST: usize = 1000;

/// `sys` is where sysfs is.
pub(super) fn observe(sys: &Path) -> Observed {
    let bus = sys.join("class/mdev_bus");
    let parents = names(&bus).into_iter().map(|device| {
        let all = bus.join(&device).join("mdev_supported_types");
        let types = names(&all).into_iter().map(|id| {
            let read = |file| fs::read_to_string(all.join(&id).join(file)).ok();
            let name = read("name").map(|name| name.trim().to_owned());
            let available = read("available_instances").and_then(|text| text.trim().parse().ok());
            Type { id, name, available }
        });
        Parent { types: types.collect(), device }
    });
    Observed { parents: parents.collect() }
}

/// What a directory has, sorted; nothing if there is none.
fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let mut names: Vec<_> =
        entries.filter_map(|entry| entry.file_name().into_string().ok()).take(MOST).collect();
    names.sort();
    names
}

pub(super) fn judge(observed: &Observed) -> Judgement {
    let parents = &observed.parents;
    if parents.is_empty() {
        return Judgement::cannot_tell(
            "no device offers any: there is nothing in /sys/class/mdev_bus",
        );
    }
    let types = parents.iter().flat_map(|parent| {
        parent.types.iter().map(|t| {
            let available = t.available.map_or("?".into(), |count| count.to_string());
            let name = t.name.as_deref().map(|name| format!(" ({name})")).unwrap_or_default();
            format!("{} {}{name}: {available} more", parent.device, t.id)
        })
    });
    let listed: Vec<_> = types.collect();
    Judgement::cannot_tell(format!(
        "the fix is one of a comment; {}, {}: {}",
        plural(parents.len(), "parent device", "parent devices"),
        plural(listed.len(), "type", "types"),
        listed.join(", ")
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::{Verdict, check};

    #[test]
    fn parents_and_types_are_read_from_sysfs() {
        let sys = tempfile::tempdir().unwrap();
        assert_eq!(observe(sys.path()), Observed { parents: Vec::new() });
        let parent = sys.path().join("class/mdev_bus/mtty");
        for (id, name, available) in [("mtty-2", "Dual", "12\n"), ("mtty-1", "Single port", "x")] {
            let of_type = parent.join("mdev_supported_types").join(id);
            fs::create_dir_all(&of_type).unwrap();
            fs::write(of_type.join("name"), format!("{name}\n")).unwrap();
            fs::write(of_type.join("available_instances"), available).unwrap();
        }
        fs::create_dir_all(sys.path().join("class/mdev_bus/empty")).unwrap();
        let found = judge(&observe(sys.path()));
        let words = "2 parent devices, 2 types: mtty mtty-1 (Single port): ? more, mtty mtty-2 (Dual): 12 more";
        check(&found, Verdict::CannotTell, words);
    }

    #[test]
    fn a_host_without_any_says_so() {
        check(
            &judge(&Observed { parents: Vec::new() }),
            Verdict::CannotTell,
            "no device offers any",
        );
    }
}
