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

# What the floating-point unit holds before any Rust code uses it; ring 0 has left it alone.
first_in_ring3:
    fxsave64 early_fpu
    jmp {agent}
