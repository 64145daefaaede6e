//! Frames on a connection: bytes to requests, replies to bytes.

use alloc::string::String;
use alloc::vec::Vec;

use agent_protocol::{Hello, Reply, Request, frame};

/// Memory that an idle connection may keep, in bytes.
const SMALL: usize = 4096;

/// Who answers the host.
pub trait Answer {
    /// The greeting for a new connection.
    fn hello(&self) -> Hello;

    /// Carries out one request.
    fn answer(&mut self, request: Request) -> Option<Reply>;

    /// Notes an event of the transport.
    fn note_event(&mut self) {}

    /// Logs that the host misbehaved.
    fn warn(&mut self, text: String);
}

/// Answers the complete frames at the start of `inbox` until there is a reply to send, and removes them.
///
/// # Errors
/// If the bytes can never become a request; the connection is of no more use.
pub(super) fn answer_frames(
    inbox: &mut Vec<u8>,
    agent: &mut impl Answer,
) -> Result<Vec<u8>, frame::FrameError> {
    let mut at = 0;
    let mut outbox = Vec::new();
    while outbox.is_empty()
        && let Some((request, used)) = frame::decode(&inbox[at..])?
    {
        at += used;
        if let Some(reply) = agent.answer(request) {
            outbox = frame::encode(&reply)?;
        }
    }
    inbox.drain(..at);
    // A prefix alone is no reason to reserve anything, but an impossible one is known at once.
    frame::total_len(inbox)?;
    if inbox.is_empty() && inbox.capacity() > SMALL {
        *inbox = Vec::new();
    }
    Ok(outbox)
}
