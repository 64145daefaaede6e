//! Names of jails.

use std::fmt;
use std::str::FromStr;

/// Longest name: a host name has at most `HOST_NAME_MAX` bytes (limits.h).
const MAX_LEN: usize = 64;

/// Name of a jail: its control group and its host name. What both, and a file, can be called: 1 to 64 letters, digits or
/// hyphens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Id(String);

/// Text that is no name of a jail.
#[derive(Debug, thiserror::Error)]
#[error("an id has 1 to {MAX_LEN} letters, digits or hyphens")]
pub struct IdError;

impl Id {
    /// A name of its own for this process: `cleanslate-<process number>-<moment>`. The number alone would not do: containers
    /// may have the same one in control groups that they share.
    pub fn of_this_process() -> Self {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        Self(format!("cleanslate-{}-{:x}", std::process::id(), now.tv_nsec))
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Id {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        let fits = (1..=MAX_LEN).contains(&text.len());
        let is_plain = text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
        if fits && is_plain { Ok(Self(text.into())) } else { Err(IdError) }
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_can_be_a_file_and_a_host() {
        let check = |text: &str, good: bool| {
            assert_eq!(text.parse::<Id>().is_ok(), good, "{text:?}");
        };
        check("a", true);
        check("vm-17", true);
        check(&"x".repeat(64), true);
        check(&"x".repeat(65), false);
        for bad in ["", "a/b", "..", "a b", "a_b", "ü", "a\n"] {
            check(bad, false);
        }
        assert!(Id::of_this_process().as_str().parse::<Id>().is_ok());
    }
}
