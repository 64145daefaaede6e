//! The ports by which a guest resets the machine or turns it off: keyboard controller, reset control register, ACPI. And the
//! one by which the agent says that it has nothing left to do but to be reset.

use agent_protocol::GuestReset;
use serde::{Deserialize, Serialize};

use crate::bus::{Device, Effect};

/// Status register of the keyboard controller: input buffer empty, output buffer empty, self-test passed.
const I8042_STATUS: u8 = 0x04;
/// Pulse output lines with line 0 (reset) low; bits 3:1 choose other lines (IBM PS/2 technical reference).
const I8042_PULSE_RESET: u8 = 0xf0;

/// A port of a keyboard controller with no keyboard: it can reset the machine and say that nothing was typed.
#[derive(Debug)]
pub enum I8042 {
    /// Port 0x60.
    Data,
    /// Port 0x64.
    Command,
}

impl Device for I8042 {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(match self {
            Self::Data => 0,
            Self::Command => I8042_STATUS,
        });
    }

    fn write(&mut self, _offset: u64, data: &[u8]) -> Effect {
        match self {
            // Line 0 is pulsed where its bit is 0: 0xf0, 0xf2 … 0xfe.
            Self::Command if data[0] & 0xf1 == I8042_PULSE_RESET => {
                Effect::Reset(GuestReset::I8042)
            }
            _ => Effect::None,
        }
    }
}

/// The reset control register: bit 1 says how hard, a rising bit 2 does it (Intel ICH9 datasheet, section 13.7.5).
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct ResetControl {
    value: u8,
}

impl ResetControl {
    const WRITABLE: u8 = 0x0e;

    /// Makes it what another one was.
    pub fn restore(&mut self, saved: &Self) {
        self.value = saved.value & Self::WRITABLE;
    }
}

impl Device for ResetControl {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(self.value);
    }

    fn write(&mut self, _offset: u64, data: &[u8]) -> Effect {
        let old = std::mem::replace(&mut self.value, data[0] & Self::WRITABLE);
        if !old & self.value & 0x04 != 0 {
            self.value = 0;
            return Effect::Reset(GuestReset::Cf9);
        }
        Effect::None
    }
}

/// What to write to the ACPI reset register (FADT `RESET_VALUE`).
pub const ACPI_RESET_VALUE: u8 = 1;
/// `SLP_TYP` of S5, in place for the sleep control register (ACPI 6.5, section 4.8.3.7).
pub const ACPI_SLEEP_S5: u8 = 5;
/// `SLP_EN` of the sleep control register.
const ACPI_SLEEP_ENABLE: u8 = 1 << 5;
/// The whole byte that turns the machine off.
pub const ACPI_POWER_OFF: u8 = ACPI_SLEEP_S5 << 2 | ACPI_SLEEP_ENABLE;

/// Hardware-reduced ACPI: reset register at +0, sleep control at +1, sleep status at +2.
#[derive(Debug)]
pub struct AcpiPorts;

impl Device for AcpiPorts {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        match (offset, data[0]) {
            (0, ACPI_RESET_VALUE) => Effect::Reset(GuestReset::Acpi),
            (1, ACPI_POWER_OFF) => Effect::PowerOff,
            _ => Effect::None,
        }
    }
}

/// Where the agent writes in the last instruction of a life that the host ends.
#[derive(Debug)]
pub struct RestPort;

impl Device for RestPort {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write(&mut self, _offset: u64, _data: &[u8]) -> Effect {
        Effect::Rest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_right_byte_at_the_right_port_resets() {
        let check = |device: &mut dyn Device, offset, byte, expected| {
            assert_eq!(device.write(offset, &[byte]), expected, "{byte:#x} at +{offset}");
        };
        check(&mut I8042::Command, 0, 0xfe, Effect::Reset(GuestReset::I8042));
        check(&mut I8042::Command, 0, 0xf0, Effect::Reset(GuestReset::I8042));
        check(&mut I8042::Command, 0, 0xff, Effect::None);
        check(&mut I8042::Command, 0, 0xed, Effect::None);
        check(&mut I8042::Data, 0, 0xfe, Effect::None);
        check(&mut AcpiPorts, 0, 1, Effect::Reset(GuestReset::Acpi));
        check(&mut AcpiPorts, 0, 2, Effect::None);
        check(&mut AcpiPorts, 1, 0x34, Effect::PowerOff);
        check(&mut AcpiPorts, 1, 0x14, Effect::None);
        check(&mut AcpiPorts, 2, 0x34, Effect::None);
    }

    #[test]
    fn the_reset_control_register_acts_on_a_rising_bit() {
        let mut cf9 = ResetControl::default();
        assert_eq!(cf9.write(0, &[0x02]), Effect::None);
        assert_eq!(cf9.write(0, &[0x06]), Effect::Reset(GuestReset::Cf9));
        assert_eq!(cf9.write(0, &[0x0e]), Effect::Reset(GuestReset::Cf9));
    }
}
