//! Credit of one connection in both directions (virtio 1.3, section 5.10.6.3). All counters run freely and wrap.

/// The peer broke the rules of credit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct CreditError;

/// The counters.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Credit {
    received: u32,
    forwarded: u32,
    /// How far the peer was told that it may send. Credit that was given stays given, so this never goes back, and `buf_alloc`
    /// is what leads there.
    edge: u32,
    sent: u32,
    peer_buf_alloc: u32,
    peer_fwd_cnt: u32,
}

impl Credit {
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
        if len > self.given() {
            return Err(CreditError);
        }
        self.received = self.received.wrapping_add(len);
        Ok(())
    }

    /// Notes that all but `held` of the bytes received have left the receive buffer.
    pub fn keep(&mut self, held: u32) {
        self.forwarded = self.received.wrapping_sub(held);
    }

    /// The `buf_alloc` and `fwd_cnt` for a packet that is about to leave, with a receive buffer of `room` bytes.
    pub fn announce(&mut self, room: u32) -> (u32, u32) {
        let edge = self.forwarded.wrapping_add(room);
        if edge.wrapping_sub(self.edge).cast_signed() > 0 {
            self.edge = edge;
        }
        (self.edge.wrapping_sub(self.forwarded), self.forwarded)
    }

    /// Whether the peer can send less than half of what there is `room` for although much more is free, or nothing although
    /// anything is. So no peer waits for news that do not come.
    pub fn should_announce(&self, room: u32) -> bool {
        let free = room.saturating_sub(self.received.wrapping_sub(self.forwarded));
        let given = self.given();
        free > given && (given == 0 || given < room / 2 && free - given >= room / 4)
    }

    /// Bytes that the peer may still send.
    pub fn given(&self) -> u32 {
        self.edge.wrapping_sub(self.received)
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
            edge: start,
            sent: start,
            peer_buf_alloc: 0,
            peer_fwd_cnt: start,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOM: u32 = 64 * 1024;

    /// A peer that was told of all there is room for.
    fn told(start: u32) -> Credit {
        let mut credit = Credit::starting_at(start);
        credit.announce(ROOM);
        credit
    }

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
            assert_eq!(credit.receive(1), Err(CreditError), "it was told of no room");
            credit.announce(ROOM);
            assert_eq!(credit.receive(ROOM + 1), Err(CreditError));
            credit.receive(ROOM).unwrap();
            assert_eq!(credit.receive(1), Err(CreditError));
            credit.keep(ROOM - 5);
            assert_eq!(credit.receive(1), Err(CreditError), "it was not told yet");
            assert_eq!(credit.announce(ROOM), (ROOM, start.wrapping_add(5)));
            assert_eq!(credit.receive(6), Err(CreditError));
            assert_eq!(credit.receive(5), Ok(()));
        }
    }

    #[test]
    fn credit_that_was_given_stays_given_when_there_is_less_room() {
        for start in STARTS {
            let mut credit = told(start);
            credit.receive(100).unwrap();
            credit.keep(0);
            assert_eq!(credit.announce(10), (ROOM - 100, start.wrapping_add(100)));
            assert!(!credit.should_announce(10));
            credit.receive(ROOM - 100).unwrap();
            credit.keep(3);
            assert_eq!(credit.announce(10).0, 10, "what was given is used up");
            assert_eq!(credit.receive(8), Err(CreditError));
            assert_eq!(credit.receive(7), Ok(()));
        }
    }

    #[test]
    fn more_than_four_gib_pass_both_ways() {
        let mut credit = told(0);
        let mut forwarded = 0_u32;
        for _ in 0..3 * (u64::from(u32::MAX) / u64::from(ROOM)) {
            credit.receive(ROOM).unwrap();
            assert_eq!(credit.receive(1), Err(CreditError));
            credit.keep(0);
            credit.announce(ROOM);
            credit.update(ROOM, forwarded).unwrap();
            assert_eq!(credit.peer_free(), ROOM);
            credit.send(ROOM);
            forwarded = forwarded.wrapping_add(ROOM);
        }
    }

    #[test]
    fn credit_is_announced_when_the_peer_could_starve() {
        for start in STARTS {
            let mut credit = told(start);
            credit.receive(ROOM / 2 + 1).unwrap();
            credit.keep(ROOM / 2 + 1);
            assert!(!credit.should_announce(ROOM), "nothing was forwarded yet");
            credit.keep(0);
            assert!(credit.should_announce(ROOM));
            assert_eq!(credit.announce(ROOM), (ROOM, start.wrapping_add(ROOM / 2 + 1)));
            credit.receive(ROOM / 2).unwrap();
            credit.keep(0);
            assert!(!credit.should_announce(ROOM));
        }
    }

    #[test]
    fn a_peer_without_credit_hears_of_every_byte_that_is_free() {
        let mut credit = told(7);
        credit.receive(ROOM).unwrap();
        credit.keep(ROOM);
        assert!(!credit.should_announce(ROOM));
        credit.keep(ROOM - 1);
        assert!(credit.should_announce(ROOM));
    }

    #[test]
    fn more_room_is_announced_at_once_and_may_be_used_then() {
        let mut credit = told(u32::MAX - 5);
        assert!(!credit.should_announce(ROOM));
        assert!(credit.should_announce(16 * ROOM));
        assert_eq!(credit.announce(16 * ROOM).0, 16 * ROOM);
        assert!(!credit.should_announce(16 * ROOM));
        assert_eq!(credit.receive(16 * ROOM), Ok(()));
        assert_eq!(credit.receive(1), Err(CreditError));
    }

    #[test]
    fn a_peer_that_uses_all_its_credit_is_never_left_without_an_update() {
        for packet in [1, 7, 4096, 65536] {
            let mut credit = told(u32::MAX - 100_000);
            let mut updates = 0;
            for _ in 0..2 * ROOM / packet + 2 {
                let len = packet.min(credit.given());
                assert!(len > 0, "stalled with packets of {packet}");
                credit.receive(len).unwrap();
                credit.keep(0);
                if credit.should_announce(ROOM) {
                    credit.announce(ROOM);
                    updates += 1;
                }
            }
            assert!(updates <= 5, "{updates} updates for packets of {packet}");
        }
    }
}
