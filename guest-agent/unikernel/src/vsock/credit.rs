//! Credit of one connection in both directions (virtio 1.3, section 5.10.6.3). All counters run freely and wrap.

/// Bytes that the agent takes from the host on one connection before they must be forwarded. Requests wait in memory, so this
/// is what a connection can make the agent hold.
pub(super) const BUF_ALLOC: u32 = 64 * 1024;
/// The same once bytes were transferred on it: they are looked at and are gone, and the host need not wait for news.
pub(super) const TRANSFER_ALLOC: u32 = 1024 * 1024;

/// The peer broke the rules of credit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct CreditError;

/// The counters.
#[derive(Clone, Copy, Debug)]
pub(super) struct Credit {
    buf_alloc: u32,
    received: u32,
    forwarded: u32,
    /// What the peer last heard of `forwarded` and of `buf_alloc`.
    announced: u32,
    announced_alloc: u32,
    sent: u32,
    peer_buf_alloc: u32,
    peer_fwd_cnt: u32,
}

impl Credit {
    /// Counters of a new connection, of whose peer nothing is known.
    pub fn new() -> Self {
        Self {
            buf_alloc: BUF_ALLOC,
            received: 0,
            forwarded: 0,
            announced: 0,
            announced_alloc: BUF_ALLOC,
            sent: 0,
            peer_buf_alloc: 0,
            peer_fwd_cnt: 0,
        }
    }

    /// Takes over what the peer's latest packet says. It cannot have forwarded what was never sent. An older count than one
    /// that is known is no news, and no lie: the peer may have put its packets in another order than it counted.
    pub fn update(&mut self, peer_buf_alloc: u32, peer_fwd_cnt: u32) -> Result<(), CreditError> {
        let newly_forwarded = peer_fwd_cnt.wrapping_sub(self.peer_fwd_cnt);
        if newly_forwarded <= self.in_flight() {
            self.peer_fwd_cnt = peer_fwd_cnt;
        } else if newly_forwarded.cast_signed() > 0 {
            return Err(CreditError);
        }
        self.peer_buf_alloc = peer_buf_alloc;
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
        if len > self.buf_alloc - self.held() {
            return Err(CreditError);
        }
        self.received = self.received.wrapping_add(len);
        Ok(())
    }

    /// Notes that so many of the bytes received have left the receive buffer; no more than are in it.
    pub fn forward(&mut self, len: u32) {
        debug_assert!(len <= self.held());
        self.forwarded = self.forwarded.wrapping_add(len);
    }

    /// Notes that everything received has left the receive buffer.
    pub fn forward_all(&mut self) {
        self.forwarded = self.received;
    }

    /// Gives the peer as much credit as transfers can use.
    pub fn grow(&mut self) {
        self.buf_alloc = TRANSFER_ALLOC;
    }

    /// The `buf_alloc` and `fwd_cnt` for a packet that is about to leave.
    pub fn announce(&mut self) -> (u32, u32) {
        self.announced = self.forwarded;
        self.announced_alloc = self.buf_alloc;
        (self.buf_alloc, self.forwarded)
    }

    /// Whether the peer believes in less than half of what there could be although much more is free. If everything is free,
    /// that is always much more, so no peer waits for news that do not come.
    pub fn should_announce(&self) -> bool {
        let in_use = self.received.wrapping_sub(self.announced);
        let believes = self.announced_alloc.saturating_sub(in_use);
        let free = self.buf_alloc - self.held();
        believes < self.buf_alloc / 2 && free - believes >= self.buf_alloc / 4
    }

    fn held(&self) -> u32 {
        self.received.wrapping_sub(self.forwarded)
    }

    fn in_flight(&self) -> u32 {
        self.sent.wrapping_sub(self.peer_fwd_cnt)
    }

    /// As if so many bytes had gone both ways already.
    #[cfg(test)]
    pub fn starting_at(start: u32) -> Self {
        Self {
            received: start,
            forwarded: start,
            announced: start,
            sent: start,
            peer_fwd_cnt: start,
            ..Self::new()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where counters start, so that each claim holds with and without a wrap on the way.
    const STARTS: [u32; 4] = [0, 1 << 31, u32::MAX - 10, u32::MAX];

    #[test]
    fn sending_stops_at_the_peers_credit() {
        for start in STARTS {
            let mut credit = Credit::starting_at(start);
            assert_eq!(credit.peer_free(), 0, "nothing is known before the first packet");
            credit.update(100, start).unwrap();
            credit.send(100);
            assert_eq!(credit.peer_free(), 0);
            credit.update(100, start.wrapping_add(60)).unwrap();
            assert_eq!(credit.peer_free(), 60);
            credit.update(20, start.wrapping_add(60)).unwrap();
            assert_eq!(credit.peer_free(), 0, "a shrunk buffer is no negative credit");
        }
    }

    #[test]
    fn a_peer_cannot_have_forwarded_what_was_not_sent_but_may_repeat_itself() {
        for start in STARTS {
            let mut credit = Credit::starting_at(start);
            credit.update(100, start).unwrap();
            credit.send(60);
            let at = |offset: u32| start.wrapping_add(offset);
            assert_eq!(credit.update(100, at(30)), Ok(()));
            assert_eq!(credit.update(100, at(10)), Ok(()));
            assert_eq!(credit.peer_free(), 70, "an older count is no news");
            assert_eq!(credit.update(100, at(61)), Err(CreditError));
            assert_eq!(credit.update(100, at(60)), Ok(()));
        }
    }

    #[test]
    fn the_peer_may_fill_the_buffer_and_not_a_byte_more() {
        for start in STARTS {
            let mut credit = Credit::starting_at(start);
            credit.receive(BUF_ALLOC).unwrap();
            assert_eq!(credit.receive(1), Err(CreditError));
            credit.forward(5);
            assert_eq!(credit.receive(6), Err(CreditError));
            assert_eq!(credit.receive(5), Ok(()));
            credit.forward_all();
            assert_eq!(credit.receive(BUF_ALLOC), Ok(()));
        }
    }

    #[test]
    fn more_than_four_gib_pass_both_ways() {
        let mut credit = Credit::new();
        let mut forwarded = 0_u32;
        for _ in 0..3 * (u64::from(u32::MAX) / u64::from(BUF_ALLOC)) {
            credit.receive(BUF_ALLOC).unwrap();
            assert_eq!(credit.receive(1), Err(CreditError));
            credit.forward_all();
            credit.update(BUF_ALLOC, forwarded).unwrap();
            assert_eq!(credit.peer_free(), BUF_ALLOC);
            credit.send(BUF_ALLOC);
            forwarded = forwarded.wrapping_add(BUF_ALLOC);
        }
    }

    #[test]
    fn credit_is_announced_when_the_peer_could_starve() {
        for start in STARTS {
            let mut credit = Credit::starting_at(start);
            credit.receive(BUF_ALLOC / 2 + 1).unwrap();
            assert!(!credit.should_announce(), "nothing was forwarded yet");
            credit.forward_all();
            assert!(credit.should_announce());
            assert_eq!(credit.announce(), (BUF_ALLOC, start.wrapping_add(BUF_ALLOC / 2 + 1)));
            credit.receive(BUF_ALLOC / 2).unwrap();
            credit.forward_all();
            assert!(!credit.should_announce());
        }
    }

    #[test]
    fn more_credit_is_announced_at_once_and_may_be_used_then() {
        let mut credit = Credit::starting_at(u32::MAX - 5);
        assert!(!credit.should_announce());
        credit.grow();
        assert!(credit.should_announce());
        assert_eq!(credit.announce().0, TRANSFER_ALLOC);
        assert!(!credit.should_announce());
        assert_eq!(credit.receive(TRANSFER_ALLOC), Ok(()));
        assert_eq!(credit.receive(1), Err(CreditError));
    }

    #[test]
    fn a_peer_that_uses_all_its_credit_is_never_left_without_an_update() {
        for packet in [1, 7, 4096, 65536] {
            let mut credit = Credit::starting_at(u32::MAX - 100_000);
            let (mut believes, mut updates) = (BUF_ALLOC, 0);
            for _ in 0..2 * BUF_ALLOC / packet + 2 {
                let len = packet.min(believes);
                assert!(len > 0, "stalled with packets of {packet}");
                credit.receive(len).unwrap();
                believes -= len;
                credit.forward_all();
                if credit.should_announce() {
                    credit.announce();
                    believes = BUF_ALLOC;
                    updates += 1;
                }
            }
            assert!(updates <= 5, "{updates} updates for packets of {packet}");
        }
    }
}
