//! The guest's physical address space and its ports: the one place that knows where things are.

/// First address behind the low RAM; what does not fit below continues at [`HIGH_RAM`]. The gap holds devices.
pub const LOW_RAM_END: u64 = 0xc000_0000;
/// Where RAM continues when there is more than fits below [`LOW_RAM_END`].
pub const HIGH_RAM: u64 = 0x1_0000_0000;

/// Registers of the virtio-mmio device in the first slot; the others follow at [`VIRTIO_MMIO_SIZE`].
const VIRTIO_MMIO_BASE: u64 = 0xd000_0000;
/// Bytes of address space of one virtio-mmio device.
pub const VIRTIO_MMIO_SIZE: u64 = 0x1000;
/// I/O APIC pin of the first slot; the others follow.
const VIRTIO_PIN: u32 = 5;
/// The most virtio-mmio devices: each has a pin of its own, up to the I/O APIC's last.
pub const VIRTIO_SLOTS: usize = 19;
/// Registers of the I/O APIC.
pub const IOAPIC_BASE: u64 = 0xfec0_0000;
/// Bytes of address space of the I/O APIC.
pub const IOAPIC_SIZE: u64 = 0x20;
/// Registers of each local APIC before x2APIC mode.
pub const LOCAL_APIC_BASE: u64 = 0xfee0_0000;
/// Three pages that KVM needs on Intel hosts to run real mode code (`KVM_SET_TSS_ADDR`).
pub const KVM_TSS: u64 = 0xfffb_d000;

/// Everything that a guest is told at boot lies below this; its image must not.
pub const BOOT_DATA_END: u64 = 0x10_0000;
/// Global descriptor table of the 64-bit Linux boot protocol.
pub const GDT: u64 = 0x500;
/// `hvm_start_info` of the PVH boot protocol. Start info, memory map and command line share one page, so that a small
/// guest touches just one.
pub const PVH_START_INFO: u64 = 0x6000;
/// `hvm_memmap_table_entry` records.
pub const PVH_MEMORY_MAP: u64 = 0x6080;
/// `hvm_modlist_entry` of the initrd.
pub const PVH_MODULE: u64 = 0x6200;
/// The command line, zero-terminated.
pub const COMMAND_LINE: u64 = 0x6240;
/// Longest command line with its zero, in bytes: Linux takes no more on x86 (`COMMAND_LINE_SIZE`), nor does the agent.
pub const COMMAND_LINE_MAX: usize = 2048;
/// The machine's generation, for agents: [`agent_protocol::GENERATION_LEN`] bytes in the same page.
pub const GENERATION: u64 = 0x6f00;
/// `boot_params` of the Linux boot protocol.
pub const ZERO_PAGE: u64 = 0x7000;
/// Page tables of the 64-bit Linux boot protocol: one PML4, one PDPT, four page directories.
pub const PAGE_TABLES: u64 = 0x9000;
/// ACPI root pointer; the tables follow. Inside the range that firmware-less guests search.
pub const ACPI_RSDP: u64 = 0xe_0000;
/// RAM that a guest may use freely below 640 KiB ends here.
pub const LOW_MEMORY_END: u64 = 0x9_fc00;
/// RAM continues here above the legacy hole.
pub const HIGH_MEMORY: u64 = 0x10_0000;

/// The agent's image lies below, with everything that it uses as memory. A multiple of 2 MiB, so that what is above can have
/// large pages.
pub const AGENT_END: u64 = 12 << 20;

/// First serial port.
pub const SERIAL_PORT: u16 = 0x3f8;
/// I/O APIC pin of the serial port.
pub const SERIAL_PIN: u32 = 4;
/// Keyboard controller: data.
pub const I8042_DATA_PORT: u16 = 0x60;
/// NMI status and control.
pub const NMI_STATUS_PORT: u16 = 0x61;
/// Keyboard controller: command and status.
pub const I8042_COMMAND_PORT: u16 = 0x64;
/// Diagnostics of old; the agent says here that it rests. A number that an instruction can hold: no register is free then.
pub const REST_PORT: u16 = 0x80;
/// Reset control register of a PCI host bridge.
pub const RESET_CONTROL_PORT: u16 = 0xcf9;
/// ACPI registers: reset at +0, sleep control at +1, sleep status at +2.
pub const ACPI_PORT: u16 = 0x600;

/// Where the first vCPU starts, and by which protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// PVH: 32-bit protected mode without paging, `hvm_start_info` at [`PVH_START_INFO`].
    Pvh {
        /// First instruction.
        rip: u64,
    },
    /// Linux's 64-bit boot protocol, `boot_params` at [`ZERO_PAGE`].
    Linux64 {
        /// First instruction.
        rip: u64,
    },
}

/// The place of one virtio-mmio device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VirtioSlot {
    /// Guest address of its registers, [`VIRTIO_MMIO_SIZE`] bytes.
    pub base: u64,
    /// Its pin of the I/O APIC.
    pub pin: u32,
}

/// All places of virtio-mmio devices, lowest first.
pub fn virtio_slots() -> impl Iterator<Item = VirtioSlot> {
    (0..VIRTIO_SLOTS as u32).map(|number| VirtioSlot {
        base: VIRTIO_MMIO_BASE + u64::from(number) * VIRTIO_MMIO_SIZE,
        pin: VIRTIO_PIN + number,
    })
}

/// Where RAM of `bytes` lies: (guest address, length) of each range, lowest first.
pub fn ram_ranges(bytes: u64) -> Vec<(u64, u64)> {
    let low = bytes.min(LOW_RAM_END);
    let mut ranges = vec![(0, low)];
    if bytes > low {
        ranges.push((HIGH_RAM, bytes - low));
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_goes_around_the_device_gap() {
        assert_eq!(ram_ranges(128 << 20), [(0, 128 << 20)]);
        assert_eq!(ram_ranges(LOW_RAM_END), [(0, LOW_RAM_END)]);
        assert_eq!(ram_ranges(4 << 30), [(0, LOW_RAM_END), (HIGH_RAM, 1 << 30)]);
    }

    #[test]
    fn virtio_slots_fill_the_pins_and_lie_in_the_device_gap() {
        let slots: Vec<_> = virtio_slots().collect();
        assert_eq!(slots[0], VirtioSlot { base: 0xd000_0000, pin: 5 });
        assert_eq!(slots[1], VirtioSlot { base: 0xd000_1000, pin: 6 });
        let last = slots.last().unwrap();
        assert_eq!(last.pin as usize, crate::device::ioapic::PINS - 1);
        assert!(slots[0].base >= LOW_RAM_END && last.base + VIRTIO_MMIO_SIZE <= IOAPIC_BASE);
    }
}
