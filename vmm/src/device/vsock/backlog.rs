//! Bytes for a host's socket that would block. Holds no memory while it is empty.

use std::collections::VecDeque;
use std::io::IoSlice;

use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

/// First in, first out: bytes, and where messages end among them. Its length is bounded by the credit that the guest was given.
#[derive(Debug, Default)]
pub struct Backlog {
    bytes: VecDeque<u8>,
    /// Lengths of the complete messages in it.
    messages: Lengths,
    /// Bytes at the end that belong to a message of which the rest has not come.
    open: usize,
}

impl Backlog {
    /// True if it holds nothing.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// True if it holds a message that is complete.
    pub fn has_message(&self) -> bool {
        self.messages.first().is_some()
    }

    /// All there is to write, in order: the second part goes behind the first.
    pub fn bytes(&self) -> [IoSlice<'_>; 2] {
        self.first(self.bytes.len())
    }

    /// The first message that is complete.
    pub fn message(&self) -> Option<[IoSlice<'_>; 2]> {
        self.messages.first().map(|len| self.first(len))
    }

    fn first(&self, len: usize) -> [IoSlice<'_>; 2] {
        let (front, back) = self.bytes.as_slices();
        let cut = len.min(front.len());
        [IoSlice::new(&front[..cut]), IoSlice::new(&back[..len - cut])]
    }

    /// Appends a copy of guest memory. The whole is at most `most` bytes.
    pub fn push<B: BitmapSlice>(&mut self, slice: &VolatileSlice<'_, B>, most: usize) {
        let (start, end) = (self.bytes.len(), self.bytes.len() + slice.len());
        if end > self.bytes.capacity() {
            let capacity = (2 * self.bytes.capacity()).min(most).max(end);
            self.bytes.reserve_exact(capacity - start);
        }
        self.bytes.resize(end, 0);
        let (front, back) = self.bytes.as_mut_slices();
        let (cut, skip) = (front.len().saturating_sub(start), start.saturating_sub(front.len()));
        let old = front.len() - cut;
        slice.copy_to(&mut front[old..]);
        // No longer than the slice: the rest is what the second part has room for.
        if let Ok(rest) = slice.offset(cut) {
            rest.copy_to(&mut back[skip..]);
        }
        self.open += slice.len();
    }

    /// What was pushed since the last end of a message is a message, unless it is nothing.
    pub fn end_message(&mut self) {
        if self.open > 0 {
            self.messages.push(std::mem::take(&mut self.open));
        }
    }

    /// Drops the first `len` bytes; at most as many as there are.
    pub fn consume(&mut self, len: usize) {
        self.bytes.drain(..len);
        if self.is_empty() {
            *self = Self::default();
        }
    }

    /// Drops the first message. Gives its length.
    pub fn consume_message(&mut self) -> usize {
        let len = self.messages.pop();
        self.bytes.drain(..len);
        if self.is_empty() {
            *self = Self::default();
        }
        len
    }
}

/// Numbers, seven bits a byte: messages of a byte each may not cost many times what the guest's credit counts.
#[derive(Debug, Default)]
struct Lengths(VecDeque<u8>);

impl Lengths {
    const MORE: u8 = 0x80;

    fn push(&mut self, mut len: usize) {
        while len >= usize::from(Self::MORE) {
            self.0.push_back(len as u8 | Self::MORE);
            len >>= 7;
        }
        self.0.push_back(len as u8);
    }

    /// The first number, and how many bytes it takes.
    fn peek(&self) -> Option<(usize, usize)> {
        let width = self.0.iter().position(|byte| byte & Self::MORE == 0)? + 1;
        let digits = self.0.iter().take(width).rev();
        let value = digits.fold(0, |value, byte| value << 7 | usize::from(byte & !Self::MORE));
        Some((value, width))
    }

    fn first(&self) -> Option<usize> {
        self.peek().map(|(value, _)| value)
    }

    /// Takes the first number; 0 if there is none.
    fn pop(&mut self) -> usize {
        let (value, width) = self.peek().unwrap_or_default();
        self.0.drain(..width);
        value
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flat(parts: [IoSlice<'_>; 2]) -> Vec<u8> {
        parts.iter().flat_map(|part| part.iter().copied()).collect()
    }

    #[test]
    fn bytes_leave_in_the_order_they_came_and_memory_goes_with_them() {
        let mut backlog = Backlog::default();
        let (mut sent, mut received) = (Vec::new(), Vec::new());
        for round in 0..200u8 {
            let mut data = vec![round; 1 + usize::from(round) * 7 % 50];
            sent.extend_from_slice(&data);
            backlog.push(&VolatileSlice::from(&mut data[..]), 10_000);
            let bytes = flat(backlog.bytes());
            let take = bytes.len().min(23);
            received.extend_from_slice(&bytes[..take]);
            backlog.consume(take);
            assert!(backlog.bytes.capacity() <= 10_000);
        }
        received.extend_from_slice(&flat(backlog.bytes()));
        backlog.consume(backlog.bytes.len());
        assert_eq!(received, sent);
        assert!(backlog.is_empty() && backlog.bytes.capacity() == 0);
    }

    #[test]
    fn it_takes_no_more_memory_than_it_may_hold_bytes() {
        let mut backlog = Backlog::default();
        let mut data = [1; 100];
        for _ in 0..10 {
            backlog.push(&VolatileSlice::from(&mut data[..]), 1000);
        }
        assert_eq!((backlog.bytes.len(), backlog.bytes.capacity()), (1000, 1000));
    }

    #[test]
    fn messages_come_out_as_they_went_in_however_they_came() {
        let mut backlog = Backlog::default();
        let lens = [1, 127, 128, 129, 16_383, 16_384, 40_000, 2];
        let message = |len: usize| -> Vec<u8> { (0..len).map(|i| (i * 31 + len) as u8).collect() };
        // Twice round, so that messages lie across the end of the ring.
        for _ in 0..2 {
            for len in lens {
                for part in message(len).chunks_mut(100) {
                    backlog.push(&VolatileSlice::from(part), 1 << 20);
                }
                backlog.end_message();
            }
            let mut last = vec![9; 300];
            backlog.push(&VolatileSlice::from(&mut last[..]), 1 << 20);
            for len in lens {
                assert!(flat(backlog.message().unwrap()) == message(len), "{len}");
                assert_eq!(backlog.consume_message(), len);
            }
            assert!(!backlog.has_message() && backlog.message().is_none() && !backlog.is_empty());
            backlog.end_message();
            assert_eq!(backlog.consume_message(), 300);
            assert!(backlog.is_empty());
        }
    }
}
