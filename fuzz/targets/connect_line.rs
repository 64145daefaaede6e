//! The line with which a client of the vsock socket says where it wants to go.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vmm::fuzzing::{GuestPort, parse_connect};

/// The port that means "any" and belongs to nobody.
const PORT_ANY: u32 = u32::MAX;

/// The same grammar, written down another way: two words between ASCII white space, the second a decimal number below
/// [`PORT_ANY`].
fn expected(line: &[u8]) -> Option<u32> {
    std::str::from_utf8(line).ok()?;
    let is_space = |byte: &u8| matches!(byte, b' ' | b'\t' | b'\n' | b'\r' | 0x0c);
    let mut words = line.split(is_space).filter(|word| !word.is_empty());
    let (verb, port) = (words.next()?, words.next()?);
    if words.next().is_some() || !verb.eq_ignore_ascii_case(b"CONNECT") {
        return None;
    }
    let value = port.iter().try_fold(0u64, |value, byte| match byte {
        b'0'..=b'9' => Some((value * 10 + u64::from(byte - b'0')).min(u64::from(PORT_ANY))),
        _ => None,
    })?;
    u32::try_from(value).ok().filter(|port| *port != PORT_ANY)
}

fuzz_target!(|line: &[u8]| {
    let port = parse_connect(line);
    assert_eq!(port, expected(line).map(GuestPort));
    if let Some(GuestPort(port)) = port {
        assert_eq!(parse_connect(format!("CONNECT {port}").as_bytes()), Some(GuestPort(port)));
    }
});
