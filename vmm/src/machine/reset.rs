//! The reset in place: how a machine that has lived becomes one that has not.

use std::time::Instant;

use agent_protocol::Cause;

use super::pmu::VcpuPmu;
use super::{Devices, Event, Machine, MachineError};
use crate::boot;
use crate::bus::lock;
use crate::device::virtio::audit::DmaAudit;
use crate::device::vsock::{EVENT_QUEUE, TRANSPORT_RESET};
use crate::fault::{Fault, Faults};
use crate::layout;

impl Machine {
    /// Resets the machine and lets it run its next life. The order is the content: each step relies on those before it.
    ///
    /// # Errors
    /// [`MachineError`] if a step fails. The machine is then half of either life and must be dropped.
    pub(super) fn reset(&mut self, cause: Cause, at: Instant) -> Result<(), MachineError> {
        // 1. Nobody runs guest code, no exit waits to be completed over restored registers, and no write that KVM kept waits
        //    for an answer: a vCPU gives those before it parks.
        self.park_vcpus();
        self.forget_vcpu_stops();
        // 2. Devices forget the driver: connections die, queues and their requests in RAM are let go.
        let stale_event = self.config.faults.has(Fault::EventBuffersStale);
        let stale_event = stale_event
            .then(|| lock(&self.devices.virtio.vsock).oldest_request(EVENT_QUEUE))
            .flatten();
        self.devices.reset(&self.config.faults);
        // 3. Each vCPU is what it was at power-on; the PV registers go first, so KVM stops writing into RAM.
        let tsc = self.vcpus[0].0.vcpu().zero_tsc()?;
        if self.config.faults.has(Fault::NmiQueued) {
            // An NMI into a guest without an interrupt table would be a triple fault, which names no cause.
            self.vcpus[0].0.vcpu().queue_nmi_behind_another()?;
        }
        for (thread, power_on) in &self.vcpus {
            thread.vcpu().reset(power_on, tsc)?;
            // Counters of the monitor's own are registers too, and their timer may not ring in another life.
            thread.pmu().map(VcpuPmu::reset).transpose()?;
        }
        self.vm.set_clock_ns(0)?;
        // 4. With nobody left to write to it, RAM is the template again.
        if let Some(boot) = self.boot.take() {
            // The machine went on from a snapshot: that is gone, and the boot image takes its place.
            self.memory.replace(boot)?;
            self.dismiss_page_server();
        } else if self.config.faults.has(Fault::RamKept) {
            self.memory.restore_below(layout::AGENT_END)?;
        } else {
            self.memory.restore()?;
        }
        if let Some(event) = stale_event {
            event.complete(self.memory.ram(), &TRANSPORT_RESET);
        }
        // 5. A new life, which may know its number and its cause.
        self.begin_life(cause);
        if self.config.payload.has_agent() {
            let text = self.config.command_line(self.life, cause);
            boot::write_command_line(self.memory.ram(), &text)?;
        }
        if self.config.payload.is_unikernel() {
            boot::write_generation(self.memory.ram())?;
        }
        self.go_on();
        self.tell_of_life(cause, at);
        Ok(())
    }

    /// Counts a life that the guest has begun by itself.
    pub(super) fn note_life(&mut self, cause: Cause, at: Instant) {
        self.begin_life(cause);
        self.tell_of_life(cause, at);
    }

    /// What is counted for each life begins anew. Before the guest runs: what it does then is the new life's.
    fn begin_life(&mut self, cause: Cause) {
        self.life += 1;
        self.cause = cause;
        self.rested = false;
        self.devices.audit.iter().for_each(DmaAudit::begin_life);
    }

    fn tell_of_life(&self, cause: Cause, at: Instant) {
        // The listener may want to connect while the guest boots. If it has gone, the machine is about to be stopped.
        self.events.send(Event::Reset { life: self.life, cause, at });
    }

    /// Nobody misses a page server from here on.
    pub(super) fn dismiss_page_server(&mut self) {
        if let Some(pages) = self.pages.take() {
            pages.dismiss();
        }
    }

    /// Stops all vCPUs: asks all, then waits for each.
    pub(super) fn park_vcpus(&self) {
        self.vcpus.iter().for_each(|(thread, _)| thread.request_park());
        self.vcpus.iter().for_each(|(thread, _)| thread.wait_parked());
    }

    /// Lets all vCPUs run, unless somebody has paused the machine.
    pub(super) fn go_on(&self) {
        if self.paused.is_none() {
            self.run_vcpus();
        }
    }

    /// Lets all vCPUs run.
    pub(super) fn run_vcpus(&self) {
        self.vcpus.iter().for_each(|(thread, _)| thread.run());
    }
}

impl Devices {
    /// Every device back to its power-on state; interrupts last, so that none of theirs is left.
    fn reset(&self, faults: &Faults) {
        let vsock = || lock(&self.virtio.vsock);
        let kept = faults.has(Fault::VsockKept).then(|| vsock().device.take_connections());
        self.virtio.all.iter().for_each(|device| lock(device).reset());
        if let Some(connections) = kept {
            vsock().device.put_back_connections(connections);
        }
        lock(&self.console).reset();
        lock(&self.nmi_status).reset();
        *lock(&self.reset_control) = Default::default();
        if !faults.has(Fault::IoapicKept) {
            self.ioapic.reset();
        }
    }
}
