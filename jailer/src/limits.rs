//! Limits of the process itself (`setrlimit`): the ones that a user may set by name, and those that always hold.

use std::fmt;
use std::str::FromStr;

use rustix::process::{Resource, Rlimit};

/// A resource and how much of it a jailed process may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResourceLimit {
    resource: Resource,
    most: u64,
}

/// The limits that have a name, as Firecracker's jailer calls them.
const NAMES: [(&str, Resource); 2] = [("no-file", Resource::Nofile), ("fsize", Resource::Fsize)];

/// Text that is no limit.
#[derive(Debug, thiserror::Error)]
#[error("a limit is no-file=NUMBER (open descriptors) or fsize=BYTES (size of a file it writes)")]
pub struct LimitError;

impl ResourceLimit {
    /// No dump of memory when the process dies: it would hold the guest's.
    pub const NO_CORE: Self = Self { resource: Resource::Core, most: 0 };

    /// At most `most` open descriptors, or what this process may have at most, if that is less.
    pub fn descriptors(most: u64) -> Self {
        let now = rustix::process::getrlimit(Resource::Nofile).maximum;
        Self { resource: Resource::Nofile, most: most.min(now.unwrap_or(u64::MAX)) }
    }

    /// At most `most` processes and threads of the user in this user namespace.
    pub fn processes(most: u64) -> Self {
        Self { resource: Resource::Nproc, most }
    }

    /// Sets it for this process, for good.
    pub(crate) fn set(self) -> rustix::io::Result<()> {
        let limit = Rlimit { current: Some(self.most), maximum: Some(self.most) };
        rustix::process::setrlimit(self.resource, limit)
    }
}

impl FromStr for ResourceLimit {
    type Err = LimitError;

    fn from_str(text: &str) -> Result<Self, LimitError> {
        let (name, most) = text.split_once('=').ok_or(LimitError)?;
        let (_, resource) =
            NAMES.into_iter().find(|(known, _)| *known == name).ok_or(LimitError)?;
        Ok(Self { resource, most: most.parse().map_err(|_| LimitError)? })
    }
}

impl fmt::Display for ResourceLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match NAMES.into_iter().find(|(_, resource)| *resource == self.resource) {
            Some((name, _)) => write!(f, "{name}={}", self.most),
            None => write!(f, "{:?}={}", self.resource, self.most),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_read_by_name() {
        let check = |text: &str, good: bool| {
            let parsed = text.parse::<ResourceLimit>();
            assert_eq!(parsed.is_ok(), good, "{text}");
            if let Ok(limit) = parsed {
                assert_eq!(limit.to_string(), text);
            }
        };
        check("no-file=64", true);
        check("fsize=0", true);
        for bad in ["no-file", "no-file=", "no-file=-1", "no-file=x", "as=1", ""] {
            check(bad, false);
        }
    }
}
