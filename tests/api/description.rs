//! A machine is described before it starts and steered afterwards; what makes no sense is refused when it is said.

use serde_json::json;

use super::with_agent;
use crate::harness::api::{Api, request};
use crate::harness::guest::Guest;
use crate::harness::{eventually, file, temp_dir};

const BEFORE: &str = "not supported before starting the microVM";
const AFTER: &str = "not supported after starting the microVM";

#[test]
fn what_is_for_later_is_refused_before_the_start_and_the_reverse() {
    let api = Api::start();
    assert_eq!(api.get_json("/")["state"], "Not started");
    let of_a_machine = |refusal: &str| {
        api.patch("/vm", json!({ "state": "Paused" })).expect_refused(refusal);
        api.put("/cleanslate/reset", json!({})).expect_refused(refusal);
        api.get("/cleanslate/verdict").expect_refused(refusal);
        let snapshot = json!({ "snapshot_path": "/s", "mem_file_path": "/m" });
        api.put("/snapshot/create", snapshot).expect_refused(refusal);
        api.action("FlushMetrics").expect_refused(refusal);
        api.patch("/drives/d", json!({ "drive_id": "d" })).expect_refused(refusal);
    };
    of_a_machine(BEFORE);
    api.end();

    let api = with_agent();
    let machine = json!({ "vcpu_count": 1, "mem_size_mib": 16 });
    api.put("/machine-config", machine.clone()).expect_refused(AFTER);
    api.patch("/machine-config", machine).expect_refused(AFTER);
    api.put("/entropy", json!({})).expect_refused(AFTER);
    api.put("/logger", json!({})).expect_refused(AFTER);
    api.put("/cleanslate/machine", json!({})).expect_refused(AFTER);
    api.action("InstanceStart").expect_refused(AFTER);
    let load = json!({ "snapshot_path": "/s", "mem_file_path": "/m" });
    api.put("/snapshot/load", load).expect_refused(AFTER);
    api.action("FlushMetrics").expect_refused("no file was given");
    api.get("/cleanslate/dma-audit").expect_refused("no DMA audit");
    api.patch("/drives/d", json!({ "drive_id": "d" })).expect_refused("cannot be replaced");
    assert_eq!(api.get_json("/machine-config")["mem_size_mib"], 16);
    api.end();
}

#[test]
fn a_change_that_is_refused_changes_nothing() {
    let api = Api::start();
    api.put("/machine-config", json!({ "vcpu_count": 2, "mem_size_mib": 64 })).expect_done();
    let wrong = json!({ "vcpu_count": 4, "mem_size_mib": 1 });
    api.put("/machine-config", wrong.clone()).expect_refused("mem_size_mib 1");
    api.patch("/machine-config", wrong).expect_refused("mem_size_mib 1");
    api.patch("/machine-config", json!({})).expect_refused("Empty PATCH request.");
    api.patch("/machine-config", json!({ "mem_size_mib": 32 })).expect_done();
    let machine = api.get_json("/machine-config");
    assert_eq!((&machine["vcpu_count"], &machine["mem_size_mib"]), (&json!(2), &json!(32)));
    let snapshot = json!({ "snapshot_path": "/s", "mem_file_path": "/m" });
    api.put("/snapshot/load", snapshot).expect_refused("boot-specific resources");
    api.end();
}

#[test]
fn files_that_cannot_be_what_they_are_to_be_are_refused_when_they_are_named() {
    let api = Api::start();
    let fifo = api.path("fifo");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &fifo,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RWXU,
        0,
    )
    .unwrap();
    let missing = api.path("missing");
    for path in [&fifo, &missing, &api.dir.path().to_path_buf()] {
        api.put("/boot-source", json!({ "kernel_image_path": path }))
            .expect_refused("The kernel file cannot be opened");
        let drive = json!({ "drive_id": "d", "is_root_device": false, "path_on_host": path });
        api.put("/drives/d", drive).expect_refused("path_on_host");
    }
    let kernel = json!({ "kernel_image_path": "/proc/self/exe", "initrd_path": fifo });
    api.put("/boot-source", kernel).expect_refused("The initrd file cannot be opened");
    let vsock = json!({ "guest_cid": 3, "uds_path": fifo });
    api.put("/vsock", vsock).expect_refused("exists");
    api.put("/logger", json!({ "log_path": api.dir.path() })).expect_refused("open the log");
    api.put("/metrics", json!({ "metrics_path": api.dir.path() }))
        .expect_refused("open the metrics");
    assert!(fifo.exists());
    api.end();
}

#[test]
fn a_start_that_fails_can_be_mended() {
    let api = Api::start();
    let kernel = api.path("kernel");
    std::fs::write(&kernel, "no kernel at all").unwrap();
    api.put("/boot-source", json!({ "kernel_image_path": kernel })).expect_done();
    api.action("InstanceStart").expect_refused("kernel");
    assert_eq!(api.get_json("/")["state"], "Not started");
    std::fs::write(&kernel, Guest::new().halt().elf()).unwrap();
    api.action("InstanceStart").expect_done();
    api.get("/cleanslate/verdict").expect_refused("only the embedded agent reports");
    api.end();
}

#[test]
fn a_template_changes_cpuid_and_msrs_in_every_life() {
    const PAT: u32 = 0x277;
    let dir = temp_dir();
    // Prints a letter if CPUID's name of the processor is the one that it was told to be, and another if the memory types are; then
    // asks for a reset, and goes on in the next life.
    let cpuid = Guest::new().raw(&[0xb8, 2, 0, 0, 0x80, 0x0f, 0xa2]);
    let guest = cpuid
        .if_eax_is(0x6e61_6c43, Guest::new().out(0x3f8, b'C'))
        .read_msr(PAT)
        .if_eax_is(0x0007_0106, Guest::new().out(0x3f8, b'M'))
        .write_msr(PAT, 0x0606_0606_0606_0606)
        .out(0x64, 0xfe)
        .halt();
    let kernel = file(&dir, "guest.elf", &guest.elf());
    let api = Api::start_with(dir, &[]);
    api.put("/boot-source", json!({ "kernel_image_path": kernel })).expect_done();
    api.put("/cleanslate/machine", json!({ "on_guest_reset": "in-place" })).expect_done();
    let template = json!({
        "cpuid_modifiers": [{ "leaf": "0x80000002", "subleaf": "0x0", "flags": 0, "modifiers": [
            { "register": "eax", "bitmap": "0b0110_1110_0110_0001_0110_1100_0100_0011" }
        ]}],
        "msr_modifiers": [{ "addr": "0x277", "bitmap": "0b00000000000001110000000100000110" }],
    });
    api.put("/cpu-config", template).expect_done();
    api.action("InstanceStart").expect_done();
    let mut lines = String::new();
    eventually("three lives have printed", || {
        lines = api.get_json("/cleanslate/console")["lines"].to_string();
        lines.len() > 12
    });
    assert!(lines.contains("CMCMCM"), "{lines}");
    api.end();
}

#[test]
fn a_template_that_this_host_cannot_follow_is_refused_at_the_start() {
    let check = |template, text: &str| {
        let api = Api::start();
        api.put("/cpu-config", template).expect_done();
        api.action("InstanceStart").expect_refused(text);
        api.end();
    };
    let leaf = json!({ "cpuid_modifiers": [{ "leaf": "0x12345", "subleaf": "0", "flags": 0, "modifiers": [
        { "register": "eax", "bitmap": "0b1" }
    ]}]});
    check(leaf, "leaf 0x12345");
    check(json!({ "kvm_capabilities": ["99999"] }), "lacks the capability 99999");
    check(json!({ "kvm_capabilities": ["!121"] }), "the capability 121 is needed");
    check(json!({ "msr_modifiers": [{ "addr": "0x12345", "bitmap": "0b1" }] }), "MSR 0x12345");
}

#[test]
fn what_is_not_here_is_refused_with_what_to_do_instead() {
    let api = Api::start();
    api.put("/network-interfaces/eth0", json!({})).expect_refused("vsock");
    api.get("/balloon").expect_refused("balloon");
    api.put("/mmds", json!({})).expect_refused("boot_args");
    api.patch("/hotplug/memory", json!({})).expect_refused("mem_size_mib");
    api.put("/pmem/p", json!({})).expect_refused("PUT /drives");
    request(&api.socket, "DELETE", "/drives/d", b"").expect_refused("Invalid request method");
    api.end();
}
