//! Snapshots by their two files, as Firecracker has them. What clients had said of the machine is in the state file too, since a
//! client that loads one says no more than where it is.

use std::path::Path;
use std::sync::Arc;

use super::config::VmConfig;
use super::model::{LoadSnapshot, MemoryBackendType, Vsock};
use crate::lifecycle::chain;
use crate::machine::{Config, GuestKind, MachineState, RamSource, Restore};
use crate::snapshot::{self, Kind, Snapshot};

/// The machine of a snapshot, as it was described, and as it is to be built.
///
/// # Errors
/// Why there is none, in words.
pub fn load(wanted: &LoadSnapshot) -> Result<(VmConfig, Config), String> {
    let Some(memory) = wanted.memory() else {
        return Err("mem_backend: say where RAM comes from".into());
    };
    let snapshot = read(&wanted.snapshot_path).map_err(|error| {
        format!("Load snapshot error: {:?}: {}", wanted.snapshot_path, chain(&*error))
    })?;
    // A page server has all of RAM, wherever it has that from.
    if let (Kind::Layer(parent), MemoryBackendType::File) =
        (snapshot.header.kind, memory.backend_type)
    {
        return Err(format!(
            "the snapshot has only what changed since the snapshot {parent}: `cleanslate snapshot restore --base` puts them \
             together"
        ));
    }
    let mut described = describe(&snapshot.state)?;
    if let Some(vsock) = &wanted.vsock_override {
        let path = vsock.uds_path.clone();
        let fresh = Vsock { vsock_id: None, guest_cid: 3, uds_path: path.clone() };
        described.vsock.get_or_insert(fresh).uds_path = path;
    }
    described.machine.track_dirty_pages = wanted.tracks_dirty_pages();
    let config = described.machine().map_err(|refusal| refusal.to_string())?;
    let payload = config.payload.clone();
    let description = snapshot.state.description().clone();
    let ram = match memory.backend_type {
        MemoryBackendType::File => {
            RamSource::Files(vec![(snapshot.header.clone(), memory.backend_path)])
        }
        MemoryBackendType::Uffd => RamSource::Server(memory.backend_path),
    };
    let restore = Restore { header: snapshot.header, state: Arc::new(snapshot.state), ram };
    let config = Config { restore: Some(restore), starts_paused: !wanted.resume_vm, ..config };
    Ok((described, description.configure(config, payload)))
}

/// Any failure, with its sources.
type Error = Box<dyn std::error::Error>;

/// All that the state file says, of whatever host: the machine looks at its own when it has one.
fn read(path: &Path) -> Result<Snapshot<MachineState>, Error> {
    let file = snapshot::open(path)?;
    Ok(snapshot::read_state(&file, &snapshot::read_header(&file)?.host)?)
}

/// What clients had said of it; or what can be known, if it was made in another way.
fn describe(state: &MachineState) -> Result<VmConfig, String> {
    let description = state.description();
    let mut described = match (state.note(), description.guest) {
        ("", GuestKind::Agent(_)) => VmConfig::default(),
        ("", guest) => {
            return Err(format!(
                "the snapshot is of {guest}, and does not say where that is; restore it with `cleanslate snapshot restore`"
            ));
        }
        (note, _) => VmConfig::from_note(note)?,
    };
    described.machine.mem_size_mib = description.mem_mib;
    described.machine.vcpu_count = u8::try_from(description.vcpus).unwrap_or(u8::MAX);
    Ok(described)
}
