//! All that clients have said about a machine, and the machine that it makes. The same comes out of a configuration file.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Value, json};

use super::model::cpu::CpuConfig;
use super::model::{
    BootSource, Drive, Entropy, GuestReset, Logger, MachineConfig, Metrics, Own, Refusal, Serial,
    Vsock,
};
use super::route;
use crate::boot::Payload;
use crate::device::block::DiskConfig;
use crate::device::console::ConsoleOutput;
use crate::device::vsock::GuestCid;
use crate::machine::{Config, MOST_DISKS, ResetPolicy};

/// What Firecracker tells a kernel for which no `boot_args` are given.
const DEFAULT_BOOT_ARGS: &str =
    "reboot=k panic=1 nomodule 8250.nr_uarts=0 i8042.noaux i8042.nomux i8042.dumbkbd";

/// A machine that is being described.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VmConfig {
    /// vCPUs and RAM.
    pub machine: MachineConfig,
    /// What it boots; the embedded agent if nothing is said.
    pub boot: Option<BootSource>,
    /// What of CPUID and the MSRs is changed.
    pub cpu: Option<CpuConfig>,
    /// Its disks: the root device first, the others in the order in which they came.
    pub drives: Vec<Drive>,
    /// Its source of random bytes.
    pub entropy: Option<Entropy>,
    /// Its address and socket.
    pub vsock: Option<Vsock>,
    /// Where its console goes.
    pub serial: Option<Serial>,
    /// Where the log goes.
    pub logger: Option<Logger>,
    /// Where the metrics go.
    pub metrics: Option<Metrics>,
    /// What Firecracker has no words for.
    pub own: Own,
}

/// A configuration file, in Firecracker's format. `cpu-config` is a path there.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct ConfigFile {
    #[serde(default)]
    boot_source: Option<BootSource>,
    #[serde(default)]
    drives: Vec<Drive>,
    #[serde(default)]
    machine_config: Option<MachineConfig>,
    #[serde(default)]
    cpu_config: Option<CpuConfigSource>,
    #[serde(default)]
    entropy: Option<Entropy>,
    #[serde(default)]
    vsock: Option<Vsock>,
    #[serde(default)]
    serial: Option<Serial>,
    #[serde(default)]
    logger: Option<Logger>,
    #[serde(default)]
    metrics: Option<Metrics>,
    #[serde(default)]
    cleanslate: Option<Own>,
    #[serde(default)]
    network_interfaces: Vec<Value>,
    #[serde(default)]
    balloon: Option<Value>,
    #[serde(default)]
    mmds_config: Option<Value>,
    #[serde(default)]
    pmem: Vec<Value>,
    #[serde(default)]
    memory_hotplug: Option<Value>,
}

/// A template's text, or the path of a file with it.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum CpuConfigSource {
    Path(PathBuf),
    Text(CpuConfig),
}

impl VmConfig {
    /// What a configuration file says. `read` reads a file that it names.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn from_file(
        text: &[u8],
        read: impl Fn(&PathBuf) -> Result<Vec<u8>, Refusal>,
    ) -> Result<Self, Refusal> {
        let file: ConfigFile =
            serde_json::from_slice(text).map_err(|error| Refusal::new(error.to_string()))?;
        let lacking = [
            (!file.network_interfaces.is_empty(), route::NO_NETWORK),
            (file.balloon.is_some(), route::NO_BALLOON),
            (file.mmds_config.is_some(), route::NO_MMDS),
            (!file.pmem.is_empty(), route::NO_PMEM),
            (file.memory_hotplug.is_some(), route::NO_HOTPLUG),
        ];
        if let Some((_, reason)) = lacking.iter().find(|(is_wanted, _)| *is_wanted) {
            return Err(Refusal::new(*reason));
        }
        let cpu = match file.cpu_config {
            None => None,
            Some(CpuConfigSource::Text(cpu)) => Some(cpu),
            Some(CpuConfigSource::Path(path)) => {
                let text = read(&path)?;
                let cpu = serde_json::from_slice(&text);
                Some(cpu.map_err(|error| Refusal::new(format!("cpu-config {path:?}: {error}")))?)
            }
        };
        let mut config = Self::default();
        if let Some(machine) = file.machine_config {
            machine.check()?;
            config.machine = machine;
        }
        if let Some(cpu) = cpu {
            cpu.template()?;
            config.cpu = Some(cpu);
        }
        for drive in file.drives {
            drive.check()?;
            config.set_drive(drive)?;
        }
        if let Some(entropy) = file.entropy {
            entropy.check()?;
            config.entropy = Some(entropy);
        }
        if let Some(vsock) = file.vsock {
            vsock.check()?;
            config.vsock = Some(vsock);
        }
        if let Some(serial) = file.serial {
            serial.check()?;
            config.serial = Some(serial);
        }
        if let Some(own) = file.cleanslate {
            own.check()?;
            config.own = own;
        }
        config.boot = file.boot_source;
        config.logger = file.logger;
        config.metrics = file.metrics;
        Ok(config)
    }

    /// For [`VmConfig::from_note`]: what a snapshot has to say of its machine, without this process's log and metrics.
    fn note(&self) -> String {
        Self { logger: None, metrics: None, ..self.clone() }.to_json().to_string()
    }

    /// What a snapshot says of its machine.
    ///
    /// # Errors
    /// That nobody can have said so, in words.
    pub fn from_note(note: &str) -> Result<Self, String> {
        let no_files = |_: &PathBuf| Err(Refusal::new("a path"));
        let mut described = Self::from_file(note.as_bytes(), no_files)
            .map_err(|refusal| format!("what the snapshot says of its machine: {refusal}"))?;
        // The embedded agent's, which no client has named.
        described.boot = described.boot.filter(|boot| boot.kernel_image_path != Path::new(""));
        Ok(described)
    }

    /// Adds a drive, or changes the one with its name.
    ///
    /// # Errors
    /// [`Refusal`] of a second root device, or of more drives than there is room for.
    pub fn set_drive(&mut self, drive: Drive) -> Result<(), Refusal> {
        let others = self.drives.iter().filter(|other| other.drive_id != drive.drive_id);
        if drive.is_root_device && others.clone().any(|other| other.is_root_device) {
            return Err(Refusal::new("A root block device already exists!"));
        }
        if others.count() >= MOST_DISKS {
            return Err(Refusal::new(format!("a machine has {MOST_DISKS} drives at most")));
        }
        match self.drives.iter_mut().find(|other| other.drive_id == drive.drive_id) {
            Some(old) => *old = drive,
            None => self.drives.push(drive),
        }
        // Stable: the others keep their order.
        self.drives.sort_by_key(|drive| !drive.is_root_device);
        Ok(())
    }

    /// Whether anything but log and metrics was described, which a snapshot brings itself.
    pub fn describes_a_machine(&self) -> bool {
        let Self { logger, metrics, .. } = self;
        let undescribed =
            Self { logger: logger.clone(), metrics: metrics.clone(), ..Self::default() };
        *self != undescribed
    }

    /// `GET /vm/config`.
    pub fn to_json(&self) -> Value {
        let boot = self.boot.as_ref().map_or_else(
            // Firecracker's clients expect the field.
            || json!({ "kernel_image_path": "" }),
            |boot| without_nulls(json!(boot)),
        );
        let drives: Vec<_> = self.drives.iter().map(|drive| json!(drive)).collect();
        json!({
            "balloon": null,
            "boot-source": boot,
            "cleanslate": self.own,
            "cpu-config": self.cpu,
            "drives": drives,
            "entropy": self.entropy,
            "logger": self.logger.as_ref().map(|logger| without_nulls(json!(logger))),
            "machine-config": machine_to_json(&self.machine),
            "memory-hotplug": null,
            "metrics": self.metrics,
            "mmds-config": null,
            "network-interfaces": [],
            "pmem": [],
            "serial": self.serial,
            "vsock": self.vsock,
        })
    }

    /// The machine that this describes.
    ///
    /// # Errors
    /// [`Refusal`] of a CPU template that is none.
    pub fn machine(&self) -> Result<Config, Refusal> {
        let (payload, policy, console) = match &self.boot {
            Some(boot) => (
                Payload::Kernel {
                    kernel: boot.kernel_image_path.clone(),
                    initrd: boot.initrd_path.clone(),
                },
                GuestReset::End,
                ConsoleOutput::Stdout,
            ),
            None => (Payload::Agent(None), GuestReset::InPlace, ConsoleOutput::Kept),
        };
        let console = if self.console_path().is_some() { ConsoleOutput::Stdout } else { console };
        let drive_to_disk = |drive: &Drive| DiskConfig {
            path: drive.path_on_host.clone().unwrap_or_default(),
            read_only: drive.is_read_only.unwrap_or(false),
        };
        Ok(Config {
            command_line: self.command_line(),
            vcpus: self.machine.vcpu_count.into(),
            cpu_template: match &self.cpu {
                Some(cpu) => cpu.template()?,
                None => Default::default(),
            },
            pmu: self.own.pmu,
            pmu_shape: self.own.shape()?,
            pmu_seed: self.own.pmu_seed,
            reset_policy: match self.own.on_guest_reset.unwrap_or(policy) {
                GuestReset::InPlace => ResetPolicy::InPlace,
                GuestReset::End => ResetPolicy::Limited(0),
            },
            console,
            vsock_path: self.vsock.as_ref().map(|vsock| vsock.uds_path.clone()),
            vsock_messages_path: self.own.uds_seqpacket_path.clone(),
            rng: self.entropy.is_some(),
            disks: self.drives.iter().map(drive_to_disk).collect(),
            dma_platform: self.own.dma_platform,
            dma_audit: self.own.dma_audit,
            cid: match &self.vsock {
                Some(vsock) => GuestCid::new(vsock.guest_cid.into()).unwrap_or(GuestCid::FIRST),
                None => GuestCid::FIRST,
            },
            track_dirty_pages: self.machine.track_dirty_pages,
            note: self.note(),
            ..Config::new(payload, self.machine.mem_size_mib)
        })
    }

    /// The file that takes the place of standard output in the machine's process.
    pub fn console_path(&self) -> Option<&Path> {
        self.serial.as_ref()?.serial_out_path.as_deref()
    }

    /// The user's part of the kernel command line, with the root device in Linux's words, as Firecracker adds it.
    fn command_line(&self) -> String {
        let Some(boot) = &self.boot else { return String::new() };
        let mut line = boot.boot_args.clone().unwrap_or_else(|| DEFAULT_BOOT_ARGS.into());
        if let Some(root) = self.drives.iter().find(|drive| drive.is_root_device) {
            let access = if root.is_read_only.unwrap_or(false) { "ro" } else { "rw" };
            let device = match &root.partuuid {
                Some(partuuid) => format!("PARTUUID={partuuid}"),
                None => "/dev/vda".into(),
            };
            let root = format!("root={device} {access}");
            // What follows `--` is for the first process.
            line = match line.split_once(" -- ") {
                Some((kernel, process)) => format!("{kernel} {root} -- {process}"),
                None => format!("{line} {root}").trim_start().into(),
            };
        }
        line
    }
}

/// `GET /machine-config`.
pub fn machine_to_json(machine: &MachineConfig) -> Value {
    let mut value = without_nulls(json!(machine));
    value["huge_pages"] = json!("None");
    value
}

/// An object without the fields that are null, for those that Firecracker leaves out.
fn without_nulls(mut value: Value) -> Value {
    if let Value::Object(fields) = &mut value {
        fields.retain(|_, field| !field.is_null());
    }
    value
}

#[cfg(test)]
mod tests;
