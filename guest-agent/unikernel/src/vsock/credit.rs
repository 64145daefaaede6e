//! Credit of one connection in both directions (virtio 1.3, section 5.10.6.3). All counters run freely and wrap.

/// Bytes that the agent takes from the host on one connection before they must be forwarded.
pub(super) const BUF_ALLOC: u32 = 64 * 1024;

/// The peer broke the rules of credit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct CreditError;

/// The counters.
#[derive(Clone, Copy, Debug)]
pub(super) struct Credit {
    received: u32,
    forwarded: u32,
    announced: u32,
    sent: u32,
    peer_buf_alloc: u32,
    peer_fwd_cnt: u32,
}

impl Credit {
    /// Counters of a new connection; the peer's come from its first packet.
    pub fn new(peer_buf_alloc: u32, peer_fwd_cnt: u32) -> Self {
        let sent = peer_fwd_cnt;
        Self { received: 0, forwarded: 0, announced: 0, sent, peer_buf_alloc, peer_fwd_cnt }
    }

    /// Takes over what the peer's latest packet says. It cannot have forwarded what was never sent.
    pub fn update(&mut self, peer_buf_alloc: u32, peer_fwd_cnt: u32) -> Result<(), CreditError> {
        let newly_forwarded = peer_fwd_cnt.wrapping_sub(self.peer_fwd_cnt);
        if newly_forwarded > self.in_flight() {
            return Err(CreditError);
        }
        self.peer_buf_alloc = peer_buf_alloc;
        self.peer_fwd_cnt = peer_fwd_cnt;
        Ok(())
    }

    /// How many bytes may be sent.
    pub fn peer_free(&self) -> u32 {
        self.peer_buf_alloc.saturating_sub(self.in_flight())
    }

    /// Notes sent bytes; no more than [`Self::peer_free`].
    pub fn send(&mut self, len: u32) {
        debug_assert!(len <= self.peer_free());
        self.sent = self.sent.wrapping_add(len);
    }

    /// Notes received bytes, unless the peer had no credit for them.
    pub fn receive(&mut self, len: u32) -> Result<(), CreditError> {
        let held = self.received.wrapping_sub(self.forwarded);
        if len > BUF_ALLOC - held {
            return Err(CreditError);
        }
        self.received = self.received.wrapping_add(len);
        Ok(())
    }

    /// Notes that everything received has left the receive buffer.
    pub fn forward_all(&mut self) {
        self.forwarded = self.received;
    }

    /// The `fwd_cnt` for a packet that is about to leave.
    pub fn announce(&mut self) -> u32 {
        self.announced = self.forwarded;
        self.forwarded
    }

    /// Whether the peer believes that less than half of the buffer is free although more is.
    pub fn should_announce(&self) -> bool {
        self.forwarded != self.announced
            && self.received.wrapping_sub(self.announced) > BUF_ALLOC / 2
    }

    fn in_flight(&self) -> u32 {
        self.sent.wrapping_sub(self.peer_fwd_cnt)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sending_stops_at_the_peers_credit_across_the_wrap() {
        let start = u32::MAX - 10;
        let mut credit = Credit::new(100, start);
        credit.send(100);
        assert_eq!(credit.peer_free(), 0);
        credit.update(100, start.wrapping_add(60)).unwrap();
        assert_eq!(credit.peer_free(), 60);
        credit.update(20, start.wrapping_add(60)).unwrap();
        assert_eq!(credit.peer_free(), 0, "a shrunk buffer is no negative credit");
    }

    #[test]
    fn a_peer_cannot_have_forwarded_what_was_not_sent() {
        let mut credit = Credit::new(100, 5);
        credit.send(10);
        assert_eq!(credit.update(100, 16), Err(CreditError));
        assert_eq!(credit.update(100, 4), Err(CreditError));
        assert_eq!(credit.update(100, 15), Ok(()));
    }

    #[test]
    fn receiving_more_than_the_buffer_is_an_error() {
        let mut credit = Credit::new(0, 0);
        for _ in 0..3 * (u64::from(u32::MAX) / u64::from(BUF_ALLOC)) {
            credit.receive(BUF_ALLOC).unwrap();
            assert_eq!(credit.receive(1), Err(CreditError));
            credit.forward_all();
        }
    }

    #[test]
    fn credit_is_announced_when_the_peer_could_starve() {
        let mut credit = Credit::new(0, 0);
        credit.receive(BUF_ALLOC / 2 + 1).unwrap();
        assert!(!credit.should_announce(), "nothing was forwarded yet");
        credit.forward_all();
        assert!(credit.should_announce());
        assert_eq!(credit.announce(), BUF_ALLOC / 2 + 1);
        credit.receive(BUF_ALLOC / 2).unwrap();
        credit.forward_all();
        assert!(!credit.should_announce());
    }
}
