//! Descriptor chains (virtio 1.2, section 2.7.5): a request's bytes, wherever the guest has put them.
//!
//! `virtio_vsock::VsockPacket` wants the payload in one descriptor. The specification leaves the framing to the driver
//! (section 2.7.4), and Linux does use many for zero-copy sends, hence this walker. A chain is an allegation until
//! [`Chain::walk`] has checked it against guest RAM.

use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions, VolatileSlice};

use crate::memory::GuestRam;

/// Who reads and who writes a chain's buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// The device writes.
    ToGuest,
    /// The device reads.
    ToHost,
}

impl Direction {
    fn access(self) -> Permissions {
        match self {
            Self::ToGuest => Permissions::Write,
            Self::ToHost => Permissions::Read,
        }
    }
}

/// The chain does not describe a buffer: a loop, a link out of the table, memory that is not RAM, a buffer of the wrong
/// direction, or too little room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadChain;

/// A chain whose buffers are all in RAM and of the direction that its queue is for. Reused from packet to packet.
#[derive(Debug)]
pub struct Chain {
    direction: Direction,
    head: u16,
    segments: Vec<(GuestAddress, u32)>,
    len: u64,
}

impl Chain {
    /// An empty chain, to be filled by [`Chain::walk`]. It holds up to `queue_size` descriptors.
    pub fn new(direction: Direction, queue_size: u16) -> Self {
        Self { direction, head: 0, segments: Vec::with_capacity(queue_size.into()), len: 0 }
    }

    /// Takes over the buffers of `descriptors`, if they are sound. [`Chain::head`] is valid either way.
    pub fn walk(
        &mut self,
        ram: &GuestRam,
        descriptors: DescriptorChain<&GuestRam>,
    ) -> Result<(), BadChain> {
        self.head = descriptors.head_index();
        self.segments.clear();
        self.len = 0;
        // A loop ends when the table's size is used up, a bad link at once; both leave a last link without a follower.
        let mut complete = false;
        for descriptor in descriptors {
            let (addr, len) = (descriptor.addr(), descriptor.len());
            if descriptor.is_write_only() != (self.direction == Direction::ToGuest)
                || !ram.check_range(addr, len as usize, self.direction.access())
                || self.segments.len() == self.segments.capacity()
            {
                return Err(BadChain);
            }
            self.segments.push((addr, len));
            self.len += u64::from(len);
            complete = !descriptor.has_next();
        }
        if complete { Ok(()) } else { Err(BadChain) }
    }

    /// Index of the chain's first descriptor.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Length of all buffers together in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Copies `bytes.len()` bytes from the start of the chain.
    pub fn read(&self, ram: &GuestRam, bytes: &mut [u8]) -> Result<(), BadChain> {
        let mut rest = bytes;
        self.each_part(0, rest.len(), |addr, len| {
            let (part, tail) = std::mem::take(&mut rest).split_at_mut(len);
            rest = tail;
            ram.read_slice(part, addr).map_err(|_| BadChain)
        })
    }

    /// Copies `bytes` to the start of the chain.
    pub fn write(&self, ram: &GuestRam, bytes: &[u8]) -> Result<(), BadChain> {
        let mut rest = bytes;
        self.each_part(0, rest.len(), |addr, len| {
            let (part, tail) = rest.split_at(len);
            rest = tail;
            ram.write_slice(part, addr).map_err(|_| BadChain)
        })
    }

    /// The `len` bytes from `offset` on as slices of guest RAM, in order.
    ///
    /// Fewer bytes come if the chain is shorter; the caller has checked [`Chain::len`].
    pub fn slices<'a>(
        &'a self,
        ram: &'a GuestRam,
        offset: usize,
        len: usize,
    ) -> impl Iterator<Item = VolatileSlice<'a>> {
        parts(&self.segments, offset, len)
            .filter_map(|(addr, len)| ram.get_slices(addr, len, self.direction.access()).ok())
            .flatten()
            .map_while(Result::ok)
    }

    fn each_part(
        &self,
        offset: usize,
        len: usize,
        mut copy: impl FnMut(GuestAddress, usize) -> Result<(), BadChain>,
    ) -> Result<(), BadChain> {
        if self.len < (offset + len) as u64 {
            return Err(BadChain);
        }
        parts(&self.segments, offset, len).try_for_each(|(addr, len)| copy(addr, len))
    }
}

/// Cuts the bytes from `offset` to `offset + len` out of `segments`.
fn parts(
    segments: &[(GuestAddress, u32)],
    offset: usize,
    len: usize,
) -> impl Iterator<Item = (GuestAddress, usize)> {
    let (mut skip, mut left) = (offset, len);
    segments.iter().filter_map(move |&(addr, segment_len)| {
        let segment_len = segment_len as usize;
        let start = skip.min(segment_len);
        skip -= start;
        let take = left.min(segment_len - start);
        left -= take;
        // In RAM as a whole, so the sum cannot overflow.
        (take > 0).then(|| (GuestAddress(addr.0 + start as u64), take))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use virtio_bindings::bindings::virtio_ring::{
        VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
    };
    use virtio_queue::desc::{RawDescriptor, split::Descriptor};
    use virtio_queue::mock::MockSplitQueue;

    const NEXT: u16 = VRING_DESC_F_NEXT as u16;
    const WRITE: u16 = VRING_DESC_F_WRITE as u16;
    const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;

    fn ram() -> GuestRam {
        GuestRam::from_ranges(&[(GuestAddress(0), 0x10000), (GuestAddress(0x10000), 0x10000)])
            .unwrap()
    }

    /// Walks the chain made of `(address, length, flags, next)`.
    fn walk(
        ram: &GuestRam,
        direction: Direction,
        descriptors: &[(u64, u32, u16, u16)],
    ) -> Result<Chain, BadChain> {
        let queue = MockSplitQueue::new(ram, 4);
        let descriptors: Vec<_> = descriptors
            .iter()
            .map(|&(addr, len, flags, next)| {
                RawDescriptor::from(Descriptor::new(addr, len, flags, next))
            })
            .collect();
        let mut chain = Chain::new(direction, 4);
        chain.walk(ram, queue.build_multiple_desc_chains(&descriptors).unwrap()).map(|()| chain)
    }

    #[test]
    fn sound_chains_have_the_length_of_their_buffers() {
        let ram = ram();
        for (direction, descriptors, len) in [
            (Direction::ToHost, &[(0x8000, 44, 0, 0)][..], 44),
            (Direction::ToGuest, &[(0x8000, 44, NEXT | WRITE, 1), (0x9000, 9, WRITE, 0)], 53),
            (Direction::ToHost, &[(0x8000, 0, NEXT, 1), (0xfff0, 32, 0, 0)], 32),
        ] {
            assert_eq!(walk(&ram, direction, descriptors).unwrap().len(), len);
        }
    }

    #[test]
    fn broken_chains_are_refused() {
        let ram = ram();
        use Direction::{ToGuest, ToHost};
        for (name, direction, descriptors) in [
            ("loop", ToHost, &[(0x8000, 44, NEXT, 1), (0x8000, 44, NEXT, 0)][..]),
            ("link to itself", ToHost, &[(0x8000, 44, NEXT, 0)]),
            ("link out of the table", ToHost, &[(0x8000, 44, NEXT, 4)]),
            ("outside RAM", ToHost, &[(0x20000, 1, 0, 0)]),
            ("end outside RAM", ToHost, &[(0x1ffff, 2, 0, 0)]),
            ("end wraps", ToHost, &[(u64::MAX - 1, 44, 0, 0)]),
            ("huge", ToHost, &[(0x8000, u32::MAX, 0, 0)]),
            ("writable to read", ToHost, &[(0x8000, 44, WRITE, 0)]),
            ("readable to write", ToGuest, &[(0x8000, 44, 0, 0)]),
            ("indirect of odd length", ToHost, &[(0x8000, 17, INDIRECT, 0)]),
            ("indirect and empty", ToHost, &[(0x8000, 0, INDIRECT, 0)]),
        ] {
            assert_eq!(walk(&ram, direction, descriptors).err(), Some(BadChain), "{name}");
        }
    }

    #[test]
    fn bytes_are_found_wherever_the_guest_has_put_them() {
        let ram = ram();
        // The second buffer crosses from one memory region into the next.
        let layout = [(0x8000, 3, NEXT, 1), (0xfffe, 4, NEXT, 2), (0x9000, 5, 0, 0)];
        for (addr, bytes) in [(0x8000, &b"abc"[..]), (0xfffe, b"defg"), (0x9000, b"hijkl")] {
            ram.write_slice(bytes, GuestAddress(addr)).unwrap();
        }
        let chain = walk(&ram, Direction::ToHost, &layout).unwrap();
        let text = b"abcdefghijkl";
        for offset in 0..=12 {
            for len in 0..=12 - offset {
                let mut found = Vec::new();
                for slice in chain.slices(&ram, offset, len) {
                    let start = found.len();
                    found.resize(start + slice.len(), 0);
                    slice.copy_to(&mut found[start..]);
                }
                assert_eq!(found, &text[offset..offset + len]);
            }
        }
        let mut head = [0; 7];
        chain.read(&ram, &mut head).unwrap();
        assert_eq!(&head, b"abcdefg");
        assert_eq!(chain.read(&ram, &mut [0; 13]), Err(BadChain));
    }

    #[test]
    fn writes_stay_inside_the_buffers() {
        let ram = ram();
        let layout = [(0x8000, 3, NEXT | WRITE, 1), (0xfffe, 4, WRITE, 0)];
        let chain = walk(&ram, Direction::ToGuest, &layout).unwrap();
        chain.write(&ram, b"1234567").unwrap();
        assert_eq!(chain.write(&ram, b"12345678"), Err(BadChain));
        let mut seen = [0; 4];
        ram.read_slice(&mut seen, GuestAddress(0x8000)).unwrap();
        assert_eq!(&seen, b"123\0");
        ram.read_slice(&mut seen, GuestAddress(0xffff)).unwrap();
        assert_eq!(&seen, b"567\0");
    }
}
