//! The thread of one vCPU: runs guest code, answers its accesses, parks when told to or when the guest wants something
//! that only the machine can do.

use std::io;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Once, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use jailer::seccomp::ThreadKind;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use super::pmu::VcpuPmu;
use super::{GuestStuck, Message, NmiOutcome, NmiVia, StuckReason, VcpuStop};
use crate::bus::{Bus, Effect};
use crate::device::ioapic::IoApic;
use crate::device::virtio::bell::Bell;
use crate::kvm::KvmError;
use crate::kvm::coalesced::CoalescedWrites;
use crate::kvm::vcpu::{Exit, Vcpu, VcpuCell};
use crate::memory::GuestRam;

/// What a vCPU thread needs of its machine.
#[derive(Clone)]
pub(super) struct Surroundings {
    pub ports: Arc<Bus>,
    pub mmio: Arc<Bus>,
    pub ioapic: Arc<IoApic>,
    pub ram: GuestRam,
    /// Writes that KVM kept for later, where it can.
    pub coalesced: Option<Arc<CoalescedWrites>>,
    pub outbox: Sender<Message>,
    pub wake: Arc<Bell>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    Run,
    Park,
    End,
}

/// What to do about an NMI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum NmiOrder {
    None,
    /// Queue one before the next entry.
    Queue(NmiVia),
    Done(NmiOutcome),
}

#[derive(Debug)]
struct State {
    order: Order,
    /// True while the thread waits and guest code does not run.
    parked: bool,
    nmi: NmiOrder,
}

#[derive(Debug)]
struct Control {
    state: Mutex<State>,
    changed: Condvar,
}

impl Control {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Plain values; a panic elsewhere leaves them whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }
}

/// A vCPU and its thread. Starts parked.
pub(super) struct VcpuThread {
    cell: Arc<VcpuCell>,
    control: Arc<Control>,
    pmu: Option<Arc<VcpuPmu>>,
    thread: Option<JoinHandle<()>>,
}

impl VcpuThread {
    /// Starts the thread; with `seccomp` it confines itself before it runs anything. `pmu` are the vCPU's counters, if they
    /// are the monitor's.
    pub fn spawn(
        vcpu: Vcpu,
        id: u8,
        pmu: Option<VcpuPmu>,
        surroundings: Surroundings,
        seccomp: bool,
    ) -> io::Result<Self> {
        install_kick_handler();
        let cell = Arc::new(VcpuCell::new(vcpu));
        let state = State { order: Order::Park, parked: true, nmi: NmiOrder::None };
        let control = Arc::new(Control { state: Mutex::new(state), changed: Condvar::new() });
        let pmu = pmu.map(Arc::new);
        let (cell_of_runner, control_of_runner) = (cell.clone(), control.clone());
        let runner = Runner {
            id,
            cell: cell_of_runner,
            control: control_of_runner,
            pmu: pmu.clone(),
            surroundings,
        };
        let thread =
            std::thread::Builder::new().name(format!("vcpu{id}")).spawn(move || match seccomp {
                true => runner.confined(),
                false => runner.main(),
            })?;
        Ok(Self { cell, control, pmu, thread: Some(thread) })
    }

    /// Lets the vCPU run.
    pub fn run(&self) {
        let mut state = self.control.lock();
        state.order = Order::Run;
        state.parked = false;
        self.control.changed.notify_all();
    }

    /// Asks the vCPU to park; [`VcpuThread::wait_parked`] waits for it.
    pub fn request_park(&self) {
        let mut state = self.control.lock();
        state.order = Order::Park;
        let parked = state.parked;
        drop(state);
        if !parked {
            self.kick();
        }
    }

    /// Waits until the vCPU is parked and has no exit to complete.
    pub fn wait_parked(&self) {
        drop(self.wait_kicking(self.control.lock(), |state| state.parked));
    }

    /// Waits until the thread has done what it was kicked for. One kick gets a vCPU out of guest code for certain; the
    /// repetitions are for a thread that is about to block elsewhere, on a console that nobody reads.
    fn wait_kicking<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        done: impl Fn(&State) -> bool,
    ) -> MutexGuard<'a, State> {
        const KICK_AGAIN: Duration = Duration::from_millis(20);
        while !done(&state) && self.thread.as_ref().is_some_and(|thread| !thread.is_finished()) {
            let waited = self.control.changed.wait_timeout(state, KICK_AGAIN);
            let (guard, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
            state = guard;
            if timeout.timed_out() && !done(&state) {
                self.kick();
            }
        }
        state
    }

    /// The parked vCPU.
    pub fn vcpu(&self) -> MutexGuard<'_, Vcpu> {
        self.cell.lock()
    }

    /// Its counters, if they are the monitor's.
    pub fn pmu(&self) -> Option<&VcpuPmu> {
        self.pmu.as_deref()
    }

    /// The timer of its counters has fired: the vCPU has to see which of them overflowed.
    pub fn check_counters(&self) {
        if let Some(pmu) = &self.pmu {
            pmu.acknowledge();
            self.kick();
        }
    }

    /// Queues an NMI.
    pub fn inject_nmi(&self, via: NmiVia) -> NmiOutcome {
        self.control.lock().nmi = NmiOrder::Queue(via);
        self.kick();
        let done = |state: &State| state.nmi != NmiOrder::Queue(via) || state.parked;
        let mut state = self.wait_kicking(self.control.lock(), done);
        match std::mem::replace(&mut state.nmi, NmiOrder::None) {
            NmiOrder::Done(outcome) => outcome,
            // It parked instead: its machine is about to be reset or to end.
            NmiOrder::Queue(_) | NmiOrder::None => NmiOutcome::VcpuStopped,
        }
    }

    /// The same for a vCPU that is parked, and will be for a while.
    pub fn inject_nmi_parked(&self, via: NmiVia) -> NmiOutcome {
        match queue_nmi(&self.vcpu(), via) {
            Ok(true) => NmiOutcome::Queued,
            Ok(false) => NmiOutcome::Masked,
            // It will not run either.
            Err(_) => NmiOutcome::VcpuStopped,
        }
    }

    /// Flag first, then the signal: whichever side of `KVM_RUN`'s entry the vCPU is on, one of them gets it out.
    fn kick(&self) {
        self.cell.request_exit();
        if let Some(thread) = &self.thread {
            // Fails only if the thread has ended, and then it runs no guest code.
            let _ = thread.kill(kick_signal());
        }
    }
}

impl Drop for VcpuThread {
    fn drop(&mut self) {
        self.control.lock().order = Order::End;
        self.control.changed.notify_all();
        self.kick();
        self.wait_parked();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn kick_signal() -> i32 {
    SIGRTMIN()
}

/// The signal has to interrupt `KVM_RUN`, so it needs a handler; the handler has nothing to do.
fn install_kick_handler() {
    extern "C" fn ignore(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        register_signal_handler(kick_signal(), ignore).expect("a real-time signal takes a handler");
    });
}

/// What ended a stretch of running.
enum Pause {
    /// Somebody wants attention: look at the orders.
    Kicked,
    /// The machine has to act.
    Stop(VcpuStop),
}

struct Runner {
    id: u8,
    cell: Arc<VcpuCell>,
    control: Arc<Control>,
    pmu: Option<Arc<VcpuPmu>>,
    surroundings: Surroundings,
}

impl Runner {
    /// Like [`Runner::main`], with a filter of system calls.
    fn confined(self) {
        match jailer::seccomp::restrict(ThreadKind::Vcpu) {
            Ok(()) => self.main(),
            Err(error) => self.stop(Instant::now(), VcpuStop::Failed(error.into())),
        }
    }

    fn main(self) {
        while let Some(nmi) = self.next_entry() {
            let mut vcpu = self.cell.lock();
            let queued = match nmi {
                NmiOrder::Queue(via) => self.queue_nmi(&vcpu, via),
                NmiOrder::None | NmiOrder::Done(_) => Ok(()),
            };
            let pause = queued
                .and_then(|()| self.run(&mut vcpu))
                .unwrap_or_else(|error| Pause::Stop(VcpuStop::Failed(error.into())));
            if let Pause::Stop(stop) = pause {
                let at = Instant::now();
                let stop = match self.complete_exit(&mut vcpu) {
                    Ok(()) => stop,
                    Err(error) => VcpuStop::Failed(error.into()),
                };
                drop(vcpu);
                self.stop(at, stop);
            }
        }
    }

    /// Parks and has the machine act.
    fn stop(&self, at: Instant, stop: VcpuStop) {
        // In this order: whoever finds the vCPU parked finds its message too, and a reset drops it.
        let sent = self.surroundings.outbox.send(Message::VcpuStopped(at, stop));
        self.park_itself();
        if sent.is_ok() {
            self.surroundings.wake.ring();
        }
    }

    /// Waits for the order to run and says what is to be queued first; `None` is the order to end.
    fn next_entry(&self) -> Option<NmiOrder> {
        // Before the look at the orders: a kick that comes after it stays raised for the next entry.
        self.cell.allow_entry();
        let mut state = self.control.lock();
        loop {
            match state.order {
                Order::End => {
                    state.parked = true;
                    self.control.changed.notify_all();
                    return None;
                }
                Order::Run => return Some(state.nmi),
                Order::Park => {
                    state.parked = true;
                    self.control.changed.notify_all();
                    state = self.control.wait(state);
                }
            }
        }
    }

    /// From here on the thread runs no guest code before it is told to, so whoever gets its message need not kick it.
    fn park_itself(&self) {
        let mut state = self.control.lock();
        // An order to end stands.
        if state.order == Order::Run {
            state.order = Order::Park;
        }
        state.parked = true;
        self.control.changed.notify_all();
    }

    fn queue_nmi(&self, vcpu: &Vcpu, via: NmiVia) -> Result<(), KvmError> {
        let queued = queue_nmi(vcpu, via)?;
        let outcome = if queued { NmiOutcome::Queued } else { NmiOutcome::Masked };
        self.control.lock().nmi = NmiOrder::Done(outcome);
        self.control.changed.notify_all();
        Ok(())
    }

    /// Runs guest code until it needs more than a device.
    fn run(&self, vcpu: &mut Vcpu) -> Result<Pause, KvmError> {
        if let Some(pmu) = &self.pmu {
            pmu.catch_up()?;
        }
        loop {
            self.deliver_overflows(vcpu)?;
            let effect = match self.enter(vcpu)? {
                Exit::Kicked => return Ok(Pause::Kicked),
                Exit::TripleFault => {
                    return Ok(Pause::Stop(VcpuStop::Reset(agent_protocol::Cause::Triple)));
                }
                Exit::InternalError => {
                    let reason = StuckReason::InternalError(vcpu.suberror());
                    return Ok(self.stuck(vcpu, reason));
                }
                Exit::FailEntry(reason) => {
                    return Ok(self.stuck(vcpu, StuckReason::FailEntry(reason)));
                }
                Exit::Unexpected(exit) => {
                    return Ok(self.stuck(vcpu, StuckReason::Unexpected(exit)));
                }
                Exit::MsrRead(read) => {
                    let value = self.pmu.as_ref().map(|pmu| pmu.read(read.index())).transpose()?;
                    read.answer(value.flatten());
                    Effect::None
                }
                Exit::MsrWrite(write) => {
                    let pmu = self.pmu.as_ref();
                    let accepted = pmu.map(|pmu| pmu.write(write.index(), write.value()));
                    write.answer(accepted.transpose()?.unwrap_or(false));
                    Effect::None
                }
                access => self.surroundings.answer(access),
            };
            match effect {
                Effect::None => {}
                Effect::Reset(reset) => return Ok(Pause::Stop(VcpuStop::Reset(reset.into()))),
                Effect::PowerOff => return Ok(Pause::Stop(VcpuStop::PowerOff)),
                Effect::Rest => return Ok(Pause::Stop(VcpuStop::Rest)),
            }
        }
    }

    /// What a counter of the monitor's has to say to its vCPU, it says before guest code runs on.
    fn deliver_overflows(&self, vcpu: &mut Vcpu) -> Result<(), KvmError> {
        if let Some(pmu) = &self.pmu
            && pmu.take_interrupt()
        {
            vcpu.deliver_overflow()?;
        }
        Ok(())
    }

    /// Runs guest code until it needs something. The writes that it made before have been answered then, so accesses keep
    /// their order, and a vCPU that parks leaves none behind.
    fn enter<'v>(&self, vcpu: &'v mut Vcpu) -> Result<Exit<'v>, KvmError> {
        let exit = vcpu.run();
        self.surroundings.answer_coalesced();
        exit
    }

    fn stuck(&self, vcpu: &Vcpu, reason: StuckReason) -> Pause {
        let (rip, bytes) = vcpu.bytes_at_rip(&self.surroundings.ram);
        Pause::Stop(VcpuStop::Stuck(GuestStuck { reason, vcpu: self.id, rip, bytes }))
    }

    /// Lets KVM finish the instruction that caused the last exit, without running another: a restore of registers would
    /// otherwise be overwritten by the rest of it.
    fn complete_exit(&self, vcpu: &mut Vcpu) -> Result<(), KvmError> {
        /// An access is split into at most two by a page boundary.
        const MOST_FRAGMENTS: u32 = 4;
        self.cell.request_exit();
        for _ in 0..MOST_FRAGMENTS {
            if self.enter(vcpu)? == Exit::Kicked {
                self.cell.allow_entry();
                return Ok(());
            }
        }
        let source = io::Error::other("KVM keeps asking for more");
        Err(KvmError::Request { action: "complete the vCPU's last exit", source })
    }
}

/// False if the guest does not want it.
fn queue_nmi(vcpu: &Vcpu, via: NmiVia) -> Result<bool, KvmError> {
    match via {
        NmiVia::Pin => vcpu.inject_nmi(),
        NmiVia::Message => vcpu.send_nmi().map(|()| true),
    }
}

impl Surroundings {
    /// Answers the writes that KVM kept for later. They have no effect beyond their device, or they would not wait.
    fn answer_coalesced(&self) {
        if let Some(writes) = &self.coalesced {
            writes.answer_all(|address, data| {
                self.mmio.write(address, data);
            });
        }
    }

    /// Answers an access of the guest.
    fn answer(&self, access: Exit<'_>) -> Effect {
        match access {
            Exit::PortRead(port, data) => {
                data.chunks_mut(1).for_each(|byte| self.ports.read(u64::from(port), byte));
                Effect::None
            }
            Exit::PortWrite(port, data) => data
                .chunks(1)
                .map(|byte| self.ports.write(u64::from(port), byte))
                .find(|effect| *effect != Effect::None)
                .unwrap_or(Effect::None),
            Exit::MmioRead(address, data) => {
                self.mmio.read(address, data);
                Effect::None
            }
            Exit::MmioWrite(address, data) => self.mmio.write(address, data),
            Exit::EndOfInterrupt(vector) => {
                self.ioapic.end_of_interrupt(vector);
                Effect::None
            }
            // No accesses to devices; `Runner::run` has dealt with them.
            Exit::MsrRead(_)
            | Exit::MsrWrite(_)
            | Exit::Kicked
            | Exit::TripleFault
            | Exit::InternalError
            | Exit::FailEntry(_)
            | Exit::Unexpected(_) => Effect::None,
        }
    }
}
