//! `--kernel`: other guests, and the ways in which they end.

use crate::harness::guest::Guest;
use crate::harness::{
    Outcome, Started, cleanslate, eventually, file, machine_of, run, signal, temp_dir,
};

/// Registers of the first virtio device.
const VIRTIO: u32 = 0xd000_0000;

#[track_caller]
fn boot(guest: &Guest, extra: &[&str]) -> Outcome {
    let dir = temp_dir();
    let kernel = file(&dir, "guest.elf", &guest.elf());
    run(&[&["run", "--kernel", kernel.to_str().unwrap()], extra].concat())
}

#[test]
fn the_console_is_stdout() {
    let outcome = boot(&Guest::new().print("hello\n").power_off(), &[]).expect_status(0);
    assert_eq!(outcome.stdout, "hello\n");
}

#[test]
fn each_end_has_its_message_and_its_status() {
    let check = |guest: Guest, status, message| {
        boot(&guest, &[]).expect_status(status).expect_stderr(message).expect_one_line_of_stderr();
    };
    check(Guest::new().power_off(), 0, "the guest turned the machine off");
    check(Guest::new().out(0x64, 0xfe).halt(), 3, "the guest asked for a reset (i8042)");
    check(Guest::new().out(0xcf9, 0x06).halt(), 3, "the guest asked for a reset (cf9)");
    check(Guest::new().out(0x600, 0x01).halt(), 3, "the guest asked for a reset (acpi)");
    check(Guest::new().triple_fault(), 4, "the guest died of a triple fault");
}

#[test]
fn an_instruction_that_kvm_cannot_emulate_is_shown_with_its_bytes() {
    // A KVM that runs ring 0 on the processor meets a triple fault instead: there is no interrupt table.
    let guest =
        Guest::new().raw(&[0x0f, 0x01, 0x1d]).raw(&0x1f_fff0_u32.to_le_bytes()).breakpoint().halt();
    let outcome = boot(&guest, &[]);
    match outcome.status {
        Some(5) => {
            outcome
                .expect_stderr("could not emulate an instruction")
                .expect_stderr("rip 0x200007, bytes cc fa f4");
        }
        _ => {
            outcome.expect_status(4);
        }
    }
}

#[test]
fn resets_in_place_come_first_as_many_as_were_asked_for() {
    let outcome = boot(&Guest::new().print("life\n").out(0x64, 0xfe).halt(), &["--resets", "3"])
        .expect_status(3);
    assert_eq!(outcome.stdout, "life\n".repeat(4));
    assert_eq!(outcome.stderr.matches("reset in place (i8042)").count(), 3, "{outcome}");
}

#[test]
fn a_reset_masks_the_pins_of_the_io_apic() {
    // Each life looks at pin 7 first: mov [0xfec00000], 0x1e; test dword [0xfec00010], 0x10000; jnz masked
    let masked = [0xf7, 0x05, 0x10, 0, 0xc0, 0xfe, 0, 0, 1, 0];
    let guest = Guest::new().store(0xfec0_0000, 0x1e).raw(&masked);
    let guest = guest.raw(&[0x75, 7 + 4]).print("!").halt();
    // Then it unmasks it and resets.
    let guest = guest.print(".").store(0xfec0_0010, 0x41).out(0x64, 0xfe).halt();
    let outcome = boot(&guest, &["--resets", "2"]).expect_status(3);
    assert_eq!(outcome.stdout, "...", "{outcome}");
}

#[test]
fn two_processors_that_both_ask_for_a_reset_get_one_each_life() {
    // The second processor runs real-mode code at 0x8000: mov al, 0xfe; out 0x64, al; hlt
    let (low, high) = (0x64e6_feb0, 0x00fd_ebf4);
    let icr = |guest: Guest, command| guest.store(0xfee0_0310, 1 << 24).store(0xfee0_0300, command);
    let guest = Guest::new().print("L").store(0x8000, low).store(0x8004, high);
    // INIT, start-up at page 8, then the same wish from the first processor.
    let guest = icr(icr(guest.store(0xfee0_00f0, 0x1ff), 0x4500), 0x4608);
    let guest = guest.out(0x64, 0xfe).halt();
    let outcome = boot(&guest, &["--vcpus", "2", "--resets", "200"]).expect_status(3);
    assert_eq!(outcome.stdout, "L".repeat(201), "{outcome}");
}

#[test]
fn a_console_that_nobody_reads_does_not_keep_the_machine() {
    // 1: out dx, al; jmp 1b, into a pipe that is full after 64 KiB.
    let guest = Guest::new().raw(&[0x66, 0xba, 0xf8, 0x03, 0xb0, b'.', 0xee, 0xeb, 0xfd]);
    let dir = temp_dir();
    let kernel = file(&dir, "guest.elf", &guest.elf());
    let mut program = Started::new(cleanslate(&["run", "--kernel", kernel.to_str().unwrap()]));
    let _unread = program.child.stdout.take().unwrap();
    let tasks = format!("/proc/{}/task", machine_of(&program.child));
    eventually("the vCPU waits for the reader", || {
        std::fs::read_dir(&tasks).unwrap().any(|task| {
            let waits_in = std::fs::read_to_string(task.unwrap().path().join("wchan"));
            waits_in.is_ok_and(|name| name.contains("pipe_write"))
        })
    });
    signal(&program.child, rustix::process::Signal::TERM);
    program.finish("cleanslate run --kernel, unread").expect_status(130);
}

#[test]
fn a_halted_guest_is_ended_by_ctrl_c() {
    is_ended_by_a_signal(&Guest::new().halt());
}

#[test]
fn a_guest_that_never_leaves_its_loop_is_ended_by_ctrl_c() {
    // 1: jmp 1b
    is_ended_by_a_signal(&Guest::new().raw(&[0xeb, 0xfe]));
}

#[test]
fn a_guest_that_prints_for_ever_is_ended_by_ctrl_c() {
    // mov dx, 0x3f8; mov al, '.'; 1: out dx, al; jmp 1b
    is_ended_by_a_signal(
        &Guest::new().raw(&[0x66, 0xba, 0xf8, 0x03, 0xb0, b'.', 0xee, 0xeb, 0xfd]),
    );
}

#[track_caller]
fn is_ended_by_a_signal(guest: &Guest) {
    let dir = temp_dir();
    let kernel = file(&dir, "guest.elf", &guest.elf());
    let program = Started::new(cleanslate(&["run", "--kernel", kernel.to_str().unwrap()]));
    let status = format!("/proc/{}/task", machine_of(&program.child));
    eventually("the vCPU thread exists", || {
        let tasks = std::fs::read_dir(&status).map(|dir| dir.count()).unwrap_or_default();
        tasks >= 3
    });
    signal(&program.child, rustix::process::Signal::TERM);
    program
        .finish("cleanslate run --kernel, terminated")
        .expect_status(130)
        .expect_stderr("interrupted");
}

#[test]
fn the_command_line_and_the_initrd_reach_the_guest() {
    // The guest prints the user's part of its command line, which comes behind "virtio_mmio.device=4K@0xd0000000:5 ", and
    // the first bytes of its initrd. Start info is in EBX.
    // mov esi, [ebx + 24]; add esi, 35; mov dx, 0x3f8; mov ecx, 5; rep outsb
    let command_line =
        [0x8b, 0x73, 24, 0x83, 0xc6, 35, 0x66, 0xba, 0xf8, 0x03, 0xb9, 5, 0, 0, 0, 0xf3, 0x6e];
    // mov esi, [ebx + 16]; mov esi, [esi]; mov ecx, 6; rep outsb
    let initrd = [0x8b, 0x73, 16, 0x8b, 0x36, 0xb9, 6, 0, 0, 0, 0xf3, 0x6e];
    let dir = temp_dir();
    let disk = file(&dir, "initrd", b"ramdisk-and-more");
    let guest = Guest::new().raw(&command_line).raw(&initrd).power_off();
    let outcome = boot(&guest, &["--cmdline", "quiet panic=1", "--initrd", disk.to_str().unwrap()])
        .expect_status(0);
    assert_eq!(outcome.stdout, "quietramdis", "{outcome}");
}

#[test]
fn ram_is_the_template_again_after_a_reset() {
    // cmp dword [0x300000], 0; jne dirty; write to it and reset.
    let guest = Guest::new()
        .raw(&[0x83, 0x3d, 0x00, 0x00, 0x30, 0x00, 0x00])
        .raw(&[0x75, 7 + 10 + 7 + 4]) // over what follows
        .print(".")
        .store(0x30_0000, 0x1234_5678)
        .out(0x64, 0xfe)
        .halt()
        .print("dirty")
        .halt();
    let outcome = boot(&guest, &["--resets", "2"]).expect_status(3);
    assert_eq!(outcome.stdout, "...", "{outcome}");
}

/// Prints bit 0 of a 32-bit register of the first virtio device: and al, 1; add al, '0'; mov dx, 0x3f8; out dx, al
fn print_bit(guest: Guest, offset: u32) -> Guest {
    guest.load(VIRTIO + offset).raw(&[0x24, 1, 0x04, b'0', 0x66, 0xba, 0xf8, 0x03, 0xee])
}

#[test]
fn a_driver_reads_what_it_wrote_however_many_writes_wait() {
    // DeviceFeaturesSel decides which half DeviceFeatures shows; bit 32 is VERSION_1, bit 0 is none of this device.
    let mut guest = Guest::new();
    for writes in [0, 1, 2, 3, 168, 169, 170, 171, 400, 401] {
        guest = (0..writes).fold(guest, |guest, i| guest.store(VIRTIO + 0x14, (i + 1) % 2));
        guest = print_bit(guest, 0x10);
    }
    // Status to FEATURES_OK, then queue 1 alone is ready.
    for (offset, value) in [(0x70, 1), (0x70, 3), (0x24, 1), (0x20, 1), (0x70, 11), (0x30, 1)] {
        guest = guest.store(VIRTIO + offset, value);
    }
    guest = guest.store(VIRTIO + 0x44, 1).print(" ");
    for queue in [0, 1, 2] {
        guest = print_bit(guest.store(VIRTIO + 0x30, queue), 0x44);
    }
    let outcome = boot(&guest.power_off(), &[]).expect_status(0);
    assert_eq!(outcome.stdout, "0101010101 010", "{outcome}");
}

#[test]
fn writes_that_wait_do_not_survive_a_reset() {
    let check = |end: fn(Guest) -> Guest, status| {
        let guest = print_bit(Guest::new(), 0x10).store(VIRTIO + 0x14, 1);
        let outcome = boot(&end(guest), &["--resets", "2"]).expect_status(status);
        assert_eq!(outcome.stdout, "000", "{outcome}");
    };
    check(|guest| guest.out(0x64, 0xfe).halt(), 3);
    check(Guest::triple_fault, 4);
}

#[test]
fn an_elf_without_the_note_starts_in_long_mode() {
    // A 64-bit immediate has no meaning in 32-bit code. mov rax, 1 << 40; shr rax, 40; add al, '0'; mov dx, 0x3f8; out dx, al
    let long = [0x48, 0xb8, 0, 0, 0, 0, 0, 1, 0, 0, 0x48, 0xc1, 0xe8, 40, 0x04, b'0'];
    let guest = Guest::new().raw(&long).raw(&[0x66, 0xba, 0xf8, 0x03, 0xee]).power_off();
    let dir = temp_dir();
    let kernel = file(&dir, "guest.elf", &guest.elf_without_note());
    let outcome = run(&["run", "--kernel", kernel.to_str().unwrap()]).expect_status(0);
    assert_eq!(outcome.stdout, "1");
}

#[test]
fn a_bzimage_starts_at_its_64_bit_entry_with_boot_parameters() {
    // The signature of the setup header, as it stands in the zero page: mov al, [rsi + 0x202] and so on.
    let print = |at: u8| [0x8a, 0x86, at, 0x02, 0, 0, 0x66, 0xba, 0xf8, 0x03, 0xee];
    let guest =
        [2, 3, 4, 5].iter().fold(Guest::new(), |guest, at| guest.raw(&print(*at))).power_off();
    let dir = temp_dir();
    let kernel = file(&dir, "bzImage", &guest.bzimage());
    let outcome = run(&["run", "--kernel", kernel.to_str().unwrap()]).expect_status(0);
    assert_eq!(outcome.stdout, "HdrS");
}

#[test]
fn a_console_that_would_block_is_waited_for() {
    let guest = Guest::new().raw(&[0x66, 0xba, 0xf8, 0x03, 0xb0, b'.', 0xee, 0xeb, 0xfd]);
    let dir = temp_dir();
    let kernel = file(&dir, "guest.elf", &guest.elf());
    let mut command = cleanslate(&["run", "--kernel", kernel.to_str().unwrap()]);
    let (_unread, stdout) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::NONBLOCK).unwrap();
    command.stdout(stdout);
    let program = Started::new(command);
    let tasks = format!("/proc/{}/task", machine_of(&program.child));
    eventually("the vCPU waits for room", || {
        std::fs::read_dir(&tasks).unwrap().any(|thread| {
            let thread = thread.unwrap().path();
            let call = std::fs::read_to_string(thread.join("syscall")).unwrap_or_default();
            call.split(' ').next().is_some_and(|number| number == "271") // ppoll
                && std::fs::read_to_string(thread.join("comm")).is_ok_and(|name| name == "vcpu0\n")
        })
    });
    signal(&program.child, rustix::process::Signal::TERM);
    program.finish("cleanslate run --kernel, full").expect_status(130);
}

#[test]
fn an_interrupt_that_a_vcpu_causes_is_delivered() {
    // Pin 4 gets vector 0x20 and is not masked; then the serial port's transmitter is empty, which it is allowed to say.
    let (select, window) = (0xfec0_0000, 0xfec0_0010);
    let guest = Guest::new()
        .store(select, 0x10 + 2 * 4)
        .store(window, 0x20)
        .out(0x3f9, 2)
        .print("on")
        .power_off();
    let outcome = boot(&guest, &[]).expect_status(0);
    assert_eq!(outcome.stdout, "on", "{outcome}");
}
