# The gate: what ring 3 asks of ring 0. `ud2` is the one way in that works alike on hardware, under nested
# SVM and where ring 0 is emulated. Ring 0 may change the registers that a C call may change, no others.

# u64 gate_call(argument: rdi, argument: rsi, service number: rdx), run in ring 3.
.globl gate_call
gate_call:
    movl %edx, %eax
gate_site:
    ud2
    ret

trap_6:
    cmpq $gate_site, (%rsp)
    jne 1f
    addq $2, (%rsp)
    jmpq *gate_services(,%rax,8)
1:  pushq $0
    pushq $6
    jmp trap_fatal

# In the order of `Service` in gate.rs, the only caller of gate_call.
.balign 8
gate_services:
    .quad gate_wait, gate_registers, gate_virtio, gate_msrs, gate_cpuid, gate_triple, gate_stop
    .quad gate_read_debug, gate_write_debug, gate_read_system, gate_poison_system, gate_open_xsave
    .quad gate_read_msrs, gate_write_msrs, gate_vmrun, gate_vmcs_scan

# rdi = the interrupt count last seen, rsi = address of a virtio device's InterruptACK. Halts unless the count has moved
# on. The end-of-interrupt belongs here, not in the handler: while ring 3 is awake it polls, and must not be interrupted
# again.
gate_wait:
    cmpl irq_count, %edi
    jne 1f
    movl $0x80b, %ecx
    xorl %eax, %eax
    xorl %edx, %edx
    wrmsr
    sti                             # takes effect after the next instruction: no wake-up is lost
    hlt
1:  movl $3, (%rsi)                 # used buffers and configuration changes: the caller looks for both
    iretq

# Batches are unrolled, since a loop would take as many instructions again. All blocks of one have the same length, so they
# are entered so many before the end as there are items.

# rdi = the end of an array of `Access`, rsi = how many, at most ACCESSES. An access copies a 32-bit word between a register and
# the array itself, so reads and writes need no branch.
gate_registers:
    movq %rdi, %rdx
    imulq $-13, %rsi, %rsi
    addq $registers_end, %rsi
    jmpq *%rsi
registers_start:
.set left, ACCESSES
.rept ACCESSES
    {{disp32}} movl -20 * left(%rdx), %esi
    {{disp32}} movl -20 * left + 4(%rdx), %edi
    movsl
    .set left, left - 1
.endr
registers_end:
    iretq
.if registers_end - registers_start - 13 * ACCESSES
    .error "a block of gate_registers is not 13 bytes long"
.endif

# rdi = registers of a virtio-mmio device, rsi = `VirtioSetUp`: everything from the first look to DRIVER_OK in the order of
# virtio 1.3, sections 4.2.3 and 3.1.1, as far as the device plays along. As accesses of gate_registers it would take
# three times as many instructions. Returns the time.
gate_virtio:
    cmpl $0x74726976, (%rdi)        # MagicValue
    jne 2f
    cmpl $2, 0x4(%rdi)              # Version
    jne 2f
    movl 4(%rsi), %eax
    cmpl %eax, 0x8(%rdi)            # DeviceID
    jne 2f
    incl (%rsi)                     # progress
    movl $0, 0x70(%rdi)             # Status: reset, ACKNOWLEDGE, DRIVER; one bit at a time as strict monitors want it
    movl $1, 0x70(%rdi)
    movl $3, 0x70(%rdi)
    movl 20(%rsi), %eax
    testl %eax, %eax
    jz 3f                           # the lower word is zero after a reset
    movl $0, 0x24(%rdi)             # DriverFeaturesSel
    movl %eax, 0x20(%rdi)           # DriverFeatures
3:  movl $1, 0x24(%rdi)             # the upper word
    movl 8(%rsi), %eax
    movl %eax, 0x20(%rdi)           # DriverFeatures
    movl $11, 0x70(%rdi)            # FEATURES_OK, and whether it stays
    testl $8, 0x70(%rdi)
    jz 2f
    incl (%rsi)
    movl 12(%rsi), %ecx
    leaq 24(%rsi), %rdx
    xorl %r8d, %r8d
1:  movl %r8d, 0x30(%rdi)           # QueueSel
    movl (%rdx), %eax
    cmpl %eax, 0x34(%rdi)           # QueueSizeMax
    jb 2f
    movl %eax, 0x38(%rdi)           # QueueSize
    movl 4(%rdx), %eax
    movl %eax, 0x80(%rdi)           # QueueDesc; the upper halves of addresses are zero after a reset
    movl 8(%rdx), %eax
    movl %eax, 0x90(%rdi)           # QueueDriver
    movl 12(%rdx), %eax
    movl %eax, 0xa0(%rdi)           # QueueDevice
    movl $1, 0x44(%rdi)             # QueueReady
    addq $16, %rdx
    incl %r8d
    loop 1b
    incl (%rsi)
    movl 0x100(%rdi), %eax          # Config
    movl %eax, 16(%rsi)
    movl $15, 0x70(%rdi)            # DRIVER_OK
2:  rdtsc
    shlq $32, %rdx
    orq %rdx, %rax
    iretq

# rdi, rsi = start and end of an array of `MsrOperation`; at least one.
gate_msrs:
    movl (%rdi), %ecx
    cmpb $0, 4(%rdi)
    jne 1f
rdmsr_site:
    rdmsr
    movl %eax, 8(%rdi)
    movl %edx, 12(%rdi)
    jmp next_msr
1:  movl 8(%rdi), %eax
    movl 12(%rdi), %edx
wrmsr_site:
    wrmsr
next_msr:
    addq $16, %rdi
    cmpq %rsi, %rdi
    jne gate_msrs
    iretq

# rdi = the end of an array of `MsrOperation`, rsi = how many, at most MSRS: reads each.
gate_read_msrs:
    imulq $-20, %rsi, %rsi
    addq $read_msrs_end, %rsi
    jmpq *%rsi
msr_batches:
.set left, MSRS
.rept MSRS
    {{disp32}} movl -16 * left(%rdi), %ecx
    rdmsr
    {{disp32}} movl %eax, -16 * left + 8(%rdi)
    {{disp32}} movl %edx, -16 * left + 12(%rdi)
    .set left, left - 1
.endr
read_msrs_end:
    iretq
.if read_msrs_end - msr_batches - 20 * MSRS
    .error "a block of gate_read_msrs is not 20 bytes long"
.endif

# The same, but each is written first.
gate_write_msrs:
    imulq $-34, %rsi, %rsi
    addq $write_msrs_end, %rsi
    jmpq *%rsi
write_msrs_start:
.set left, MSRS
.rept MSRS
    {{disp32}} movl -16 * left(%rdi), %ecx
    {{disp32}} movl -16 * left + 8(%rdi), %eax
    {{disp32}} movl -16 * left + 12(%rdi), %edx
    wrmsr
    rdmsr
    {{disp32}} movl %eax, -16 * left + 8(%rdi)
    {{disp32}} movl %edx, -16 * left + 12(%rdi)
    .set left, left - 1
.endr
write_msrs_end:
    iretq
.if write_msrs_end - write_msrs_start - 34 * MSRS
    .error "a block of gate_write_msrs is not 34 bytes long"
.endif

# A general-protection fault at one of the instructions above is an answer, any other is fatal.
trap_13:
    cmpq $rdmsr_site, 8(%rsp)
    je 1f
    cmpq $wrmsr_site, 8(%rsp)
    je 1f
    cmpq $msr_batches, 8(%rsp)
    jb 2f
    cmpq $write_msrs_end, 8(%rsp)
    jb 3f
2:  pushq $13
    jmp trap_fatal
1:  movb $1, 5(%rdi)
    addq $8, %rsp
    movq $next_msr, (%rsp)
    iretq
# In a batch: whose value it is says the store of its lower half, 6 bytes with the displacement in the last 4, right behind the
# `rdmsr`. That is left out, also after a `wrmsr` that faulted.
3:  addq $8, %rsp
    popq %rax
    cmpb $0x30, 1(%rax)             # wrmsr
    jne 4f
    addq $2, %rax
4:  addq $2, %rax
    movslq 2(%rax), %rcx
    movb $1, -3(%rdi, %rcx)
    pushq %rax
    iretq

# rdi, rsi = start and end of an array of `CpuidQuery`; at least one.
gate_cpuid:
    movq %rbx, %r8
1:  movl (%rdi), %eax
    movl 4(%rdi), %ecx
    cpuid
    movl %eax, 8(%rdi)
    movl %ebx, 12(%rdi)
    movl %ecx, 16(%rdi)
    movl %edx, 20(%rdi)
    addq $24, %rdi
    cmpq %rsi, %rdi
    jne 1b
    movq %r8, %rbx
    iretq

# rdi = six words for DR0 to DR3, DR6 and DR7, which are written and then read.
gate_write_debug:
    movq (%rdi), %rax
    movq %rax, %dr0
    movq 8(%rdi), %rax
    movq %rax, %dr1
    movq 16(%rdi), %rax
    movq %rax, %dr2
    movq 24(%rdi), %rax
    movq %rax, %dr3
    movq 32(%rdi), %rax
    movq %rax, %dr6
    movq 40(%rdi), %rax
    movq %rax, %dr7

# The same, but they are only read.
gate_read_debug:
    movq %dr0, %rax
    movq %rax, (%rdi)
    movq %dr1, %rax
    movq %rax, 8(%rdi)
    movq %dr2, %rax
    movq %rax, 16(%rdi)
    movq %dr3, %rax
    movq %rax, 24(%rdi)
    movq %dr6, %rax
    movq %rax, 32(%rdi)
    movq %dr7, %rax
    movq %rax, 40(%rdi)
    iretq

# rdi = `SystemRegisters`.
gate_read_system:
    movq %cr0, %rax
    movq %rax, (%rdi)
    movq %cr2, %rax
    movq %rax, 8(%rdi)
    movq %cr3, %rax
    movq %rax, 16(%rdi)
    movq %cr4, %rax
    movq %rax, 24(%rdi)
    sgdt 32(%rdi)
    sidt 48(%rdi)
    sldt 64(%rdi)
    str 66(%rdi)
    movw %ds, 68(%rdi)
    movw %es, 70(%rdi)
    movw %fs, 72(%rdi)
    movw %gs, 74(%rdi)
    iretq

# rdi = an address for CR2. LDTR gets the table that nobody uses, and segment registers that 64-bit code has no use for the
# selector of SS: from here, since where ring 0 is emulated KVM does not hear of what ring 3 loads.
gate_poison_system:
    movq %rdi, %cr2
    movl $USER_DATA, %eax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %fs
    movw %ax, %gs
    movl $LOCAL_TABLE, %eax
    lldt %ax
    iretq

# rdi = two words for the bytes of state that XCR0 enables (CPUID leaf 0xd), before and after it is set to rsi. Turns
# CR4.OSXSAVE on.
gate_open_xsave:
    movq %rbx, %r8
    movl $0xd, %eax
    xorl %ecx, %ecx
    cpuid
    movl %ebx, (%rdi)
    movq %cr4, %rax
    orl $0x40000, %eax
    movq %rax, %cr4
    xorl %ecx, %ecx
    movl %esi, %eax
    xorl %edx, %edx
    xsetbv
    movl $0xd, %eax
    cpuid
    movl %ebx, 4(%rdi)
    movq %r8, %rbx
    iretq

# rdi = the address of a control block that cannot be run. EFER.SVME is set. Afterwards interrupts and NMIs are possible again,
# whatever the failure has made of that (the global interrupt flag).
gate_vmrun:
    movq %rdi, %rax
    vmrun %rax
    stgi
    iretq

# rdi = a `Scan` of vmx.rs: addresses of a VMXON region and of a VMCS, room for how far it came and for an error, and a byte for
# each field that there could be, which is 1 if it can be read. Steps are counted in rsi. CR0.NE and CR4.VMXE are set for it.
gate_vmcs_scan:
    movq %cr0, %r8
    movq %cr4, %r9
    movq %r8, %rax
    orl $0x20, %eax
    movq %rax, %cr0
    movq %r9, %rax
    orl $0x2000, %eax
    movq %rax, %cr4
    xorl %esi, %esi
    vmxon (%rdi)
    jbe 3f
    incl %esi
    vmclear 8(%rdi)
    jbe 2f
    incl %esi
    vmptrld 8(%rdi)
    jbe 2f
    incl %esi
    xorl %ecx, %ecx
1:  movl %ecx, %eax                 # width, type and index, with a reserved bit between the first two and none at the end
    andl $0x7ff, %eax
    addl %eax, %eax
    movl %ecx, %edx
    shrl $11, %edx
    shll $13, %edx
    orl %edx, %eax
    vmread %rax, %rdx
    seta 32(%rdi,%rcx)
    incl %ecx
    cmpl $0x2000, %ecx
    jb 1b
    movl $0x2032, %eax              # TSC_MULTIPLIER; then the error of the last instruction that failed
    vmread %rax, %rdx
    movl $0x4400, %eax
    vmread %rax, 24(%rdi)
    vmclear 8(%rdi)
2:  vmxoff
3:  movq %rsi, 16(%rdi)
    movq %r9, %cr4
    movq %r8, %cr0
    iretq

# An exception that cannot be delivered: shutdown.
gate_triple:
    lidt empty_idt_pointer
    ud2

gate_stop:
    cli
    hlt
    jmp gate_stop
