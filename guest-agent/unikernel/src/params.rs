//! The kernel command line: which devices there are and what the agent is to do. Untrusted text: whatever does not
//! parse is ignored, as Linux ignores parameters that it does not know.

use alloc::vec::Vec;

use agent_protocol::Cause;

/// More devices than any monitor gives to this agent.
const MAX_DEVICES: usize = 32;

/// A virtio-mmio device, `virtio_mmio.device=<size>@<base>:<irq>` (Linux,
/// Documentation/admin-guide/kernel-parameters.txt).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VirtioDevice {
    /// Guest-physical address of its registers.
    pub base: u64,
    /// Bytes of register space.
    pub size: u64,
    /// Its pin of the I/O APIC.
    pub irq: u8,
}

/// An 8-bit write to a port that resets the machine or powers it off, `PORT:VALUE`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortWrite {
    /// I/O port.
    pub port: u16,
    /// What to write there.
    pub value: u8,
}

/// What the command line says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Params {
    /// `agent.life=`; 0 if absent.
    pub life: u32,
    /// `agent.cause=`.
    pub cause: Option<Cause>,
    /// `agent.report=serial`: print the report on the serial port and stop.
    pub serial_report: bool,
    /// `agent.acpi_reset=PORT:VALUE`.
    pub acpi_reset: Option<PortWrite>,
    /// `agent.acpi_poweroff=PORT:VALUE`.
    pub acpi_poweroff: Option<PortWrite>,
    /// `agent.generation=ADDRESS`: where the host has written this machine's generation.
    pub generation: Option<u64>,
    /// `attack.*`.
    #[cfg(feature = "attacks")]
    pub attack: crate::attack::Orders,
    devices: Vec<VirtioDevice>,
}

impl Params {
    /// Parses a command line. A later parameter overrides an earlier one; devices add up.
    pub fn parse(line: &str) -> Self {
        let mut params = Self::default();
        for word in line.split_ascii_whitespace() {
            let Some((key, value)) = word.split_once('=') else { continue };
            match key {
                "virtio_mmio.device" => params.add_device(value),
                "agent.life" => params.life = value.parse().unwrap_or(0),
                "agent.cause" => params.cause = value.parse().ok(),
                "agent.report" => params.serial_report = value == "serial",
                "agent.acpi_reset" => params.acpi_reset = parse_port_write(value),
                "agent.acpi_poweroff" => params.acpi_poweroff = parse_port_write(value),
                "agent.generation" => params.generation = parse_number(value),
                #[cfg(feature = "attacks")]
                _ => params.attack.add(key, value),
                #[cfg(not(feature = "attacks"))]
                _ => {}
            }
        }
        params
    }

    /// The devices in the order of the command line.
    pub fn devices(&self) -> impl Iterator<Item = VirtioDevice> + '_ {
        self.devices.iter().copied()
    }

    fn add_device(&mut self, value: &str) {
        if let Some(device) = parse_device(value)
            && self.devices.len() < MAX_DEVICES
        {
            self.devices.push(device);
        }
    }
}

fn parse_device(value: &str) -> Option<VirtioDevice> {
    let (size, place) = value.split_once('@')?;
    // Linux allows `:<id>` after the irq; it names nothing that matters here.
    let mut parts = place.split(':');
    let base = parse_number(parts.next()?)?;
    let irq = parse_number(parts.next()?)?.try_into().ok()?;
    let size = parse_size(size)?;
    (size > 0 && base.checked_add(size).is_some()).then_some(VirtioDevice { base, size, irq })
}

fn parse_port_write(value: &str) -> Option<PortWrite> {
    let (port, value) = value.split_once(':')?;
    Some(PortWrite {
        port: parse_number(port)?.try_into().ok()?,
        value: parse_number(value)?.try_into().ok()?,
    })
}

fn parse_size(text: &str) -> Option<u64> {
    let (digits, unit) = match text.as_bytes().last()? {
        b'K' | b'k' => (&text[..text.len() - 1], 1 << 10),
        b'M' | b'm' => (&text[..text.len() - 1], 1 << 20),
        _ => (text, 1),
    };
    parse_number(digits)?.checked_mul(unit)
}

/// Decimal, or hexadecimal after `0x`.
fn parse_number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_read_in_linux_syntax() {
        let check = |value: &str, expected: Option<(u64, u64, u8)>| {
            let device = expected.map(|(size, base, irq)| VirtioDevice { base, size, irq });
            assert_eq!(parse_device(value), device, "{value}");
        };
        check("4K@0xd0000000:5", Some((4096, 0xd000_0000, 5)));
        check("512@0xfeb00e00:12", Some((512, 0xfeb0_0e00, 12)));
        check("0x200@0xfeb00e00:12:3", Some((512, 0xfeb0_0e00, 12)));
        check("1M@3489660928:255", Some((1 << 20, 0xd000_0000, 255)));
        check("4K@0xd0000000", None);
        check("4K@0xd0000000:256", None);
        check("@0xd0000000:5", None);
        check("K@0xd0000000:5", None);
        check("0xffffffffffffffffK@1:5", None);
        check("é@1:5", None);
        check("0@0xd0000000:5", None);
        check("4K@0xffffffffffffffff:5", None);
        check("", None);
    }

    #[test]
    fn a_full_command_line() {
        let params = Params::parse(
            "console=ttyS0 virtio_mmio.device=4K@0xd0000000:5 agent.life=3 agent.cause=triple quiet \
             agent.report=serial agent.acpi_reset=0xcf9:6 agent.acpi_poweroff=1540:0x34 \
             virtio_mmio.device=4K@0xd0001000:6 agent.unknown=1",
        );
        assert_eq!(params.life, 3);
        assert_eq!(params.cause, Some(Cause::Triple));
        assert!(params.serial_report);
        assert_eq!(params.acpi_reset, Some(PortWrite { port: 0xcf9, value: 6 }));
        assert_eq!(params.acpi_poweroff, Some(PortWrite { port: 0x604, value: 0x34 }));
        assert_eq!(params.devices().map(|device| device.irq).collect::<Vec<_>>(), [5, 6]);
    }

    #[test]
    fn what_does_not_parse_is_ignored() {
        for line in
            ["", "   ", "agent.life=x agent.cause=none agent.acpi_reset=1", "=", "agent.report="]
        {
            assert_eq!(Params::parse(line), Params::default(), "{line:?}");
        }
        let many = "virtio_mmio.device=4K@0xd0000000:5 ".repeat(MAX_DEVICES + 5);
        assert_eq!(Params::parse(&many).devices().count(), MAX_DEVICES);
    }
}
