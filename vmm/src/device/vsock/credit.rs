//! Flow control of one connection (virtio 1.2, section 5.10.6.3): counters that wrap, in both directions.

/// Most bytes that the host buffers for the guest on one connection: the `buf_alloc` of packets to it.
pub const BUF_ALLOC: u32 = 256 * 1024;
/// The same where there are many connections.
pub const SMALL_BUF_ALLOC: u32 = 16 * 1024;

/// The guest sent what its credit did not cover, or took bytes that it was never sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CreditViolation;

/// Counters of one connection. All but the sizes count bytes since its start, modulo 2³².
#[derive(Clone, Copy, Debug)]
pub struct Credit {
    /// Size of the host's buffer.
    host_alloc: u32,
    /// Size of the guest's buffer, as it last said.
    guest_alloc: u32,
    /// What the guest has taken out of its buffer, as it last said.
    guest_forwarded: u32,
    /// Sent to the guest.
    sent: u32,
    /// Received from the guest.
    received: u32,
    /// Of these, passed on to the host's socket.
    forwarded: u32,
    /// The value of `forwarded` that the guest last heard.
    told: u32,
}

impl Credit {
    /// Counters of a new connection on which the host buffers `host_alloc` bytes. Of the guest's buffer nothing is known.
    pub fn new(host_alloc: u32) -> Self {
        Self {
            host_alloc,
            guest_alloc: 0,
            guest_forwarded: 0,
            sent: 0,
            received: 0,
            forwarded: 0,
            told: 0,
        }
    }

    /// Size of the host's buffer in bytes.
    pub fn host_alloc(&self) -> u32 {
        self.host_alloc
    }

    /// Size of the guest's buffer in bytes, as it last said.
    pub fn guest_alloc(&self) -> u32 {
        self.guest_alloc
    }

    /// Takes in what a packet says about the guest's buffer.
    pub fn guest_says(&mut self, buf_alloc: u32, fwd_cnt: u32) -> Result<(), CreditViolation> {
        self.guest_alloc = buf_alloc;
        let in_flight = self.sent.wrapping_sub(fwd_cnt);
        if in_flight <= self.sent.wrapping_sub(self.guest_forwarded) {
            self.guest_forwarded = fwd_cnt;
            return Ok(());
        }
        // Two senders in the guest may put their packets into the queue in the other order than they read the counter,
        // so an older value is legitimate and carries no news. A value ahead of what was sent is a lie.
        if fwd_cnt.wrapping_sub(self.sent) < 1 << 31 { Err(CreditViolation) } else { Ok(()) }
    }

    /// Bytes that the guest has room for.
    pub fn guest_room(&self) -> u32 {
        // The guest may shrink its buffer below what is in flight.
        self.guest_alloc.saturating_sub(self.sent.wrapping_sub(self.guest_forwarded))
    }

    /// Counts `len` bytes sent to the guest; at most [`Credit::guest_room`].
    pub fn sent(&mut self, len: u32) {
        self.sent = self.sent.wrapping_add(len);
    }

    /// Counts `len` bytes from the guest.
    pub fn received(&mut self, len: u32) -> Result<(), CreditViolation> {
        if len > self.host_alloc - self.buffered() {
            return Err(CreditViolation);
        }
        self.received = self.received.wrapping_add(len);
        Ok(())
    }

    /// Counts `len` bytes as passed on; at most [`Credit::buffered`].
    pub fn forwarded(&mut self, len: u32) {
        self.forwarded = self.forwarded.wrapping_add(len);
    }

    /// Bytes received from the guest and not passed on yet; never more than [`Credit::host_alloc`].
    pub fn buffered(&self) -> u32 {
        self.received.wrapping_sub(self.forwarded)
    }

    /// True if the guest should hear of the space that was freed since it last did: once it believes in less than half of
    /// the buffer, and there is a quarter of news, so that a slow reader does not cause one packet for each byte. With less than
    /// half left an empty buffer is always that much news, hence a guest never waits for an update that does not come.
    pub fn update_due(&self) -> bool {
        let guest_believes = self.host_alloc.saturating_sub(self.received.wrapping_sub(self.told));
        let news = self.forwarded.wrapping_sub(self.told);
        guest_believes < self.host_alloc / 2 && news >= self.host_alloc / 4
    }

    /// Gives the `fwd_cnt` for a packet to the guest, and remembers that it was told.
    pub fn tell(&mut self) -> u32 {
        self.told = self.forwarded;
        self.told
    }

    /// Starts all counters at `start`, as if that many bytes had gone both ways already.
    #[cfg(test)]
    pub fn starting_at(start: u32) -> Self {
        Self {
            guest_forwarded: start,
            sent: start,
            received: start,
            forwarded: start,
            told: start,
            ..Self::new(BUF_ALLOC)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOW_WATER: u32 = BUF_ALLOC / 2;
    const WORTH_TELLING: u32 = BUF_ALLOC / 4;

    /// Where counters start, so that each claim holds with and without a wrap on the way.
    const STARTS: [u32; 4] = [0, 1 << 31, u32::MAX - 10, u32::MAX];

    #[test]
    fn room_in_the_guest_is_its_buffer_less_what_is_in_flight() {
        for start in STARTS {
            let mut credit = Credit::starting_at(start);
            assert_eq!(credit.guest_room(), 0, "nothing is known before the first packet");
            credit.guest_says(100, start).unwrap();
            credit.sent(60);
            assert_eq!(credit.guest_room(), 40);
            credit.guest_says(100, start.wrapping_add(25)).unwrap();
            assert_eq!(credit.guest_room(), 65);
            credit.guest_says(20, start.wrapping_add(25)).unwrap();
            assert_eq!(credit.guest_room(), 0, "a shrunken buffer is full, not huge");
        }
    }

    #[test]
    fn an_older_count_from_the_guest_changes_nothing_and_a_count_ahead_is_a_violation() {
        for start in STARTS {
            let mut credit = Credit::starting_at(start);
            credit.guest_says(100, start).unwrap();
            credit.sent(60);
            let at = |offset: i32| start.wrapping_add_signed(offset);
            credit.guest_says(100, at(30)).unwrap();
            assert_eq!(credit.guest_says(100, at(10)), Ok(()));
            assert_eq!(credit.guest_room(), 70);
            assert_eq!(credit.guest_says(100, at(61)), Err(CreditViolation));
            assert_eq!(credit.guest_says(100, at(i32::MAX)), Err(CreditViolation));
        }
    }

    #[test]
    fn the_guest_may_fill_the_buffer_and_not_a_byte_more() {
        for start in STARTS {
            let mut credit = Credit::starting_at(start);
            assert_eq!(credit.received(BUF_ALLOC), Ok(()));
            assert_eq!(credit.received(1), Err(CreditViolation));
            assert_eq!(credit.received(u32::MAX), Err(CreditViolation));
            credit.forwarded(5);
            assert_eq!(credit.received(6), Err(CreditViolation));
            assert_eq!(credit.received(5), Ok(()));
            assert_eq!(credit.buffered(), BUF_ALLOC);
        }
    }

    #[test]
    fn updates_come_when_the_guest_believes_in_little_space_and_there_is_news() {
        // (received, forwarded, update due)
        for (received, forwarded, due) in [
            (0, 0, false),
            (100, 100, false),
            (LOW_WATER, LOW_WATER, false),
            (LOW_WATER + 1, LOW_WATER + 1, true),
            (LOW_WATER + 1, WORTH_TELLING - 1, false),
            (LOW_WATER + 1, WORTH_TELLING, true),
            (BUF_ALLOC, 1, false),
            (BUF_ALLOC, BUF_ALLOC, true),
        ] {
            for start in STARTS {
                let mut credit = Credit::starting_at(start);
                credit.received(received).unwrap();
                credit.forwarded(forwarded);
                assert_eq!(credit.update_due(), due, "{received} {forwarded} from {start}");
                assert_eq!(credit.tell(), start.wrapping_add(forwarded));
                assert!(!credit.update_due() || credit.buffered() > 0, "told, hence no news");
            }
        }
    }

    #[test]
    fn a_sender_that_uses_all_its_credit_is_never_left_without_an_update() {
        for (size, packet) in [1, 7, 4096, 65536, BUF_ALLOC]
            .map(|packet| (BUF_ALLOC, packet))
            .into_iter()
            .chain([1, 7, 4096, SMALL_BUF_ALLOC].map(|packet| (SMALL_BUF_ALLOC, packet)))
        {
            let mut credit = Credit { host_alloc: size, ..Credit::starting_at(u32::MAX - 100_000) };
            let (mut guest_believes, mut updates) = (size, 0);
            for _ in 0..2 * size / packet + 2 {
                let len = packet.min(guest_believes);
                assert!(len > 0, "stalled with packets of {packet}");
                credit.received(len).unwrap();
                guest_believes -= len;
                credit.forwarded(len);
                if credit.update_due() {
                    credit.tell();
                    guest_believes = size;
                    updates += 1;
                }
            }
            assert!(updates <= 6, "{updates} updates for packets of {packet}");
        }
    }
}
