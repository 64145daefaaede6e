//! A reset at its moment: what the machine is made busy with, the reset, and which events have to come of it.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use agent_protocol::{AGENT_PORT, Cause, GuestReset, Pattern, Request, Transfer, frame};

use super::{Beginning, Leader, ResidueCheck, Trouble};
use crate::agent::{Agent, AgentError};
use crate::device::vsock::{Acceptance, GuestPort, HostPort};
use crate::machine::{Event, NmiVia};
use crate::schedule::{Moment, Step};
use crate::verify::FailureKind;

/// Connections that the guest has not accepted when its reset comes.
const OPEN_CONNECTIONS: usize = 4;

/// The host's port for connections of the guest.
const EXPECTED_PORT: HostPort = HostPort(6006);

/// More than passes until the reset comes.
const TRANSFERRED_BYTES: u64 = 1 << 30;
/// Bytes of each message.
const MESSAGE: usize = 64 * 1024;
/// Bytes that are written for the guest at most; it takes some while they are written.
const MOST_WRITTEN: u64 = 1024 * 1024;

impl Leader<'_> {
    /// Resets the machine and says how the next life began.
    pub(super) fn reset(&mut self, mut agent: Agent, step: Step) -> Result<Beginning, Trouble> {
        let Step { cause, moment, delay } = step;
        self.trace.note(|| format!("next: {cause} {moment}, after {} us", delay.as_micros()));
        let mut busy = self.make_busy(&mut agent, moment)?;
        // Registers that the agent needs are poisoned last of all: it does nothing more then. In the middle of a transfer it has
        // to be at work.
        self.left = false;
        if self.plan.residue == ResidueCheck::Poison
            && guest_reset(cause).is_none()
            && moment != Moment::MidTransfer
        {
            self.hold(&mut agent)?;
            self.trace.note(|| "the agent rests".into());
            self.left = true;
        }
        if moment == Moment::MidConnect {
            for _ in 0..OPEN_CONNECTIONS {
                busy.push(self.connect()?);
            }
            self.trace.note(|| format!("{OPEN_CONNECTIONS} connections asked for"));
        }
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
        if cause == Cause::Kexec {
            // The machine knows nothing of it but that its devices are begun with anew.
            let at = Instant::now();
            agent.await_end().map_err(|error| self.explain(error, FailureKind::NoReset))?;
            self.machine.note_new_life(cause, at);
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
                Some(Event::Reset { cause, .. }) if cause == first.seen_by_machine() => {
                    first_came = true;
                }
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

    /// Makes the guest busy. What is returned has to stay open until it is reset.
    fn make_busy(&mut self, agent: &mut Agent, moment: Moment) -> Result<Vec<UnixStream>, Trouble> {
        match moment {
            Moment::Quiet | Moment::NmiPending | Moment::TwoCauses | Moment::MidBoot => {
                Ok(Vec::new())
            }
            Moment::MidTransfer => self.begin_transfers(agent),
            Moment::MidConnect => self.have_guest_connect(),
        }
    }

    /// Bytes both ways, on a connection of the host's and on one of the guest's.
    fn begin_transfers(&mut self, agent: &mut Agent) -> Result<Vec<UnixStream>, Trouble> {
        let of_host = self.connect()?;
        let of_guest = self.expect(Acceptance::AtOnce)?;
        let connected = agent.connect(EXPECTED_PORT.0, self.plan.timeout);
        if let Err(error) = connected.map_err(|e| self.explain(e, FailureKind::NoReset))? {
            let words = format!("the guest could not connect to the host: {error:?}");
            return Err(self.failure(FailureKind::NoReset, words));
        }
        let streams = (0..).zip([of_host, of_guest]).map(|(number, stream)| {
            let transfer = Transfer {
                to_host: TRANSFERRED_BYTES,
                message: MESSAGE as u32,
                to_guest: TRANSFERRED_BYTES,
                seed: number,
            };
            let timeout = self.plan.timeout;
            let begun = Agent::greet(stream, timeout).and_then(|agent| {
                let mut stream = agent.transfer(transfer)?;
                let written = write_some(&mut stream, Pattern::to_guest(transfer.seed));
                await_some(&mut stream, timeout)?;
                self.trace.note(|| format!("{written} bytes were written, and the guest's come"));
                Ok(stream)
            });
            begun.map_err(|error| self.explain(error, FailureKind::NoReset))
        });
        streams.collect()
    }

    /// Has the guest ask for a connection that the host never accepts.
    fn have_guest_connect(&mut self) -> Result<Vec<UnixStream>, Trouble> {
        let never_accepted = self.expect(Acceptance::Never)?;
        let mut asking = self.connect()?;
        let timeout_ms = u32::try_from(self.plan.timeout.as_millis()).unwrap_or(u32::MAX);
        self.write(&mut asking, &Request::Connect { host_port: EXPECTED_PORT.0, timeout_ms });
        self.trace.note(|| "the guest is to ask for a connection".into());
        Ok(vec![never_accepted, asking])
    }

    /// A connection to the agent, which has not accepted it yet.
    fn connect(&self) -> Result<UnixStream, Trouble> {
        // The device of a machine that has stopped refuses.
        let stream = self.machine.connect(GuestPort(AGENT_PORT));
        stream.map_err(|_| self.explain(AgentError::Closed, FailureKind::NoReset))
    }

    /// The guest's next connection to [`EXPECTED_PORT`].
    fn expect(&self, acceptance: Acceptance) -> Result<UnixStream, Trouble> {
        let stream = self.machine.expect(EXPECTED_PORT, acceptance);
        stream.map_err(|_| self.explain(AgentError::Closed, FailureKind::NoReset))
    }

    /// Writes a request that fits into the socket, so this does not wait for the guest; if it hangs up, the events say why.
    fn write(&mut self, stream: &mut UnixStream, request: &Request) {
        let bytes = frame::encode(request).unwrap_or_default();
        let _ = stream.set_write_timeout(Some(self.plan.timeout));
        let written = stream.write_all(&bytes);
        if written.is_err() {
            self.trace.note(|| format!("{request:?}: {written:?}"));
        }
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
                Some(Event::Reset { life, cause, at }) if cause == last.seen_by_machine() => {
                    return Ok(Beginning { life, cause: last, moment: Some(moment), at });
                }
                Some(Event::Reset { cause, .. })
                    if cause == first.seen_by_machine() && first_may_come =>
                {
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

/// Writes what the stream takes without waiting, up to [`MOST_WRITTEN`], and returns how much that is.
fn write_some(stream: &mut UnixStream, mut pattern: Pattern) -> u64 {
    let mut message = vec![0; MESSAGE];
    let mut written = 0;
    // It fails only if the descriptor is bad; then the writes below do as well.
    let _ = stream.set_nonblocking(true);
    while written < MOST_WRITTEN {
        pattern.fill(&mut message);
        match stream.write(&message) {
            Ok(len) => written += len as u64,
            Err(_) => break,
        }
        if pattern.position() != written {
            break;
        }
    }
    written
}

/// Waits for bytes.
fn await_some(stream: &mut UnixStream, timeout: Duration) -> Result<(), AgentError> {
    stream.set_nonblocking(false).map_err(AgentError::Io)?;
    stream.set_read_timeout(Some(timeout)).map_err(AgentError::Io)?;
    match stream.read(&mut [0; 64]) {
        Ok(1..) => Ok(()),
        Err(error) if error.kind() == ErrorKind::WouldBlock => Err(AgentError::Timeout(timeout)),
        Ok(0) | Err(_) => Err(AgentError::Closed),
    }
}

fn guest_reset(cause: Cause) -> Option<GuestReset> {
    match cause {
        Cause::PowerOn | Cause::Host => None,
        Cause::I8042 => Some(GuestReset::I8042),
        Cause::Cf9 => Some(GuestReset::Cf9),
        Cause::Acpi => Some(GuestReset::Acpi),
        Cause::Triple => Some(GuestReset::Triple),
        Cause::Sysrq => Some(GuestReset::Sysrq),
        Cause::Panic => Some(GuestReset::Panic),
        Cause::Kexec => Some(GuestReset::Kexec),
    }
}
