//! ACPI tables for kernels that look for them: processors, I/O APIC, serial port, virtio devices, reset register, sleep register. Hardware-reduced, so
//! there is no SCI, no power-management timer and no legacy device to find (ACPI 6.5, section 4.1).

use acpi_tables::aml::{
    Device, EISAName, IO, Interrupt, Memory32Fixed, Name, ONE, PackageBuilder, ResourceTemplate,
    ZERO,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::device::reset_ports::{ACPI_RESET_VALUE, ACPI_SLEEP_S5};
use crate::layout::{self, VirtioSlot};
use crate::memory::GuestRam;

const OEM_ID: [u8; 6] = *b"CLEANS";
const OEM_TABLE_ID: [u8; 8] = *b"CLEANSLT";
const OEM_REVISION: u32 = 1;
/// Enough for the largest of the tables.
const TABLE_STEP: u64 = 0x1000;

struct Bytecode(Vec<u8>);

impl AmlSink for Bytecode {
    fn byte(&mut self, byte: u8) {
        self.0.push(byte);
    }
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut sink = Bytecode(Vec::new());
    table.to_aml_bytes(&mut sink);
    sink.0
}

fn port(address: u16) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(address))
}

/// Writes the tables at [`layout::ACPI_RSDP`] for a machine with `vcpus` processors and virtio devices in `slots`.
pub(super) fn write(
    ram: &GuestRam,
    vcpus: u8,
    slots: impl Iterator<Item = VirtioSlot>,
) -> Result<(), GuestMemoryError> {
    let [dsdt_at, fadt_at, madt_at, xsdt_at] =
        [1, 2, 3, 4].map(|i| layout::ACPI_RSDP + i * TABLE_STEP);
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt_at);
    xsdt.add_entry(madt_at);
    let tables = [
        (layout::ACPI_RSDP, bytes(&Rsdp::new(OEM_ID, xsdt_at))),
        (dsdt_at, bytes(&dsdt(slots))),
        (fadt_at, bytes(&fadt(dsdt_at))),
        (madt_at, bytes(&madt(vcpus))),
        (xsdt_at, bytes(&xsdt)),
    ];
    for (address, table) in tables {
        ram.write_slice(&table, GuestAddress(address))?;
    }
    Ok(())
}

fn dsdt(slots: impl Iterator<Item = VirtioSlot>) -> Sdt {
    let mut s5 = PackageBuilder::new();
    s5.add_element(&ACPI_SLEEP_S5);
    let mut table = Sdt::new(*b"DSDT", 36, 6, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    table.append_slice(&bytes(&Name::new("_S5_".into(), &s5)));
    table.append_slice(&serial_port());
    for (number, slot) in slots.enumerate() {
        table.append_slice(&virtio_device(number, slot));
    }
    table
}

/// The serial port. Without an interrupt that it can route, Linux shows its own messages and nothing of its programs'.
fn serial_port() -> Vec<u8> {
    let ports = IO::new(layout::SERIAL_PORT, layout::SERIAL_PORT, 0, 8);
    let interrupt = edge_interrupt(layout::SERIAL_PIN);
    bytes(&Device::new(
        "\\_SB_.COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ports, &interrupt])),
        ],
    ))
}

/// Edge-triggered, active high and not shared: a device signals its pin once for each interrupt.
fn edge_interrupt(pin: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, pin)
}

/// A device as Linux's virtio_mmio driver looks for it. Debian's kernels do not read the command line for them.
fn virtio_device(number: usize, slot: VirtioSlot) -> Vec<u8> {
    let registers = Memory32Fixed::new(true, slot.base as u32, layout::VIRTIO_MMIO_SIZE as u32);
    let interrupt = edge_interrupt(slot.pin);
    let path = format!("\\_SB_.VI{number:02}");
    bytes(&Device::new(
        path.as_str().into(),
        vec![
            &Name::new("_HID".into(), &"LNRO0005"),
            &Name::new("_UID".into(), &number),
            &Name::new("_CCA".into(), &ONE),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&registers, &interrupt])),
        ],
    ))
}

fn fadt(dsdt: u64) -> acpi_tables::fadt::FADT {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup);
    fadt.reset_reg = port(layout::ACPI_PORT);
    fadt.reset_value = ACPI_RESET_VALUE;
    fadt.sleep_control_reg = port(layout::ACPI_PORT + 1);
    fadt.sleep_status_reg = port(layout::ACPI_PORT + 2);
    // No VGA, no CMOS clock, but an 8042 (bit 1), by which Linux may reset.
    fadt.iapc_boot_arch = (1 << 1 | 1 << 2 | 1 << 5).into();
    fadt.finalize()
}

fn madt(vcpus: u8) -> MADT {
    let local_apic = LocalInterruptController::Address(layout::LOCAL_APIC_BASE as u32);
    let mut madt = MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, local_apic);
    for id in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, layout::IOAPIC_BASE as u32, 0));
    madt
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_table_has_its_signature_and_a_zero_checksum() {
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        write(&ram, 254, layout::virtio_slots()).unwrap();
        for (i, signature) in (1..).zip([b"DSDT", b"FACP", b"APIC", b"XSDT"]) {
            let at = GuestAddress(layout::ACPI_RSDP + i * TABLE_STEP);
            let mut header = [0; 8];
            ram.read_slice(&mut header, at).unwrap();
            assert_eq!(&header[..4], signature);
            let len = u32::from_le_bytes(header[4..8].try_into().unwrap()) as usize;
            assert!(len as u64 <= TABLE_STEP, "{len}");
            let mut table = vec![0; len];
            ram.read_slice(&mut table, at).unwrap();
            assert_eq!(table.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)), 0);
        }
    }

    #[test]
    fn devices_are_described_once_with_their_registers_and_their_pin() {
        let count = |table: &[u8], wanted: &[u8]| {
            table.windows(wanted.len()).filter(|bytes| *bytes == wanted).count()
        };
        for devices in [0, 1, 19] {
            let table = bytes(&dsdt(layout::virtio_slots().take(devices)));
            assert_eq!(count(&table, b"LNRO0005"), devices);
            // Eight I/O ports from 0x3f8 on (ACPI 6.5, section 6.4.2.5), pin 4.
            assert_eq!(count(&table, &[0x47, 1, 0xf8, 3, 0xf8, 3, 0, 8, 0x89, 6, 0, 3, 1, 4]), 1);
            for slot in layout::virtio_slots().take(devices) {
                // 32-bit fixed memory range, writable (ACPI 6.5, section 6.4.3.4); extended interrupt of one pin
                // (section 6.4.3.6).
                let base = (slot.base as u32).to_le_bytes();
                let registers = [&[0x86, 9, 0, 1], &base[..], &0x1000_u32.to_le_bytes()].concat();
                let interrupt = [&[0x89, 6, 0, 3, 1], &slot.pin.to_le_bytes()[..]].concat();
                let found = (count(&table, &registers), count(&table, &interrupt));
                assert_eq!(found, (1, 1), "{slot:x?}");
            }
        }
    }
}
