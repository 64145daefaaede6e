//! The kernel's log by /dev/kmsg (Documentation/ABI/testing/dev-kmsg): one record a read, each
//! `level,number,microseconds,flags;text`, with more lines behind it that begin with a space.

use std::fs::OpenOptions;
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::OpenOptionsExt;

use agent_protocol::LogLine;

/// Far less than a frame takes.
const MAX_BYTES: usize = 128 * 1024;
/// What the kernel needs for a record at most (`CONSOLE_EXT_LOG_MAX`).
const RECORD: usize = 8192;
/// O_NONBLOCK of x86-64 (asm-generic/fcntl.h).
const NONBLOCK: i32 = 0o4000;

/// All that the log holds, oldest first, and how many records did not fit.
///
/// # Errors
/// Those of /dev/kmsg.
pub fn read() -> io::Result<(Vec<LogLine>, u32)> {
    let mut device = OpenOptions::new().read(true).custom_flags(NONBLOCK).open("/dev/kmsg")?;
    let mut record = vec![0; RECORD];
    let (mut lines, mut dropped) = (Vec::new(), 0);
    loop {
        match device.read(&mut record) {
            Ok(len) => lines.extend(parse(&String::from_utf8_lossy(&record[..len]))),
            // Overwritten while we read: the next read goes on behind the gap.
            Err(error) if error.raw_os_error() == Some(nix::libc::EPIPE) => dropped += 1,
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) => return Err(error),
        }
    }
    Ok(newest(lines, dropped))
}

/// As much of the end as is to be sent.
fn newest(lines: Vec<LogLine>, dropped: u32) -> (Vec<LogLine>, u32) {
    let mut bytes = 0;
    let kept = lines.iter().rev().take_while(|line| {
        bytes += line.text.len() + size_of::<LogLine>();
        bytes <= MAX_BYTES
    });
    let first = lines.len() - kept.count();
    (lines[first..].to_vec(), dropped + first as u32)
}

/// One record. What does not look like one gives nothing.
fn parse(record: &str) -> Option<LogLine> {
    let (head, text) = record.split_once(';')?;
    let mut fields = head.split(',');
    let level: u32 = fields.next()?.parse().ok()?;
    let us = fields.nth(1)?.parse().ok()?;
    let text = text.lines().next().unwrap_or_default();
    // The upper bits are the facility.
    Some(LogLine { us, level: (level & 7) as u8, text: unescape(text) })
}

/// The kernel writes bytes that cannot be printed, and the backslash, as `\xNN`.
fn unescape(text: &str) -> String {
    let mut plain = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("\\x") {
        plain.push_str(before);
        // Control characters stay as they are written: this goes to terminals.
        rest = match after.strip_prefix("5c") {
            Some(after) => {
                plain.push('\\');
                after
            }
            None => {
                plain.push_str("\\x");
                after
            }
        };
    }
    plain + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_its_level_its_time_and_its_first_line() {
        let line = parse("3,137,52341,-;[Firmware Bug]: the BIOS\n SUBSYSTEM=cpu\n").unwrap();
        assert_eq!((line.level, line.us), (3, 52341));
        assert_eq!(line.text, "[Firmware Bug]: the BIOS");
        let of_a_program = parse("30,7,1,c,more=fields;text; and more").unwrap();
        assert_eq!((of_a_program.level, of_a_program.text.as_str()), (6, "text; and more"));
        for nonsense in ["", "6,1,2", "x,1,2,-;a", "6,1;a", "6,1,y,-;a"] {
            assert_eq!(parse(nonsense), None, "{nonsense:?}");
        }
    }

    #[test]
    fn backslashes_are_read_and_control_characters_stay_escaped() {
        assert_eq!(unescape(r"a\x5cb"), r"a\b");
        assert_eq!(unescape(r"\x1b[31m"), r"\x1b[31m");
        assert_eq!(unescape(r"end \x5"), r"end \x5");
        assert_eq!(unescape("plain"), "plain");
        for text in [r"\xä", r"\x€", r"\x", r"\x5"] {
            assert_eq!(unescape(text), text);
        }
    }

    #[test]
    fn the_end_is_kept() {
        let line = |us| LogLine { us, level: 6, text: "x".repeat(1000) };
        let (kept, dropped) = newest((0..200).map(line).collect(), 3);
        assert_eq!(kept.last().unwrap().us, 199);
        assert_eq!(kept.len() as u32 + dropped, 203);
        assert!(kept.len() > 100 && kept.len() < 128, "{}", kept.len());
    }
}
