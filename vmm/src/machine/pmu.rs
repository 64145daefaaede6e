//! The emulated counters of one vCPU in their machine: the model, the clock that it counts by, and the timer that gets the
//! vCPU out of guest mode when a counter is due to overflow.

use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

use super::MachineError;
use crate::device::pmu::{GeneralProtection, Pmu, SavedPmu};
use crate::kvm::KvmError;
use crate::kvm::unhalted::{Reading, UnhaltedClock};

/// While a vCPU sleeps with a counter that would be due if it ran, the timer looks again after longer and longer times: from
/// the first to the second of these. Nothing tells when a vCPU wakes up inside KVM.
const SLEEP_CHECKS: [Duration; 2] = [Duration::from_millis(1), Duration::from_secs(1)];

/// The counters of one vCPU. Its thread uses them while it runs, the machine while it is parked.
#[derive(Debug)]
pub(super) struct VcpuPmu {
    /// Readable when the vCPU should be kicked. Disarmed unless a counter runs whose overflow interrupts.
    timer: OwnedFd,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    model: Pmu,
    clock: UnhaltedClock,
    /// What a reset writes.
    reset: Vec<(u32, u64)>,
    /// The tick for which the timer is armed.
    aim: Option<u64>,
    /// When the timer was last armed.
    armed_at: Reading,
    /// How long the timer waits at least.
    patience: Duration,
}

impl VcpuPmu {
    /// `model` counting by `clock`; `reset` are the register writes by which a reset clears it.
    pub fn new(
        model: Pmu,
        clock: UnhaltedClock,
        reset: Vec<(u32, u64)>,
    ) -> Result<Self, MachineError> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let timer = timerfd_create(TimerfdClockId::Monotonic, flags)
            .map_err(|errno| MachineError::host("create a timer")(errno.into()))?;
        let armed_at = Reading::default();
        let state = State { model, clock, reset, aim: None, armed_at, patience: Duration::ZERO };
        Ok(Self { timer, state: Mutex::new(state) })
    }

    /// The guest reads a register; `None` is a fault.
    pub fn read(&self, index: u32) -> Result<Option<u64>, KvmError> {
        self.access(|model, now| model.read(index, now))
    }

    /// The guest writes a register; false is a fault.
    pub fn write(&self, index: u32, value: u64) -> Result<bool, KvmError> {
        Ok(self.access(|model, now| model.write(index, value, now))?.is_some())
    }

    fn access<T>(
        &self,
        access: impl FnOnce(&mut Pmu, u64) -> Result<T, GeneralProtection>,
    ) -> Result<Option<T>, KvmError> {
        let mut state = self.lock();
        let now = state.clock.read()?;
        let result = access(&mut state.model, now.unhalted);
        let due = state.model.ticks_to_interrupt().map(|ticks| now.unhalted.saturating_add(ticks));
        if due != state.aim {
            state.patience = Duration::ZERO;
            self.arm(&mut state, now)?;
        }
        Ok(result.ok())
    }

    /// Counts up to now, after the timer or anybody else has got the vCPU out of guest mode.
    pub fn catch_up(&self) -> Result<(), KvmError> {
        let mut state = self.lock();
        if state.aim.is_none() {
            // No counter runs towards an interrupt; what others show is counted when they are read.
            return Ok(());
        }
        let now = state.clock.read()?;
        let ran = now.unhalted.saturating_sub(state.armed_at.unhalted);
        let passed = now.all.saturating_sub(state.armed_at.all);
        state.patience = match ran < passed / 2 {
            true => (state.patience * 2).clamp(SLEEP_CHECKS[0], SLEEP_CHECKS[1]),
            false => Duration::ZERO,
        };
        state.model.advance(now.unhalted);
        self.arm(&mut state, now)
    }

    /// Whether an overflow is to be delivered that was not before.
    pub fn take_interrupt(&self) -> bool {
        self.lock().model.take_interrupt()
    }

    /// The counters' part of a reset. An overflow that was not delivered yet belongs to the life that is over.
    pub fn reset(&self) -> Result<(), KvmError> {
        let mut state = self.lock();
        let State { model, reset, aim, .. } = &mut *state;
        for (index, value) in reset {
            let taken = model.put_back(*index, *value);
            debug_assert!(taken.is_ok(), "the model has no register {index:x}");
        }
        model.take_interrupt();
        // A counter that a fault leaves running is as far from its overflow as before.
        if aim.is_some() && model.ticks_to_interrupt().is_none() {
            *aim = None;
            self.set_timer(Duration::ZERO)?;
        }
        Ok(())
    }

    /// Its vCPU stands still from here on, and so do they.
    pub fn stop(&self) -> Result<(), KvmError> {
        let mut state = self.lock();
        let now = state.clock.read()?.unhalted;
        state.model.advance(now);
        match state.aim.take() {
            Some(_) => self.set_timer(Duration::ZERO),
            None => Ok(()),
        }
    }

    /// It goes on.
    pub fn go_on(&self) -> Result<(), KvmError> {
        let mut state = self.lock();
        let now = state.clock.read()?;
        state.model.skip_to(now.unhalted);
        state.patience = Duration::ZERO;
        self.arm(&mut state, now)
    }

    /// What they hold while their vCPU stands still.
    pub fn save(&self) -> SavedPmu {
        self.lock().model.save()
    }

    /// Makes them what those of another vCPU were, which stood still; so does this one, but not for long.
    pub fn restore(&self, saved: &SavedPmu) -> Result<(), KvmError> {
        let mut state = self.lock();
        let now = state.clock.read()?;
        state.model.restore(saved, now.unhalted);
        self.arm(&mut state, now)
    }

    /// The timer has fired.
    pub fn acknowledge(&self) {
        // Says how often it fired, or that somebody set it anew meanwhile: all the same here.
        let _ = rustix::io::read(&self.timer, &mut [0; 8]);
    }

    /// Arms the timer for the next overflow that interrupts, or disarms it.
    fn arm(&self, state: &mut State, now: Reading) -> Result<(), KvmError> {
        let ticks = state.model.ticks_to_interrupt();
        let was_armed = state.aim.is_some();
        state.aim = ticks.map(|ticks| now.unhalted.saturating_add(ticks));
        state.armed_at = now;
        let wait = match ticks {
            Some(ticks) => state.clock.duration(ticks).max(state.patience),
            None if was_armed => Duration::ZERO,
            None => return Ok(()),
        };
        self.set_timer(wait)
    }

    /// Zero disarms it, and nothing else is that short: a tick takes a nanosecond at least after rounding up.
    fn set_timer(&self, wait: Duration) -> Result<(), KvmError> {
        let wait = Timespec::try_from(wait)
            .unwrap_or(Timespec { tv_sec: i64::from(i32::MAX), tv_nsec: 0 });
        let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: wait };
        timerfd_settime(self.timer.as_fd(), TimerfdTimerFlags::empty(), &once)
            .map(drop)
            .map_err(|errno| KvmError::Request { action: "set a timer", source: errno.into() })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Plain values; a panic elsewhere leaves them whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AsRawFd for VcpuPmu {
    fn as_raw_fd(&self) -> RawFd {
        self.timer.as_raw_fd()
    }
}
