# Descriptor tables, page tables, stacks and records of ring 0, all finished by the assembler.
# The nucleus lies at 1 MiB (link.ld asserts it), so an address in it is 0x100000 + its offset from nucleus_base.

.set NUCLEUS_HIGH, 0x10             # bits 16 and up of every address in the nucleus
.set KERNEL_CODE, 0x10
.set USER_DATA, 0x28 | 3
.set USER_CODE, 0x30 | 3
.set TASK_STATE, 0x40
.set LOCAL_TABLE, 0x50

.macro interrupt_gate handler, stack=0
    .word \handler - nucleus_base, KERNEL_CODE
    .byte \stack, 0x8e              # present, interrupt gate
    .word NUCLEUS_HIGH
    .quad 0
.endm
.macro no_gate
    .quad 0, 0
.endm

.balign 64
idt:
.irp vector, 0, 1
    interrupt_gate trap_\vector
.endr
    interrupt_gate trap_2, 1
.irp vector, 3, 4, 5, 6, 7
    interrupt_gate trap_\vector
.endr
    interrupt_gate trap_8, 2
.irp vector, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31
    interrupt_gate trap_\vector
.endr
    no_gate
    interrupt_gate trap_kept        # 33
.rept DEVICE_VECTOR - 34
    no_gate
.endr
    interrupt_gate trap_device
.rept SPURIOUS_VECTOR - DEVICE_VECTOR - 1
    no_gate
.endr
    interrupt_gate trap_spurious
.rept 97 - SPURIOUS_VECTOR - 1
    no_gate
.endr
    interrupt_gate trap_kept        # 97
idt_end:

.balign 16
gdt:
    .quad 0, 0
    .quad 0x00af9b000000ffff        # KERNEL_CODE: 64-bit
    .quad 0x00cf93000000ffff        # data of ring 0, for far returns there
    .quad 0
    .quad 0x00cff3000000ffff        # USER_DATA
    .quad 0x00affb000000ffff        # USER_CODE: 64-bit
    .quad 0
    .word io_permissions_end - task_state - 1, task_state - nucleus_base # TASK_STATE
    .byte NUCLEUS_HIGH, 0x89, 0, 0
    .quad 0
    .word 7, gdt - nucleus_base     # LOCAL_TABLE, which nobody uses: LDTR is poisoned with it
    .byte NUCLEUS_HIGH, 0x82, 0, 0
    .quad 0
gdt_end:

gdt_pointer:
    .word gdt_end - gdt - 1
    .quad gdt
idt_pointer:
    .word idt_end - idt - 1
    .quad idt
empty_idt_pointer:
    .word 0
    .quad 0

.balign 16
task_state:
    .long 0
    .quad boot_frame_end, 0, 0      # stack of ring 0
    .quad 0
    .quad nmi_stack_end, fault_stack_end, 0, 0, 0, 0, 0
    .quad 0
    .word 0, io_permissions - task_state

.balign 16
fatal_frame:
    .quad {fatal}, USER_CODE, 0x3002, fatal_stack_end - 8, USER_DATA

# What ring 0 writes. First read by `records.rs`, whose types give the layouts.
.balign 64
.globl boot_record, irq_count, fatal_vector, exception_records
.globl nmi_total, nmi_by_reason, nmi_records, early_fpu, first_look
boot_record:        .quad 0, 0, 0   # TSC at entry, TSC on leaving ring 0, hvm_start_info
irq_count:          .long 0
fatal_vector:       .long 0
exception_records:  .fill 32 * 4, 8, 0
nmi_total:          .long 0, 0
nmi_by_reason:      .long 0, 0, 0, 0
nmi_records:        .fill NMI_RECORDS * 3, 8, 0
.balign 16
early_fpu:          .fill 512, 1, 0
first_look:         .fill 184, 1, 0

.balign 16
    .fill 24, 8, 0
nmi_stack_end:
    .fill 32, 8, 0
fault_stack_end:
    .fill 32, 8, 0
.balign 16
# The stack of ring 0 has the way to ring 3 lying on it ready made: IOPL 3, interrupts on.
boot_frame:
    .quad first_in_ring3, USER_CODE, 0x3202, agent_stack_end - 8, USER_DATA
.balign 16
boot_frame_end:

# Identity map: the first GiB as memory, 3-4 GiB (devices, I/O APIC) uncached; all of it open to ring 3.
.balign 4096
page_map:
    .quad page_directories + 0x7
    .fill 511, 8, 0
page_directories:
    .quad memory_directory + 0x7, 0, 0, device_directory + 0x7
    .fill 508, 8, 0
memory_directory:
    .set address, 0
    .rept 512
    .quad address + 0x87
    .set address, address + 0x200000
    .endr
device_directory:
    .set address, 0xc0000000
    .rept 512
    .quad address + 0x9f
    .set address, address + 0x200000
    .endr

# Every port is open to ring 3. IOPL says so too, but a software KVM forgets IOPL and looks here.
io_permissions:
    .fill 8192, 1, 0
    .byte 0xff
io_permissions_end:

.section .bss.large.stacks, "aw", @nobits
.balign 4096
    .skip 16384
fatal_stack_end:
    .skip 131072
agent_stack_end:
