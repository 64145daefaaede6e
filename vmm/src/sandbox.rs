//! A sandbox: a machine in a process of its own that is jailed and does what it is told over a socket.
//!
//! Outside is whoever holds a [`Sandbox`]; it knows names and opens files. Inside is [`serve`], in a copy of the program that has
//! gone through the jail's steps and has descriptors alone. Outside believes inside nothing: what comes is bounded, decoded, and
//! used as data.

mod channel;
mod protocol;
mod worker;

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

pub use channel::{Channel, ChannelError, MOST_DESCRIPTORS};
pub use protocol::{Answer, Ended, Found, Judged, Order};
pub use worker::{Guidance, WorkerError, refuse, serve};

/// The outside of a sandbox.
#[derive(Debug)]
pub struct Sandbox {
    channel: Channel<Order, Answer>,
}

impl AsFd for Sandbox {
    /// Readable when an answer comes.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }
}

impl Sandbox {
    /// The outside, and the socket for [`serve`].
    ///
    /// # Errors
    /// What the kernel says when it has no descriptor left.
    pub fn new() -> io::Result<(Self, UnixStream)> {
        let (ours, theirs) = UnixStream::pair()?;
        Ok((Self { channel: Channel::new(ours)? }, theirs))
    }

    /// Gives an order. What the socket does not take at once waits for [`Sandbox::flush`].
    ///
    /// # Errors
    /// [`ChannelError`]: the process is gone, or the order is too long, and then it was not given.
    pub fn order(&mut self, order: &Order) -> Result<(), ChannelError> {
        self.channel.send(order)
    }

    /// The same with open files. Only if no order is under way.
    ///
    /// # Errors
    /// As for [`Sandbox::order`].
    pub fn order_with(
        &mut self,
        order: &Order,
        files: &[BorrowedFd<'_>],
    ) -> Result<(), ChannelError> {
        self.channel.send_with(order, files)
    }

    /// Sends what waits.
    ///
    /// # Errors
    /// As for [`Sandbox::order`].
    pub fn flush(&mut self) -> Result<(), ChannelError> {
        self.channel.flush()
    }

    /// Whether something waits to be sent: the descriptor is writable when it can be.
    pub fn has_to_flush(&self) -> bool {
        self.channel.has_to_flush()
    }

    /// The next answer, if one has come.
    ///
    /// # Errors
    /// [`ChannelError`]: none will come any more.
    pub fn answer(&mut self) -> Result<Option<Answer>, ChannelError> {
        Ok(self.channel.receive()?.map(|(answer, _)| answer))
    }
}
