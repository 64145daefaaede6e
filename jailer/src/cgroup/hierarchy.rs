//! Where the kernel shows control groups: at the places that systemd's "Control Group APIs and Delegation" fixes for all
//! programs, so that nobody has to search the list of mounts. Pure: text in, places out.

use std::path::{Path, PathBuf};

/// Where everything about control groups is.
const TOP: &str = "/sys/fs/cgroup";

/// Which interface a hierarchy has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// One hierarchy for each controller or a few (cgroups(7), "cgroups version 1").
    V1,
    /// One hierarchy for all ("cgroups version 2").
    V2,
}

/// A mounted hierarchy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hierarchy {
    /// Its interface.
    pub version: Version,
    /// Where it is mounted.
    pub top: PathBuf,
    /// The directory of this process's own group.
    pub own: PathBuf,
}

impl Hierarchy {
    /// The hierarchy of version 1 that has `controller`, or else that of version 2, which says itself what it has. `own` is the
    /// content of `/proc/self/cgroup` (cgroups(7)), `exists` whether there is something at a path.
    pub fn of(controller: &str, own: &str, exists: impl Fn(&Path) -> bool) -> Option<Self> {
        let v1 = own_group(own, |names| names.split(',').any(|name| name == controller));
        if let Some(group) = v1 {
            return Self::at(Version::V1, Path::new(TOP).join(controller), group, &exists);
        }
        let group = own_group(own, str::is_empty)?;
        let is_v2 = |top: &PathBuf| exists(&top.join("cgroup.controllers"));
        // Beside hierarchies of version 1 it has a place among them.
        let top = [PathBuf::from(TOP), Path::new(TOP).join("unified")].into_iter().find(is_v2)?;
        Self::at(Version::V2, top, group, &exists)
    }

    fn at(
        version: Version,
        top: PathBuf,
        group: &str,
        exists: impl Fn(&Path) -> bool,
    ) -> Option<Self> {
        let own = top.join(group.trim_start_matches('/'));
        // A container may see no more than its own group, at the top, and the path of that group on the host.
        let own = if exists(&own) { own } else { top.clone() };
        exists(&own).then_some(Self { version, top, own })
    }
}

/// The path in the line `ID:names:path` whose names are the wanted ones.
fn own_group(own: &str, wanted: impl Fn(&str) -> bool) -> Option<&str> {
    own.lines().find_map(|line| {
        let (names, path) = line.split_once(':')?.1.split_once(':')?;
        wanted(names).then_some(path)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const V1: &str = "9:name=systemd:/\n4:memory:/box/17\n1:cpu,cpuacct:/\nbroken\n0::/\n";

    /// `present` is what exists; `expected` is version, top and own group.
    fn check(
        own: &str,
        controller: &str,
        present: &[&str],
        expected: Option<(Version, &str, &str)>,
    ) {
        let exists = |path: &Path| present.iter().any(|present| path == Path::new(present));
        let found = Hierarchy::of(controller, own, exists);
        let found =
            found.as_ref().map(|h| (h.version, h.top.to_str().unwrap(), h.own.to_str().unwrap()));
        let without_slash = found.map(|(v, top, own)| (v, top, own.trim_end_matches('/')));
        assert_eq!(without_slash, expected, "{controller}");
    }

    #[test]
    fn each_controller_of_version_1_has_its_hierarchy() {
        let (cpu, memory) = ("/sys/fs/cgroup/cpu", "/sys/fs/cgroup/memory");
        let own = "/sys/fs/cgroup/memory/box/17";
        check(V1, "memory", &[memory, own], Some((Version::V1, memory, own)));
        check(V1, "cpu", &[cpu], Some((Version::V1, cpu, cpu)));
        check(V1, "memory", &[], None);
    }

    #[test]
    fn what_version_1_does_not_have_version_2_may() {
        let (unified, file) =
            ("/sys/fs/cgroup/unified", "/sys/fs/cgroup/unified/cgroup.controllers");
        check(V1, "pids", &[unified, file], Some((Version::V2, unified, unified)));
        check(V1, "pids", &[unified], None);
    }

    #[test]
    fn version_2_has_one_for_all() {
        let own = "0::/user.slice/user-0.slice/session-1.scope\n";
        let (top, file) = ("/sys/fs/cgroup", "/sys/fs/cgroup/cgroup.controllers");
        let group = "/sys/fs/cgroup/user.slice/user-0.slice/session-1.scope";
        check(own, "memory", &[top, file, group], Some((Version::V2, top, group)));
        check(own, "cpu", &[top, file, group], Some((Version::V2, top, group)));
        check("", "cpu", &[top, file, group], None);
    }

    #[test]
    fn a_container_sees_its_part() {
        let memory = "/sys/fs/cgroup/memory";
        check("4:memory:/docker/ab", "memory", &[memory], Some((Version::V1, memory, memory)));
    }
}
