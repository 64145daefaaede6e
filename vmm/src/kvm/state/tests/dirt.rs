//! Changes everything that a guest may have changed, by requests to KVM.

use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_VCPUEVENT_VALID_SHADOW, Msrs, kvm_lapic_state, kvm_mp_state, kvm_regs,
};
use kvm_ioctls::VcpuFd;

use super::super::msrs::{MSR_TSC, MSR_TSC_DEADLINE, entry, read_msrs};

/// What cannot be had at once: the two kinds of timer, the two modes of the local APIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Variant {
    CountingTimer,
    DeadlineTimerX2apic,
}

/// A time stamp counter that no machine reaches by itself.
pub const LATE: u64 = 1 << 50;

/// Leaves nothing as it is. What this KVM refuses or ignores shows in the snapshot and is the caller's to judge.
pub fn dirty(vcpu: &VcpuFd, variant: Variant, xcr0: u64, mcg_cap: u64) {
    system_registers(vcpu, variant);
    local_apic(vcpu, variant);
    extended_state(vcpu, xcr0);
    let mut debug_regs = vcpu.get_debug_regs().unwrap();
    debug_regs.db = [0x1111_1000, 0x2222_2000, 0x3333_3000, 0x4444_4000];
    (debug_regs.dr6, debug_regs.dr7) = (0xffff_0ff1, 0x0000_0403);
    vcpu.set_debug_regs(&debug_regs).unwrap();
    for (index, value) in msrs(mcg_cap) {
        set_msr(vcpu, index, value);
    }
    set_msr(vcpu, MSR_TSC, LATE);
    let now = read_msrs(vcpu, &[MSR_TSC]).unwrap()[0].data;
    set_msr(vcpu, MSR_TSC_DEADLINE, now + (1 << 40));
    general_registers(vcpu);
    events(vcpu);
    vcpu.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_HALTED }).unwrap();
}

fn general_registers(vcpu: &VcpuFd) {
    const ODD: u64 = 0x1eaf;
    let regs = kvm_regs {
        rax: ODD,
        rbx: ODD,
        rcx: ODD,
        rdx: ODD,
        rsi: ODD,
        rdi: ODD,
        rsp: ODD,
        rbp: ODD,
        r8: ODD,
        r9: ODD,
        r10: ODD,
        r11: ODD,
        r12: ODD,
        r13: ODD,
        r14: ODD,
        r15: ODD,
        rip: 0x2000,
        rflags: 0x46,
    };
    vcpu.set_regs(&regs).unwrap();
}

fn system_registers(vcpu: &VcpuFd, variant: Variant) {
    const CR0_MP_NE_WP: u64 = 1 << 1 | 1 << 5 | 1 << 16;
    const CR4_PAE_OSFXSR: u64 = 1 << 5 | 1 << 9;
    const EFER_SCE_NXE: u64 = 1 << 0 | 1 << 11;
    const X2APIC: u64 = 1 << 10;
    let mut sregs = vcpu.get_sregs().unwrap();
    let segments = [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss];
    for (segment, base) in segments.into_iter().zip((0x1_0000..).step_by(0x1_0000)) {
        (segment.base, segment.selector) = (base, 0x28);
    }
    (sregs.gdt.base, sregs.gdt.limit) = (0x6000, 0x7f);
    (sregs.idt.base, sregs.idt.limit) = (0x7000, 0xfff);
    (sregs.ldt.base, sregs.ldt.limit) = (0x8000, 0x7);
    (sregs.tr.base, sregs.tr.limit) = (0x9000, 0x1ff);
    sregs.cr0 |= CR0_MP_NE_WP;
    (sregs.cr2, sregs.cr3, sregs.cr8) = (0xdead_0000, 0x5000, 5);
    sregs.cr4 |= CR4_PAE_OSFXSR;
    sregs.efer |= EFER_SCE_NXE;
    if variant == Variant::DeadlineTimerX2apic {
        sregs.apic_base |= X2APIC;
    }
    vcpu.set_sregs(&sregs).unwrap();
}

/// Intel SDM volume 3, table "Local APIC Register Address Map".
fn local_apic(vcpu: &VcpuFd, variant: Variant) {
    const PERIODIC: u32 = 1 << 17 | 0x31;
    const DEADLINE: u32 = 2 << 17 | 0x31;
    const MASKED: u32 = 1 << 16;
    let timer = match variant {
        // Divided by one, which is the code 0xb, the full count takes seconds.
        Variant::CountingTimer => [(0x320, PERIODIC), (0x380, u32::MAX), (0x390, u32::MAX)],
        Variant::DeadlineTimerX2apic => [(0x320, DEADLINE), (0x380, 0), (0x390, 0)],
    };
    let registers = [
        // Task priority, spurious vector with the APIC on, destination format, logical destination.
        (0x80, 0x50),
        (0xf0, 0x1ff),
        (0xe0, 0x0fff_ffff),
        (0xd0, 0x0200_0000),
        // In service, trigger mode, requested: a vector in each; error status; the command register.
        (0x120, 4),
        (0x1a0, 8),
        (0x220, 2),
        (0x280, 0x40),
        (0x300, 0x0c_4042),
        (0x310, 0x0100_0000),
        // Local vectors: thermal, counter overflow as NMI, LINT0, LINT1, error; the timer's divider.
        (0x330, 0x33),
        (0x340, 0x400),
        (0x350, MASKED),
        (0x360, MASKED),
        (0x370, 0x32),
        (0x3e0, 0xb),
    ];
    let mut lapic = vcpu.get_lapic().unwrap();
    for (offset, value) in registers.into_iter().chain(timer) {
        set_register(&mut lapic, offset, value);
    }
    vcpu.set_lapic(&lapic).unwrap();
}

fn set_register(lapic: &mut kvm_lapic_state, offset: usize, value: u32) {
    for (to, from) in lapic.regs[offset..].iter_mut().zip(value.to_le_bytes()) {
        *to = from as _;
    }
}

/// Intel SDM volume 1, section "XSAVE Area".
fn extended_state(vcpu: &VcpuFd, xcr0: u64) {
    const X87_SSE_AVX: u64 = 7;
    let mut xcrs = vcpu.get_xcrs().unwrap();
    xcrs.xcrs[0].value = xcr0;
    vcpu.set_xcrs(&xcrs).unwrap();
    let mut xsave = vcpu.get_xsave().unwrap();
    // Control, status and tag words of the x87, MXCSR.
    (xsave.region[0], xsave.region[1], xsave.region[6]) = (0x3800_027f, 0xff, 0x1fa0);
    // x87 and XMM registers; the header; the upper halves of YMM.
    xsave.region[8..104].fill(0x1eaf_1eaf);
    xsave.region[128] = (xcr0 & X87_SSE_AVX) as u32;
    if xcr0 & 4 != 0 {
        xsave.region[144..208].fill(0x1eaf_1eaf);
    }
    // SAFETY: the buffer came from `get_xsave` of this vCPU, and no dynamic feature is enabled for this process.
    unsafe { vcpu.set_xsave(&xsave) }.unwrap();
}

/// MSRs with values that no vCPU starts with; some exist on some hosts only.
pub fn msrs(mcg_cap: u64) -> Vec<(u32, u64)> {
    const KERNEL: u64 = 0xffff_8000_0000_1000;
    const MCG_CAP_CMCI: u64 = 1 << 10;
    let mut all = vec![
        // SYSENTER, STAR, LSTAR, CSTAR, FMASK, KERNEL_GS_BASE, TSC_AUX, PAT.
        (0x174, 0x10),
        (0x175, KERNEL),
        (0x176, KERNEL),
        (0xc000_0081, 0x0023_0010_0000_0000),
        (0xc000_0082, KERNEL),
        (0xc000_0083, KERNEL),
        (0xc000_0084, 0x4_7700),
        (0xc000_0102, KERNEL),
        (0xc000_0103, 7),
        (0x277, 0x0606_0606_0606_0606),
        // AMD's legacy counters, which an old KVM gives to guests without a PMU: a selector and its counter.
        (0xc001_0000, 0x53_0076),
        (0xc001_0004, 0x1234),
        // OS visible workarounds: length and status.
        (0xc001_0140, 1),
        (0xc001_0141, 1),
        // TSC_ADJUST, SPEC_CTRL, VIRT_SPEC_CTRL, MISC_ENABLE, DEBUGCTL, HWCR, VM_HSAVE_PA.
        (0x3b, 0x1000),
        (0x48, 1),
        (0xc001_011f, 4),
        (0x1a0, 0),
        (0x1d9, 1),
        (0xc001_0015, 1 << 18),
        (0xc001_0117, 0x5000),
        // MISC_FEATURES_ENABLES, UMWAIT_CONTROL, TSX_CTRL, SMI_COUNT, XSS, MCG_STATUS.
        (0x140, 1),
        (0xe1, 0x100),
        (0x122, 1),
        (0x34, 5),
        (0xda0, 0x800),
        (0x17a, 4),
        // Memory types: default, one range, all fixed ranges.
        (0x2ff, 0xc06),
        (0x200, 0x8000_0006),
        (0x201, 0xffff_8000_0800),
        // KVM's clocks, async page faults, steal time, PV EOI, halt polling, page fault vector.
        (0x12, 0x1001),
        (0x11, 0x1100),
        (0x4b56_4d01, 0x1001),
        (0x4b56_4d00, 0x1100),
        (0x4b56_4d06, 0x50),
        (0x4b56_4d02, 0x2009),
        (0x4b56_4d03, 0x3001),
        (0x4b56_4d04, 0x4001),
        (0x4b56_4d05, 0),
    ];
    let fixed = [0x250, 0x258, 0x259].into_iter().chain(0x268..=0x26f);
    all.extend(fixed.map(|index| (index, 0x0606_0606_0606_0606)));
    for bank in 0..(mcg_cap as u32 & 0xff) {
        let registers = [u64::MAX, 0xb200_0000_0000_0000, 0xdead_0000, 0x86];
        all.extend((0x400 + 4 * bank..).zip(registers));
        if mcg_cap & MCG_CAP_CMCI != 0 {
            all.push((0x280 + bank, 0x4000_0001));
        }
    }
    all
}

/// Queues one of everything; the NMI comes the way that a monitor's comes.
fn events(vcpu: &VcpuFd) {
    let mut events = vcpu.get_vcpu_events().unwrap();
    events.flags = KVM_VCPUEVENT_VALID_SHADOW;
    (events.exception.injected, events.exception.nr) = (1, 6);
    (events.interrupt.injected, events.interrupt.nr, events.interrupt.shadow) = (1, 0x40, 1);
    events.nmi.masked = 1;
    vcpu.set_vcpu_events(&events).unwrap();
    vcpu.nmi().unwrap();
}

fn set_msr(vcpu: &VcpuFd, index: u32, value: u64) {
    let msrs = Msrs::from_entries(&[entry(&(index, value))]).unwrap();
    vcpu.set_msrs(&msrs).unwrap();
}
