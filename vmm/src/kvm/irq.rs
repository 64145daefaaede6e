//! Interrupts into the guest: an eventfd for each I/O APIC pin (`KVM_IRQFD`) and its route to a local APIC.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1,
    kvm_irq_routing_msi,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::KvmError;
use crate::device::ioapic::{Msi, MsiSink, PINS};

/// Delivers what the I/O APIC's pins send. A route is given to KVM when a pin first fires with it and kept until the pin
/// fires with another one, so a guest that programs the same after a reset costs no request.
#[derive(Debug)]
pub struct IrqRouter {
    vm: Arc<VmFd>,
    lines: Mutex<Lines>,
}

#[derive(Debug, Default)]
struct Lines {
    routes: [Option<Msi>; PINS],
    /// Made when a pin first fires; most pins never do.
    fds: [Option<EventFd>; PINS],
}

impl IrqRouter {
    /// A router without routes.
    pub fn new(vm: Arc<VmFd>) -> Self {
        Self { vm, lines: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Lines> {
        // A panic elsewhere cannot leave the arrays half-written.
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_route(&self, lines: &mut Lines, pin: usize, msi: Msi) -> Result<(), KvmError> {
        if lines.routes[pin] != Some(msi) {
            let mut routes = lines.routes;
            routes[pin] = Some(msi);
            let entries: Vec<_> = routes.iter().enumerate().filter_map(route).collect();
            let table = KvmIrqRouting::from_entries(&entries)
                .map_err(|_| KvmError::Capability("room for one route a pin"))?;
            self.vm.set_gsi_routing(&table).map_err(KvmError::request("set interrupt routes"))?;
            lines.routes = routes;
        }
        Ok(())
    }

    fn deliver(&self, pin: usize, msi: Msi) -> Result<(), KvmError> {
        let mut lines = self.lock();
        self.set_route(&mut lines, pin, msi)?;
        if lines.fds[pin].is_none() {
            let fd = EventFd::new(EFD_NONBLOCK)
                .map_err(|source| KvmError::Request { action: "create an eventfd", source })?;
            self.vm
                .register_irqfd(&fd, pin as u32)
                .map_err(KvmError::request("register an irqfd"))?;
            lines.fds[pin] = Some(fd);
        }
        let Some(fd) = &lines.fds[pin] else { return Ok(()) };
        fd.write(1).map_err(|source| KvmError::Request { action: "signal an irqfd", source })
    }
}

impl MsiSink for IrqRouter {
    fn send(&self, pin: usize, msi: Msi) {
        if let Err(error) = self.deliver(pin, msi) {
            // Lost interrupts make a guest hang; that is worth a word, and nothing else can be done here.
            eprintln!("cleanslate: interrupt on pin {pin} was not delivered: {error}");
        }
    }

    /// KVM tells of ends of interrupts that it has a route for.
    fn await_end(&self, pin: usize, msi: Msi) {
        let mut lines = self.lock();
        if let Err(error) = self.set_route(&mut lines, pin, msi) {
            eprintln!(
                "cleanslate: the end of an interrupt on pin {pin} will not be heard: {error}"
            );
        }
    }
}

fn route((pin, msi): (usize, &Option<Msi>)) -> Option<kvm_irq_routing_entry> {
    let msi = (*msi)?;
    Some(kvm_irq_routing_entry {
        gsi: pin as u32,
        type_: KVM_IRQ_ROUTING_MSI,
        u: kvm_irq_routing_entry__bindgen_ty_1 {
            msi: kvm_irq_routing_msi {
                address_lo: msi.address as u32,
                address_hi: (msi.address >> 32) as u32,
                data: msi.data,
                ..Default::default()
            },
        },
        ..Default::default()
    })
}
