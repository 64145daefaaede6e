//! One machine of a soak and the process that it has now; what the end of a process says of it.

use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::Duration;

use super::line::End;
use super::plan::Plan;
use super::process::Process;
use super::{Place, printable};
use crate::exit;

/// Resets of a machine that has no number of them: years.
const ENDLESS: u32 = u32::MAX - 1;

/// The finding of a process that failed: the host's doing, or it printed nonsense.
pub(super) const FAILED: &str = "vm-failed";

/// One machine.
pub(super) struct Slot {
    pub place: Place,
    pub running: Option<Process>,
    /// Lives that this process told of, and the last one's number.
    pub lives: u32,
    pub last_life: u32,
    /// How often it said anything.
    pub said: u32,
    /// Resets left to it and those after it.
    pub resets: u32,
    /// How long it has said nothing.
    pub silent: Duration,
    /// What it said of its end.
    pub end: Option<(End, String)>,
    pub verdict: bool,
    /// It was told to end, or killed.
    pub asked: bool,
    pub killed: bool,
}

impl Slot {
    /// Machine `vm`, with no process yet.
    pub fn new(plan: &Plan, vm: u32) -> Self {
        Self {
            place: Place { seed: plan.seed, vm, process: 0 },
            running: None,
            lives: 0,
            last_life: 0,
            said: 0,
            resets: plan.resets.unwrap_or(ENDLESS),
            silent: Duration::ZERO,
            end: None,
            verdict: false,
            asked: false,
            killed: false,
        }
    }

    /// The same machine with another process to come, if there is anything left for it to do. One that does not get
    /// anywhere is not tried again.
    pub fn next(&self, plan: &Plan) -> Option<Self> {
        let done = self.lives.saturating_sub(1);
        let resets = self.resets.saturating_sub(done);
        let place = Place { process: self.place.process + 1, ..self.place };
        (done > 0 && resets > 0).then(|| Self { place, resets, ..Self::new(plan, place.vm) })
    }

    /// What is wrong with the end of its process, as a finding.
    pub fn judge_end(
        &self,
        status: ExitStatus,
        errors: &[String],
    ) -> Option<(&'static str, String)> {
        if self.killed {
            return None;
        }
        if let Some((end, detail)) = &self.end {
            let name = match end {
                End::OutOfMemory => "vm-out-of-memory",
                End::Killed => "vm-killed",
                End::ForbiddenCall => "vm-forbidden-call",
                End::Failed => FAILED,
            };
            return Some((name, printable(detail)));
        }
        match (status.signal(), status.code().map(|code| code as u8)) {
            // So early that it did not catch the signal yet.
            (Some(libc::SIGTERM), _) | (_, Some(exit::INTERRUPTED)) if self.asked => None,
            (Some(signal), _) => {
                Some(("vm-killed", format!("its process was killed by signal {signal}")))
            }
            (_, Some(exit::CLEAN | exit::FINDINGS)) if self.verdict => None,
            (_, Some(exit::INTERRUPTED)) => {
                Some(("vm-killed", "its process was told to end by somebody else".into()))
            }
            (_, code) => {
                let words = errors.last().map_or("and said nothing", String::as_str);
                let words = words.strip_prefix("cleanslate: ").unwrap_or(words);
                match code {
                    Some(exit::USAGE_OR_HOST) => Some((FAILED, words.into())),
                    code => {
                        let code = code.unwrap_or_default();
                        Some((FAILED, format!("its process ended with status {code}: {words}")))
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end(change: impl FnOnce(&mut Slot), wait_status: i32) -> Option<&'static str> {
        let mut slot = Slot::new(&Plan::example(), 1);
        change(&mut slot);
        slot.judge_end(ExitStatus::from_raw(wait_status), &[]).map(|(name, _)| name)
    }

    /// A wait status as the kernel gives it for an exit.
    fn exited(code: u8) -> i32 {
        i32::from(code) << 8
    }

    #[test]
    fn an_end_is_a_finding_unless_it_was_wanted_or_comes_with_a_verdict() {
        let verdict = |slot: &mut Slot| slot.verdict = true;
        let asked = |slot: &mut Slot| slot.asked = true;
        let killed = |slot: &mut Slot| slot.killed = true;
        let said = |how| move |slot: &mut Slot| slot.end = Some((how, String::new()));
        assert_eq!(end(verdict, exited(0)), None);
        assert_eq!(end(verdict, exited(1)), None);
        assert_eq!(end(|_| {}, exited(0)), Some("vm-failed"));
        assert_eq!(end(|_| {}, exited(2)), Some("vm-failed"));
        assert_eq!(end(|_| {}, exited(130)), Some("vm-killed"));
        assert_eq!(end(asked, exited(130)), None);
        assert_eq!(end(asked, 15), None);
        assert_eq!(end(asked, 9), Some("vm-killed"));
        assert_eq!(end(|_| {}, 15), Some("vm-killed"));
        assert_eq!(end(killed, 9), None);
        assert_eq!(end(said(End::OutOfMemory), exited(2)), Some("vm-out-of-memory"));
        assert_eq!(end(said(End::Killed), exited(2)), Some("vm-killed"));
        assert_eq!(end(said(End::ForbiddenCall), exited(2)), Some("vm-forbidden-call"));
        assert_eq!(end(said(End::Failed), exited(2)), Some("vm-failed"));
    }

    #[test]
    fn another_process_does_what_is_left_if_the_one_before_got_anywhere() {
        let next = |lives| {
            let slot = Slot { lives, ..Slot::new(&Plan::example(), 3) };
            slot.next(&Plan::example()).map(|slot| (slot.place.process, slot.resets, slot.lives))
        };
        assert_eq!(next(0), None);
        assert_eq!(next(1), None, "a life is no reset");
        assert_eq!(next(2), Some((1, 9, 0)));
        assert_eq!(next(10), Some((1, 1, 0)));
        assert_eq!(next(11), None);
    }
}
