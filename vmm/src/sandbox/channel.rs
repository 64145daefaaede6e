//! Frames with descriptors over a Unix stream socket.

use std::io::{self, ErrorKind, IoSlice, IoSliceMut};
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use agent_protocol::frame::{self, FrameError, MAX_FRAME};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Most descriptors that go with one message.
pub const MOST_DESCRIPTORS: usize = 4;

/// Bytes that are read at once.
const CHUNK: usize = 16 * 1024;

/// Why nothing more can come from the other side.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// It has closed its end.
    #[error("the other side has closed the connection")]
    Closed,
    /// It sent what is no message.
    #[error("the other side sent what is no message")]
    Frame(#[from] FrameError),
    /// It sent more descriptors than it may.
    #[error("the other side sent too many descriptors")]
    Descriptors,
    /// The kernel's word.
    #[error("talk to the other side")]
    Io(#[from] io::Error),
}

impl From<Errno> for ChannelError {
    fn from(errno: Errno) -> Self {
        Self::Io(errno.into())
    }
}

/// One end: sends `S` and receives `R`. The socket does not block; its descriptor tells when something comes. Whatever comes is
/// bounded by [`MAX_FRAME`].
#[derive(Debug)]
pub struct Channel<S, R> {
    socket: UnixStream,
    received: Vec<u8>,
    descriptors: Vec<OwnedFd>,
    to_send: Vec<u8>,
    kinds: PhantomData<fn(S) -> R>,
}

impl<S, R> AsFd for Channel<S, R> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl<S: Serialize, R: DeserializeOwned> Channel<S, R> {
    /// Over `socket`.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn new(socket: UnixStream) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        let (received, descriptors, to_send) = Default::default();
        Ok(Self { socket, received, descriptors, to_send, kinds: PhantomData })
    }

    /// Sends what the socket takes at once of `message`. The rest waits for [`Channel::flush`].
    ///
    /// # Errors
    /// [`ChannelError`]; a message that is too long is not sent at all.
    pub fn send(&mut self, message: &S) -> Result<(), ChannelError> {
        self.to_send.extend(frame::encode(message)?);
        self.flush()
    }

    /// The same with descriptors. Nothing may wait to be sent.
    ///
    /// # Errors
    /// [`ChannelError`].
    pub fn send_with(
        &mut self,
        message: &S,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), ChannelError> {
        assert!(self.to_send.is_empty() && descriptors.len() <= MOST_DESCRIPTORS);
        let bytes = frame::encode(message)?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        ancillary.push(SendAncillaryMessage::ScmRights(descriptors));
        let sent =
            sendmsg(&self.socket, &[IoSlice::new(&bytes)], &mut ancillary, SendFlags::NOSIGNAL)?;
        self.to_send.extend_from_slice(&bytes[sent..]);
        self.flush()
    }

    /// Sends what waits, as far as the socket takes it.
    ///
    /// # Errors
    /// [`ChannelError`].
    pub fn flush(&mut self) -> Result<(), ChannelError> {
        while !self.to_send.is_empty() {
            match rustix::net::send(&self.socket, &self.to_send, SendFlags::NOSIGNAL) {
                Ok(sent) => drop(self.to_send.drain(..sent)),
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    /// Whether something waits for the socket to take it.
    pub fn has_to_flush(&self) -> bool {
        !self.to_send.is_empty()
    }

    /// The next message with the descriptors that came so far and were not taken, or `None` if it has not come.
    ///
    /// # Errors
    /// [`ChannelError`]; the channel is of no use then.
    pub fn receive(&mut self) -> Result<Option<(R, Vec<OwnedFd>)>, ChannelError> {
        loop {
            if let Some((message, len)) = frame::decode(&self.received)? {
                self.received.drain(..len);
                return Ok(Some((message, std::mem::take(&mut self.descriptors))));
            }
            match self.read() {
                Ok(0) => return Err(ChannelError::Closed),
                Ok(_) => {}
                Err(ChannelError::Io(error)) if error.kind() == ErrorKind::WouldBlock => {
                    return Ok(None);
                }
                Err(ChannelError::Io(error)) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn read(&mut self) -> Result<usize, ChannelError> {
        let old = self.received.len();
        // `decode` has refused longer frames, so a whole one is there before the room is used up.
        self.received.resize(old + (MAX_FRAME - old).min(CHUNK), 0);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let parts = &mut [IoSliceMut::new(&mut self.received[old..])];
        let result = recvmsg(&self.socket, parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC);
        let len = result.as_ref().map_or(0, |message| message.bytes);
        self.received.truncate(old + len);
        result?;
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                self.descriptors.extend(descriptors);
            }
        }
        match self.descriptors.len() {
            0..=MOST_DESCRIPTORS => Ok(len),
            _ => Err(ChannelError::Descriptors),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    type Ends = (Channel<Vec<u8>, String>, Channel<String, Vec<u8>>);

    fn pair() -> Ends {
        let (one, other) = UnixStream::pair().unwrap();
        (Channel::new(one).unwrap(), Channel::new(other).unwrap())
    }

    #[test]
    fn messages_come_whole_and_in_order() {
        let (mut ours, mut theirs) = pair();
        assert!(theirs.receive().unwrap().is_none());
        let long = vec![7; 200_000];
        ours.send(&long).unwrap();
        ours.send(&vec![1]).unwrap();
        let mut came = Vec::new();
        while came.len() < 2 {
            came.extend(theirs.receive().unwrap().map(|(message, _)| message));
            ours.flush().unwrap();
        }
        assert_eq!(came, [long, vec![1]]);
        assert!(!ours.has_to_flush());
    }

    #[test]
    fn descriptors_come_with_their_message() {
        let (mut ours, mut theirs) = pair();
        let (reader, mut writer) = std::io::pipe().unwrap();
        ours.send_with(&vec![1, 2], &[reader.as_fd()]).unwrap();
        ours.send(&vec![3]).unwrap();
        let (message, descriptors) = theirs.receive().unwrap().unwrap();
        assert_eq!((message, descriptors.len()), (vec![1, 2], 1));
        writer.write_all(b"x").unwrap();
        let mut byte = [0];
        rustix::io::read(&descriptors[0], &mut byte).unwrap();
        assert_eq!(byte, *b"x");
        assert!(theirs.receive().unwrap().unwrap().1.is_empty());
    }

    #[test]
    fn nonsense_and_the_end_are_errors() {
        let (one, mut other) = UnixStream::pair().unwrap();
        let mut channel = Channel::<(), Vec<u8>>::new(one).unwrap();
        other.write_all(&[0xff; 8]).unwrap();
        assert!(matches!(channel.receive(), Err(ChannelError::Frame(FrameError::TooLong(_)))));
        let (ours, mut theirs) = pair();
        drop(ours);
        assert!(matches!(theirs.receive(), Err(ChannelError::Closed)));
    }
}
