//! Wrong usage and wrong input: one line, exit status 2, nothing left.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;

use crate::harness::guest::Guest;
use crate::harness::{Outcome, Started, cleanslate, file, run, skipped, temp_dir};

/// Expects one line on stderr that contains `message`, and nothing on stdout.
#[track_caller]
fn refused(outcome: Outcome, message: &str) {
    let outcome = outcome.expect_status(2).expect_stderr(message).expect_one_line_of_stderr();
    assert!(outcome.stdout.is_empty(), "{outcome}");
}

#[test]
fn sizes_that_make_no_machine_are_refused() {
    let check =
        |arguments: &[&str], message| refused(run(&[&["run"], arguments].concat()), message);
    check(&["--mem", "0"], "--mem 0 MiB is not between");
    check(&["--mem", "1048576"], "--mem 1048576 MiB is not between");
    check(&["--mem", "18446744073709551615"], "is not between");
    check(&["--vcpus", "0"], "--vcpus 0 is not between 1 and");
    check(&["--vcpus", "9999"], "--vcpus 9999 is not between 1 and");
}

#[test]
fn a_kernel_that_is_none_is_refused_with_its_path_and_its_problem() {
    let dir = temp_dir();
    let check = |path: &std::path::Path, message: &str| {
        let path = path.to_str().unwrap();
        let outcome = run(&["run", "--kernel", path]);
        assert!(outcome.stderr.contains(path), "the path is missing: {outcome}");
        refused(outcome, message);
    };
    let good = Guest::new().halt();
    check(&dir.path().join("missing"), "No such file");
    check(dir.path(), "not a regular file");
    check(&file(&dir, "empty", b""), "is empty");
    check(&file(&dir, "script", b"#!/bin/sh\nexit 0\n"), "neither an ELF executable nor a bzImage");
    check(&file(&dir, "arm", &good.elf_for(183, 0x1f_fff0)), "another machine (number 183)");
    check(&file(&dir, "high", &good.elf_for(62, 0x7fff_0000)), "outside RAM");
    check(&file(&dir, "low", &good.elf_for(62, 0x1000)), "below 1 MiB");
    check(&file(&dir, "cut", &good.elf()[..100]), "truncated");
}

#[test]
fn an_agent_that_is_none_is_refused_with_its_path_and_its_problem() {
    let dir = temp_dir();
    let check = |path: &std::path::Path, message: &str| {
        let path = path.to_str().unwrap();
        let outcome = run(&["run", "--agent", path]);
        assert!(outcome.stderr.contains(&format!("agent {path:?}")), "{outcome}");
        refused(outcome, message);
    };
    let good = Guest::new().halt();
    check(&dir.path().join("missing"), "No such file");
    check(dir.path(), "not a regular file");
    check(&file(&dir, "script", b"#!/bin/sh\nexit 0\n"), "neither an ELF executable nor a bzImage");
    check(&file(&dir, "plain", &good.elf_without_note()), "has no PVH note");
    let behind = good.elf_for(62, 0xc0_0000);
    check(&file(&dir, "high", &behind), "does not end below 12 MiB");
    refused(run(&["run", "--agent", "a", "--kernel", "b"]), "cannot be used with");
}

#[test]
fn an_initrd_that_does_not_fit_is_refused() {
    let dir = temp_dir();
    let kernel = file(&dir, "guest.elf", &Guest::new().halt().elf());
    let initrd = dir.path().join("initrd");
    std::fs::File::create(&initrd).unwrap().set_len(1 << 30).unwrap();
    let outcome =
        run(&["run", "--kernel", kernel.to_str().unwrap(), "--initrd", initrd.to_str().unwrap()]);
    refused(outcome, "does not fit between the kernel and the end of RAM");
}

#[test]
fn a_command_line_that_is_too_long_is_refused() {
    for len in [1950, 2100, 10_000] {
        let long = "x".repeat(len);
        refused(run(&["run", "--cmdline", &long]), "it must have fewer than 2048");
    }
    run(&["run", "--cmdline", &"x".repeat(1700)]).expect_status(0);
}

#[test]
fn a_socket_path_in_use_is_refused_and_left_alone() {
    let dir = temp_dir();
    let live = dir.path().join("live");
    let _listener = UnixListener::bind(&live).unwrap();
    let plain = file(&dir, "plain", b"mine");
    for path in [&live, &plain] {
        refused(run(&["run", "--uds", path.to_str().unwrap()]), path.to_str().unwrap());
        assert!(path.exists());
    }
    assert_eq!(std::fs::read(&plain).unwrap(), b"mine");
}

#[test]
fn a_socket_path_that_no_socket_can_have_is_refused() {
    let long = format!("/tmp/{}", "x".repeat(200));
    refused(run(&["run", "--uds", &long]), "the path has 205 bytes and may have at most 107");
    refused(run(&["run", "--uds", "/no/such/directory/vsock"]), "/no/such/directory/vsock");
    let twice = run(&["run", "--uds", "vsock", "--uds-seqpacket", "vsock"]);
    refused(twice, "--uds and --uds-seqpacket name the same socket, \"vsock\"");
}

#[test]
fn a_refused_launch_leaves_no_socket() {
    let dir = temp_dir();
    let path = dir.path().join("vsock");
    refused(run(&["run", "--uds", path.to_str().unwrap(), "--mem", "0"]), "--mem 0");
    assert!(!path.exists());
}

#[test]
fn the_agent_image_overwrites_nothing() {
    let dir = temp_dir();
    let path = file(&dir, "mine", b"mine");
    refused(run(&["agent", "export", path.to_str().unwrap()]), "File exists");
    assert_eq!(std::fs::read(&path).unwrap(), b"mine");
}

#[test]
fn wrong_flags_are_refused_with_the_remedy() {
    refused(
        run(&["run", "--reset-via", "keyboard"]),
        "known are host, i8042, cf9, acpi, triple; for Linux also",
    );
    refused(run(&["soak", "--causes", "kexec"]), "known are host, i8042, cf9, acpi, triple");
    refused(run(&["run", "--initrd", "x"]), "--kernel");
    refused(run(&["run", "--resets", "-1"]), "unexpected argument '-1'");
    refused(run(&["walk"]), "unrecognized subcommand 'walk'; see --help");
    run(&[]).expect_status(2).expect_stderr("Usage");
}

#[test]
fn without_the_right_to_dev_kvm_the_remedy_is_named() {
    // Another user may not open it on most machines; where everybody may, the run succeeds.
    let mode = std::fs::metadata("/dev/kvm").unwrap().permissions().mode();
    let dir = temp_dir();
    std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let program = dir.path().join("cleanslate");
    std::fs::copy(env!("CARGO_BIN_EXE_cleanslate"), &program).unwrap();
    if !rustix::process::geteuid().is_root() {
        return skipped("it gives up root's rights, so it needs them");
    }
    use std::os::unix::process::CommandExt;
    let mut command = std::process::Command::new(&program);
    command.arg("run").uid(65534).gid(65534);
    command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    let outcome = Started::new(command).finish("cleanslate run as nobody");
    if mode & 0o006 == 0o006 {
        outcome.expect_status(0);
    } else {
        refused(outcome, "usermod -aG kvm");
    }
}

#[test]
fn without_dev_kvm_the_remedy_is_named() {
    // An empty /dev in a mount namespace of its own.
    let script =
        format!("mount -t tmpfs none /dev && exec {} run", env!("CARGO_BIN_EXE_cleanslate"));
    let mut command = std::process::Command::new("unshare");
    command.args(["--user", "--map-root-user", "--mount", "sh", "-c", &script]);
    command.stdin(std::process::Stdio::null());
    command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    let outcome = Started::new(command).finish("cleanslate run without /dev");
    refused(outcome, "modprobe kvm");
}

#[test]
fn a_result_that_cannot_be_printed_is_a_failure() {
    for arguments in [&["run", "--json"][..], &["run"], &["doctor"]] {
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let mut command = cleanslate(arguments);
        command.stdout(full);
        Started::new(command)
            .finish("cleanslate run > /dev/full")
            .expect_status(2)
            .expect_stderr("print the result: No space left on device");
    }
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    let mut program = Started::new(cleanslate(&["run", "--json"]));
    drop(program.child.stdout.take());
    program.finish("cleanslate run --json | true").expect_status(0);
}
