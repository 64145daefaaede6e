//! The I/O APIC (Intel 82093AA datasheet, section 3): 24 pins that turn device signals into messages for local APICs.
//!
//! The registers are the chip; where messages go is [`MsiSink`]'s business. A signal on a masked pin is kept and delivered
//! when the pin is unmasked, so a driver that masks a pin while it sets up loses nothing.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use crate::bus::{Device, Effect};

/// Number of pins.
pub const PINS: usize = 24;

/// Version register: maximum redirection entry in bits 23:16, version 0x11 (the chip itself, without the EOI register of
/// its successors).
const VERSION: u32 = ((PINS as u32 - 1) << 16) | 0x11;

const REG_SELECT: u64 = 0x00;
const REG_WINDOW: u64 = 0x10;

const INDEX_ID: u32 = 0x00;
const INDEX_VERSION: u32 = 0x01;
const INDEX_ARBITRATION: u32 = 0x02;
const INDEX_FIRST_ENTRY: u32 = 0x10;

/// Redirection entry: read-only bits are delivery status (12) and remote IRR (14).
const ENTRY_READ_ONLY: u64 = ENTRY_DELIVERY_STATUS | ENTRY_REMOTE_IRR;
const ENTRY_DELIVERY_STATUS: u64 = 1 << 12;
const ENTRY_REMOTE_IRR: u64 = 1 << 14;
const ENTRY_LEVEL: u64 = 1 << 15;
const ENTRY_MASKED: u64 = 1 << 16;
/// The bits of the identification register that are not reserved.
const ID_WRITABLE: u32 = 0x0f00_0000;

/// A message-signalled interrupt (Intel SDM volume 3, section "Message Signalled Interrupts").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Msi {
    /// Address; destination in bits 19:12, mode in bit 2.
    pub address: u64,
    /// Data; vector in bits 7:0, delivery mode in 10:8, trigger mode in 15.
    pub data: u32,
}

/// Takes the messages of the pins to the local APICs.
pub trait MsiSink: Send + Sync + fmt::Debug {
    /// Delivers one message of `pin` (below [`PINS`]).
    fn send(&self, pin: usize, msi: Msi);

    /// Such a message has been delivered, to a machine that this one was restored from; its end is to be told.
    fn await_end(&self, _pin: usize, _msi: Msi) {}
}

/// All of its state, as plain data.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Registers {
    select: u32,
    id: u32,
    entries: [u64; PINS],
    /// Signals that came while the pin was masked or waiting for an end of interrupt.
    pending: [bool; PINS],
}

impl Registers {
    const POWER_ON: Self =
        Self { select: 0, id: 0, entries: [ENTRY_MASKED; PINS], pending: [false; PINS] };
}

/// The I/O APIC of a machine. Shared by the bus and by every device with a pin.
#[derive(Debug)]
pub struct IoApic {
    registers: Mutex<Registers>,
    sink: Box<dyn MsiSink>,
}

impl IoApic {
    /// All pins masked, as after power-on.
    pub fn new(sink: Box<dyn MsiSink>) -> Self {
        Self { registers: Mutex::new(Registers::POWER_ON), sink }
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        // Every change is a single assignment, so a panic elsewhere leaves the registers whole.
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A device signals `pin` once. Pins beyond the last are ignored.
    pub fn signal(&self, pin: usize) {
        let mut registers = self.lock();
        if let Some(pending) = registers.pending.get_mut(pin) {
            *pending = true;
            self.deliver(&mut registers, pin);
        }
    }

    /// A vCPU finished the level-triggered interrupt `vector` (`KVM_EXIT_IOAPIC_EOI`).
    pub fn end_of_interrupt(&self, vector: u8) {
        let mut registers = self.lock();
        for pin in 0..PINS {
            let entry = registers.entries[pin];
            if entry as u8 == vector && entry & ENTRY_LEVEL != 0 {
                registers.entries[pin] &= !ENTRY_REMOTE_IRR;
                self.deliver(&mut registers, pin);
            }
        }
    }

    /// What it is now.
    pub fn save(&self) -> Registers {
        self.lock().clone()
    }

    /// Makes it what another one was. Bits that no register has are dropped, as at a write.
    pub fn restore(&self, saved: &Registers) {
        let mut registers = Registers { select: saved.select & 0xff, ..saved.clone() };
        registers.id &= ID_WRITABLE;
        for (pin, entry) in registers.entries.iter_mut().enumerate() {
            *entry = settled(*entry & !ENTRY_DELIVERY_STATUS);
            if *entry & ENTRY_REMOTE_IRR != 0 {
                self.sink.await_end(pin, message(*entry));
            }
        }
        *self.lock() = registers;
    }

    /// Power-on state: pins masked, signals forgotten.
    pub fn reset(&self) {
        *self.lock() = Registers::POWER_ON;
    }

    fn deliver(&self, registers: &mut Registers, pin: usize) {
        let entry = registers.entries[pin];
        let blocked = entry & (ENTRY_MASKED | ENTRY_REMOTE_IRR) != 0;
        if !registers.pending[pin] || blocked {
            return;
        }
        registers.pending[pin] = false;
        if entry & ENTRY_LEVEL != 0 {
            registers.entries[pin] |= ENTRY_REMOTE_IRR;
        }
        self.sink.send(pin, message(entry));
    }

    fn read_window(&self) -> u32 {
        let registers = self.lock();
        match registers.select {
            INDEX_ID | INDEX_ARBITRATION => registers.id,
            INDEX_VERSION => VERSION,
            index => match entry_half(index) {
                Some((pin, 0)) => registers.entries[pin] as u32,
                Some((pin, _)) => (registers.entries[pin] >> 32) as u32,
                None => 0,
            },
        }
    }

    fn write_window(&self, value: u32) {
        let mut registers = self.lock();
        if registers.select == INDEX_ID {
            registers.id = value & ID_WRITABLE;
            return;
        }
        let Some((pin, half)) = entry_half(registers.select) else { return };
        let old = registers.entries[pin];
        let written = match half {
            0 => (old & !0xffff_ffff) | u64::from(value),
            _ => (old & 0xffff_ffff) | u64::from(value) << 32,
        };
        let entry = (written & !ENTRY_READ_ONLY) | (old & ENTRY_READ_ONLY);
        registers.entries[pin] = settled(entry);
        self.deliver(&mut registers, pin);
    }
}

/// The pin and half (0 low, 1 high) of a redirection entry that register `index` shows.
fn entry_half(index: u32) -> Option<(usize, u32)> {
    let offset = index.checked_sub(INDEX_FIRST_ENTRY)?;
    let pin = (offset / 2) as usize;
    (pin < PINS).then_some((pin, offset % 2))
}

/// An edge-triggered entry waits for no end of interrupt.
fn settled(entry: u64) -> u64 {
    if entry & ENTRY_LEVEL == 0 { entry & !ENTRY_REMOTE_IRR } else { entry }
}

/// The message of a redirection entry.
fn message(entry: u64) -> Msi {
    let destination = entry >> 56;
    let logical = entry >> 11 & 1;
    let delivery_mode = (entry >> 8 & 7) as u32;
    let trigger = (entry >> 15 & 1) as u32;
    Msi {
        address: 0xfee0_0000 | destination << 12 | logical << 2,
        data: entry as u8 as u32 | delivery_mode << 8 | trigger << 15,
    }
}

impl Device for Arc<IoApic> {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let value = match offset {
            REG_SELECT => self.lock().select,
            REG_WINDOW => self.read_window(),
            _ => return,
        };
        let len = data.len().min(4);
        data[..len].copy_from_slice(&value.to_le_bytes()[..len]);
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        let Some(bytes) = data.first_chunk::<4>() else { return Effect::None };
        let value = u32::from_le_bytes(*bytes);
        match offset {
            REG_SELECT => self.lock().select = value & 0xff,
            REG_WINDOW => self.write_window(value),
            _ => {}
        }
        Effect::None
    }
}

/// One pin of the I/O APIC, given to the device that it belongs to.
#[derive(Clone, Debug)]
pub struct Pin {
    ioapic: Arc<IoApic>,
    number: usize,
}

impl Pin {
    /// Pin `number` of `ioapic`.
    pub fn new(ioapic: &Arc<IoApic>, number: u32) -> Self {
        Self { ioapic: Arc::clone(ioapic), number: number as usize }
    }

    /// Signals the pin once.
    pub fn signal(&self) {
        self.ioapic.signal(self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Debug, Default)]
    struct Log(Arc<Mutex<Vec<(usize, Msi)>>>);

    impl MsiSink for Log {
        fn send(&self, pin: usize, msi: Msi) {
            self.0.lock().unwrap().push((pin, msi));
        }
    }

    impl Log {
        fn take(&self) -> Vec<(usize, Msi)> {
            std::mem::take(&mut self.0.lock().unwrap())
        }
    }

    fn ioapic() -> (Arc<IoApic>, Log) {
        let log = Log::default();
        (Arc::new(IoApic::new(Box::new(log.clone()))), log)
    }

    fn program(ioapic: &mut Arc<IoApic>, pin: u32, entry: u64) {
        for (half, value) in [(1, (entry >> 32) as u32), (0, entry as u32)] {
            ioapic.write(REG_SELECT, &(INDEX_FIRST_ENTRY + 2 * pin + half).to_le_bytes());
            ioapic.write(REG_WINDOW, &value.to_le_bytes());
        }
    }

    fn read(ioapic: &mut Arc<IoApic>, index: u32) -> u32 {
        ioapic.write(REG_SELECT, &index.to_le_bytes());
        let mut value = [0; 4];
        ioapic.read(REG_WINDOW, &mut value);
        u32::from_le_bytes(value)
    }

    #[test]
    fn an_entry_becomes_a_message() {
        let check = |entry, address, data| {
            assert_eq!(message(entry), Msi { address, data }, "{entry:#x}");
        };
        check(0x41, 0xfee0_0000, 0x41);
        check(0x0300_0000_0000_0041, 0xfee0_3000, 0x41);
        check(0x0100_0000_0000_8931, 0xfee0_1004, 0x8131); // level, logical, lowest priority
    }

    #[test]
    fn a_signal_on_a_masked_pin_waits_for_the_unmasking() {
        let (mut ioapic, log) = ioapic();
        ioapic.signal(5);
        assert!(log.take().is_empty());
        program(&mut ioapic, 5, 0x41);
        assert_eq!(log.take().len(), 1);
        program(&mut ioapic, 5, 0x41);
        assert!(log.take().is_empty(), "delivered twice");
    }

    #[test]
    fn a_level_interrupt_is_not_sent_again_before_its_end() {
        let (mut ioapic, log) = ioapic();
        program(&mut ioapic, 9, ENTRY_LEVEL | 0x42);
        ioapic.signal(9);
        ioapic.signal(9);
        assert_eq!(log.take().len(), 1);
        assert_ne!(u64::from(read(&mut ioapic, INDEX_FIRST_ENTRY + 18)) & ENTRY_REMOTE_IRR, 0);
        ioapic.end_of_interrupt(0x41);
        assert!(log.take().is_empty(), "another vector's end");
        ioapic.end_of_interrupt(0x42);
        assert_eq!(log.take().len(), 1);
    }

    #[test]
    fn a_reset_masks_all_pins_and_forgets_signals() {
        let (mut ioapic, log) = ioapic();
        ioapic.signal(3);
        program(&mut ioapic, 5, 0x41);
        ioapic.reset();
        assert_eq!(read(&mut ioapic, INDEX_FIRST_ENTRY + 10), ENTRY_MASKED as u32);
        program(&mut ioapic, 3, 0x41);
        assert!(log.take().is_empty());
    }

    #[test]
    fn another_one_goes_on_where_this_one_stopped() {
        let (mut ioapic, log) = ioapic();
        program(&mut ioapic, 9, ENTRY_LEVEL | 0x42);
        ioapic.signal(9);
        ioapic.signal(9);
        ioapic.signal(3);
        let (mut other, other_log) = self::ioapic();
        let mut saved = ioapic.save();
        // What no write could have set.
        saved.entries[4] |= ENTRY_READ_ONLY;
        saved.id = u32::MAX;
        other.restore(&saved);
        assert_eq!((log.take().len(), other_log.take().len()), (1, 0));
        assert_eq!(read(&mut other, INDEX_FIRST_ENTRY + 8), ENTRY_MASKED as u32);
        assert_eq!(read(&mut other, INDEX_ID), ID_WRITABLE);
        other.end_of_interrupt(0x42);
        assert_eq!(other_log.take().len(), 1, "the second signal waited for the end of the first");
        program(&mut other, 3, 0x41);
        assert_eq!(other_log.take().len(), 1, "a signal waited for the unmasking");
    }

    #[test]
    fn junk_is_harmless() {
        let (mut ioapic, log) = ioapic();
        for index in 0..=0xff {
            ioapic.write(REG_SELECT, &u32::to_le_bytes(index));
            ioapic.write(REG_WINDOW, &[0xff; 4]);
            read(&mut ioapic, index);
        }
        ioapic.write(REG_WINDOW, &[1]);
        ioapic.read(7, &mut [0; 8]);
        ioapic.signal(PINS);
        ioapic.end_of_interrupt(0xff);
        assert_eq!(read(&mut ioapic, INDEX_VERSION), VERSION);
        assert!(log.take().is_empty());
    }
}
