//! The shortest way from a guest to the monitor and back: a notification by an ioeventfd, a thread that waits for it with epoll, an
//! irqfd, a handler in ring 0, and the instruction behind in ring 3. No queue, no device, no lock.

use std::arch::global_asm;
use std::os::fd::AsRawFd;
use std::time::Duration;

use kvm_bindings::{
    KVM_CAP_SPLIT_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_MAX_CPUID_ENTRIES, KvmIrqRouting,
    kvm_enable_cap, kvm_irq_routing_entry, kvm_regs, kvm_segment, kvm_userspace_memory_region,
};
use kvm_ioctls::{IoEventAddress, Kvm, VcpuExit};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vmm::memory::GuestRam;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

const RAM: usize = 2 << 20;
const NOTIFY: u64 = 0xd000_0050;
const PORT: u16 = 0xec;
const VECTOR: u8 = 0x41;
const GSI: u32 = 5;
const PML4: u64 = 0x1000;
const GDT: u64 = 0x7000;
const TSS: u64 = 0x8000;
const IDT: u64 = 0x9000;
const CODE: u64 = 0x1_0000;
const STACK: u64 = 0x6_0000;

global_asm!(
    ".pushsection .rodata.floor_guest, \"a\"",
    ".globl floor_guest, floor_guest_gate, floor_guest_irq, floor_guest_end",
    "floor_guest:",
    // The local APIC accepts interrupts: its spurious vector register, by x2APIC.
    "mov ecx, 0x80f; mov eax, 0x1ff; xor edx, edx; wrmsr",
    // Ring 3 with interrupts, and with ports.
    "push 0x2b; push 0x50000; push 0x3202; push 0x33; lea rax, [rip + 2f]; push rax; iretq",
    "2: mov ebx, 0xd0000050",
    "3: mov r14d, [rip + 9f]",
    "rdtsc; shl rdx, 32; or rax, rdx; mov r12, rax",
    "mov dword ptr [rbx], 0",
    "4: ud2; cmp r14d, [rip + 9f]; je 4b",
    "rdtsc; shl rdx, 32; or rax, rdx; sub rax, r12",
    "mov dx, 0xec; out dx, eax",
    "jmp 3b",
    // Waits in ring 0 unless the interrupt came before.
    "floor_guest_gate: add qword ptr [rsp], 2",
    "cmp r14d, [rip + 9f]; jne 5f",
    "sti; hlt; cli",
    "5: iretq",
    "floor_guest_irq: push rax; push rcx; push rdx",
    "inc dword ptr [rip + 9f]",
    "mov ecx, 0x80b; xor eax, eax; xor edx, edx; wrmsr",
    "pop rdx; pop rcx; pop rax; iretq",
    ".balign 64",
    "9: .long 0",
    "floor_guest_end:",
    ".popsection",
);

#[allow(unsafe_code, reason = "where the code above lies")]
mod image {
    unsafe extern "C" {
        static floor_guest: u8;
        static floor_guest_gate: u8;
        static floor_guest_irq: u8;
        static floor_guest_end: u8;
    }

    /// The code, and where in it the two handlers begin.
    pub fn code() -> (&'static [u8], [u64; 2]) {
        let (start, end) = (&raw const floor_guest, &raw const floor_guest_end);
        let at = |symbol: *const u8| symbol.addr() as u64 - start.addr() as u64;
        // SAFETY: the symbols enclose bytes of this program that nobody writes.
        let code = unsafe { std::slice::from_raw_parts(start, end.addr() - start.addr()) };
        (code, [at(&raw const floor_guest_gate), at(&raw const floor_guest_irq)])
    }
}

/// Times of so many trips.
pub fn trips(count: usize) -> Vec<Duration> {
    let kvm = Kvm::new().expect("open /dev/kvm");
    let vm = kvm.create_vm().expect("a machine");
    let ram = GuestRam::from_ranges(&[(GuestAddress(0), RAM)]).expect("map memory");
    let region = kvm_userspace_memory_region {
        memory_size: RAM as u64,
        userspace_addr: ram.get_host_address(GuestAddress(0)).expect("it is there") as u64,
        ..Default::default()
    };
    // SAFETY: the mapping is there until the machine is gone, at the end of this function.
    unsafe { vm.set_user_memory_region(region) }.expect("give it memory");
    let mut split = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, ..Default::default() };
    split.args[0] = 24;
    vm.enable_cap(&split).expect("split the interrupt controller");
    let mut entry =
        kvm_irq_routing_entry { gsi: GSI, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
    entry.u.msi.address_lo = 0xfee0_0000;
    entry.u.msi.data = VECTOR.into();
    vm.set_gsi_routing(&KvmIrqRouting::from_entries(&[entry]).expect("one")).expect("route");
    let (notified, interrupt) = (eventfd(), eventfd());
    vm.register_ioevent(&notified, &IoEventAddress::Mmio(NOTIFY), 0_u32).expect("an ioeventfd");
    vm.register_irqfd(&interrupt, GSI).expect("an irqfd");
    let mut vcpu = vm.create_vcpu(0).expect("a vCPU");
    let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).expect("CPUID");
    vcpu.set_cpuid2(&cpuid).expect("CPUID");
    fill(&ram);
    let mut sregs = vcpu.get_sregs().expect("registers");
    let segment = |selector, type_, l| kvm_segment {
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        s: 1,
        l,
        db: 1 - l,
        g: 1,
        ..Default::default()
    };
    sregs.cs = segment(0x10, 11, 1);
    let data = segment(0x18, 3, 0);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment {
        base: TSS,
        limit: 0x67,
        selector: 0x40,
        type_: 11,
        present: 1,
        ..Default::default()
    };
    (sregs.gdt.base, sregs.gdt.limit) = (GDT, 0x4f);
    (sregs.idt.base, sregs.idt.limit) = (IDT, 0xfff);
    // Paging with large pages; long mode; x2APIC.
    (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (0x8005_0033, PML4, 0x6b0, 0xd00);
    sregs.apic_base |= 0xc00;
    vcpu.set_sregs(&sregs).expect("registers");
    let regs = kvm_regs { rip: CODE, rsp: STACK, rflags: 2, ..Default::default() };
    vcpu.set_regs(&regs).expect("registers");
    let khz = f64::from(vcpu.get_tsc_khz().expect("the clock's frequency"));
    // Ends when the machine's last trip is over: by a notification that has no interrupt.
    let last = notified.try_clone().expect("a descriptor");
    let answers = std::thread::spawn(move || answer(&notified, &interrupt));
    let mut times = Vec::with_capacity(count);
    while times.len() < count {
        match vcpu.run().expect("run the guest") {
            VcpuExit::IoOut(PORT, ticks) => {
                let ticks = u32::from_le_bytes(ticks.try_into().expect("four bytes"));
                times.push(Duration::from_secs_f64(f64::from(ticks) / khz / 1e3));
            }
            other => panic!("the guest of the floor: {other:?}"),
        }
    }
    last.write(END).expect("tell the thread");
    answers.join().expect("the thread's end");
    times
}

/// More than a guest can have notified.
const END: u64 = 1 << 32;

fn eventfd() -> EventFd {
    EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).expect("an eventfd")
}

/// Answers each notification by an interrupt, as the event loop of a monitor without devices.
fn answer(notified: &EventFd, interrupt: &EventFd) {
    let epoll = Epoll::new().expect("an epoll");
    let event = EpollEvent::new(EventSet::IN, 0);
    epoll.ctl(ControlOperation::Add, notified.as_raw_fd(), event).expect("add it");
    loop {
        let mut events = [EpollEvent::default()];
        match epoll.wait(-1, &mut events) {
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            waited => waited.expect("wait"),
        };
        if notified.read().expect("it was notified") >= END {
            return;
        }
        interrupt.write(1).expect("an interrupt");
    }
}

/// Tables and code.
fn fill(ram: &GuestRam) {
    let put = |address: u64, value: u64| ram.write_obj(value, GuestAddress(address)).expect("RAM");
    // Present, writable, for ring 3; the first 2 MiB, and those of the device.
    put(PML4, 0x2007);
    put(0x2000, 0x3007);
    put(0x2000 + 8 * 3, 0x4007);
    put(0x3000, 0x87);
    put(0x4000 + 8 * 128, 0xd000_0000 | 0x9f);
    let gdt = [
        0x00af_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0,
        0x00cf_f300_0000_ffff,
        0x00af_fb00_0000_ffff,
        0,
        0x0000_8b00_8000_0067,
        0,
    ];
    (0..).zip(gdt).for_each(|(place, descriptor)| put(GDT + 16 + 8 * place, descriptor));
    // The stack of ring 0.
    put(TSS + 4, STACK);
    let (code, [gate, irq]) = image::code();
    ram.write_slice(code, GuestAddress(CODE)).expect("RAM");
    for (vector, handler) in [(6, CODE + gate), (u64::from(VECTOR), CODE + irq)] {
        let low = handler & 0xffff | 0x10 << 16 | 0x8e00 << 32 | (handler >> 16 & 0xffff) << 48;
        put(IDT + 16 * vector, low);
        put(IDT + 16 * vector + 8, handler >> 32);
    }
}
