//! Port 0x61: NMI status and control. An NMI handler reads it for the reason; on this machine no device ever raises SERR
//! or IOCHK, and saying anything else would turn every stray NMI into a bus error.

use serde::{Deserialize, Serialize};

use crate::bus::{Device, Effect};

/// Gate and data of timer 2 and the enables of SERR and IOCHK are what software wrote; the rest is status.
const WRITABLE: u8 = 0x0f;
/// Memory refresh: real hardware toggles it, and old software waits for that.
const REFRESH_TOGGLE: u8 = 1 << 4;

/// The register.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct NmiStatus {
    value: u8,
}

impl Device for NmiStatus {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        self.value ^= REFRESH_TOGGLE;
        data.fill(self.value);
    }

    fn write(&mut self, _offset: u64, data: &[u8]) -> Effect {
        self.value = (self.value & !WRITABLE) | (data[0] & WRITABLE);
        Effect::None
    }
}

impl NmiStatus {
    /// Makes it what another one was, as far as software could have made it so.
    pub fn restore(&mut self, saved: &Self) {
        self.value = saved.value & (WRITABLE | REFRESH_TOGGLE);
    }

    /// Power-on state.
    pub fn reset(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nor_can_a_file() {
        let mut port = NmiStatus::default();
        port.restore(&NmiStatus { value: 0xff });
        assert_eq!(port.value, WRITABLE | REFRESH_TOGGLE);
    }

    #[test]
    fn a_guest_cannot_make_it_claim_a_bus_error() {
        let mut port = NmiStatus::default();
        port.write(0, &[0xff]);
        for _ in 0..4 {
            let mut data = [0];
            port.read(0, &mut data);
            assert_eq!(data[0] & 0xc0, 0);
            assert_eq!(data[0] & 0x0f, 0x0f);
        }
    }
}
