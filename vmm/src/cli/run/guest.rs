//! Follows a machine without an agent of ours, or one that is kept running, to its end.

use std::time::Duration;

use agent_protocol::Cause;

use crate::cli::Error;
use crate::exit;
use crate::machine::{Event, Handle, Stop};

/// Waits for the end of a guest of the user's and says how it came.
pub(super) fn follow(machine: &Handle) -> Result<u8, Error> {
    let (words, status) = describe(wait(machine))?;
    eprintln!("cleanslate: {words}");
    let offences = machine.guest_stats().offences();
    if !offences.is_empty() {
        eprintln!("cleanslate: the guest broke rules: {}", offences.join(", "));
    }
    Ok(status)
}

/// Keeps the machine running for clients until somebody ends it. Then the verdict's `status` stands, unless the guest
/// ended first.
pub(super) fn hold(machine: &Handle, status: u8) -> Result<u8, Error> {
    eprintln!("cleanslate: the machine keeps running; Ctrl-C ends it");
    match wait(machine) {
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
            Some(Event::Nmi(_) | Event::Rested) | None => {}
        }
    }
}
