//! The serial port and what the guest printed on it.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use vm_superio::serial::{NoEvents, SerialState};
use vm_superio::{Serial, Trigger};

use super::ioapic::Pin;
use crate::bus::{Device, Effect};

/// How much of the console is kept for reports, in bytes.
const TAIL_BYTES: usize = 16 * 1024;

/// The last bytes that the guest printed. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct ConsoleTail(Arc<Mutex<VecDeque<u8>>>);

impl ConsoleTail {
    fn push(&self, bytes: &[u8]) {
        let mut tail = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        tail.extend(bytes);
        let excess = tail.len().saturating_sub(TAIL_BYTES);
        tail.drain(..excess);
    }

    /// The last `count` lines, control characters made visible so that a guest cannot drive the reader's terminal.
    pub fn last_lines(&self, count: usize) -> Vec<String> {
        let mut tail = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let text = String::from_utf8_lossy(tail.make_contiguous());
        let lines: Vec<&str> = text.lines().collect();
        let first = lines.len().saturating_sub(count);
        lines[first..].iter().map(|line| printable(line)).collect()
    }
}

fn printable(line: &str) -> String {
    let visible = |c: char| if c.is_control() && c != '\t' { '\u{fffd}' } else { c };
    line.trim_end_matches('\r').chars().map(visible).collect()
}

/// Where the guest's console output goes besides the tail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConsoleOutput {
    /// Nowhere.
    Kept,
    /// The process's standard output, byte for byte.
    Stdout,
}

#[derive(Debug)]
struct Output {
    tail: ConsoleTail,
    to: ConsoleOutput,
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.tail.push(bytes);
        if self.to == ConsoleOutput::Stdout {
            write_to_stdout(bytes);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes past the buffers of the standard library, which would insist on an interrupted write: a signal means that the
/// vCPU is wanted, and a reader that does not read must not keep it. Bytes that cannot be written are lost.
fn write_to_stdout(mut bytes: &[u8]) {
    while !bytes.is_empty() {
        match rustix::io::write(rustix::stdio::stdout(), bytes) {
            Ok(count) if count > 0 => bytes = &bytes[count..],
            Err(Errno::AGAIN) => {
                let stdout = rustix::stdio::stdout();
                if poll(&mut [PollFd::new(&stdout, PollFlags::OUT)], None).is_err() {
                    return;
                }
            }
            // Interrupted, or a reader that went away: no reason to disturb the guest.
            Ok(_) | Err(_) => return,
        }
    }
}

/// The chip's registers (Serde's way for a structure of another crate).
#[derive(Serialize, Deserialize)]
#[serde(remote = "SerialState")]
struct Registers {
    baud_divisor_low: u8,
    baud_divisor_high: u8,
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    in_buffer: Vec<u8>,
}

/// A serial port's state, as plain data. What was printed is not part of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SavedConsole(#[serde(with = "Registers")] SerialState);

/// More bytes wait to be read than the chip has room for.
#[derive(Debug, thiserror::Error)]
#[error("its serial port holds {0} bytes, more than there is room for")]
pub struct Overfull(usize);

impl Trigger for Pin {
    type E = std::convert::Infallible;

    fn trigger(&self) -> Result<(), Self::E> {
        self.signal();
        Ok(())
    }
}

/// A 16550A at the first serial port (chip: `vm-superio`); this type is its wiring.
pub struct Console {
    chip: Serial<Pin, NoEvents, Output>,
    pin: Pin,
    tail: ConsoleTail,
    to: ConsoleOutput,
}

impl Console {
    /// A serial port on `pin`.
    pub fn new(pin: Pin, to: ConsoleOutput) -> Self {
        let tail = ConsoleTail::default();
        Self { chip: chip(&pin, &tail, to), pin, tail, to }
    }

    /// What the guest printed last.
    pub fn tail(&self) -> ConsoleTail {
        self.tail.clone()
    }

    /// What the chip is now.
    pub fn save(&self) -> SavedConsole {
        SavedConsole(self.chip.state())
    }

    /// Makes the chip what another one was. An interrupt that it asked for is asked for again.
    ///
    /// # Errors
    /// [`Overfull`].
    pub fn restore(&mut self, SavedConsole(state): &SavedConsole) -> Result<(), Overfull> {
        let output = Output { tail: self.tail.clone(), to: self.to };
        // Its trigger cannot fail.
        self.chip = Serial::from_state(state, self.pin.clone(), NoEvents, output)
            .map_err(|_| Overfull(state.in_buffer.len()))?;
        Ok(())
    }

    /// Power-on state of the chip; what was printed stays known.
    pub fn reset(&mut self) {
        self.chip = chip(&self.pin, &self.tail, self.to);
    }
}

fn chip(pin: &Pin, tail: &ConsoleTail, to: ConsoleOutput) -> Serial<Pin, NoEvents, Output> {
    Serial::new(pin.clone(), Output { tail: tail.clone(), to })
}

impl Device for Console {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        // The port takes bytes; wider accesses reach its first register.
        data[0] = self.chip.read(offset as u8);
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        // Neither our writer nor our trigger can fail, and a guest that overflows its own loop-back buffer keeps the loss.
        let _ = self.chip.write(offset as u8, data[0]);
        Effect::None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_is_bounded_and_shows_no_control_characters() {
        let tail = ConsoleTail::default();
        for i in 0..10_000 {
            tail.push(format!("line {i}\r\n").as_bytes());
        }
        tail.push(b"\x1b[2Jbad\x07");
        assert!(tail.0.lock().unwrap().len() <= TAIL_BYTES);
        assert_eq!(tail.last_lines(2), ["line 9999", "\u{fffd}[2Jbad\u{fffd}"]);
    }
}
