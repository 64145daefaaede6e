//! Follows a machine without an agent of ours, or one that is kept running, to its end.

use std::time::Duration;

use agent_protocol::Cause;

use super::lines;
use crate::cli::Error;
use crate::device::virtio::audit::{AuditMode, AuditSummary, DmaAudit};
use crate::exit;
use crate::machine::{Event, Handle, Stop};
use crate::verify::DMA_AUDIT;

/// Waits for the end of a guest of the user's and says how it came, and what the DMA audit found.
pub(super) fn follow(machine: &Handle, mode: AuditMode) -> Result<u8, Error> {
    let stop = wait(machine);
    let audit = machine.dma_audit().map(DmaAudit::summary);
    let (words, status) = describe(stop)?;
    eprintln!("cleanslate: {words}");
    let offences = machine.guest_stats().offences();
    if !offences.is_empty() {
        eprintln!("cleanslate: the guest broke rules: {}", offences.join(", "));
    }
    let is_clean = audit.is_none_or(|audit| tell_audit(&audit, mode));
    // A guest that came to a worse end has its own status.
    Ok(if status == exit::CLEAN && !is_clean { exit::FINDINGS } else { status })
}

/// Says what the DMA audit found. True if nothing of it is a finding.
fn tell_audit(audit: &AuditSummary, mode: AuditMode) -> bool {
    eprintln!("cleanslate: {audit}");
    for violation in &audit.violations {
        let word = if mode.forbids(violation.level) { DMA_AUDIT } else { "seen by the DMA audit" };
        eprintln!("cleanslate: {word}: {violation}");
    }
    audit.not_findings(mode).count() == audit.violations.len()
}

/// Keeps the machine running for clients until somebody ends it. Then the verdict's `status` stands, unless the guest
/// ended first, or the DMA audit has found something meanwhile. In `lines`, what was seen becomes one.
pub(in crate::cli) fn hold(
    machine: &Handle,
    mode: AuditMode,
    status: u8,
    lines: bool,
) -> Result<u8, Error> {
    if !lines {
        eprintln!("cleanslate: the machine keeps running; Ctrl-C ends it");
    }
    let stop = wait(machine);
    let audit = machine.dma_audit().map(DmaAudit::summary);
    let is_clean = match (&audit, lines) {
        (Some(audit), false) => tell_audit(audit, mode),
        (Some(audit), true) => audit.not_findings(mode).count() == audit.violations.len(),
        (None, _) => true,
    };
    if lines {
        lines::held(machine, audit);
    }
    match stop {
        Stop::Interrupted if status == exit::CLEAN && !is_clean => Ok(exit::FINDINGS),
        Stop::Interrupted => Ok(status),
        stop => {
            let (words, status) = describe(stop)?;
            eprintln!("cleanslate: {words}");
            Ok(status)
        }
    }
}

/// How a machine ended, in words and as the process's exit status.
fn describe(stop: Stop) -> Result<(String, u8), Error> {
    Ok(match stop {
        Stop::PowerOff => ("the guest turned the machine off".into(), exit::CLEAN),
        Stop::Reset(Cause::Triple) => {
            ("the guest died of a triple fault".into(), exit::GUEST_TRIPLE_FAULT)
        }
        Stop::Reset(cause) => (format!("the guest asked for a reset ({cause})"), exit::GUEST_RESET),
        Stop::Stuck(stuck) => (format!("the guest cannot go on: {stuck}"), exit::GUEST_STUCK),
        Stop::Interrupted => ("interrupted".into(), exit::INTERRUPTED),
        Stop::Requested => ("the machine was stopped".into(), exit::CLEAN),
        Stop::Failed(error) => return Err(error.into()),
    })
}

fn wait(machine: &Handle) -> Stop {
    const FOREVER: Duration = Duration::from_secs(u32::MAX as u64);
    loop {
        match machine.next_event(FOREVER) {
            Some(Event::Stopped(stop)) => return stop,
            Some(Event::Reset { life, cause, .. }) => {
                eprintln!("cleanslate: reset in place ({cause}), life {life}");
            }
            Some(
                Event::Nmi(_) | Event::Rested | Event::Paused | Event::Resumed | Event::Snapshot(_),
            )
            | None => {}
        }
    }
}
