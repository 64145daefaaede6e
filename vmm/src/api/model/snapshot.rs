//! Snapshots: what to write where, and what to start from.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::Refusal;

/// How much of RAM a snapshot has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum SnapshotType {
    /// What changed since the last one.
    Diff,
    /// All.
    #[default]
    Full,
}

/// `PUT /snapshot/create`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewSnapshot {
    /// How much of RAM.
    #[serde(default)]
    pub snapshot_type: SnapshotType,
    /// The file for everything but RAM.
    pub snapshot_path: PathBuf,
    /// The file for RAM.
    pub mem_file_path: PathBuf,
}

impl NewSnapshot {
    /// Refuses to write both into one file.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn check(&self) -> Result<(), Refusal> {
        match self.snapshot_path == self.mem_file_path {
            true => Err(Refusal::new("snapshot_path and mem_file_path name the same file")),
            false => Ok(()),
        }
    }
}

/// What gives the pages of RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum MemoryBackendType {
    /// A file.
    File,
    /// A process that answers page faults.
    Uffd,
}

/// Where RAM comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryBackend {
    /// A file, or the socket of a process.
    pub backend_path: PathBuf,
    /// Which of these.
    pub backend_type: MemoryBackendType,
}

/// Another path for the socket of vsock.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockOverride {
    /// The path.
    pub uds_path: PathBuf,
}

/// Another TAP device for a network interface, of which there are none here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkOverride {
    iface_id: String,
    host_dev_name: String,
}

/// `PUT /snapshot/load`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoadSnapshot {
    /// The file with everything but RAM.
    pub snapshot_path: PathBuf,
    /// The file with RAM: the old way to say so.
    #[serde(default)]
    pub mem_file_path: Option<PathBuf>,
    /// Where RAM comes from.
    #[serde(default)]
    pub mem_backend: Option<MemoryBackend>,
    /// The old name of the next.
    #[serde(default)]
    pub enable_diff_snapshots: bool,
    /// Whether incremental snapshots are wanted.
    #[serde(default)]
    pub track_dirty_pages: bool,
    /// Whether the machine runs at once.
    #[serde(default)]
    pub resume_vm: bool,
    /// Other TAP devices.
    #[serde(default)]
    pub network_overrides: Vec<NetworkOverride>,
    /// Another path for the socket of vsock.
    #[serde(default)]
    pub vsock_override: Option<VsockOverride>,
    /// Whether the guest's clock jumps ahead by the time that has passed.
    #[serde(default)]
    pub clock_realtime: bool,
}

impl LoadSnapshot {
    /// Refuses what cannot be.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn check(&self) -> Result<(), Refusal> {
        match (&self.mem_backend, &self.mem_file_path) {
            (Some(_), Some(_)) => {
                return Err(Refusal::new("give either mem_backend or mem_file_path, not both"));
            }
            (None, None) => {
                return Err(Refusal::new("missing field: either mem_backend or mem_file_path"));
            }
            _ => {}
        }
        if !self.network_overrides.is_empty() {
            return Err(Refusal::new(
                "network_overrides: there are no network interfaces here; leave it out",
            ));
        }
        match self.clock_realtime {
            true => Err(Refusal::new(
                "clock_realtime: a guest's clock goes on where it was; leave it out",
            )),
            false => Ok(()),
        }
    }

    /// Where RAM comes from, however it was said.
    pub fn memory(&self) -> Option<MemoryBackend> {
        let file = self.mem_file_path.clone().map(|backend_path| MemoryBackend {
            backend_path,
            backend_type: MemoryBackendType::File,
        });
        self.mem_backend.clone().or(file)
    }

    /// Whether incremental snapshots are wanted, by either name.
    pub fn tracks_dirty_pages(&self) -> bool {
        self.enable_diff_snapshots || self.track_dirty_pages
    }
}
