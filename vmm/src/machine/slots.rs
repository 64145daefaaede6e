//! Puts virtio devices into their places: registers on the memory bus, notifications into the event loop, interrupts to the
//! I/O APIC.

use std::sync::{Arc, Mutex};

use super::build::eventfd;
use super::event_loop::{EventLoop, VirtioEvents};
use super::{AnyVirtioDevice, MachineError};
use crate::bus::{Bus, Shared};
use crate::device::ioapic::{IoApic, Pin};
use crate::device::virtio::VirtioDevice;
use crate::device::virtio::audit::DmaAudit;
use crate::device::virtio::mmio::{Mmio, QUEUE_NOTIFY};
use crate::kvm::vm::Vm;
use crate::layout::{VIRTIO_MMIO_SIZE, VirtioSlot};
use crate::memory::GuestRam;

/// The places of a machine that is being built.
pub(super) struct Slots<'m, I> {
    /// Those that are free, and those that the guest is told of: the same.
    pub free: I,
    pub vm: &'m Vm,
    pub ram: &'m GuestRam,
    pub ioapic: &'m Arc<IoApic>,
    pub mmio: &'m mut Bus,
    pub event_loop: &'m mut EventLoop,
    pub dma_platform: bool,
    /// Whoever looks at the buffers of all of them.
    pub audit: Option<&'m DmaAudit>,
    /// What has its place.
    pub filled: Vec<AnyVirtioDevice>,
}

impl<I: Iterator<Item = VirtioSlot>> Slots<'_, I> {
    /// Puts `device` into the next slot.
    ///
    /// # Errors
    /// [`MachineError::Host`], [`MachineError::Kvm`].
    pub fn add<D: VirtioDevice + 'static>(
        &mut self,
        device: D,
    ) -> Result<Shared<Mmio<D>>, MachineError> {
        let slot = self.free.next().expect("the configuration has counted its devices");
        let backend = device.backend_fd();
        let queues =
            device.queue_max_sizes().iter().map(|_| eventfd()).collect::<Result<Vec<_>, _>>()?;
        for (index, fd) in (0..).zip(&queues) {
            self.vm.notify_on_write(slot.base + QUEUE_NOTIFY, index, fd)?;
        }
        let pin = Pin::new(self.ioapic, slot.pin);
        let mmio = Mmio::new(device, self.ram.clone(), pin, self.dma_platform);
        let audit = self.audit.map(|audit| audit.add_device(mmio.device.device_id()));
        let mmio = mmio.with_audit(audit);
        let device = Arc::new(Mutex::new(mmio));
        self.mmio.insert(slot.base, VIRTIO_MMIO_SIZE, device.clone());
        self.event_loop.add_device(VirtioEvents { device: device.clone(), queues, backend });
        self.filled.push(device.clone());
        Ok(device)
    }
}
