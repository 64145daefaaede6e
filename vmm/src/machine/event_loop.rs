//! The event loop: what wakes it and what it does then. Runs on a thread of its own and owns the machine.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::Instant;

use agent_protocol::Cause;
use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use jailer::seccomp::{RestrictError, ThreadKind};
use rustix::event::{PollFd, PollFlags, poll};
use vmm_sys_util::eventfd::EventFd;

use super::interrupts::Interrupt;
use super::vcpu_thread::VcpuThread;
use super::{
    AnyVirtioDevice, Command, Event, Interrupts, Machine, MachineError, Message, ResetPolicy, Stop,
    VcpuStop,
};
use crate::bus::lock;
use crate::kvm::KvmError;

type Subscriber = Box<dyn MutEventSubscriber + Send>;

/// The loop with everything that it serves.
pub(super) struct EventLoop {
    manager: EventManager<Subscriber>,
    stopped: Arc<AtomicBool>,
}

impl EventLoop {
    pub fn new() -> Result<Self, MachineError> {
        let manager = EventManager::new().map_err(|error| MachineError::Host {
            action: "create the event loop",
            source: std::io::Error::other(error.to_string()),
        })?;
        Ok(Self { manager, stopped: Arc::default() })
    }

    pub fn add_device(&mut self, device: VirtioEvents) {
        self.manager.add_subscriber(Box::new(device));
    }

    /// Serves `machine` until it stops.
    pub fn run(mut self, machine: Machine, interrupts: Interrupts) {
        let (stopped, events) = (Arc::clone(&self.stopped), machine.events.clone());
        self.manager.add_subscriber(Box::new(MachineEvents { machine, interrupts, stopped }));
        while !self.stopped.load(Ordering::Relaxed) {
            if let Err(error) = self.manager.run() {
                // An interrupted wait is no error; anything else would repeat for ever.
                let source = std::io::Error::other(error.to_string());
                events.send(Event::Stopped(Stop::Failed(MachineError::Host {
                    action: "wait for events",
                    source,
                })));
                break;
            }
        }
    }
}

/// What the loop's thread is given: everything.
type Work = (EventLoop, Machine, Interrupts);

/// The loop's thread before it has a machine. It starts while others are busy with the machine, so that nobody waits for it
/// once that is ready.
pub(super) struct EventLoopThread {
    ready: Receiver<Result<(), RestrictError>>,
    work: Sender<Work>,
    thread: JoinHandle<()>,
}

impl EventLoopThread {
    /// Starts the thread; with `seccomp` it confines itself.
    pub fn spawn(seccomp: bool) -> Result<Self, MachineError> {
        let (readiness, ready) = channel();
        let (work, inbox) = channel::<Work>();
        let main = move || {
            let restricted =
                if seccomp { jailer::seccomp::restrict(ThreadKind::EventLoop) } else { Ok(()) };
            // Whoever does not listen any more sends no work either.
            let _ = readiness.send(restricted);
            if let Ok((event_loop, machine, interrupts)) = inbox.recv() {
                event_loop.run(machine, interrupts);
            }
        };
        let thread = std::thread::Builder::new()
            .name("event-loop".into())
            .spawn(main)
            .map_err(MachineError::host("start the event loop's thread"))?;
        Ok(Self { ready, work, thread })
    }

    /// Waits until the thread is confined, if it is to be.
    pub fn wait_ready(&self) -> Result<(), MachineError> {
        // It says so before it does anything else.
        Ok(self.ready.recv().expect("the thread has not panicked")?)
    }

    /// Gives the thread its work.
    pub fn run(self, work: Work) -> JoinHandle<()> {
        // It waits for nothing else.
        let _ = self.work.send(work);
        self.thread
    }
}

fn watch(ops: &mut EventOps, fd: &impl AsRawFd) {
    // Each descriptor is watched once, from `init`; epoll has no other reason to refuse it than lack of memory.
    ops.add(Events::new(fd, EventSet::IN)).expect("watch a descriptor");
}

/// A virtio device in the event loop: an eventfd for each queue, and the device's back end.
pub(super) struct VirtioEvents {
    pub device: AnyVirtioDevice,
    pub queues: Vec<EventFd>,
    pub backend: Option<RawFd>,
}

struct Backend(RawFd);

impl AsRawFd for Backend {
    fn as_raw_fd(&self) -> RawFd {
        self.0
    }
}

impl MutEventSubscriber for VirtioEvents {
    fn init(&mut self, ops: &mut EventOps) {
        self.queues.iter().for_each(|fd| watch(ops, fd));
        self.backend.iter().for_each(|fd| watch(ops, &Backend(*fd)));
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        let mut mmio = lock(&self.device);
        if self.backend == Some(events.fd()) {
            mmio.device.handle_backend();
            return;
        }
        for (index, fd) in (0..).zip(&self.queues) {
            if fd.as_raw_fd() == events.fd() {
                // Reading clears the count; how often the guest wrote does not matter.
                let _ = fd.read();
                mmio.notify(index);
            }
        }
    }
}

/// The machine in its own event loop: messages from vCPUs and the handle, timers of emulated counters, and signals.
struct MachineEvents {
    machine: Machine,
    interrupts: Interrupts,
    stopped: Arc<AtomicBool>,
}

impl MutEventSubscriber for MachineEvents {
    fn init(&mut self, ops: &mut EventOps) {
        watch(ops, &*self.machine.wake);
        watch(ops, &self.interrupts);
        self.machine
            .vcpus
            .iter()
            .filter_map(|(thread, _)| thread.pmu())
            .for_each(|pmu| watch(ops, pmu));
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        let fd = events.fd();
        let is_timer = |thread: &VcpuThread| thread.pmu().is_some_and(|pmu| pmu.as_raw_fd() == fd);
        let stop = if fd == self.interrupts.as_raw_fd() {
            match self.interrupts.take() {
                Interrupt::End => Some(Stop::Interrupted),
                Interrupt::ResetTransport => {
                    self.machine.reset_transport();
                    None
                }
            }
        } else if let Some((thread, _)) = self.machine.vcpus.iter().find(|(t, _)| is_timer(t)) {
            thread.check_counters();
            None
        } else {
            self.machine.wake.clear();
            self.machine.handle_messages()
        };
        let stop = stop.or_else(|| self.stand_still());
        if let Some(stop) = stop {
            self.machine.stop(stop);
            self.stopped.store(true, Ordering::Relaxed);
        }
    }
}

impl MachineEvents {
    /// While the machine is paused, nobody is heard but who can end that; the reason to stop, if one came. All others wait where
    /// they are: requests in sockets, notifications in eventfds.
    fn stand_still(&mut self) -> Option<Stop> {
        while self.machine.paused.is_some() {
            let mut descriptors = [
                PollFd::new(&*self.machine.wake, PollFlags::IN),
                PollFd::new(&self.interrupts, PollFlags::IN),
            ];
            if poll(&mut descriptors, None).is_err() {
                // Interrupted.
                continue;
            }
            let stop = match descriptors.map(|descriptor| !descriptor.revents().is_empty()) {
                // What else signals want has to wait, too.
                [_, true] if self.interrupts.take() == Interrupt::End => Some(Stop::Interrupted),
                [true, _] => {
                    self.machine.wake.clear();
                    self.machine.handle_messages()
                }
                _ => None,
            };
            if stop.is_some() {
                return stop;
            }
        }
        None
    }
}

impl Machine {
    /// The last thing that a machine does. Its connections end after the event that says why, so that whoever sees the end
    /// of one finds the event.
    fn stop(&mut self, stop: Stop) {
        self.park_vcpus();
        self.dismiss_page_server();
        self.events.send(Event::Stopped(stop));
        lock(&self.devices.virtio.vsock).device.shut_down();
    }

    /// Handles what has come; the reason to stop, if one did.
    fn handle_messages(&mut self) -> Option<Stop> {
        while let Some(message) = self.next_message() {
            let stop = match message {
                Message::VcpuStopped(at, stop) => self.handle_vcpu_stop(at, stop),
                Message::Command(Command::Reset) => self.reset_or_stop(Cause::Host, Instant::now()),
                Message::Command(Command::NewLife(cause, at)) => {
                    self.note_life(cause, at);
                    None
                }
                Message::Command(Command::Nmi(via)) => {
                    // There is a first vCPU: the configuration asks for one at least.
                    let outcome = match self.paused {
                        None => self.vcpus[0].0.inject_nmi(via),
                        Some(_) => self.vcpus[0].0.inject_nmi_parked(via),
                    };
                    self.events.send(Event::Nmi(outcome));
                    None
                }
                Message::Command(Command::Pause) => self.pause().err().map(failed),
                Message::Command(Command::Resume) => self.resume().err().map(failed),
                Message::Command(Command::Snapshot(targets, kind)) => {
                    let written = self.snapshot(&targets, kind);
                    self.events.send(Event::Snapshot(Box::new(written)));
                    None
                }
                Message::Command(Command::ResetTransport) => {
                    self.reset_transport();
                    None
                }
                Message::Command(Command::Stop) => Some(Stop::Requested),
            };
            if stop.is_some() {
                return stop;
            }
        }
        None
    }

    fn reset_transport(&self) {
        lock(&self.devices.virtio.vsock).device.reset_transport();
    }

    fn next_message(&mut self) -> Option<Message> {
        self.kept.pop_front().or_else(|| self.inbox.try_recv().ok())
    }

    /// Drops what parked vCPUs have said: it belongs to the life that is over. Commands stay, and failures of the host.
    pub(super) fn forget_vcpu_stops(&mut self) {
        let stays = |message: &Message| {
            matches!(message, Message::Command(_) | Message::VcpuStopped(_, VcpuStop::Failed(_)))
        };
        self.kept = std::iter::from_fn(|| self.next_message()).filter(stays).collect();
    }

    fn handle_vcpu_stop(&mut self, at: Instant, stop: VcpuStop) -> Option<Stop> {
        match stop {
            VcpuStop::Reset(cause) => match self.config.reset_policy {
                ResetPolicy::Limited(limit) if self.life > limit => Some(Stop::Reset(cause)),
                ResetPolicy::InPlace | ResetPolicy::Limited(_) => self.reset_or_stop(cause, at),
            },
            VcpuStop::PowerOff => Some(Stop::PowerOff),
            VcpuStop::Rest => {
                // Nobody hears it twice, however often the guest says it.
                if !std::mem::replace(&mut self.rested, true) {
                    self.events.send(Event::Rested);
                }
                self.go_on();
                None
            }
            VcpuStop::Stuck(stuck) => Some(Stop::Stuck(stuck)),
            VcpuStop::Failed(error) => Some(Stop::Failed(error)),
        }
    }

    fn reset_or_stop(&mut self, cause: Cause, at: Instant) -> Option<Stop> {
        self.reset(cause, at).err().map(Stop::Failed)
    }
}

fn failed(error: KvmError) -> Stop {
    Stop::Failed(error.into())
}
