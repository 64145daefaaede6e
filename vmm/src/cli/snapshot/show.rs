//! `cleanslate snapshot show`: what a snapshot is, and whether its files are whole.

use std::io::Write;
use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use super::{Directory, DirectoryError};
use crate::cli::Error;
use crate::cli::run::PrintError;
use crate::exit;
use crate::kvm::pmu::PmuPolicy;
use crate::machine::Description;
use crate::snapshot::{self, Kind, PAGE};
use crate::words::plural;

/// Say what is in a snapshot, and check that its files are whole
#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// Directory of the snapshot
    directory: PathBuf,

    /// Directory of a snapshot that the one before it builds on; may be repeated, the base first
    #[arg(long, value_name = "DIRECTORY")]
    base: Vec<PathBuf>,

    /// Print one JSON object instead
    #[arg(long)]
    json: bool,
}

/// What is printed.
#[derive(Serialize)]
struct Shown {
    id: String,
    /// The snapshot that it builds on.
    parent: Option<String>,
    /// Seconds since 1970.
    created: u64,
    kernel: String,
    processor: String,
    kvm: &'static str,
    tsc_khz: u32,
    guest: String,
    command_line: String,
    mem_mib: u64,
    /// How much of RAM is in the memory file.
    memory_bytes: u64,
    vcpus: u32,
    pmu: PmuPolicy,
    devices: Vec<&'static str>,
    life: u32,
    cause: &'static str,
}

pub(super) fn main(arguments: &Arguments) -> Result<u8, Error> {
    let directory = Directory(&arguments.directory);
    let snapshot = directory.read()?;
    let bases = arguments.base.iter().map(|base| {
        let base = Directory(base);
        Ok((base.header()?, base.open(&base.memory())?))
    });
    let mut layers = bases.collect::<Result<Vec<_>, DirectoryError>>()?;
    layers.push((snapshot.header.clone(), directory.open(&directory.memory())?));
    // As a restore does it.
    let layers: Vec<_> = layers.iter().map(|(header, file)| (header, file)).collect();
    snapshot::template(&layers).map_err(directory.unreadable())?;

    let Description { guest, command_line, mem_mib, vcpus, pmu, .. } =
        snapshot.state.description().clone();
    let (life, cause) = snapshot.state.life();
    let header = snapshot.header;
    let host = header.host;
    let shown = Shown {
        id: header.id.to_string(),
        parent: match header.kind {
            Kind::Full => None,
            Kind::Layer(parent) => Some(parent.to_string()),
        },
        created: header.created,
        processor: host.processor.to_string(),
        kvm: host.kvm.name(),
        tsc_khz: host.tsc_khz,
        kernel: host.kernel,
        guest: guest.to_string(),
        command_line,
        mem_mib,
        memory_bytes: header.pages.stored() * PAGE,
        vcpus,
        pmu,
        devices: snapshot.state.devices().collect(),
        life,
        cause: cause.name(),
    };
    let text = match arguments.json {
        true => serde_json::to_string(&shown)? + "\n",
        false => shown.text(),
    };
    std::io::stdout().lock().write_all(text.as_bytes()).map_err(PrintError)?;
    Ok(exit::CLEAN)
}

impl Shown {
    fn text(&self) -> String {
        let kind = match &self.parent {
            None => "all of RAM".into(),
            Some(parent) => format!("what changed since {parent}"),
        };
        let pmu = match self.pmu {
            PmuPolicy::Off => "no performance counters",
            PmuPolicy::Host => "KVM's performance counters",
            PmuPolicy::Emulated => "emulated performance counters",
        };
        let words = match self.command_line.as_str() {
            "" => String::new(),
            words => format!(", command line {words:?}"),
        };
        format!(
            "snapshot {id}: {kind}; state and memory are whole\n\
             host: Linux {kernel}, {kvm}, {processor}, {khz} kHz\n\
             machine: {guest}{words}, {mem} MiB, {vcpus}, {pmu}; {devices}\n\
             life {life}, after {cause}\n\
             RAM: {kib} KiB in the file\n",
            id = self.id,
            kernel = self.kernel,
            kvm = self.kvm,
            processor = self.processor,
            khz = self.tsc_khz,
            guest = self.guest,
            mem = self.mem_mib,
            vcpus = plural(self.vcpus as usize, "vCPU", "vCPUs"),
            devices = self.devices.join(", "),
            life = self.life,
            cause = self.cause,
            kib = self.memory_bytes / 1024,
        )
    }
}
