//! Jobs that the host gives the agent: bytes in, bytes out. What they are given decides what comes out, and nothing else does.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::str;

use sha2::{Digest, Sha256};

/// The longest that a job may spin, in milliseconds: an hour.
const MOST_SPINNING_MS: u64 = 3_600_000;

/// Does the job `name`. `spin` keeps the processor busy for so many milliseconds.
///
/// # Errors
/// Why it cannot be done, in words.
pub fn run(name: &str, input: Vec<u8>, spin: impl FnOnce(u64)) -> Result<Vec<u8>, String> {
    match name {
        "echo" => Ok(input),
        "sha256" => Ok(Sha256::digest(&input).to_vec()),
        "spin" => {
            let ms = str::from_utf8(&input).ok().and_then(|text| text.trim().parse().ok());
            match ms {
                Some(ms @ 0..=MOST_SPINNING_MS) => {
                    spin(ms);
                    Ok(input)
                }
                _ => Err(format!("spin is given milliseconds, up to {MOST_SPINNING_MS}")),
            }
        }
        _ => Err(format!("there is no job {name:?}: echo, sha256 or spin")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_in_bytes_out() {
        let never = |_| panic!("nobody spins");
        assert_eq!(run("echo", alloc::vec![1, 2], never), Ok(alloc::vec![1, 2]));
        // FIPS 180-2, appendix B.1.
        let digest = run("sha256", b"abc".into(), never).unwrap();
        assert_eq!(digest[..4], [0xba, 0x78, 0x16, 0xbf]);
        let mut spun = 0;
        assert_eq!(run("spin", b"20\n".into(), |ms| spun = ms), Ok(b"20\n".into()));
        assert_eq!(spun, 20);
    }

    #[test]
    fn what_cannot_be_done_is_told() {
        let never = |_| panic!("nobody spins");
        for (name, input) in
            [("spin", &b"x"[..]), ("spin", b"3600001"), ("spin", b"\xff"), ("", b"")]
        {
            assert!(run(name, input.into(), never).is_err(), "{name} {input:?}");
        }
    }
}
