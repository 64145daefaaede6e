//! What connections may make the agent hold: credit that was given is memory that has to be there, since it cannot be taken back.
//!
//! Each connection has a share of its own, less where there are many. A request that is longer than its connection's share is
//! given the rest of its length once it has come so far, and waits while others have that. A request whose answer may be long
//! waits while answers that were not sent yet leave no room for the longest. So whoever keeps to its credit waits at worst, for
//! others who neither send on nor read.

use agent_protocol::frame::MAX_FRAME;

use super::connections::MAX_CONNECTIONS;

/// Bytes that a connection may send before they are looked at.
pub(super) const SHARE: u32 = 64 * 1024;
/// The same where there are many connections.
pub(super) const SMALL_SHARE: u32 = 256;
/// Shares of all connections together, of which small ones are left for everybody.
const SHARES: usize = (1 << 20) + MAX_CONNECTIONS * SMALL_SHARE as usize;
/// Requests that are longer than a share, together.
const LONG_REQUESTS: usize = 4 * MAX_FRAME;
/// Answers that were not sent yet, together.
const ANSWERS: usize = 8 * MAX_FRAME;

/// Bytes of one connection, or of all together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Claims {
    pub share: usize,
    /// The length of a request that is longer than the share.
    pub long_request: usize,
    pub answer: usize,
}

impl Claims {
    /// The share of one more connection, with so many there.
    pub fn next_share(&self, connections: usize) -> u32 {
        let later = MAX_CONNECTIONS.saturating_sub(connections + 1) * SMALL_SHARE as usize;
        let has_room = self.share + SHARE as usize + later <= SHARES;
        if has_room { SHARE } else { SMALL_SHARE }
    }

    /// Whether a request of this length, longer than its share, may come in.
    pub fn has_room_for(&self, long_request: usize) -> bool {
        self.long_request + long_request <= LONG_REQUESTS
    }

    /// Whether there is room for any answer.
    pub fn has_room_for_answer(&self) -> bool {
        self.answer + MAX_FRAME <= ANSWERS
    }

    /// Takes what a connection claims now instead of `before`. True if others may claim more than they could.
    pub fn replace(&mut self, before: Self, now: Self) -> bool {
        self.share = self.share - before.share + now.share;
        self.long_request = self.long_request - before.long_request + now.long_request;
        self.answer = self.answer - before.answer + now.answer;
        now.long_request < before.long_request || now.answer < before.answer
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_of_as_many_connections_as_there_can_be_stay_within_their_bound() {
        let mut claims = Claims::default();
        let mut shares = [0; 2];
        for connections in 0..MAX_CONNECTIONS {
            let share = claims.next_share(connections);
            shares[usize::from(share == SMALL_SHARE)] += 1;
            claims
                .replace(Claims::default(), Claims { share: share as usize, ..Claims::default() });
        }
        assert!(claims.share <= SHARES, "{}", claims.share);
        assert_eq!(shares, [16, MAX_CONNECTIONS - 16]);
    }

    #[test]
    fn long_requests_and_answers_stay_within_their_bounds() {
        let mut claims = Claims::default();
        let long = Claims { long_request: MAX_FRAME, ..claims };
        let answer = Claims { answer: MAX_FRAME, ..claims };
        let none = claims;
        for _ in 0..4 {
            assert!(claims.has_room_for(MAX_FRAME));
            assert!(!claims.replace(none, long));
        }
        for _ in 0..8 {
            assert!(claims.has_room_for_answer());
            assert!(!claims.replace(none, answer));
        }
        assert!(!claims.has_room_for(1) && !claims.has_room_for_answer());
        assert!(claims.replace(long, none) && claims.replace(answer, none));
        assert!(claims.has_room_for(MAX_FRAME) && claims.has_room_for_answer());
    }
}
