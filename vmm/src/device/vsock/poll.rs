//! The device's own epoll instance, and the timer in it. The event loop of the monitor sees one descriptor.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{Timespec, epoll};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, timerfd_create, timerfd_settime,
};

use super::packet::{ConnectionKey, GuestPort, HostPort, SocketType};

/// Most events that one call handles; the rest are still there at the next.
const MAX_EVENTS: usize = 64;

/// The port number that means "any": no connection that the guest knows has it on the host's side. It marks the tokens below.
pub const PORT_ANY: u32 = u32::MAX;

/// From here on the guest's port belongs to a connection even beside [`PORT_ANY`]; see [`ConnectionKey::parted`].
pub const FIRST_PARTED: u32 = 1 << 31;

/// What a registered descriptor is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Token {
    /// The listening socket for clients of a type.
    Listener(SocketType),
    /// Something to pick up: a connection asked for in-process, or work left over from an earlier call.
    Wake,
    /// Some deadline has passed.
    Timer,
    /// A client that has not said yet where it wants to go.
    Client(u32),
    /// The socket of a connection.
    Connection(ConnectionKey),
}

impl Token {
    fn to_u64(self) -> u64 {
        let (high, low) = match self {
            Self::Connection(key) => (key.host.0, key.guest.0),
            Self::Listener(SocketType::Stream) => (PORT_ANY, 0),
            Self::Listener(SocketType::Seqpacket) => (PORT_ANY, 1),
            Self::Wake => (PORT_ANY, 2),
            Self::Timer => (PORT_ANY, 3),
            Self::Client(slot) => (PORT_ANY, 4 + slot),
        };
        u64::from(high) << 32 | u64::from(low)
    }

    fn from_u64(raw: u64) -> Self {
        match ((raw >> 32) as u32, raw as u32) {
            (PORT_ANY, 0) => Self::Listener(SocketType::Stream),
            (PORT_ANY, 1) => Self::Listener(SocketType::Seqpacket),
            (PORT_ANY, 2) => Self::Wake,
            (PORT_ANY, 3) => Self::Timer,
            (PORT_ANY, slot @ 4..FIRST_PARTED) => Self::Client(slot - 4),
            (host, guest) => {
                Self::Connection(ConnectionKey { host: HostPort(host), guest: GuestPort(guest) })
            }
        }
    }
}

/// Which conditions of a descriptor are wanted, for as long as they last. With neither, a hang-up is still reported,
/// once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Interest {
    /// There are bytes, an end of file, or a client to take.
    pub readable: bool,
    /// There is room for bytes.
    pub writable: bool,
}

impl Interest {
    /// Readable alone.
    pub const READABLE: Self = Self { readable: true, writable: false };

    fn flags(self) -> epoll::EventFlags {
        let mut flags = epoll::EventFlags::empty();
        flags.set(epoll::EventFlags::IN | epoll::EventFlags::RDHUP, self.readable);
        flags.set(epoll::EventFlags::OUT, self.writable);
        // A hang-up cannot be masked and lasts for ever: without the edge it would spin.
        flags.set(epoll::EventFlags::ET, flags.is_empty());
        flags
    }
}

/// A condition that was met.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// Which descriptor.
    pub token: Token,
    /// There is something to read, perhaps an end of file.
    pub readable: bool,
    /// There is room to write.
    pub writable: bool,
    /// The other end sends no more; there may be bytes left to read.
    pub peer_done: bool,
    /// The other end is gone in both directions, or failed.
    pub hung_up: bool,
}

/// The epoll instance.
#[derive(Debug)]
pub struct Poller {
    epoll: OwnedFd,
    timer: OwnedFd,
    /// When the timer fires.
    armed: Option<Instant>,
}

impl Poller {
    /// Makes the instance with its timer, disarmed.
    pub fn new() -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let timer = timerfd_create(TimerfdClockId::Monotonic, flags)?;
        let poller = Self { epoll, timer, armed: None };
        poller.add(&poller.timer, Token::Timer, Interest::READABLE)?;
        Ok(poller)
    }

    /// Registers `fd`. Closing it unregisters it.
    pub fn add(&self, fd: impl AsFd, token: Token, interest: Interest) -> io::Result<()> {
        let data = epoll::EventData::new_u64(token.to_u64());
        Ok(epoll::add(&self.epoll, fd, data, interest.flags())?)
    }

    /// Changes what is wanted of a registered `fd`.
    pub fn change(&self, fd: impl AsFd, token: Token, interest: Interest) -> io::Result<()> {
        let data = epoll::EventData::new_u64(token.to_u64());
        Ok(epoll::modify(&self.epoll, fd, data, interest.flags())?)
    }

    /// Unregisters `fd`.
    pub fn remove(&self, fd: impl AsFd) -> io::Result<()> {
        Ok(epoll::delete(&self.epoll, fd)?)
    }

    /// Gives the conditions that are met now, at most [`MAX_EVENTS`]. Does not wait.
    pub fn poll(&self) -> io::Result<impl Iterator<Item = Event> + use<>> {
        let none =
            epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) };
        let mut events = [none; MAX_EVENTS];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let count = match epoll::wait(&self.epoll, &mut events[..], Some(&now)) {
            Err(rustix::io::Errno::INTR) => 0,
            other => other?,
        };
        Ok(events.into_iter().take(count).map(|event| {
            let flags = event.flags;
            Event {
                token: Token::from_u64(event.data.u64()),
                readable: flags.contains(epoll::EventFlags::IN),
                writable: flags.contains(epoll::EventFlags::OUT),
                peer_done: flags.contains(epoll::EventFlags::RDHUP),
                hung_up: flags.intersects(epoll::EventFlags::HUP | epoll::EventFlags::ERR),
            }
        }))
    }

    /// Makes [`Token::Timer`] ready at `deadline`, unless it will be earlier anyway.
    pub fn arm_timer(&mut self, deadline: Instant) -> io::Result<()> {
        if self.armed.is_none_or(|armed| deadline < armed) {
            let delay = deadline.saturating_duration_since(Instant::now());
            // A delay of 0 would disarm it.
            self.set_timer(delay.max(Duration::from_nanos(1)))?;
            self.armed = Some(deadline);
        }
        Ok(())
    }

    /// Takes note that the timer has fired.
    pub fn disarm_timer(&mut self) -> io::Result<()> {
        self.armed = None;
        self.set_timer(Duration::ZERO)
    }

    fn set_timer(&self, delay: Duration) -> io::Result<()> {
        let value = Timespec {
            tv_sec: delay.as_secs().try_into().unwrap_or(i64::MAX),
            tv_nsec: delay.subsec_nanos().into(),
        };
        let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: value };
        timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once)?;
        Ok(())
    }
}

impl AsFd for Poller {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    #[test]
    fn tokens_survive_the_kernel() {
        let key = |host, guest| ConnectionKey { host: HostPort(host), guest: GuestPort(guest) };
        for token in [
            Token::Listener(SocketType::Stream),
            Token::Listener(SocketType::Seqpacket),
            Token::Wake,
            Token::Timer,
            Token::Client(0),
            Token::Client(127),
            Token::Connection(key(0, 0)),
            Token::Connection(key(PORT_ANY - 1, PORT_ANY)),
            Token::Connection(ConnectionKey::parted(0)),
            Token::Connection(ConnectionKey::parted(u32::MAX)),
            Token::Connection(key(1 << 30, 1024)),
        ] {
            assert_eq!(Token::from_u64(token.to_u64()), token);
        }
    }

    #[test]
    fn a_hang_up_that_nobody_waits_for_is_reported_once() {
        let poller = Poller::new().unwrap();
        let (mut theirs, ours) = UnixStream::pair().unwrap();
        theirs.write_all(b"unread").unwrap();
        poller.add(&ours, Token::Client(0), Interest::default()).unwrap();
        assert_eq!(poller.poll().unwrap().count(), 0, "bytes are not asked for");
        drop(theirs);
        let events: Vec<_> = poller.poll().unwrap().collect();
        assert!(matches!(events[..], [Event { hung_up: true, .. }]), "{events:?}");
        assert_eq!(poller.poll().unwrap().count(), 0);
    }

    #[test]
    fn the_timer_fires_once_and_goes_silent() {
        let mut poller = Poller::new().unwrap();
        let start = Instant::now();
        for millis in [500_000, 1, 1_000_000] {
            poller.arm_timer(start + Duration::from_millis(millis)).unwrap();
        }
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(poller.poll().unwrap().next().unwrap().token, Token::Timer);
        poller.disarm_timer().unwrap();
        assert_eq!(poller.poll().unwrap().count(), 0);
    }
}
