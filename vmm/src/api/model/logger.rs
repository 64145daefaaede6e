//! Where the log and the metrics go.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// How much is logged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Level {
    /// Nothing.
    Off,
    /// What failed.
    Error,
    /// What may surprise.
    Warn,
    /// Each request and what became of it.
    #[default]
    Info,
    /// The same: there is nothing more to say.
    Debug,
    /// The same.
    Trace,
}

impl Level {
    const NAMES: [(Self, &str); 6] = [
        (Self::Off, "Off"),
        (Self::Error, "Error"),
        (Self::Warn, "Warn"),
        (Self::Info, "Info"),
        (Self::Debug, "Debug"),
        (Self::Trace, "Trace"),
    ];

    /// Its name.
    pub fn name(self) -> &'static str {
        Self::NAMES[self as usize].1
    }
}

impl std::str::FromStr for Level {
    type Err = String;

    /// Upper and lower case are the same, as with Firecracker, and `Warning` is `Warn`.
    fn from_str(name: &str) -> Result<Self, String> {
        let name = if name.eq_ignore_ascii_case("warning") { "warn" } else { name };
        let found = Self::NAMES.iter().find(|(_, known)| known.eq_ignore_ascii_case(name));
        found.map(|(level, _)| *level).ok_or_else(|| {
            format!("level {name:?} is none of Off, Error, Warn, Info, Debug, Trace")
        })
    }
}

impl TryFrom<String> for Level {
    type Error = String;

    fn try_from(name: String) -> Result<Self, String> {
        name.parse()
    }
}

impl From<Level> for String {
    fn from(level: Level) -> Self {
        level.name().into()
    }
}

/// `PUT /logger`. What is missing stays as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Logger {
    /// A file or FIFO; standard error if there never was one.
    #[serde(default)]
    pub log_path: Option<PathBuf>,
    /// How much is logged.
    #[serde(default)]
    pub level: Option<Level>,
    /// Whether each line says its level.
    #[serde(default)]
    pub show_level: Option<bool>,
    /// Whether each line says where in the program it comes from.
    #[serde(default)]
    pub show_log_origin: Option<bool>,
    /// Only lines of this module.
    #[serde(default)]
    pub module: Option<String>,
}

impl Logger {
    /// `self` where it says something, `old` elsewhere.
    pub fn over(self, old: Self) -> Self {
        Self {
            log_path: self.log_path.or(old.log_path),
            level: self.level.or(old.level),
            show_level: self.show_level.or(old.show_level),
            show_log_origin: self.show_log_origin.or(old.show_log_origin),
            module: self.module.or(old.module),
        }
    }
}

/// `PUT /metrics`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Metrics {
    /// A file or FIFO.
    pub metrics_path: PathBuf,
}
