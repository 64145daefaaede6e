//! Devices: drives, vsock, entropy, serial port.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::Refusal;

/// A bucket of a rate limiter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenBucket {
    size: u64,
    #[serde(default)]
    one_time_burst: Option<u64>,
    refill_time: u64,
}

impl TokenBucket {
    /// Firecracker takes a bucket of no size, or that needs no time, for none.
    fn limits(&self) -> bool {
        self.size > 0 && self.refill_time > 0
    }
}

/// Limits of bytes and operations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimiter {
    #[serde(default)]
    bandwidth: Option<TokenBucket>,
    #[serde(default)]
    ops: Option<TokenBucket>,
}

/// Refuses a limiter that limits: no device here has one.
fn check_rate_limiter(limiter: Option<RateLimiter>) -> Result<(), Refusal> {
    let buckets = limiter.into_iter().flat_map(|limiter| [limiter.bandwidth, limiter.ops]);
    match buckets.flatten().any(|bucket| bucket.limits()) {
        true => Err(Refusal::new(
            "rate_limiter: devices have no rate limiters here; leave it out, and limit the machine's control group instead",
        )),
        false => Ok(()),
    }
}

/// How a drive treats the guest's flushes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum CacheType {
    /// Firecracker ignores them; here they reach the file nevertheless.
    #[default]
    Unsafe,
    /// They reach the file.
    Writeback,
}

/// By which of the kernel's interfaces a drive's file is read and written: here always by threads that wait.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum IoEngine {
    /// One request after the other.
    #[default]
    Sync,
    /// io_uring.
    Async,
}

/// `PUT /drives/{drive_id}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Drive {
    /// Its name.
    pub drive_id: String,
    /// Which partition of it Linux boots from, if it is the root device.
    #[serde(default)]
    pub partuuid: Option<String>,
    /// Whether Linux boots from it.
    pub is_root_device: bool,
    /// How it treats flushes.
    #[serde(default)]
    pub cache_type: CacheType,
    /// Whether the guest may write.
    #[serde(default)]
    pub is_read_only: Option<bool>,
    /// The file with its bytes.
    #[serde(default)]
    pub path_on_host: Option<PathBuf>,
    /// How much of it may be used in a time.
    #[serde(default)]
    pub rate_limiter: Option<RateLimiter>,
    /// How its file is read and written.
    #[serde(default)]
    pub io_engine: IoEngine,
    /// A vhost-user back end's socket.
    #[serde(default)]
    pub socket: Option<PathBuf>,
}

impl Drive {
    /// Refuses what no drive of ours can be.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn check(&self) -> Result<(), Refusal> {
        check_rate_limiter(self.rate_limiter)?;
        if self.socket.is_some() {
            return Err(Refusal::new(
                "socket: there are no vhost-user drives here; name a file or a block device with path_on_host",
            ));
        }
        if self.path_on_host.is_none() {
            return Err(Refusal::new("path_on_host: a drive needs the path of its file"));
        }
        if self.partuuid.is_some() && !self.is_root_device {
            return Err(Refusal::new("partuuid: only the root device has one"));
        }
        let partuuid = self.partuuid.as_deref().unwrap_or_default();
        match partuuid.chars().all(|c| c.is_ascii_hexdigit() || c == '-') {
            true => Ok(()),
            false => Err(Refusal::new(format!("partuuid {partuuid:?} is not hexadecimal"))),
        }
    }
}

/// `PATCH /drives/{drive_id}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DriveUpdate {
    /// Its name.
    pub drive_id: String,
    /// The file that its bytes are in from now on.
    #[serde(default)]
    pub path_on_host: Option<PathBuf>,
    /// New limits.
    #[serde(default)]
    pub rate_limiter: Option<RateLimiter>,
}

impl DriveUpdate {
    /// Refuses limits.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn check(&self) -> Result<(), Refusal> {
        check_rate_limiter(self.rate_limiter)
    }
}

/// `PUT /entropy`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entropy {
    /// How many bytes it gives in a time.
    #[serde(default)]
    pub rate_limiter: Option<RateLimiter>,
}

impl Entropy {
    /// Refuses limits.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn check(&self) -> Result<(), Refusal> {
        check_rate_limiter(self.rate_limiter)
    }
}

/// `PUT /vsock`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vsock {
    /// Nobody uses it any more.
    #[serde(default)]
    pub vsock_id: Option<String>,
    /// The guest's address.
    pub guest_cid: u32,
    /// Where host clients connect to.
    pub uds_path: PathBuf,
}

impl Vsock {
    /// Refuses addresses that are not a guest's.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn check(&self) -> Result<(), Refusal> {
        const FIRST: u32 = 3;
        const LAST: u32 = u32::MAX - 1;
        match self.guest_cid {
            FIRST..=LAST => Ok(()),
            cid => Err(Refusal::new(format!(
                "guest_cid {cid} is reserved; the first that is not is {FIRST}"
            ))),
        }
    }
}

/// `PUT /serial`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Serial {
    /// A file or FIFO for what the guest prints; standard output if it is missing.
    #[serde(default)]
    pub serial_out_path: Option<PathBuf>,
    /// How much it may print in a time.
    #[serde(default)]
    pub rate_limiter: Option<TokenBucket>,
}

impl Serial {
    /// Refuses limits.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn check(&self) -> Result<(), Refusal> {
        check_rate_limiter(
            self.rate_limiter.map(|bucket| RateLimiter { bandwidth: Some(bucket), ops: None }),
        )
    }
}
