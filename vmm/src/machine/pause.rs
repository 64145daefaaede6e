//! A machine that stands still: how it comes to that, what can be done with it then, and how it goes on.

use std::time::Instant;

use super::{CaptureError, Event, Machine, SnapshotKind};
use crate::bus::lock;
use crate::kvm::KvmError;
use crate::snapshot::{self, Pages, Summary, Targets};

impl Machine {
    /// Parks the vCPUs. What a guest has asked for before is in the messages that come next. Devices stand still because the event
    /// loop serves none before [`Machine::resume`].
    pub(super) fn pause(&mut self) -> Result<(), KvmError> {
        if self.paused.is_none() {
            self.park_vcpus();
            self.vcpus
                .iter()
                .filter_map(|(thread, _)| thread.pmu())
                .try_for_each(|pmu| pmu.stop())?;
            self.paused = Some(Instant::now());
        }
        self.events.send(Event::Paused);
        Ok(())
    }

    /// Goes on. Nobody's patience has run out meanwhile.
    pub(super) fn resume(&mut self) -> Result<(), KvmError> {
        if let Some(since) = self.paused.take() {
            lock(&self.devices.virtio.vsock).device.prolong(since.elapsed());
            for (thread, _) in &self.vcpus {
                thread.vcpu().note_pause();
                thread.pmu().map(|pmu| pmu.go_on()).transpose()?;
            }
            self.run_vcpus();
        }
        self.events.send(Event::Resumed);
        Ok(())
    }

    /// Writes what the machine is. It is as it was afterwards, whether that succeeds or not.
    pub(super) fn snapshot(
        &mut self,
        targets: &Targets,
        kind: SnapshotKind,
    ) -> Result<Summary, CaptureError> {
        if self.paused.is_none() {
            return Err(CaptureError::NotPaused);
        }
        // Devices write to RAM for the last time.
        let state = self.capture()?;
        let dirty = self.vm.take_dirty(&self.memory)?;
        // From here on nobody knows what was written since that one.
        let parent = self.parent.take();
        let pages = match (kind, &dirty, parent) {
            (SnapshotKind::Full, ..) => Pages::All,
            (SnapshotKind::Layer, None, _) => return Err(CaptureError::NotTracked),
            (SnapshotKind::Layer, _, None) => return Err(CaptureError::NoParent),
            (SnapshotKind::Layer, Some(dirty), Some(parent)) => Pages::Since { parent, dirty },
        };
        let host = self.identity.clone();
        let summary = snapshot::write(targets, host, &state, self.memory.ram(), pages)?;
        self.parent = dirty.map(|_| summary.header.id);
        Ok(summary)
    }
}
