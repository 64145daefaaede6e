# Exceptions, NMIs and interrupts. Each is recorded; ring 3 reads the records as plain memory.

.macro trap vector
trap_\vector:
    pushq $0
    pushq $\vector
    jmp trap_fatal
.endm
.macro trap_with_error vector
trap_\vector:
    pushq $\vector
    jmp trap_fatal
.endm

.irp vector, 0, 3, 4, 5, 7, 9, 15, 16, 18, 19, 20, 22, 23, 24, 25, 26, 27, 28, 31
    trap \vector
.endr
.irp vector, 8, 10, 11, 12, 14, 17, 21, 29, 30
    trap_with_error \vector
.endr

# Stack: vector, error code, rip, cs, rflags, rsp, ss. Nothing returns from here, so no register is kept: the agent's
# last words run on a stack of their own.
trap_fatal:
    popq %rax
    movl %eax, fatal_vector
    shll $5, %eax
    incl exception_records(%rax)
    popq exception_records + 8(%rax)
    popq exception_records + 16(%rax)
    movq %cr2, %rcx
    movq %rcx, exception_records + 24(%rax)
    movl $fatal_frame, %esp
    iretq

# A debug exception means that breakpoints were left armed by an earlier life: recorded, not fatal.
trap_1:
    incl exception_records + 32
    pushq 0(%rsp)
    popq exception_records + 32 + 16
    orl $0x10000, 16(%rsp)          # RF: pass the instruction this time
    iretq

# The reason is read here since it is a state, not an event; every NMI counts, the first ones leave details.
trap_2:
    pushq %rax
    pushq %rcx
    pushq %rdx
    movl nmi_total, %ecx
    incl nmi_total
    inb $0x61, %al
    movzbl %al, %eax
    movl %eax, %edx
    shrl $6, %edx
    incl nmi_by_reason(,%rdx,4)
    cmpl $NMI_RECORDS, %ecx
    jae 1f
    imull $24, %ecx, %ecx
    movl %eax, nmi_records(%rcx)
    rdtsc
    movl %eax, nmi_records + 8(%rcx)
    movl %edx, nmi_records + 12(%rcx)
    movq 24(%rsp), %rax
    movq %rax, nmi_records + 16(%rcx)
1:  popq %rdx
    popq %rcx
    popq %rax
    iretq

# Vectors 33 and 97 are sent by the residue check alone, one to stay requested and one to stay in service: their end is
# never told to the local APIC.
trap_kept:
    iretq

# Its end-of-interrupt is given by gate_wait.
trap_device:
    incl irq_count
trap_spurious:
    iretq
