# PVH entry in 32-bit protected mode without paging (EBX = hvm_start_info), then straight to ring 3.
# Everything that could be computed is in tables.s, since an emulated ring 0 costs 1 us an instruction.

.section .note.pvh, "a", @note
.balign 4
.long 4, 8, 18                  # name size, descriptor size, XEN_ELFNOTE_PHYS32_ENTRY
.asciz "Xen"
.quad pvh_entry

.section .nucleus, "awx", @progbits
.balign 4096
nucleus_base:

.code32
.globl pvh_entry
pvh_entry:
    movl %esp, first_look
    movl 24(%ebx), %esp             # the command line
    cmpl $LOOK_FIRST, (%esp)
    je first_looking
looked:
    rdtsc
    movl %eax, boot_record
    movl %edx, boot_record + 4
    movl %ebx, boot_record + 16
    movl $boot_frame, %esp          # exceptions from here on push below it
    lgdtl gdt_pointer
    movl $0x620, %eax               # PAE, OSFXSR, OSXMMEXCPT
    movl %eax, %cr4
    movl $page_map, %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx          # EFER = LME
    movl $0x100, %eax
    xorl %edx, %edx
    wrmsr
    movl $0x80010033, %eax          # PG, WP, NE, ET, MP, PE
    movl %eax, %cr0
    ljmpl $KERNEL_CODE, $long_mode

# What this way to ring 3 would change, for the residue check: `FirstLook` in first_look.rs has the layout.
first_looking:
    movl %eax, first_look + 4
    movl %ecx, first_look + 8
    movl %edx, first_look + 12
    movw %cs, first_look + 16
    movw %ss, first_look + 18
    movw %ds, first_look + 20
    movw %es, first_look + 22
    movw %fs, first_look + 24
    movw %gs, first_look + 26
    sldt first_look + 28
    str first_look + 30
    sgdtl first_look + 32
    sidtl first_look + 40
    movl %cr0, %eax
    movl %eax, first_look + 48
    movl %cr2, %eax
    movl %eax, first_look + 52
    movl %cr3, %eax
    movl %eax, first_look + 56
    movl %cr4, %eax
    movl %eax, first_look + 60
    movl $0xc0000080, %ecx          # EFER
    rdmsr
    movl %eax, first_look + 64
    movl $0x1b, %ecx                # APIC base
    rdmsr
    movl %eax, first_look + 68
    movl 0xfee000f0, %eax           # spurious-interrupt vector register, not yet in x2APIC mode
    movl %eax, first_look + 72
    movl 0xfee00130, %eax           # what is in service, by vectors 96 to 127
    movl %eax, first_look + 76
    incl first_look + 80
    jmp looked

.code64
long_mode:
    lidt idt_pointer
    movl $TASK_STATE, %eax
    ltr %ax
    movl $0x1b, %ecx                # APIC base: x2APIC on; the LVTs stay as the loader set them
    rdmsr
    orl $0xc00, %eax
    wrmsr
    movl $0x80f, %ecx               # spurious-interrupt vector register: APIC on
    movl $(0x100 | SPURIOUS_VECTOR), %eax
    xorl %edx, %edx
    wrmsr
    rdtsc                           # for comparing ring 3's clock with ours
    movl %eax, boot_record + 8
    movl %edx, boot_record + 12
    iretq                           # boot_frame

# What the floating-point unit and the other general registers hold before any Rust code uses them; ring 0 has left them
# alone.
first_in_ring3:
    fxsave64 early_fpu
    movq %rbx, first_look + 88
    movq %rbp, first_look + 96
    movq %rsi, first_look + 104
    movq %rdi, first_look + 112
    movq %r8, first_look + 120
    movq %r9, first_look + 128
    movq %r10, first_look + 136
    movq %r11, first_look + 144
    movq %r12, first_look + 152
    movq %r13, first_look + 160
    movq %r14, first_look + 168
    movq %r15, first_look + 176
    jmp {agent}
