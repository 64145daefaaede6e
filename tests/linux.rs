//! Linux as a guest, in the lab.

use crate::harness::lab::Lab;
use crate::harness::skipped;

/// What a driver of vsock over virtio-mmio takes, in the order in which it is loaded.
const VSOCK: [&str; 6] = [
    "drivers/virtio/virtio.ko",
    "drivers/virtio/virtio_ring.ko",
    "drivers/virtio/virtio_mmio.ko",
    "net/vmw_vsock/vsock.ko",
    "net/vmw_vsock/vmw_vsock_virtio_transport_common.ko",
    "net/vmw_vsock/vmw_vsock_virtio_transport.ko",
];

#[test]
fn the_dma_audit_knows_the_event_buffers_of_linux_by_name() {
    let lab = match Lab::find() {
        Ok(lab) => lab,
        Err(missing) => return skipped(missing),
    };
    let initrd =
        lab.file_system(&VSOCK, &[], "echo the guest has $($B ls /sys/bus/virtio/drivers)");
    let kernel = std::fs::read(&lab.kernel).expect("read the kernel");
    // The keyboard controller of the machine has nothing but a reset line, for which Linux waits long.
    let words = "console=ttyS0 loglevel=1 panic=-1 mitigations=off initcall_blacklist=i8042_init";
    let run = format!(
        "/cleanslate run --no-jail --kernel /vmlinuz --initrd /initrd --mem 256 --dma-audit report --cmdline '{words}'"
    );
    let outcome = lab.run(
        &[("vmlinuz", &kernel), ("initrd", &initrd)],
        &format!("{run}; echo the status is $?"),
    );
    // What a driver may not do Linux does not do; what ours does not do either is told.
    outcome
        .expect_stdout("the guest has vmw_vsock_virtio_transport\n")
        .expect_stdout("the guest turned the machine off\n")
        .expect_stdout("buffers; violations: 0 must, ")
        .expect_stdout("vsock queue 2 (event), 0x")
        // `event_list` is at byte 313 of a structure that begins with a cache line.
        .expect_stdout("39+0x4, does not begin with a cache line (8 such)\n")
        .expect_stdout("3d+0x4, lies in two cache lines")
        .expect_stdout(
            "39+0x20, is the first of 8 packed event buffers, the virtio_vsock event_list of Linux (before 7.1 beside \
             other fields): 8 times 4 bytes, at an odd address, in 2 cache lines\n",
        )
        .expect_stdout("the status is 0\n");
}
