//! A transfer in progress: patterns out, patterns in, none of it kept.

use agent_protocol::{Pattern, Transfer, Transferred};

/// What is left of a transfer, and what was seen so far.
pub(super) struct Progress {
    out: Pattern,
    out_left: u64,
    message: usize,
    taken: Pattern,
    in_left: u64,
    first_wrong: Option<u64>,
    credit_stalls: u32,
    began_us: u64,
}

impl Progress {
    /// A transfer that begins now.
    pub fn new(transfer: Transfer, now_us: u64) -> Self {
        let Transfer { to_host, message, to_guest, seed } = transfer;
        Self {
            out: Pattern::to_host(seed),
            out_left: to_host,
            // Zero would never end.
            message: message.max(1) as usize,
            taken: Pattern::to_guest(seed),
            in_left: to_guest,
            first_wrong: None,
            credit_stalls: 0,
            began_us: now_us,
        }
    }

    /// Looks at bytes from the host, and returns how many of them belong to the transfer.
    pub fn take(&mut self, payload: &[u8]) -> usize {
        let len = payload.len().min(usize::try_from(self.in_left).unwrap_or(usize::MAX));
        self.in_left -= len as u64;
        if let Err(at) = self.taken.check(&payload[..len]) {
            self.first_wrong.get_or_insert(at);
        }
        len
    }

    /// Writes the next message, or as much of it as fits, and returns how much that is.
    pub fn fill(&mut self, buffer: &mut [u8]) -> usize {
        let left = usize::try_from(self.out_left).unwrap_or(usize::MAX);
        let len = buffer.len().min(self.message).min(left);
        self.out.fill(&mut buffer[..len]);
        self.out_left -= len as u64;
        len
    }

    /// Whether there are bytes for the host.
    pub fn has_output(&self) -> bool {
        self.out_left > 0
    }

    /// Bytes that the host has not sent yet.
    pub fn in_left(&self) -> u64 {
        self.in_left
    }

    /// There were, but no credit.
    pub fn stall(&mut self) {
        self.credit_stalls = self.credit_stalls.saturating_add(1);
    }

    /// The host takes no more.
    pub fn end_output(&mut self) {
        self.out_left = 0;
    }

    /// The host sends no more.
    pub fn end_input(&mut self) {
        self.in_left = 0;
    }

    /// Whether nothing is left in either direction.
    pub fn is_over(&self) -> bool {
        self.out_left == 0 && self.in_left == 0
    }

    /// How it went.
    pub fn result(&self, now_us: u64) -> Transferred {
        Transferred {
            to_host: self.out.position(),
            to_guest: self.taken.position(),
            first_wrong: self.first_wrong,
            credit_stalls: self.credit_stalls,
            us: now_us.saturating_sub(self.began_us),
        }
    }
}
