//! A reset at its moment: what the machine is made busy with, the reset, and which events have to come of it.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use agent_protocol::{AGENT_PORT, Cause, GuestReset, Request, frame};

use super::{Beginning, Leader, Trouble};
use crate::agent::{Agent, AgentError};
use crate::device::vsock::GuestPort;
use crate::machine::{Event, NmiVia};
use crate::schedule::{Moment, Step};
use crate::verify::FailureKind;

/// Connections that the guest has not accepted when its reset comes.
const OPEN_CONNECTIONS: usize = 4;

/// Bytes on their way to the guest and back: more than a ring of buffers holds, less than a socket does.
const ECHOED_BYTES: usize = 96 * 1024;

impl Leader<'_> {
    /// Resets the machine and says how the next life began.
    pub(super) fn reset(&mut self, mut agent: Agent, step: Step) -> Result<Beginning, Trouble> {
        let Step { cause, moment, delay } = step;
        self.trace.note(|| format!("next: {cause} {moment}, after {} us", delay.as_micros()));
        // Registers that the agent needs are poisoned last of all: it does nothing more then. In the middle of a transfer it has
        // to be at work.
        self.left = false;
        if self.plan.poison && guest_reset(cause).is_none() && moment != Moment::MidTransfer {
            self.hold(&mut agent)?;
            self.trace.note(|| "the agent rests".into());
            self.left = true;
        }
        let _busy = self.make_busy(moment)?;
        // With two resets the delay is between them.
        let has_two = matches!(moment, Moment::MidBoot | Moment::TwoCauses);
        self.pass(if has_two { Duration::ZERO } else { delay }, moment)?;
        if moment == Moment::NmiPending {
            // Right before the reset, whatever the delay was. Nobody can mask it, as one could the pin.
            self.machine.inject_nmi(NmiVia::Message);
            self.trace.note(|| "NMI sent".into());
        }
        match guest_reset(cause) {
            None => self.machine.reset(),
            Some(kind) => agent.reset(kind).map_err(|e| self.explain(e, FailureKind::NoReset))?,
        }
        self.trace.note(|| format!("reset by {cause} asked for"));
        let beginning = match moment {
            Moment::TwoCauses => self.reset_as_well(cause, delay),
            Moment::MidBoot => {
                self.await_reset(cause, cause, moment)?;
                self.pass(delay, moment)?;
                self.machine.reset();
                self.trace.note(|| "reset by host asked for".into());
                self.await_reset(Cause::Host, Cause::Host, moment)
            }
            _ => self.await_reset(cause, cause, moment),
        }?;
        if !self.left {
            for poisoning in self.poisoned.iter_mut().filter(|poisoning| poisoning.last) {
                poisoning.result =
                    Err("the host reset the machine while the agent was at work".into());
            }
        }
        Ok(beginning)
    }

    /// Has the agent do nothing more, and waits until its registers have their marks.
    fn hold(&self, agent: &mut Agent) -> Result<(), Trouble> {
        agent.hold().map_err(|error| self.explain(error, FailureKind::NoReset))?;
        match self.machine.next_event(self.plan.timeout) {
            Some(Event::Rested) => Ok(()),
            Some(event) => Err(self.unexpected(event)),
            None => {
                let words =
                    format!("the agent did not come to rest within {:?}", self.plan.timeout);
                Err(self.failure(FailureKind::NoReset, words))
            }
        }
    }

    /// Has the host reset the machine too, while a reset by `first` is on its way.
    fn reset_as_well(&mut self, first: Cause, delay: Duration) -> Result<Beginning, Trouble> {
        let moment = Moment::TwoCauses;
        let mut first_came = false;
        if !delay.is_zero() {
            match self.next_event(delay) {
                None => {}
                Some(Event::Reset { cause, .. }) if cause == first => first_came = true,
                Some(event) => return Err(self.unexpected(event)),
            }
        }
        self.machine.reset();
        self.trace.note(|| "reset by host asked for as well".into());
        if first == Cause::Host && !first_came {
            // Both are the host's, and each is carried out.
            self.await_reset(first, first, moment)?;
        }
        let may_come = if first_came { Cause::Host } else { first };
        self.await_reset(may_come, Cause::Host, moment)
    }

    /// Makes the machine busy. What is returned has to stay open until it is reset.
    fn make_busy(&mut self, moment: Moment) -> Result<Vec<UnixStream>, Trouble> {
        let connections = match moment {
            Moment::Quiet | Moment::NmiPending | Moment::TwoCauses | Moment::MidBoot => 0,
            Moment::MidTransfer => 1,
            Moment::MidConnect => OPEN_CONNECTIONS,
        };
        let streams = (0..connections).map(|_| self.machine.connect(GuestPort(AGENT_PORT)));
        let streams: Result<Vec<_>, _> = streams.collect();
        // The device of a machine that has stopped refuses.
        let mut streams =
            streams.map_err(|_| self.explain(AgentError::Closed, FailureKind::NoReset))?;
        if moment == Moment::MidTransfer {
            // All of it fits into the socket, so this does not wait for the guest; if the guest hangs up, the events say why.
            let echo = Request::Echo(vec![0x5a; ECHOED_BYTES]);
            let bytes = frame::encode(&echo).unwrap_or_default();
            let stream = &mut streams[0];
            let _ = stream.set_write_timeout(Some(self.plan.timeout));
            let written = stream.write_all(&bytes);
            self.trace.note(|| format!("{} bytes to echo, {written:?}", bytes.len()));
        } else if connections > 0 {
            self.trace.note(|| format!("{connections} connections asked for"));
        }
        Ok(streams)
    }

    /// Lets time pass, in which nothing may happen.
    fn pass(&mut self, delay: Duration, moment: Moment) -> Result<(), Trouble> {
        match (!delay.is_zero()).then(|| self.machine.next_event(delay)).flatten() {
            None => Ok(()),
            Some(event) => {
                self.trace.note(|| format!("{moment}: {event:?}"));
                Err(self.unexpected(event))
            }
        }
    }

    /// Waits for the reset by `last`. One by `first` may come before it: two were asked for, and the guest was quicker. (If
    /// the host was, there is no guest left to cause the other.)
    fn await_reset(
        &mut self,
        first: Cause,
        last: Cause,
        moment: Moment,
    ) -> Result<Beginning, Trouble> {
        let mut first_may_come = first != last;
        loop {
            match self.next_event(self.plan.timeout) {
                Some(Event::Reset { life, cause, at }) if cause == last => {
                    return Ok(Beginning { life, cause, moment: Some(moment), at });
                }
                Some(Event::Reset { cause, .. }) if cause == first && first_may_come => {
                    first_may_come = false;
                }
                // Its order came before the reset's, so this does too.
                Some(Event::Nmi(_)) if moment == Moment::NmiPending => {}
                Some(event) => return Err(self.unexpected(event)),
                None => {
                    let timeout = self.plan.timeout;
                    let words =
                        format!("no reset within {timeout:?} after one by {last} was asked for");
                    return Err(self.failure(FailureKind::NoReset, words));
                }
            }
        }
    }

    /// What happens next, with a note of it.
    fn next_event(&mut self, timeout: Duration) -> Option<Event> {
        let event = self.machine.next_event(timeout)?;
        match &event {
            Event::Reset { life, cause, .. } => {
                self.trace.note(|| format!("life {life} began, by {cause}"));
                // A guest resets the machine in the last instruction of its poisoned life.
                self.left |= guest_reset(*cause).is_some();
            }
            event => self.trace.note(|| format!("{event:?}")),
        }
        Some(event)
    }
}

fn guest_reset(cause: Cause) -> Option<GuestReset> {
    match cause {
        Cause::PowerOn | Cause::Host => None,
        Cause::I8042 => Some(GuestReset::I8042),
        Cause::Cf9 => Some(GuestReset::Cf9),
        Cause::Acpi => Some(GuestReset::Acpi),
        Cause::Triple => Some(GuestReset::Triple),
    }
}
