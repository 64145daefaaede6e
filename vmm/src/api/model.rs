//! What clients say and are told, in Firecracker's JSON. Unknown fields are errors, as there.
//!
//! Plain data without side effects: these types are made by the confined process that talks to clients, which checks what
//! can be checked without the host.

pub mod cpu;
mod device;
mod logger;
mod own;
mod snapshot;
#[cfg(test)]
mod tests;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use device::{Drive, DriveUpdate, Entropy, Serial, Vsock};
pub use logger::{Level, Logger, Metrics};
pub use own::{GuestReset, Own};
pub use snapshot::{
    LoadSnapshot, MemoryBackend, MemoryBackendType, NewSnapshot, SnapshotType, VsockOverride,
};

/// Why a body is not what its path takes: a sentence for the client.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Refusal(pub String);

impl Refusal {
    /// A refusal with this reason.
    pub fn new(reason: impl Into<String>) -> Self {
        Self(reason.into())
    }
}

/// The most vCPUs that Firecracker's interface allows.
const MAX_VCPUS: u8 = 32;

/// `PUT /machine-config`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// Number of vCPUs.
    pub vcpu_count: u8,
    /// RAM in MiB.
    pub mem_size_mib: u64,
    /// Simultaneous multithreading.
    #[serde(default)]
    pub smt: bool,
    /// A CPU template of Firecracker's by its name.
    #[serde(default)]
    pub cpu_template: Option<String>,
    /// Whether incremental snapshots are wanted.
    #[serde(default)]
    pub track_dirty_pages: bool,
    /// `None`, or what pages guest RAM is to be made of.
    #[serde(default)]
    pub huge_pages: Option<String>,
}

impl Default for MachineConfig {
    fn default() -> Self {
        Self {
            vcpu_count: 1,
            mem_size_mib: 128,
            smt: false,
            cpu_template: None,
            track_dirty_pages: false,
            huge_pages: None,
        }
    }
}

impl MachineConfig {
    /// Refuses what no machine of ours has.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn check(&self) -> Result<(), Refusal> {
        if !(1..=MAX_VCPUS).contains(&self.vcpu_count) {
            return Err(Refusal::new(format!(
                "vcpu_count {} is not between 1 and {MAX_VCPUS}",
                self.vcpu_count
            )));
        }
        let memory = crate::machine::MIN_MEM_MIB..=crate::machine::MAX_MEM_MIB;
        if !memory.contains(&self.mem_size_mib) {
            return Err(Refusal::new(format!(
                "mem_size_mib {} is not between {} and {}",
                self.mem_size_mib,
                memory.start(),
                memory.end()
            )));
        }
        if self.smt {
            return Err(Refusal::new(
                "smt: each vCPU is a core of its own here; leave smt out, or set it to false",
            ));
        }
        if let Some(template) = self.cpu_template.as_deref().filter(|name| *name != "None") {
            return Err(Refusal::new(format!(
                "cpu_template {template:?}: Firecracker's own templates are not here; describe what you need with PUT /cpu-config"
            )));
        }
        match self.huge_pages.as_deref() {
            None | Some("None") => Ok(()),
            Some(pages) => Err(Refusal::new(format!(
                "huge_pages {pages:?}: guest RAM has large pages where the host gives them, and none can be reserved; leave \
                 huge_pages out"
            ))),
        }
    }
}

/// `PATCH /machine-config`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfigUpdate {
    /// As in [`MachineConfig`], like all others; what is missing stays.
    #[serde(default)]
    pub vcpu_count: Option<u8>,
    #[serde(default)]
    #[expect(missing_docs)]
    pub mem_size_mib: Option<u64>,
    #[serde(default)]
    #[expect(missing_docs)]
    pub smt: Option<bool>,
    #[serde(default)]
    #[expect(missing_docs)]
    pub cpu_template: Option<String>,
    #[serde(default)]
    #[expect(missing_docs)]
    pub track_dirty_pages: Option<bool>,
    #[serde(default)]
    #[expect(missing_docs)]
    pub huge_pages: Option<String>,
}

impl MachineConfigUpdate {
    /// `old` with what is given here.
    ///
    /// # Errors
    /// [`Refusal`] if nothing is given, or no machine of ours has it.
    pub fn applied_to(&self, old: &MachineConfig) -> Result<MachineConfig, Refusal> {
        if *self == Self::default() {
            return Err(Refusal::new("Empty PATCH request."));
        }
        let update = self.clone();
        let new = MachineConfig {
            vcpu_count: update.vcpu_count.unwrap_or(old.vcpu_count),
            mem_size_mib: update.mem_size_mib.unwrap_or(old.mem_size_mib),
            smt: update.smt.unwrap_or(old.smt),
            cpu_template: update.cpu_template.or_else(|| old.cpu_template.clone()),
            track_dirty_pages: update.track_dirty_pages.unwrap_or(old.track_dirty_pages),
            huge_pages: update.huge_pages.or_else(|| old.huge_pages.clone()),
        };
        new.check().map(|()| new)
    }
}

/// `PUT /boot-source`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootSource {
    /// The kernel.
    pub kernel_image_path: PathBuf,
    /// An initial RAM disk.
    #[serde(default)]
    pub initrd_path: Option<PathBuf>,
    /// The kernel command line; a default of Firecracker's if it is missing.
    #[serde(default)]
    pub boot_args: Option<String>,
}

/// `PATCH /vm`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vm {
    /// What it is to become.
    pub state: VmState,
}

/// What a machine can be made to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum VmState {
    /// No vCPU runs.
    Paused,
    /// They run again.
    Resumed,
}

/// `PUT /actions`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Action {
    /// Which.
    pub action_type: ActionType,
}

/// What can be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ActionType {
    /// Write the metrics now.
    FlushMetrics,
    /// Start the machine.
    InstanceStart,
    /// Press Ctrl, Alt and Del.
    SendCtrlAltDel,
}

/// `GET /`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Instance {
    /// The program.
    pub app_name: &'static str,
    /// What `--id` says.
    pub id: String,
    /// `Not started`, `Running` or `Paused`.
    pub state: &'static str,
    /// The program's version.
    pub vmm_version: &'static str,
}
