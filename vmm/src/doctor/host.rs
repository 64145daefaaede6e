//! What a host is and can, as its kernel's files and KVM say, and what each lack costs.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use jailer::cgroup::hierarchy::{Hierarchy, Version};
use serde::Serialize;

use crate::kvm::bare::supported_cpuid;
use crate::kvm::capability::{self, Capability};
use crate::kvm::cpuid::is_amd;
use crate::kvm::host::{KvmKind, Module};
use crate::kvm::{self, Kvm, KvmError};

/// A host.
#[derive(Debug, Serialize)]
pub struct Host {
    /// Kernel release.
    pub kernel: String,
    /// The file of KVM.
    pub dev_kvm: DeviceFile,
    /// What KVM says of itself; none if it cannot be used.
    pub kvm: Option<KvmFacts>,
    /// Module parameter `kvm.enable_pmu`.
    pub enable_pmu: Option<bool>,
    /// Module parameter `kvm.ignore_msrs`.
    pub ignore_msrs: Option<bool>,
    /// Whether guests may run guests: module parameter `nested` of `kvm_amd` or `kvm_intel`.
    pub nested: Option<bool>,
    /// Large pages.
    pub huge_pages: HugePages,
    /// Where limits of each kind are kept.
    pub cgroups: Vec<Controller>,
    /// Whether filters of system calls can report what they forbid.
    pub seccomp: bool,
    /// Version of Landlock.
    pub landlock: Option<u32>,
    /// Namespaces of users.
    pub user_namespaces: UserNamespaces,
}

/// `/dev/kvm`.
#[derive(Debug, Serialize)]
pub struct DeviceFile {
    /// Its owner, group and mode, if it is there.
    pub owner: Option<(u32, u32)>,
    /// Its mode bits.
    pub mode: Option<u32>,
    /// Why it cannot be used.
    pub problem: Option<String>,
}

/// What KVM says of itself.
#[derive(Debug, Serialize)]
pub struct KvmFacts {
    /// Which kind of KVM it is.
    pub kind: KvmKind,
    /// Parts of its interface.
    pub capabilities: Vec<Capability>,
}

/// Large pages as the kernel gives them.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct HugePages {
    /// Which anonymous memory is in them: `always`, `madvise` or `never`.
    pub transparent: Option<String>,
    /// Which shared memory is.
    pub shared_memory: Option<String>,
    /// Those set aside (hugetlb).
    pub pools: Vec<Pool>,
}

/// Pages of one size.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Pool {
    /// The size, in KiB.
    pub kib: u64,
    /// How many there are.
    pub pages: u64,
    /// How many are free.
    pub free: u64,
}

/// A controller of control groups.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Controller {
    /// Its name.
    pub name: &'static str,
    /// The version of the hierarchy that has it.
    pub version: Option<u8>,
}

/// Whether users can have namespaces of their own.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct UserNamespaces {
    /// How many.
    pub most: u64,
    /// Why only root can use them.
    pub only_root: Option<&'static str>,
}

impl Host {
    /// Looks at this host. The second value is KVM, or why it cannot be used.
    pub fn look() -> (Self, Result<Kvm, KvmError>) {
        let module = Module::read();
        let kvm = kvm::open();
        let facts = kvm.as_ref().ok().map(|kvm| KvmFacts {
            kind: supported_cpuid(kvm)
                .map_or(KvmKind::Software, |cpuid| module.kind(is_amd(&cpuid))),
            capabilities: capability::used(kvm),
        });
        let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let host = Self {
            kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
            dev_kvm: DeviceFile::look(Path::new("/dev/kvm"), kvm.as_ref().err()),
            kvm: facts,
            enable_pmu: module.enable_pmu,
            ignore_msrs: module.ignore_msrs,
            nested: module.nested,
            huge_pages: HugePages::read(Path::new("/sys/kernel/mm")),
            cgroups: controllers(&own, Path::exists),
            seccomp: reports_forbidden_calls(Path::new("/proc/sys")),
            landlock: jailer::landlock_version(),
            user_namespaces: UserNamespaces::read(Path::new("/proc/sys")),
        };
        (host, kvm)
    }
}

impl DeviceFile {
    fn look(path: &Path, error: Option<&KvmError>) -> Self {
        let metadata = fs::metadata(path).ok();
        let is_device = metadata.as_ref().is_none_or(|m| m.file_type().is_char_device());
        let problem = error.map(|error| match is_device {
            true => crate::lifecycle::chain(error),
            false => format!("{} is not a device", path.display()),
        });
        Self {
            owner: metadata.as_ref().map(|m| (m.uid(), m.gid())),
            mode: metadata.as_ref().map(|m| m.mode() & 0o7777),
            problem,
        }
    }
}

impl HugePages {
    /// `mm` is the kernel's directory for memory management.
    fn read(mm: &Path) -> Self {
        let choice = |name| {
            let text = fs::read_to_string(mm.join("transparent_hugepage").join(name)).ok()?;
            chosen(&text).map(Into::into)
        };
        let sizes = fs::read_dir(mm.join("hugepages")).into_iter().flatten().flatten();
        let pools = sizes.filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let kib = name.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()?;
            let count = |file| number(&entry.path().join(file)).ok();
            Some(Pool { kib, pages: count("nr_hugepages")?, free: count("free_hugepages")? })
        });
        let mut pools: Vec<_> = pools.collect();
        pools.sort_by_key(|pool| pool.kib);
        Self { transparent: choice("enabled"), shared_memory: choice("shmem_enabled"), pools }
    }
}

/// Of words with brackets around one, that one.
fn chosen(text: &str) -> Option<&str> {
    text.split_whitespace().find_map(|word| word.strip_prefix('[')?.strip_suffix(']'))
}

fn number(path: &Path) -> io::Result<u64> {
    fs::read_to_string(path)?.trim().parse().map_err(io::Error::other)
}

/// Where the jail finds the controllers that it uses.
fn controllers(own: &str, exists: impl Fn(&Path) -> bool + Copy) -> Vec<Controller> {
    let find = |name| {
        let version = Hierarchy::of(name, own, exists).map(|hierarchy| match hierarchy.version {
            Version::V1 => 1,
            Version::V2 => 2,
        });
        Controller { name, version }
    };
    ["memory", "cpu", "pids"].map(find).into()
}

/// Whether a filter can raise a signal, by which the jail says what it has forbidden (seccomp(2)).
fn reports_forbidden_calls(sysctls: &Path) -> bool {
    let actions = fs::read_to_string(sysctls.join("kernel/seccomp/actions_avail"));
    actions.unwrap_or_default().split_whitespace().any(|action| action == "trap")
}

impl UserNamespaces {
    fn read(sysctls: &Path) -> Self {
        let most = number(&sysctls.join("user/max_user_namespaces")).unwrap_or(0);
        let is = |name, value| number(&sysctls.join("kernel").join(name)).ok() == Some(value);
        let only_root = if is("unprivileged_userns_clone", 0) {
            Some("kernel.unprivileged_userns_clone is 0")
        } else if is("apparmor_restrict_unprivileged_userns", 1) {
            Some("kernel.apparmor_restrict_unprivileged_userns is 1")
        } else {
            None
        };
        Self { most, only_root }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        dir
    }

    #[test]
    fn huge_pages_are_read_by_kind_and_size() {
        let dir = tree(&[
            ("transparent_hugepage/enabled", "always [madvise] never\n"),
            ("transparent_hugepage/shmem_enabled", "always within_size [advise] never\n"),
            ("hugepages/hugepages-1048576kB/nr_hugepages", "0\n"),
            ("hugepages/hugepages-1048576kB/free_hugepages", "0\n"),
            ("hugepages/hugepages-2048kB/nr_hugepages", "12\n"),
            ("hugepages/hugepages-2048kB/free_hugepages", "7\n"),
            ("hugepages/other/nr_hugepages", "7\n"),
        ]);
        let found = HugePages::read(dir.path());
        let pools = vec![
            Pool { kib: 2048, pages: 12, free: 7 },
            Pool { kib: 1_048_576, pages: 0, free: 0 },
        ];
        let (transparent, shared_memory) = (Some("madvise".into()), Some("advise".into()));
        assert_eq!(found, HugePages { transparent, shared_memory, pools });
        let none = HugePages::read(&dir.path().join("nothing"));
        let nothing = HugePages { transparent: None, shared_memory: None, pools: Vec::new() };
        assert_eq!(none, nothing);
    }

    #[test]
    fn each_controller_has_its_version() {
        let own = "4:memory:/\n0::/\n";
        let present = ["/sys/fs/cgroup/memory", "/sys/fs/cgroup/unified/cgroup.controllers"];
        let exists = |path: &Path| present.iter().any(|p| Path::new(p).starts_with(path));
        let found = controllers(own, exists);
        let versions: Vec<_> = found.iter().map(|c| (c.name, c.version)).collect();
        assert_eq!(versions, [("memory", Some(1)), ("cpu", Some(2)), ("pids", Some(2))]);
        let none = controllers("", exists);
        assert!(none.iter().all(|controller| controller.version.is_none()), "{none:?}");
    }

    #[test]
    fn seccomp_is_there_if_a_filter_can_raise_a_signal() {
        let check = |actions, expected| {
            let dir = tree(&[("kernel/seccomp/actions_avail", actions)]);
            assert_eq!(reports_forbidden_calls(dir.path()), expected, "{actions}");
        };
        check("kill_process kill_thread trap errno log allow\n", true);
        check("kill errno allow traps\n", false);
        assert!(!reports_forbidden_calls(Path::new("/nowhere")));
    }

    #[test]
    fn user_namespaces_may_be_roots_alone() {
        let check = |files: &[(&str, &str)], most, only_root: Option<&str>| {
            let dir = tree(files);
            let found = UserNamespaces::read(dir.path());
            assert_eq!(found.most, most, "{files:?}");
            assert_eq!(found.only_root.is_some(), only_root.is_some(), "{files:?}");
            assert!(found.only_root.unwrap_or_default().contains(only_root.unwrap_or_default()));
        };
        let most = ("user/max_user_namespaces", "96365\n");
        check(&[most], 96365, None);
        check(&[("user/max_user_namespaces", "0\n")], 0, None);
        check(&[], 0, None);
        let clone = "kernel/unprivileged_userns_clone";
        check(&[most, (clone, "1\n")], 96365, None);
        check(&[most, (clone, "0\n")], 96365, Some("unprivileged_userns_clone"));
        let apparmor = ("kernel/apparmor_restrict_unprivileged_userns", "1\n");
        check(&[most, apparmor], 96365, Some("apparmor"));
    }

    #[test]
    fn a_file_that_is_no_device_is_named_as_such() {
        let dir = tree(&[("kvm", "")]);
        let path = dir.path().join("kvm");
        let found = DeviceFile::look(&path, Some(&KvmError::Version(-1)));
        assert!(found.problem.unwrap().ends_with("is not a device"));
        assert!(found.mode.is_some_and(|mode| mode & 0o400 != 0));
        let missing = DeviceFile::look(&dir.path().join("none"), Some(&KvmError::Missing));
        assert_eq!(missing.problem.unwrap(), KvmError::Missing.to_string());
        assert_eq!(missing.mode, None);
    }
}
