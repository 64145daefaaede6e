//! Nested SVM: what a guest finds in its control block after a VMRUN that fails. The exit code for that is -1 in 64 bits (AMD64
//! Architecture Programmer's Manual volume 2, appendix C); KVM wrote it in 32 and cleared the others.
//!
//! Its sister, upper halves that KVM leaves as they were in other exits that it makes up itself, shows nowhere: processors
//! write all 64 bits in every exit of their own, so that the half it leaves is zero.

use std::time::Duration;

use agent_protocol::{AGENT_PORT, Probe, Probed};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::behaviour::json;
use super::{Judgement, Unseen};
use crate::agent::Agent;
use crate::device::vsock::GuestPort;
use crate::lifecycle::chain;
use crate::machine::Handle;

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Observed {
    /// EXITCODE of the control block before, a mark in both halves.
    before: u64,
    /// The same afterwards.
    after: u64,
}

/// Has the agent of `machine` try it; `timeout` bounds each of its answers.
///
/// # Errors
/// [`Unseen`].
pub fn observe(machine: &Handle, timeout: Duration) -> Result<Value, Unseen> {
    match probe(machine, timeout, Probe::FailedVmrun)? {
        Ok(Probed::FailedVmrun { before, after }) => Ok(json(&Observed { before, after })),
        Ok(other) => Err(Unseen::Here(format!("the agent answered something else: {other:?}"))),
        Err(why) => Err(Unseen::Here(why)),
    }
}

/// Has the agent of `machine` try something on its processor; the inner `Err` is why it cannot.
pub(super) fn probe(
    machine: &Handle,
    timeout: Duration,
    what: Probe,
) -> Result<Result<Probed, String>, Unseen> {
    let stream = machine.connect(GuestPort(AGENT_PORT));
    let stream = stream.map_err(|error| Unseen::here(format!("connect to the agent: {error}")))?;
    Agent::greet(stream, timeout)
        .and_then(|mut agent| agent.probe(what))
        .map_err(|error| Unseen::here(chain(&error)))
}

pub(super) fn judge(observed: &Observed) -> Judgement {
    const FAILED: u32 = u32::MAX;
    let &Observed { before, after } = observed;
    let words = format!("the exit code of a failed VMRUN is {after:#x}");
    match (after as u32, (after >> 32) as u32) {
        (FAILED, FAILED) => Judgement::fixed(words),
        (FAILED, 0) => Judgement::affected(words),
        (FAILED, upper) if upper == (before >> 32) as u32 => {
            Judgement::affected(format!("{words}: its upper half is as it was before"))
        }
        _ => Judgement::cannot_tell(format!("{words}, which is none of a failure")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::{Verdict, check};

    #[test]
    fn both_halves_count() {
        let before = 0x1eaf_1eaf_1eaf_1eaf;
        let judged = |after| judge(&Observed { before, after });
        check(&judged(u64::MAX), Verdict::Fixed, "0xffffffffffffffff");
        check(&judged(0xffff_ffff), Verdict::Affected, "is 0xffffffff");
        check(&judged(0x1eaf_1eaf_ffff_ffff), Verdict::Affected, "as it was before");
        check(&judged(before), Verdict::CannotTell, "none of a failure");
        check(&judged(0x80), Verdict::CannotTell, "none of a failure");
    }
}
