# The last instructions of a poisoned life, run in ring 3: a mark in every general register and in XMM0 to XMM7, which the
# agent uses until then, and no way back. What the reset itself needs in RAX and RDX is part of their marks.

.macro marks
    .irp number, 0, 1, 2, 3, 4, 5, 6, 7
    movq mark, %xmm\number
    .endr
    movabsq $MARK + 1, %rcx
    movabsq $MARK + 3, %rbx
    movabsq $MARK + 4, %rsp         # an interrupt has a stack of its own
    movabsq $MARK + 5, %rbp
    movabsq $MARK + 6, %rsi
    movabsq $MARK + 7, %rdi
    .irp number, 8, 9, 10, 11, 12, 13, 14, 15
    movabsq $MARK + \number, %r\number
    .endr
.endm

mark:
    .quad MARK

# edi = a port whose write with the byte in esi resets the machine.
.globl leave_by_port
leave_by_port:
    movabsq $MARK, %rax
    movq %rax, %rdx
    movw %di, %dx
    movb %sil, %al
    marks
    outb %al, %dx
1:  pause
    jmp 1b

.globl leave_by_triple_fault
leave_by_triple_fault:
    movl $SERVICE_TRIPLE, %eax
    movabsq $MARK + 2, %rdx
    marks
    jmp gate_site

# Tells the host, and halts until it resets the machine: counters of cycles stand still meanwhile.
.globl leave_to_host
leave_to_host:
    movabsq $MARK, %rax
    movabsq $MARK + 2, %rdx
    marks
    outb %al, $REST_PORT
    movl $SERVICE_STOP, %eax
    jmp gate_site
