//! Where the kernel shows control groups, read from what it says about mounts and about this process. Pure: text in,
//! places out.

use std::path::{Path, PathBuf};

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
    pub version: Version,
    /// Controllers of a hierarchy of version 1; the other says itself which ones it has.
    controllers: Vec<String>,
    /// Where it is mounted.
    pub top: PathBuf,
    /// The directory of this process's own group.
    pub own: PathBuf,
}

impl Hierarchy {
    /// Every hierarchy that is mounted, from the contents of `/proc/self/mountinfo` and `/proc/self/cgroup` (proc(5)).
    pub fn all(mountinfo: &str, own: &str) -> Vec<Self> {
        mountinfo.lines().filter_map(|line| Self::parse(line, own)).collect()
    }

    /// One of the lines, if it is about control groups:
    /// `36 31 0:33 /root-of-mount /mount/point rw,relatime - cgroup cgroup rw,memory`.
    fn parse(line: &str, own: &str) -> Option<Self> {
        let (place, filesystem) = line.split_once(" - ")?;
        let mut filesystem = filesystem.split(' ');
        let version = match filesystem.next()? {
            "cgroup" => Version::V1,
            "cgroup2" => Version::V2,
            _ => return None,
        };
        let mut place = place.split(' ').skip(3);
        let (root, top) = (unescape(place.next()?), unescape(place.next()?));
        let controllers: Vec<String> = match version {
            Version::V1 => filesystem.nth(1)?.split(',').map(str::to_owned).collect(),
            Version::V2 => Vec::new(),
        };
        let own = own_path(own, |names| match version {
            Version::V1 => names.split(',').any(|name| controllers.iter().any(|c| c == name)),
            Version::V2 => names.is_empty(),
        })?;
        // A container may see a part of the hierarchy; what is outside of that part it cannot name.
        let own = Path::new(own).strip_prefix(&root).unwrap_or(Path::new(""));
        let top = PathBuf::from(top);
        Some(Self { version, controllers, own: top.join(own), top })
    }

    /// Whether this is a hierarchy of version 1 with `controller`.
    pub fn has(&self, controller: &str) -> bool {
        self.controllers.iter().any(|name| name == controller)
    }
}

/// The path in the line `ID:names:path` of `/proc/self/cgroup` whose names are the wanted ones.
fn own_path(own: &str, wanted: impl Fn(&str) -> bool) -> Option<&str> {
    own.lines().find_map(|line| {
        let (names, path) = line.split_once(':')?.1.split_once(':')?;
        wanted(names).then_some(path)
    })
}

/// Spaces, tabs, line feeds and backslashes of paths are written in octal (proc(5)).
fn unescape(path: &str) -> String {
    if !path.contains('\\') {
        return path.to_owned();
    }
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .into_iter()
        .fold(path.to_owned(), |path, (code, character)| path.replace(code, character))
}

#[cfg(test)]
mod tests {
    use super::*;

    const V1: &str = "\
31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
";
    const V1_OWN: &str = "9:name=systemd:/\n4:memory:/box/17\n1:cpu,cpuacct:/\n0::/\n";

    fn check(mountinfo: &str, own: &str, controller: &str, expected: Option<(&str, &str)>) {
        let all = Hierarchy::all(mountinfo, own);
        let found = all.iter().find(|hierarchy| match controller {
            "" => hierarchy.version == Version::V2,
            name => hierarchy.has(name),
        });
        let found = found.map(|h| (h.top.to_str().unwrap(), h.own.to_str().unwrap()));
        assert_eq!(found, expected, "{controller}");
    }

    #[test]
    fn each_controller_of_version_1_has_its_hierarchy() {
        check(
            V1,
            V1_OWN,
            "memory",
            Some(("/sys/fs/cgroup/memory", "/sys/fs/cgroup/memory/box/17")),
        );
        let cpu = "/sys/fs/cgroup/cpu,cpuacct";
        check(V1, V1_OWN, "cpu", Some((cpu, &format!("{cpu}/"))));
        check(V1, V1_OWN, "pids", None);
        check(V1, V1_OWN, "", Some(("/sys/fs/cgroup/unified", "/sys/fs/cgroup/unified/")));
    }

    #[test]
    fn version_2_has_one_for_all() {
        let mountinfo = "30 23 0:27 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate\n";
        let own = "0::/user.slice/user-0.slice/session-1.scope\n";
        let place = "/sys/fs/cgroup/user.slice/user-0.slice/session-1.scope";
        check(mountinfo, own, "", Some(("/sys/fs/cgroup", place)));
        check(mountinfo, own, "memory", None);
    }

    #[test]
    fn a_container_sees_its_part() {
        let mountinfo = "35 31 0:32 /docker/ab /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory";
        let top = "/sys/fs/cgroup/memory";
        check(mountinfo, "4:memory:/docker/ab", "memory", Some((top, &format!("{top}/"))));
        check(mountinfo, "4:memory:/docker/ab/x", "memory", Some((top, &format!("{top}/x"))));
        check(mountinfo, "4:memory:/", "memory", Some((top, &format!("{top}/"))));
    }

    #[test]
    fn odd_paths_and_odd_lines_are_read_too() {
        let mountinfo = "1 1 0:1 / /a\\040b\\134 rw - cgroup2 none rw\nbroken\n1 2 3 - cgroup\n";
        check(mountinfo, "broken\n0::/x", "", Some(("/a b\\", "/a b\\/x")));
    }
}
