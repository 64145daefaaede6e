//! The control group of a jail: memory, processor time and number of tasks (cgroups(7), both versions).
//!
//! It is made below the group that the caller is in, so that a jail does not leave the limits in which it was started; in
//! version 2, where a group with processes can have none with controllers below it, beside that group. The janitor removes
//! it.

pub mod hierarchy;

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::id::Id;
use crate::janitor::Ward;
use hierarchy::{Hierarchy, Version};

/// Length of the period in which processor time is shared out, in microseconds (the kernel's default).
const CPU_PERIOD_US: u64 = 100_000;

/// What a jail's control group is to be.
#[derive(Clone, Debug, Default)]
pub struct CgroupPlan {
    /// Most memory, in bytes.
    pub memory_bytes: Option<u64>,
    /// Most processes and threads.
    pub pids: Option<u64>,
    /// Most processors' worth of time.
    pub cpus: Option<u64>,
    /// Files of the group and what to write into them, after the limits above.
    pub settings: Vec<Setting>,
    /// The group to make it in, below each hierarchy's top, instead of the one that the caller is in.
    pub parent: Option<PathBuf>,
}

/// A file of a control group and what to write into it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    file: String,
    value: String,
}

/// Text that is no setting.
#[derive(Debug, thiserror::Error)]
#[error("a setting is FILE=VALUE with a file of a control group, such as memory.max or cpu.shares")]
pub struct SettingError;

impl FromStr for Setting {
    type Err = SettingError;

    fn from_str(text: &str) -> Result<Self, SettingError> {
        let (file, value) = text.split_once('=').ok_or(SettingError)?;
        let is_name = |text: &str| {
            text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
                && text
                    .split_once('.')
                    .is_some_and(|(start, rest)| !start.is_empty() && !rest.is_empty())
        };
        if !is_name(file) || value.is_empty() {
            return Err(SettingError);
        }
        Ok(Self { file: file.into(), value: value.into() })
    }
}

/// Why there is no control group.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// The group to make it in leads out of the hierarchies.
    #[error("make control group in {0:?}: a path below each hierarchy's top has no ..")]
    Parent(PathBuf),
    /// This host shows no hierarchy for a controller.
    #[error(
        "make control group: no hierarchy with the controller {0} is mounted in /sys/fs/cgroup"
    )]
    NoHierarchy(String),
    /// A controller cannot be had below the caller's group.
    #[error("make control group: enable controller {controller} in {parent:?}")]
    Controller {
        /// Its name.
        controller: String,
        /// The group that would have to pass it on.
        parent: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// There is one of that name.
    #[error(
        "make control group {0:?}: it exists; another jail has this id, or had it and was killed with its janitor: then \
         remove it with rmdir"
    )]
    InUse(PathBuf),
    /// The system refused to make one.
    #[error("make control group {path:?}")]
    Make {
        /// Its directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file that is to be written does not exist.
    #[error("set {file} of the control group: {place:?} has no such file")]
    NoFile {
        /// The file.
        file: String,
        /// The group.
        place: PathBuf,
    },
    /// The kernel refused a value.
    #[error("set {file} of the control group to {value:?}")]
    Refused {
        /// The file.
        file: String,
        /// The value.
        value: String,
        /// What the system said.
        source: io::Error,
    },
    /// What tells about control groups cannot be read, or the group's files cannot be opened.
    #[error("open {path:?}")]
    Open {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl CgroupError {
    /// True if this host or this user has no control groups to give, whatever the plan.
    pub(crate) fn is_lack(&self) -> bool {
        match self {
            Self::NoHierarchy(_) | Self::Controller { .. } => true,
            Self::Make { source, .. } | Self::Open { source, .. } => matches!(
                source.kind(),
                io::ErrorKind::PermissionDenied
                    | io::ErrorKind::ReadOnlyFilesystem
                    | io::ErrorKind::NotFound
            ),
            Self::Parent(_) | Self::InUse(_) | Self::NoFile { .. } | Self::Refused { .. } => false,
        }
    }
}

/// A jail's control group: one directory in each hierarchy that it needs. Removing them is the janitor's task.
#[derive(Debug)]
pub(crate) struct Cgroup {
    groups: Vec<Group>,
}

#[derive(Debug)]
struct Group {
    version: Version,
    dir: PathBuf,
    /// By what a process joins: the directory itself (version 2) or its file `tasks`. `None` once it has.
    entry: Option<OwnedFd>,
}

impl Cgroup {
    /// Makes the group. What was made when an error comes is the janitor's to remove.
    ///
    /// # Errors
    /// [`CgroupError`].
    pub fn make(plan: &CgroupPlan, id: &Id, ward: &Ward) -> Result<Self, CgroupError> {
        let leads_up = |path: &PathBuf| path.components().any(|part| part == Component::ParentDir);
        if let Some(parent) = plan.parent.as_ref().filter(|parent| leads_up(parent)) {
            return Err(CgroupError::Parent(parent.clone()));
        }
        let own = read("/proc/self/cgroup")?;
        let mut cgroup = Self { groups: Vec::new() };
        let limits = plan.limits();
        let mut limited = Vec::new();
        for limit in &limits {
            limited.push(cgroup.add(limit.controller, &own, plan, id, ward)?);
        }
        let mut set = Vec::new();
        for setting in &plan.settings {
            // A file is named for its controller.
            let (controller, _) = setting.file.split_once('.').unwrap_or_default();
            set.push(cgroup.add(controller, &own, plan, id, ward)?);
        }
        for (limit, group) in limits.iter().zip(limited) {
            cgroup.groups[group].limit(limit)?;
        }
        for (setting, group) in plan.settings.iter().zip(set) {
            cgroup.groups[group].set(setting)?;
        }
        Ok(cgroup)
    }

    /// The directory that a process is to be made in (`CLONE_INTO_CGROUP`), if there is one of version 2.
    pub fn birthplace(&self) -> Option<BorrowedFd<'_>> {
        self.groups.iter().find(|g| g.version == Version::V2)?.entry.as_ref().map(AsFd::as_fd)
    }

    /// What a process needs to join the groups of version 1.
    pub fn entries(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.groups.iter().filter_map(|group| group.entry.as_ref()).map(AsFd::as_fd)
    }

    /// The process has what it needs to join.
    pub fn close_entries(&mut self) {
        self.groups.iter_mut().for_each(|group| group.entry = None);
    }

    /// Moves this thread, the only one of its process, into the groups of version 1.
    pub fn join(&self) -> io::Result<()> {
        let groups = self.groups.iter().filter(|group| group.version == Version::V1);
        for entry in groups.filter_map(|group| group.entry.as_ref()) {
            // Zero is the thread that writes. Moving itself alone, it need not wait for all other processes' forks, as
            // with the file `cgroup.procs`.
            rustix::io::write(entry, b"0")?;
        }
        Ok(())
    }

    /// True if the kernel killed a process of the group since it used more memory than the group may.
    pub fn ran_out_of_memory(&self) -> bool {
        self.groups.iter().any(|group| {
            let file = match group.version {
                Version::V1 => "memory.oom_control",
                Version::V2 => "memory.events",
            };
            let text = fs::read_to_string(group.dir.join(file)).unwrap_or_default();
            let count = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
            count.is_some_and(|count| count != "0")
        })
    }

    /// Makes the group in the hierarchy of `controller`, if it is not there already, and returns which one it is.
    fn add(
        &mut self,
        controller: &str,
        own: &str,
        plan: &CgroupPlan,
        id: &Id,
        ward: &Ward,
    ) -> Result<usize, CgroupError> {
        let hierarchy = Hierarchy::of(controller, own, Path::exists)
            .filter(|hierarchy| hierarchy.version == Version::V1 || offers(hierarchy, controller))
            .ok_or_else(|| CgroupError::NoHierarchy(controller.into()))?;
        let parent = match (&plan.parent, hierarchy.version) {
            (Some(parent), _) => hierarchy.top.join(parent.strip_prefix("/").unwrap_or(parent)),
            (None, Version::V1) => hierarchy.own.clone(),
            (None, Version::V2) => group_to_grow(&hierarchy).to_path_buf(),
        };
        if hierarchy.version == Version::V2 {
            pass_on(&parent, controller)?;
        }
        let dir = parent.join(id.as_str());
        if let Some(index) = self.groups.iter().position(|group| group.dir == dir) {
            return Ok(index);
        }
        make_dir(&dir, ward)?;
        if controller == "cpuset" && hierarchy.version == Version::V1 {
            inherit_cpuset(&parent, &dir)?;
        }
        let entry = match hierarchy.version {
            Version::V1 => open(&dir.join("tasks"), OFlags::WRONLY)?,
            Version::V2 => open(&dir, OFlags::PATH | OFlags::DIRECTORY)?,
        };
        self.groups.push(Group { version: hierarchy.version, dir, entry: Some(entry) });
        Ok(self.groups.len() - 1)
    }
}

impl Group {
    fn set(&self, Setting { file, value }: &Setting) -> Result<(), CgroupError> {
        if !self.dir.join(file).exists() {
            return Err(CgroupError::NoFile { file: file.clone(), place: self.dir.clone() });
        }
        write(&self.dir, file, value)
    }

    fn limit(&self, limit: &Limit) -> Result<(), CgroupError> {
        let (file, value) = limit.in_version(self.version);
        match write(&self.dir, file, &value) {
            // Version 1 refuses more processor time than the group above has: less is allowed already.
            Err(CgroupError::Refused { source, .. })
                if limit.controller == "cpu" && source.kind() == io::ErrorKind::InvalidInput =>
            {
                Ok(())
            }
            Ok(()) if limit.controller == "memory" => self.forbid_swap(),
            result => result,
        }
    }

    /// Whoever may have no more memory must not take swap space instead. Not every host has any.
    fn forbid_swap(&self) -> Result<(), CgroupError> {
        let file = match self.version {
            Version::V1 => "memory.swappiness",
            Version::V2 => "memory.swap.max",
        };
        match write(&self.dir, file, "0") {
            Err(CgroupError::Refused { source, .. })
                if source.kind() == io::ErrorKind::NotFound =>
            {
                Ok(())
            }
            result => result,
        }
    }
}

/// A limit of the plan, by the controller that keeps it.
struct Limit {
    controller: &'static str,
    most: u64,
}

impl Limit {
    /// The file and the value that mean this limit.
    fn in_version(&self, version: Version) -> (&'static str, String) {
        let Self { controller, most } = self;
        match (*controller, version) {
            ("memory", Version::V1) => ("memory.limit_in_bytes", most.to_string()),
            ("memory", Version::V2) => ("memory.max", most.to_string()),
            ("cpu", Version::V1) => ("cpu.cfs_quota_us", (most * CPU_PERIOD_US).to_string()),
            ("cpu", Version::V2) => {
                ("cpu.max", format!("{} {CPU_PERIOD_US}", most * CPU_PERIOD_US))
            }
            _ => ("pids.max", most.to_string()),
        }
    }
}

impl CgroupPlan {
    fn limits(&self) -> Vec<Limit> {
        [("cpu", self.cpus), ("memory", self.memory_bytes), ("pids", self.pids)]
            .into_iter()
            .filter_map(|(controller, most)| Some(Limit { controller, most: most? }))
            .collect()
    }

    /// True if the user asked for something that only a control group can give.
    pub(crate) fn is_demanded(&self) -> bool {
        !self.settings.is_empty() || self.parent.is_some()
    }
}

/// Whether this hierarchy of version 2 has `controller`: beside version 1 it may have few or none.
fn offers(hierarchy: &Hierarchy, controller: &str) -> bool {
    let controllers = read(hierarchy.top.join("cgroup.controllers"));
    controllers.is_ok_and(|all| all.split_whitespace().any(|name| name == controller))
}

/// The group of version 2 in which a new one can have controllers. This process's own cannot, since this process is in it
/// (cgroups(7), "no internal processes"), unless it is the root; then it is the one above.
fn group_to_grow(hierarchy: &Hierarchy) -> &Path {
    let above = hierarchy.own.parent().filter(|above| above.starts_with(&hierarchy.top));
    above.unwrap_or(&hierarchy.own)
}

/// Lets groups in `parent` of a hierarchy of version 2 have `controller`.
fn pass_on(parent: &Path, controller: &str) -> Result<(), CgroupError> {
    let file = parent.join("cgroup.subtree_control");
    let refused = |source| CgroupError::Controller {
        controller: controller.into(),
        parent: parent.into(),
        source,
    };
    if read_file(&file).map_err(refused)?.split_whitespace().any(|name| name == controller) {
        return Ok(());
    }
    fs::write(&file, format!("+{controller}")).map_err(refused)
}

/// A group of version 1 may hold no process before it is told processors and memory nodes.
fn inherit_cpuset(parent: &Path, dir: &Path) -> Result<(), CgroupError> {
    for file in ["cpuset.cpus", "cpuset.mems"] {
        write(dir, file, read(parent.join(file))?.trim())?;
    }
    Ok(())
}

fn make_dir(dir: &Path, ward: &Ward) -> Result<(), CgroupError> {
    ward.remove_group(dir);
    fs::create_dir(dir).map_err(|source| {
        ward.forget(dir);
        match source.kind() {
            io::ErrorKind::AlreadyExists => CgroupError::InUse(dir.into()),
            _ => CgroupError::Make { path: dir.into(), source },
        }
    })
}

fn write(dir: &Path, file: &str, value: &str) -> Result<(), CgroupError> {
    // Not `fs::write`, which would ask to create a file that is not there.
    let written = File::options().write(true).open(dir.join(file));
    written
        .and_then(|mut file| file.write_all(value.as_bytes()))
        .map_err(|source| CgroupError::Refused { file: file.into(), value: value.into(), source })
}

fn read(path: impl AsRef<Path>) -> Result<String, CgroupError> {
    let path = path.as_ref();
    read_file(path).map_err(|source| CgroupError::Open { path: path.into(), source })
}

fn read_file(path: &Path) -> io::Result<String> {
    /// These files do not tell their size, and the standard library would begin with some bytes.
    const ENOUGH: usize = 2048;
    let mut text = String::with_capacity(ENOUGH);
    File::open(path)?.read_to_string(&mut text)?;
    Ok(text)
}

fn open(path: &Path, flags: OFlags) -> Result<OwnedFd, CgroupError> {
    rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty())
        .map_err(|errno: Errno| CgroupError::Open { path: path.into(), source: errno.into() })
}
