//! What a machine needs of the host, opened by name before the process is confined. Afterwards nothing has a name.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use crate::boot::Image;
use crate::device::block::Disk;
use crate::device::vsock::{Listener, SocketFile};
use crate::kvm::cpuid::{self, Supported};
use crate::kvm::host::Module;
use crate::kvm::{self, Kvm};
use crate::layout::Entry;
use crate::memory::Template;
use crate::memory::paging::PageSource;
use crate::snapshot::{self, Targets};

use super::{Config, MachineError, RamSource, Restore};

/// Open descriptors and what was read from the kernel's files.
#[derive(Debug)]
pub struct Resources {
    pub(super) kvm: Kvm,
    pub(super) module: Module,
    pub(super) origin: Origin,
    pub(super) listener: Option<Listener>,
    pub(super) disks: Vec<Disk>,
    /// What its KVM can give, if it was asked before.
    pub(super) supported: Option<Supported>,
    /// RAM of the snapshot that the machine is restored from.
    pub(super) snapshot: Option<SnapshotRam>,
    targets: Option<Targets>,
}

/// RAM as a snapshot has it.
#[derive(Debug)]
pub(super) enum SnapshotRam {
    /// Copied from its files.
    Template(Template),
    /// With whoever serves it.
    Server(PageSource),
}

/// What guest RAM is made of.
#[derive(Debug)]
pub(super) enum Origin {
    /// Of this.
    Image(Image),
    /// It was made before, and is entered there.
    Template(Template, Entry),
}

impl Resources {
    /// Opens what `config` names. The second value has the files of the vsock sockets: whoever keeps it removes them in the
    /// end.
    ///
    /// # Errors
    /// [`MachineError`] with the name of what cannot be opened.
    pub fn open(config: &Config) -> Result<(Self, Vec<SocketFile>), MachineError> {
        let kvm = kvm::open()?;
        let origin = Origin::Image(config.payload.open()?);
        config.check_disks()?;
        let disks = config.disks.iter().map(Disk::open).collect::<Result<_, _>>()?;
        let mut files = Vec::new();
        let mut listener = None;
        if let Some(path) = &config.vsock_path {
            let (mut streams, file) = Listener::bind(path)?;
            files.push(file);
            if let Some(path) = &config.vsock_messages_path {
                files.push(streams.bind_messages(path)?);
            }
            listener = Some(streams);
        }
        let snapshot = config.restore.as_ref().map(snapshot_ram).transpose()?;
        let module = Module::read();
        let (targets, supported) = (None, None);
        let opened = Self { kvm, module, origin, listener, disks, snapshot, targets, supported };
        Ok((opened, files))
    }

    /// Makes the template of guest RAM now, for all processes that are copies of this one: they share its pages. Asks KVM what it can
    /// give as well, which takes a third of a millisecond where the host is a guest itself.
    ///
    /// # Errors
    /// As for [`super::launch`].
    pub fn prepared(mut self, config: &Config) -> Result<Self, MachineError> {
        if let Origin::Image(image) = self.origin {
            let vcpus = config.checked_vcpus(&self.kvm)?;
            config.check_command_line()?;
            let (template, entry) = super::build::template(config, image, vcpus)?;
            self.origin = Origin::Template(template, entry);
        }
        self.supported = Some(cpuid::supported(&self.kvm, self.module, config.pmu)?);
        Ok(self)
    }

    /// Every descriptor: what a jail has to let through.
    pub fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        let mut descriptors = vec![kvm::descriptor(&self.kvm)];
        match &self.origin {
            Origin::Image(image) => descriptors.extend(image.files()),
            Origin::Template(template, _) => descriptors.push(template.as_fd()),
        }
        let sockets = self.listener.iter().flat_map(Listener::sockets);
        descriptors.extend(sockets.map(|(_, socket)| socket));
        descriptors.extend(self.disks.iter().map(AsFd::as_fd));
        match &self.snapshot {
            Some(SnapshotRam::Template(template)) => descriptors.push(template.as_fd()),
            Some(SnapshotRam::Server(source)) => descriptors.extend(source.descriptors()),
            None => {}
        }
        let targets = self.targets.iter().flat_map(|targets| [&targets.state, &targets.memory]);
        descriptors.extend(targets.map(AsFd::as_fd));
        descriptors
    }

    /// The same with files for a snapshot of the machine.
    #[must_use]
    pub fn with_targets(self, targets: Targets) -> Self {
        Self { targets: Some(targets), ..self }
    }

    /// Takes the files for a snapshot out, if there are any.
    pub fn take_targets(&mut self) -> Option<Targets> {
        self.targets.take()
    }

    /// The same in a process that sees the sockets' directory as `directory`.
    pub fn with_sockets_in(mut self, directory: &Path) -> Self {
        self.listener = self.listener.map(|listener| listener.seen_in(directory));
        self
    }
}

/// The snapshot's RAM: a server's, or checked and copied, so that its files may be changed from here on.
fn snapshot_ram(restore: &Restore) -> Result<SnapshotRam, MachineError> {
    let layers = match &restore.ram {
        RamSource::Files(layers) => layers,
        RamSource::Server(path) => return Ok(SnapshotRam::Server(PageSource::connect(path)?)),
    };
    let open = |(_, path): &(_, PathBuf)| snapshot::open(path);
    let files = layers.iter().map(open).collect::<Result<Vec<_>, _>>()?;
    let layers: Vec<_> = layers.iter().map(|(header, _)| header).zip(&files).collect();
    Ok(SnapshotRam::Template(snapshot::template(&layers)?))
}
