//! Disks and random bytes, by the files that Linux has for them.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::FileExt;

use agent_protocol::{DiskAnswer, DiskDescription, DiskRequest, MAX_DISK_BYTES};

use crate::modules::{self, Group};

/// Bytes of a sector (virtio 1.2, section 5.2.4).
const SECTOR: u64 = 512;
/// Status of a request that failed (virtio 1.2, section 5.2.6).
const IO_ERROR: u8 = 1;
/// Most random bytes that are worth one answer.
const MAX_RANDOM: u32 = 64 * 1024;

/// Random bytes of the virtio-rng device, as many as it gives at once up to `bytes`.
///
/// # Errors
/// In words.
pub fn random(bytes: u32) -> Result<Vec<u8>, String> {
    modules::load(Group::Rng)?;
    let mut file = File::open("/dev/hwrng").map_err(|error| format!("open /dev/hwrng: {error}"))?;
    let mut random = vec![0; bytes.min(MAX_RANDOM) as usize];
    let len = file.read(&mut random).map_err(|error| format!("read /dev/hwrng: {error}"))?;
    random.truncate(len);
    Ok(random)
}

/// Carries out one request of disk `number`.
///
/// # Errors
/// In words, where Linux has no file for it.
pub fn disk(number: u8, request: &DiskRequest) -> Result<DiskAnswer, String> {
    modules::load(Group::Block)?;
    let name = match number {
        0..26 => format!("vd{}", char::from(b'a' + number)),
        _ => return Err(format!("no disk {number}")),
    };
    let open = |write| {
        let device = format!("/dev/{name}");
        let opened = OpenOptions::new().read(true).write(write).open(&device);
        opened.map_err(|error| format!("open {device}: {error}"))
    };
    let done = |result: io::Result<()>| match result {
        Ok(()) => DiskAnswer::Done,
        Err(_) => DiskAnswer::Status(IO_ERROR),
    };
    Ok(match request {
        DiskRequest::Describe => DiskAnswer::Description(describe(&name)?),
        DiskRequest::Read { sector, bytes } => {
            let mut data = vec![0; (*bytes).min(MAX_DISK_BYTES) as usize];
            match open(false)?.read_exact_at(&mut data, sector.saturating_mul(SECTOR)) {
                Ok(()) => DiskAnswer::Bytes(data),
                Err(_) => DiskAnswer::Status(IO_ERROR),
            }
        }
        DiskRequest::Write { sector, bytes } => {
            let file = open(true)?;
            let written = file.write_all_at(bytes, sector.saturating_mul(SECTOR));
            done(written.and_then(|()| file.sync_data()))
        }
        DiskRequest::Flush => done(open(true)?.sync_data()),
        DiskRequest::Discard { .. } | DiskRequest::WriteZeroes { .. } | DiskRequest::Sweep(_) => {
            return Err("the Linux agent does not discard, zero or sweep".into());
        }
    })
}

fn describe(name: &str) -> Result<DiskDescription, String> {
    let read = |file: &str| {
        let path = format!("/sys/block/{name}/{file}");
        let text = std::fs::read_to_string(&path).map_err(|e| format!("read {path}: {e}"))?;
        Ok::<_, String>(text.trim().to_string())
    };
    let sectors = read("size")?;
    Ok(DiskDescription {
        sectors: sectors.parse().map_err(|_| format!("{sectors:?} is no size"))?,
        features: features(&read("device/features")?),
        name: read("serial")?,
    })
}

/// One character for each bit, lowest first.
fn features(text: &str) -> u64 {
    text.bytes().take(64).enumerate().map(|(bit, byte)| u64::from(byte == b'1') << bit).sum()
}

#[cfg(test)]
mod tests {
    use super::features;

    #[test]
    fn feature_bits_are_read_lowest_first() {
        assert_eq!(features("0100000000000000000000000000000011"), 1 << 1 | 1 << 32 | 1 << 33);
        assert_eq!(features(""), 0);
    }
}
