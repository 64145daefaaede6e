//! What the coordinator waits for: sockets, ends of processes, signals.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};

/// Something that is waited for. Sandboxes have numbers that are never used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    Signals,
    /// Its socket.
    Socket(u64),
    /// The end of its process.
    End(u64),
}

/// What is waited for.
#[derive(Debug)]
pub(super) struct Watch(OwnedFd);

/// Most events that are taken at once.
const EVENTS: usize = 64;

impl Source {
    fn token(self) -> EventData {
        EventData::new_u64(match self {
            Self::Signals => 0,
            Self::Socket(number) => number << 2 | 1,
            Self::End(number) => number << 2 | 2,
        })
    }

    fn of(token: u64) -> Self {
        match token & 3 {
            1 => Self::Socket(token >> 2),
            2 => Self::End(token >> 2),
            _ => Self::Signals,
        }
    }
}

impl Watch {
    pub fn new() -> io::Result<Self> {
        Ok(Self(epoll::create(CreateFlags::CLOEXEC)?))
    }

    pub fn add(&self, fd: impl AsFd, source: Source) -> io::Result<()> {
        Ok(epoll::add(&self.0, fd, source.token(), EventFlags::IN)?)
    }

    /// Waits for room to write as well, or no more.
    pub fn await_room(&self, fd: impl AsFd, source: Source, wanted: bool) -> io::Result<()> {
        let mut flags = EventFlags::IN;
        flags.set(EventFlags::OUT, wanted);
        Ok(epoll::modify(&self.0, fd, source.token(), flags)?)
    }

    /// Before it is closed: a copy of this process may have it open still, and then the kernel goes on to tell of it.
    pub fn remove(&self, fd: impl AsFd) {
        let _ = epoll::delete(&self.0, fd);
    }

    /// Waits until something is ready, or for `timeout`.
    pub fn wait(&self, timeout: Option<Duration>) -> io::Result<Vec<Source>> {
        let timeout = timeout.map(|timeout| Timespec {
            tv_sec: timeout.as_secs() as i64,
            tv_nsec: timeout.subsec_nanos().into(),
        });
        let mut space = [MaybeUninit::uninit(); EVENTS];
        match epoll::wait(&self.0, &mut space, timeout.as_ref()) {
            Ok((ready, _)) => Ok(ready.iter().map(|e| Source::of({ e.data }.u64())).collect()),
            Err(rustix::io::Errno::INTR) => Ok(Vec::new()),
            Err(errno) => Err(errno.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_told_apart() {
        for source in [Source::Signals, Source::Socket(1), Source::End(1), Source::Socket(1 << 40)]
        {
            assert_eq!(Source::of(source.token().u64()), source);
        }
    }
}
