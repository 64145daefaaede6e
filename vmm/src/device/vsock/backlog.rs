//! Bytes for a host's socket that would block. Holds no memory while it is empty.

use vm_memory::VolatileSlice;

/// First in, first out. Its length is bounded by the credit that the guest was given.
#[derive(Debug, Default)]
pub struct Backlog {
    bytes: Vec<u8>,
    start: usize,
}

impl Backlog {
    /// True if there is nothing to write.
    pub fn is_empty(&self) -> bool {
        self.start == self.bytes.len()
    }

    /// What there is to write, in order.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[self.start..]
    }

    /// Appends a copy of guest memory.
    pub fn push(&mut self, slice: &VolatileSlice) {
        // Once half is written, moving the rest costs no more than the writing did, and keeps the whole within twice
        // the credit.
        if self.start > self.bytes.len() / 2 {
            self.bytes.drain(..self.start);
            self.start = 0;
        }
        let end = self.bytes.len();
        self.bytes.resize(end + slice.len(), 0);
        slice.copy_to(&mut self.bytes[end..]);
    }

    /// Drops the first `len` bytes; at most as many as there are.
    pub fn consume(&mut self, len: usize) {
        self.start += len;
        if self.is_empty() {
            *self = Self::default();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_leave_in_the_order_they_came_and_memory_goes_with_them() {
        let mut backlog = Backlog::default();
        let (mut sent, mut received) = (Vec::new(), Vec::new());
        for round in 0..200u8 {
            let mut data = vec![round; 1 + usize::from(round) * 7 % 50];
            sent.extend_from_slice(&data);
            backlog.push(&VolatileSlice::from(&mut data[..]));
            let take = backlog.bytes().len().min(23);
            received.extend_from_slice(&backlog.bytes()[..take]);
            backlog.consume(take);
            assert!(backlog.bytes.len() <= 2 * backlog.bytes().len() + 50);
        }
        received.extend_from_slice(backlog.bytes());
        backlog.consume(backlog.bytes().len());
        assert_eq!(received, sent);
        assert!(backlog.is_empty() && backlog.bytes.capacity() == 0);
    }
}
