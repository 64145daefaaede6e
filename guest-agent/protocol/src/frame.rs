//! Frames on a byte stream: a little-endian `u32` payload length, then the `postcard` payload.

use alloc::vec::Vec;
use core::fmt;

use serde::{Serialize, de::DeserializeOwned};

/// Bytes of the length prefix.
pub const PREFIX_LEN: usize = 4;

/// The longest payload either side accepts, in bytes. A longer announcement is [`FrameError::TooLong`], so a
/// peer can never make the other side reserve more than this.
pub const MAX_PAYLOAD: usize = 256 * 1024;
/// Largest frame in bytes.
pub const MAX_FRAME: usize = PREFIX_LEN + MAX_PAYLOAD;

/// Why bytes are not a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameError {
    /// The announced or encoded payload length exceeds [`MAX_PAYLOAD`].
    TooLong(usize),
    /// The payload is not one message of the expected type.
    Malformed,
}

impl fmt::Display for FrameError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooLong(len) => write!(f, "frame of {len} bytes exceeds {MAX_PAYLOAD}"),
            Self::Malformed => f.write_str("frame payload is not the expected message"),
        }
    }
}

impl core::error::Error for FrameError {}

/// Encodes one message with its length prefix.
///
/// # Errors
/// [`FrameError::TooLong`] if the payload exceeds [`MAX_PAYLOAD`].
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, FrameError> {
    let mut bytes = postcard::to_extend(message, alloc::vec![0; PREFIX_LEN])
        .map_err(|_| FrameError::Malformed)?;
    let len = bytes.len() - PREFIX_LEN;
    if len > MAX_PAYLOAD {
        return Err(FrameError::TooLong(len));
    }
    // The check above keeps `len` within u32.
    bytes[..PREFIX_LEN].copy_from_slice(&(len as u32).to_le_bytes());
    Ok(bytes)
}

/// The total length (prefix and payload) of the frame that starts at `bytes`, or `None` while the prefix is
/// incomplete.
///
/// # Errors
/// [`FrameError::TooLong`] if the prefix announces more than [`MAX_PAYLOAD`].
pub fn total_len(bytes: &[u8]) -> Result<Option<usize>, FrameError> {
    let Some(prefix) = bytes.first_chunk::<PREFIX_LEN>() else { return Ok(None) };
    let len = u32::from_le_bytes(*prefix) as usize;
    if len > MAX_PAYLOAD {
        return Err(FrameError::TooLong(len));
    }
    Ok(Some(PREFIX_LEN + len))
}

/// Decodes the frame that starts at `bytes`: the message and how many bytes it took, or `None` while the frame
/// is incomplete.
///
/// # Errors
/// [`FrameError`] if the bytes can never become a frame of this type, including a payload with bytes left over.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<Option<(T, usize)>, FrameError> {
    let Some(total) = total_len(bytes)? else { return Ok(None) };
    let Some(payload) = bytes.get(PREFIX_LEN..total) else { return Ok(None) };
    match postcard::take_from_bytes(payload) {
        Ok((message, [])) => Ok(Some((message, total))),
        Ok(_) | Err(_) => Err(FrameError::Malformed),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Cause, GuestReset, Reply, Request};

    #[test]
    fn a_frame_survives_the_round_trip() {
        let sent = Request::Echo(alloc::vec![7; 1000]);
        let bytes = encode(&sent).unwrap();
        assert_eq!(decode::<Request>(&bytes), Ok(Some((sent, bytes.len()))));
    }

    #[test]
    fn every_cut_of_a_frame_is_incomplete_not_invalid() {
        let bytes = encode(&Request::Reset(GuestReset::Triple)).unwrap();
        for cut in 0..bytes.len() {
            assert_eq!(decode::<Request>(&bytes[..cut]), Ok(None), "cut at {cut}");
        }
    }

    #[test]
    fn malformed_frames_are_errors() {
        let check = |bytes: &[u8], expected: FrameError| {
            assert_eq!(decode::<Request>(bytes), Err(expected), "{bytes:x?}");
        };
        check(&[0xff, 0xff, 0xff, 0xff], FrameError::TooLong(0xffff_ffff));
        check(&[0, 0, 0, 0], FrameError::Malformed); // no variant
        check(&[1, 0, 0, 0, 0x7f], FrameError::Malformed); // no such variant
        check(&[2, 0, 0, 0, 0, 0], FrameError::Malformed); // one byte too many
        check(&[6, 0, 0, 0, 2, 0xff, 0xff, 0xff, 0xff, 0x0f], FrameError::Malformed); // echo of 4 GiB in 0 bytes
    }

    #[test]
    fn an_oversized_message_is_refused_by_the_sender() {
        let reply = Reply::Echo(alloc::vec![0; MAX_PAYLOAD + 1]);
        assert!(matches!(encode(&reply), Err(FrameError::TooLong(_))));
    }

    #[test]
    fn random_bytes_never_panic() {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        for _ in 0..20_000 {
            let mut bytes = [0u8; 24];
            for byte in &mut bytes {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                *byte = state as u8;
            }
            bytes[1..4].fill(0);
            bytes[0] %= 21;
            let _ = decode::<Request>(&bytes);
            let _ = decode::<Reply>(&bytes);
            let _ = decode::<Cause>(&bytes);
        }
    }
}
