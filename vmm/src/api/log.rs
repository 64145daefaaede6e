//! The log that `PUT /logger` and `--log-path` ask for: a line for each request and what became of it, with Firecracker's
//! way to begin a line.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::time::SystemTime;

use super::model::{Level, Logger};

/// The log. Nothing is written before it has a file.
#[derive(Debug)]
pub struct Log {
    id: String,
    file: Option<File>,
    settings: Logger,
    /// Lines that could not be written.
    pub missed: u64,
}

impl Log {
    /// The log of the instance `id`.
    pub fn new(id: String) -> Self {
        Self { id, file: None, settings: Logger::default(), missed: 0 }
    }

    /// Makes the changes that a client wants.
    ///
    /// # Errors
    /// That the file cannot be opened; nothing is changed then.
    pub fn set(&mut self, logger: Logger) -> io::Result<()> {
        if let Some(path) = &logger.log_path {
            self.file = Some(open_for_lines(path)?);
        }
        self.settings = logger.over(std::mem::take(&mut self.settings));
        Ok(())
    }

    /// Writes a line, if its level and its origin, a module of this program, are wanted.
    pub fn line(&mut self, level: Level, origin: &str, text: &str) {
        let Logger { level: wanted, show_level, show_log_origin, module, .. } = &self.settings;
        let Some(file) = &mut self.file else { return };
        let is_of_module = module.as_deref().is_none_or(|module| origin.starts_with(module));
        if level > wanted.unwrap_or_default() || !is_of_module {
            return;
        }
        let time = humantime::format_rfc3339_nanos(SystemTime::now());
        // As Firecracker writes it: without the zone, which is UTC.
        let time = time.to_string();
        let mut line = format!("{} [{}:api", time.trim_end_matches('Z'), self.id);
        if show_level.unwrap_or(false) {
            line.push_str(&format!(":{}", level.name().to_uppercase()));
        }
        if show_log_origin.unwrap_or(false) {
            line.push_str(&format!(":{origin}"));
        }
        line.push_str("] ");
        line.extend(text.chars().map(|c| if c.is_control() { ' ' } else { c }));
        line.push('\n');
        // In one piece; a reader of a FIFO who does not read costs lines, not time.
        if file.write(line.as_bytes()).ok() != Some(line.len()) {
            self.missed += 1;
        }
    }
}

/// Opens a file to be written at its end, or a FIFO, whether anybody reads it or not. Never waits.
///
/// # Errors
/// What the system says, or that it is neither.
pub fn open_for_lines(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    // Reading too: a FIFO without a reader could not be opened otherwise.
    options.read(true).append(true).create(true).mode(0o600);
    let file = options.custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path)?;
    let kind = file.metadata()?.file_type();
    match kind.is_file() || kind.is_fifo() || kind.is_char_device() {
        true => Ok(file),
        false => Err(io::Error::new(io::ErrorKind::InvalidInput, "neither a file nor a FIFO")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_say_what_was_asked_for_and_stay_lines() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut log = Log::new("name".into());
        log.line(Level::Error, "api", "before there is a file");
        let logger = Logger { log_path: Some(path.clone()), ..Logger::default() };
        log.set(logger).unwrap();
        log.line(Level::Debug, "api", "too much");
        log.line(Level::Info, "api", "plain");
        let more = Logger {
            show_level: Some(true),
            show_log_origin: Some(true),
            module: Some("api::desk".into()),
            level: Some(Level::Warn),
            ..Logger::default()
        };
        log.set(more).unwrap();
        log.line(Level::Info, "api::desk", "not important enough");
        log.line(Level::Error, "api::http", "of another module");
        log.line(Level::Error, "api::desk", "with\nall");
        let text = std::fs::read_to_string(path).unwrap();
        let lines: Vec<_> = text.lines().map(|line| line.split_once(' ').unwrap().1).collect();
        assert_eq!(lines, ["[name:api] plain", "[name:api:ERROR:api::desk] with all"]);
        assert_eq!(log.missed, 0);
    }

    #[test]
    fn a_directory_is_no_log_and_a_fifo_without_a_reader_is() {
        let dir = tempfile::tempdir().unwrap();
        assert!(open_for_lines(dir.path()).is_err());
        let fifo = dir.path().join("fifo");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &fifo,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RWXU,
            0,
        )
        .unwrap();
        let mut log = Log::new("name".into());
        log.set(Logger { log_path: Some(fifo), ..Logger::default() }).unwrap();
        let long = "x".repeat(1000);
        (0..100).for_each(|_| log.line(Level::Error, "api", &long));
        assert!(log.missed > 0, "nobody reads, so the FIFO is full");
    }
}
