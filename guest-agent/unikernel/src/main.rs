//! Cleanslate's guest agent: a kernel of a few hundred lines in ring 0 (`arch`) and, in ring 3, an agent that tells the
//! host over vsock what it found of its machine.
//!
//! `unsafe` is confined to `arch` (the processor) and `dma` (memory that devices write).

#![no_std]
#![no_main]
#![deny(unsafe_code)]

extern crate alloc;

#[allow(unsafe_code)]
mod arch;
#[cfg(feature = "attacks")]
mod attacker;
#[allow(unsafe_code)]
mod dma;
mod guest;
mod io_apic;
mod machine_state;
mod serial;
mod virtio;

use core::fmt::Write;

use agent::json;
use agent::kernel_log::Level;
use agent::params::Params;
use agent::vsock::{Answer, Connections};
use alloc::format;

use arch::mmio::Registers;
use arch::{heap, pvh, tsc};
use guest::Agent;
use serial::Serial;
use virtio::VsockDevice;

/// Where ring 3 begins (tables.s).
extern "C" fn agent_start() -> ! {
    let agent_entered = tsc::init();
    heap::init();
    let cmdline = pvh::cmdline();
    let params = Params::parse(&cmdline);
    let serial_report = params.serial_report;
    machine_state::end_service();
    let mut agent = Agent::new(cmdline, params.clone(), agent_entered);
    if serial_report {
        report_on_serial(&mut agent);
    }
    match start_vsock(&params, &mut agent) {
        Some(device) => serve(device, agent),
        // Nobody can be told but whoever reads the console.
        None => report_on_serial(&mut agent),
    }
}

// Not inlined, as those below: together their frames would spread the stack over pages that are never used.
/// The first vsock device of the command line, running.
#[inline(never)]
fn start_vsock(params: &Params, agent: &mut Agent) -> Option<VsockDevice> {
    let devices = params
        .devices()
        .filter_map(|device| Some((Registers::at(device.base, device.size)?, device.irq)));
    match VsockDevice::start(devices) {
        Ok(device) => {
            if let Some(device) = &device {
                agent.set_ready();
                agent.note_cid(device.guest_cid());
            }
            #[cfg(feature = "attacks")]
            let device = device.map(|device| device.with_noise(params));
            device
        }
        Err(error) => {
            agent.log(Level::Error, format!("virtio_vsock: probe failed: {error}"));
            None
        }
    }
}

/// The agent's life. Each round takes what has come in, carries it out, and sends what comes of it.
#[inline(never)]
fn serve(mut device: VsockDevice, mut agent: Agent) -> ! {
    let mut connections = Connections::new(device.guest_cid(), agent.life());
    loop {
        let round = device.receive(&mut connections, &mut agent).and_then(|()| {
            connections.expire(&agent);
            let sent = device.send(&mut connections, &mut agent)?;
            if connections.exist() {
                agent.finish_boot();
            }
            Ok(sent)
        });
        match round {
            Err(_) => {
                agent.log(Level::Error, "virtio_vsock: the device broke a ring".into());
                report_on_serial(&mut agent);
            }
            // What leaves makes room for what comes next, and nobody would wake us for what is here already.
            Ok(true) => {}
            Ok(false) if agent.must_hold() && connections.are_quiet() => agent.hold(),
            Ok(false) => {
                let deadline = connections.next_deadline().filter(|_| agent.may_use_timer());
                device.wait(deadline.map(|at| at.saturating_sub(agent.now_us())));
            }
        }
    }
}

/// Prints the report as one line of JSON and ends.
#[inline(never)]
fn report_on_serial(agent: &mut Agent) -> ! {
    let line = json::line(&agent.report());
    // The port takes everything.
    let _ = writeln!(Serial::new(), "{line}");
    agent.power_off()
}
