//! Builds a machine and lets it run.

use std::collections::VecDeque;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use agent_protocol::Cause;
use jailer::seccomp::{RestrictError, ThreadKind, restrict};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::event_loop::{EventLoop, EventLoopThread};
use super::events::{EventReceiver, events};
use super::pmu::VcpuPmu;
use super::resources::{Origin, SnapshotRam};
use super::slots::Slots;
use super::vcpu_thread::{Surroundings, VcpuThread};
use super::{
    Config, Devices, Handle, Host, Interrupts, Machine, MachineError, Message, Resources,
    VirtioDevices,
};
use crate::boot::{self, Image, Payload};
use crate::bus::{Bus, lock};
use crate::device;
use crate::device::block::{Block, Disk};
use crate::device::console::Console;
use crate::device::ioapic::{IoApic, Pin};
use crate::device::nmi_status::NmiStatus;
use crate::device::reset_ports::{AcpiPorts, I8042, ResetControl, RestPort};
use crate::device::rng::Rng;
use crate::device::virtio::audit::{AuditMode, DmaAudit};
use crate::device::virtio::bell::Bell;
use crate::device::virtio::mmio::WRITES_THAT_CAN_WAIT;
use crate::device::vsock::{Listener, Vsock};
use crate::kvm::host::{HostInfo, KvmKind, Module};
use crate::kvm::identity::HostIdentity;
use crate::kvm::pmu::{self, PmuPolicy};
use crate::kvm::state;
use crate::kvm::vcpu::Vcpu;
use crate::kvm::vm::Vm;
use crate::kvm::{CpuId, Kvm, KvmError, cpuid};
use crate::layout::{self, Entry, VirtioSlot};
use crate::memory::paging::{self, PageServer, PageSource};
use crate::memory::{Backing, Memory, Template};

/// Builds the machine of `config` with what [`Resources::open`] opened for it, and starts its first life. If the
/// configuration asks for seccomp filters, the calling thread has its own from here on, as all others have theirs, and
/// no guest code ran before.
///
/// # Errors
/// [`MachineError`]; nothing is left behind.
pub fn launch(
    config: &Config,
    resources: Resources,
    interrupts: Interrupts,
) -> Result<Handle, MachineError> {
    let Resources { kvm, module, origin, listener, disks, snapshot, supported, .. } = resources;
    let restore = config.restore.as_ref().zip(snapshot);
    if let Some((restore, snapshot)) = &restore {
        let bytes = match snapshot {
            SnapshotRam::Template(template) => template.bytes(),
            SnapshotRam::Server(_) => restore.header.ram_bytes,
        };
        restore.check(config, bytes)?;
    }
    let kvm = Arc::new(kvm);
    let vcpu_count = config.checked_vcpus(&kvm)?;
    config.check_command_line()?;
    config.check_faults()?;
    // This thread sleeps now and then while KVM builds the machine; that one uses the time.
    let thread = EventLoopThread::spawn(config.seccomp)?;
    let (mut supported, kind) = match supported {
        Some(supported) => supported,
        None => cpuid::supported(&kvm, module, config.pmu)?,
    };
    config.check_kvm(kind)?;
    config.cpu_template.check_capabilities(&kvm).map_err(KvmError::from)?;
    let mut identity = host_identity(&supported, kind);
    let emulates_pmu = config.pmu == PmuPolicy::Emulated;
    if emulates_pmu {
        let shape = config.pmu_shape;
        let globals = shape.has_globals().then_some(shape.counters());
        pmu::show_amd(&mut supported, shape.has_core(), globals)?;
    }
    config.cpu_template.change_cpuid(&mut supported).map_err(KvmError::from)?;
    pmu::check_faults(&supported, &config.faults)?;
    let (restore, snapshot) = restore.unzip();
    let Built { vm, memory, entry, boot, pages } =
        build_vm(config, (origin, snapshot), &kvm, (module, kind), vcpu_count)?;
    if emulates_pmu {
        vm.divert_registers(&kvm, &device::pmu::REGISTERS)?;
    }

    let (outbox, inbox) = channel();
    let wake = Arc::new(Bell::new().map_err(MachineError::host("create an eventfd"))?);
    let mut event_loop = EventLoop::new()?;
    let devices = build_devices(config, (listener, disks), &vm, &memory, &mut event_loop)?;
    let mut surroundings = Surroundings {
        ports: Arc::clone(&devices.ports),
        mmio: Arc::clone(&devices.mmio),
        ioapic: Arc::clone(&devices.ioapic),
        ram: memory.ram().clone(),
        coalesced: None,
        outbox: outbox.clone(),
        wake: Arc::clone(&wake),
    };
    let mut vcpus = Vec::new();
    for id in 0..vcpu_count {
        let vcpu = vm.create_vcpu(&supported, id, vcpu_count)?;
        if id == 0 {
            let ranges = config.virtio_slots().flat_map(|VirtioSlot { base, .. }| {
                WRITES_THAT_CAN_WAIT.map(|range| base + range.start..base + range.end)
            });
            surroundings.coalesced = vm.coalesce_writes(&vcpu, ranges)?;
        }
        vcpu.change_msrs(&config.cpu_template.msrs)?;
        let power_on = vcpu.power_on(&kvm, entry, vm.pmu_absence(), &config.faults)?;
        let pmu = if emulates_pmu { Some(emulated_pmu(config, &vcpu)?) } else { None };
        let thread = VcpuThread::spawn(vcpu, id, pmu, surroundings.clone(), config.seccomp)
            .map_err(MachineError::host("start a vCPU thread"))?;
        vcpus.push((thread, power_on));
    }
    let host = Host {
        info: HostInfo::new(&kvm, kind, module),
        kind,
        pmu_absence: vm.pmu_absence(),
        clears_hwcr: !config.looks_first || state::clears_hwcr(&kvm)?,
    };
    let (events_out, events) = events(config.rings)?;
    let first = vcpus.first().map(|(thread, _)| thread.vcpu());
    identity.tsc_khz = first.map_or(0, |vcpu| cpuid::tsc_khz(vcpu.cpuid()));
    let mut machine = Machine {
        vcpus,
        devices,
        vm,
        memory,
        config: config.clone(),
        boot,
        pages,
        parent: restore.map(|restore| restore.header.id),
        life: 1,
        cause: Cause::PowerOn,
        identity,
        paused: None,
        rested: false,
        inbox,
        kept: VecDeque::new(),
        wake: Arc::clone(&wake),
        events: events_out,
    };
    if let Some(restore) = restore {
        restore.header.check_host(&machine.identity)?;
        machine.restore(&restore.state)?;
    }
    start(machine, (event_loop, thread), interrupts, outbox, events, host)
}

/// What this host is to a guest: performance counters are a matter of the configuration.
fn host_identity(supported: &CpuId, kind: KvmKind) -> HostIdentity {
    let mut cpuid = supported.clone();
    pmu::hide(&mut cpuid);
    HostIdentity::new(&cpuid, kind)
}

/// The counters of one vCPU.
fn emulated_pmu(config: &Config, vcpu: &Vcpu) -> Result<VcpuPmu, MachineError> {
    let model = device::pmu::Pmu::new(config.pmu_shape, config.pmu_seed);
    let reset = pmu::reset_sequence(vcpu.cpuid(), &config.faults);
    VcpuPmu::new(model, vcpu.unhalted_clock()?, reset)
}

/// Lets the machine run and moves it onto its event loop's thread. The guest starts at once: what it wants meanwhile waits
/// in eventfds. From here on every thread is confined, if the configuration says so: the event loop's is, this one becomes
/// so, and each vCPU's did so before it looked for orders.
fn start(
    mut machine: Machine,
    (event_loop, thread): (EventLoop, EventLoopThread),
    interrupts: Interrupts,
    commands: Sender<Message>,
    events: EventReceiver,
    host: Host,
) -> Result<Handle, MachineError> {
    let wake = Arc::clone(&machine.wake);
    let virtio = machine.devices.virtio.clone();
    let audit = machine.devices.audit.clone();
    let connector = lock(&virtio.vsock).device.connector();
    let console = lock(&machine.devices.console).tail();
    let (ports, mmio) = (Arc::clone(&machine.devices.ports), Arc::clone(&machine.devices.mmio));
    for disk in &virtio.disks {
        lock(disk).device.wait_ready()?;
    }
    thread.wait_ready()?;
    if machine.config.seccomp {
        restrict(ThreadKind::Main)?;
    }
    let first_life = (machine.life, machine.cause);
    let is_restored = machine.config.restore.is_some();
    if machine.config.starts_paused {
        machine.paused = Some(Instant::now());
    } else {
        // From here on the vCPUs may hold any device.
        machine.run_vcpus();
    }
    let thread = thread.run((event_loop, machine, interrupts));
    Ok(Handle {
        commands,
        wake,
        events,
        connector,
        virtio,
        audit,
        ports,
        mmio,
        console,
        host,
        first_life,
        is_restored,
        thread: Some(thread),
    })
}

struct Built {
    vm: Vm,
    memory: Memory,
    entry: Entry,
    /// RAM at power-on, if that is not what the machine begins with.
    boot: Option<Backing>,
    pages: Option<Arc<PageServer>>,
}

fn build_vm(
    config: &Config,
    (origin, snapshot): (Origin, Option<SnapshotRam>),
    kvm: &Kvm,
    (module, kind): (Module, KvmKind),
    vcpus: u8,
) -> Result<Built, MachineError> {
    let load = || load(config, origin, vcpus);
    let Some(snapshot) = snapshot else {
        let (image, entry) = load()?;
        let memory = map(config, image)?;
        write_generation(config, &memory)?;
        let vm = Vm::new(kvm, module, kind, &memory, config.pmu)?;
        return Ok(Built { vm, memory, entry, boot: None, pages: None });
    };
    // What the machine boots is wanted at its first reset, when nobody may make files any more. KVM takes its time meanwhile.
    std::thread::scope(|scope| {
        let loading = scope.spawn(load);
        let (memory, pages) = match snapshot {
            SnapshotRam::Template(template) => {
                (map(config, Backing::extents(&template, layout::AGENT_END)?)?, None)
            }
            SnapshotRam::Server(source) => {
                let memory = map(config, Backing::nothing(config.mem_mib << 20))?;
                let pages = serve(config, source, &memory)?;
                (memory, Some(pages))
            }
        };
        write_generation(config, &memory)?;
        let vm = Vm::new(kvm, module, kind, &memory, config.pmu)?;
        let (image, entry) = loading.join().expect("the thread has not panicked")?;
        Ok(Built { vm, memory, entry, boot: Some(image), pages })
    })
}

/// RAM of the machine of `config` before its first instruction, and where that is.
pub(super) fn template(
    config: &Config,
    image: Image,
    vcpus: u8,
) -> Result<(Template, Entry), MachineError> {
    let command_line = config.command_line(1, Cause::PowerOn);
    Template::build(config.mem_mib << 20, |ram| {
        Ok(boot::load(ram, image, &command_line, vcpus, config.virtio_slots())?)
    })
}

/// What is behind RAM at power-on, and where the first vCPU starts in it.
fn load(config: &Config, origin: Origin, vcpus: u8) -> Result<(Backing, Entry), MachineError> {
    let (template, entry) = match origin {
        Origin::Image(image) => template(config, image, vcpus)?,
        Origin::Template(template, entry) => (template, entry),
    };
    let image = match config.payload {
        Payload::Agent(_) => Backing::contents(&template, layout::AGENT_END)?,
        Payload::Kernel { .. } => Backing::private(&template)?,
        Payload::Linux(_) => Backing::copy(&template)?,
    };
    Ok((image, entry))
}

fn map(config: &Config, backing: Backing) -> Result<Memory, MachineError> {
    let memory = Memory::map(backing)?;
    if config.track_dirty_pages {
        memory.track_writes();
    }
    Ok(memory)
}

/// Has a page server have the pages of `memory`. If it goes, so does this process: whoever waits for a page waits for ever.
fn serve(
    config: &Config,
    source: PageSource,
    memory: &Memory,
) -> Result<Arc<PageServer>, MachineError> {
    let pages = Arc::new(source.serve(memory)?);
    let seccomp = config.seccomp;
    let confine = move || {
        if seccomp && let Err(error) = restrict(ThreadKind::Pages) {
            eprintln!("cleanslate: {error}");
            paging::end_without_pages();
        }
    };
    pages
        .watch(confine, || paging::end_without_pages())
        .map_err(MachineError::host("start the page server's thread"))?;
    Ok(pages)
}

/// Before the guest runs; with a page server this is the first page that is asked for.
fn write_generation(config: &Config, memory: &Memory) -> Result<(), MachineError> {
    match config.payload.is_unikernel() {
        true => Ok(boot::write_generation(memory.ram())?),
        false => Ok(()),
    }
}

pub(super) fn eventfd() -> Result<EventFd, MachineError> {
    EventFd::new(EFD_NONBLOCK).map_err(MachineError::host("create an eventfd"))
}

/// Makes the devices, puts them on their buses and into the event loop.
fn build_devices(
    config: &Config,
    (listener, disks): (Option<Listener>, Vec<Disk>),
    vm: &Vm,
    memory: &Memory,
    event_loop: &mut EventLoop,
) -> Result<Devices, MachineError> {
    let ioapic = Arc::new(IoApic::new(Box::new(vm.irq_router())));
    let serial_pin = Pin::new(&ioapic, layout::SERIAL_PIN);
    let console = Arc::new(Mutex::new(Console::new(serial_pin, config.console)));
    let nmi_status = Arc::<Mutex<NmiStatus>>::default();
    let reset_control = Arc::<Mutex<ResetControl>>::default();

    let mut ports = Bus::default();
    ports.insert(layout::SERIAL_PORT.into(), 8, console.clone());
    ports.insert(layout::I8042_DATA_PORT.into(), 1, Arc::new(Mutex::new(I8042::Data)));
    ports.insert(layout::NMI_STATUS_PORT.into(), 1, nmi_status.clone());
    ports.insert(layout::I8042_COMMAND_PORT.into(), 1, Arc::new(Mutex::new(I8042::Command)));
    ports.insert(layout::RESET_CONTROL_PORT.into(), 1, reset_control.clone());
    ports.insert(layout::ACPI_PORT.into(), 3, Arc::new(Mutex::new(AcpiPorts)));
    if matches!(config.payload, Payload::Agent(_)) {
        ports.insert(layout::REST_PORT.into(), 1, Arc::new(Mutex::new(RestPort)));
    }
    let mut mmio = Bus::default();
    let ioapic_registers = Arc::new(Mutex::new(Arc::clone(&ioapic)));
    mmio.insert(layout::IOAPIC_BASE, layout::IOAPIC_SIZE, ioapic_registers);
    let audited = config.dma_audit != AuditMode::Off;
    let audit = audited.then(|| DmaAudit::new(memory.ram().clone()));
    let mut slots = Slots {
        free: config.virtio_slots(),
        vm,
        ram: memory.ram(),
        ioapic: &ioapic,
        mmio: &mut mmio,
        event_loop,
        dma_platform: config.dma_platform,
        audit: audit.as_ref(),
        filled: Vec::new(),
    };
    // The agent's first device: it looks no further for it.
    let vsock = slots.add(Vsock::new(config.cid, listener)?)?;
    let rng = match config.rng {
        true => Some(slots.add(Rng::new().map_err(MachineError::host("create an eventfd"))?)?),
        false => None,
    };
    let confine: fn() -> Result<(), RestrictError> =
        if config.seccomp { || restrict(ThreadKind::Disk) } else { || Ok(()) };
    let block = |(number, disk)| {
        let block = Block::new(disk, number, confine);
        slots.add(block.map_err(MachineError::host("start a disk's threads"))?)
    };
    let disks = disks.into_iter().enumerate().map(block).collect::<Result<_, _>>()?;
    let virtio = VirtioDevices { vsock, rng, disks, all: slots.filled };
    let (ports, mmio) = (Arc::new(ports), Arc::new(mmio));
    Ok(Devices { ports, mmio, ioapic, console, nmi_status, reset_control, virtio, audit })
}
