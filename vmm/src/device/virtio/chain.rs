//! Descriptor chains (virtio 1.2, section 2.7.5): a request's bytes, wherever the guest has put them.
//!
//! `virtio_vsock::VsockPacket` wants the payload in one descriptor. The specification leaves the framing to the driver
//! (section 2.7.4), and Linux does use many for zero-copy sends, hence this walker. A chain is an allegation until
//! [`Chain::walk`] has checked it against guest RAM.

use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions};

use crate::memory::{GuestRam, RamSlice};

/// Who reads and who writes a chain's buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// The device writes.
    ToGuest,
    /// The device reads.
    ToHost,
    /// The device reads a request, then writes its answer behind it; either may be missing.
    Both,
}

/// The chain does not describe a buffer: a loop, a link out of the table, memory that is not RAM, a buffer of the wrong
/// direction, buffers to read behind those to write (section 2.7.4.2), more buffers than the queue has descriptors, or too
/// little room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadChain;

/// A chain whose buffers are all in RAM and of the direction that its queue is for: a string of bytes of which the first are
/// for the device to read, the others to write. Reused from request to request.
#[derive(Debug)]
pub struct Chain {
    direction: Direction,
    head: u16,
    /// Grows to the longest chain that came.
    segments: Vec<(GuestAddress, u32)>,
    most_segments: usize,
    len: u64,
    readable_len: u64,
}

impl Chain {
    /// An empty chain, to be filled by [`Chain::walk`]. It holds up to `queue_size` descriptors.
    pub fn new(direction: Direction, queue_size: u16) -> Self {
        let (segments, most_segments) = (Vec::new(), queue_size.into());
        Self { direction, head: 0, segments, most_segments, len: 0, readable_len: 0 }
    }

    /// Takes over the buffers of `descriptors`, if they are sound. [`Chain::head`] is valid either way.
    ///
    /// The iterator has followed an indirect table already, whether or not that was agreed on. It ends at a table inside a
    /// table, one that is no whole number of descriptors, and one outside RAM.
    pub fn walk(
        &mut self,
        ram: &GuestRam,
        descriptors: DescriptorChain<&GuestRam>,
    ) -> Result<(), BadChain> {
        self.head = descriptors.head_index();
        self.segments.clear();
        (self.len, self.readable_len) = (0, 0);
        // A loop ends when the table's size is used up, a bad link at once; both leave a last link without a follower.
        let mut complete = false;
        let mut writes = false;
        for descriptor in descriptors {
            let (addr, len) = (descriptor.addr(), descriptor.len());
            let read_behind_written = writes && !descriptor.is_write_only();
            writes = descriptor.is_write_only();
            let (fits, access) = match (self.direction, writes) {
                (Direction::ToGuest | Direction::Both, true) => (true, Permissions::Write),
                (Direction::ToHost, true) => (false, Permissions::Write),
                (Direction::ToHost | Direction::Both, false) => (true, Permissions::Read),
                (Direction::ToGuest, false) => (false, Permissions::Read),
            };
            if !fits
                || read_behind_written
                || !ram.check_range(addr, len as usize, access)
                || self.segments.len() == self.most_segments
            {
                return Err(BadChain);
            }
            self.segments.push((addr, len));
            self.len += u64::from(len);
            if !writes {
                self.readable_len = self.len;
            }
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

    /// Length of the buffers that the device reads; those that it writes follow.
    pub fn readable_len(&self) -> u64 {
        self.readable_len
    }

    /// Length of the buffers that the device writes.
    pub fn writable_len(&self) -> u64 {
        self.len - self.readable_len
    }

    /// Copies `bytes.len()` bytes from the start of the readable part.
    pub fn read(&self, ram: &GuestRam, bytes: &mut [u8]) -> Result<(), BadChain> {
        if self.readable_len < bytes.len() as u64 {
            return Err(BadChain);
        }
        let mut rest = bytes;
        self.parts(0, rest.len()).try_for_each(|(addr, len)| {
            let (part, tail) = std::mem::take(&mut rest).split_at_mut(len);
            rest = tail;
            ram.read_slice(part, addr).map_err(|_| BadChain)
        })
    }

    /// Copies `bytes` to the start of the writable part.
    pub fn write(&self, ram: &GuestRam, bytes: &[u8]) -> Result<(), BadChain> {
        self.write_at(ram, 0, bytes)
    }

    /// Copies `bytes` into the writable part, `offset` bytes from its start.
    pub fn write_at(&self, ram: &GuestRam, offset: u64, bytes: &[u8]) -> Result<(), BadChain> {
        if offset.checked_add(bytes.len() as u64).is_none_or(|end| end > self.writable_len()) {
            return Err(BadChain);
        }
        let mut rest = bytes;
        self.parts((self.readable_len + offset) as usize, rest.len()).try_for_each(|(addr, len)| {
            let (part, tail) = rest.split_at(len);
            rest = tail;
            ram.write_slice(part, addr).map_err(|_| BadChain)
        })
    }

    /// The `len` bytes from `offset` on as slices of guest RAM, in order, the writable part behind the readable one.
    ///
    /// Fewer bytes come if the chain is shorter; the caller has checked its lengths.
    pub fn slices<'a>(
        &'a self,
        ram: &'a GuestRam,
        offset: usize,
        len: usize,
    ) -> impl Iterator<Item = RamSlice<'a>> {
        // RAM is for reading and writing alike; `walk` has checked the guest's word.
        self.parts(offset, len)
            .filter_map(|(addr, len)| ram.get_slices(addr, len, Permissions::ReadWrite).ok())
            .flatten()
            .map_while(Result::ok)
    }

    /// Cuts the bytes from `offset` to `offset + len` out of the buffers.
    fn parts(&self, offset: usize, len: usize) -> impl Iterator<Item = (GuestAddress, usize)> {
        let (mut skip, mut left) = (offset, len);
        self.segments.iter().filter_map(move |&(addr, segment_len)| {
            let segment_len = segment_len as usize;
            let start = skip.min(segment_len);
            skip -= start;
            let take = left.min(segment_len - start);
            left -= take;
            // In RAM as a whole, so the sum cannot overflow.
            (take > 0).then(|| (GuestAddress(addr.0 + start as u64), take))
        })
    }
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

    /// Walks one descriptor that leads to a table made of `(address, length, flags, next)` at `table`.
    fn walk_indirect(
        ram: &GuestRam,
        (table, table_len): (u64, u32),
        entries: &[(u64, u32, u16, u16)],
    ) -> Result<Chain, BadChain> {
        for (number, &(addr, len, flags, next)) in (0..).zip(entries) {
            let descriptor = RawDescriptor::from(Descriptor::new(addr, len, flags, next));
            // What lies outside RAM is not there.
            let _ = ram.write_obj(descriptor, GuestAddress(table.wrapping_add(16 * number)));
        }
        walk(ram, Direction::Both, &[(table, table_len, INDIRECT, 0)])
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
        use Direction::{Both, ToGuest, ToHost};
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
            ("read behind written", Both, &[(0x8000, 44, NEXT | WRITE, 1), (0x9000, 9, 0, 0)]),
            ("read behind nothing", Both, &[(0x8000, 0, NEXT | WRITE, 1), (0x9000, 9, 0, 0)]),
            ("indirect of odd length", ToHost, &[(0x8000, 17, INDIRECT, 0)]),
            ("indirect and empty", ToHost, &[(0x8000, 0, INDIRECT, 0)]),
        ] {
            assert_eq!(walk(&ram, direction, descriptors).err(), Some(BadChain), "{name}");
        }
    }

    #[test]
    fn a_request_and_its_answer_are_two_parts_of_one_chain() {
        let ram = ram();
        for (addr, bytes) in [(0x8000, &b"abc"[..]), (0x9000, b"defg")] {
            ram.write_slice(bytes, GuestAddress(addr)).unwrap();
        }
        let layout = [
            (0x8000, 3, NEXT, 1),
            (0x9000, 4, NEXT, 2),
            (0xa000, 2, NEXT | WRITE, 3),
            (0xb000, 3, WRITE, 0),
        ];
        let chain = walk(&ram, Direction::Both, &layout).unwrap();
        assert_eq!((chain.len(), chain.readable_len(), chain.writable_len()), (12, 7, 5));
        let mut text = [0; 7];
        chain.read(&ram, &mut text).unwrap();
        assert_eq!(&text, b"abcdefg");
        assert_eq!(chain.read(&ram, &mut [0; 8]), Err(BadChain), "what is to be written");
        chain.write(&ram, b"1").unwrap();
        chain.write_at(&ram, 1, b"234").unwrap();
        assert_eq!(chain.write_at(&ram, 2, b"5678"), Err(BadChain));
        assert_eq!(chain.write_at(&ram, u64::MAX, b"5"), Err(BadChain));
        let mut answer = Vec::new();
        for slice in chain.slices(&ram, 7, 4) {
            let start = answer.len();
            answer.resize(start + slice.len(), 0);
            slice.copy_to(&mut answer[start..]);
        }
        assert_eq!(answer, b"1234");
        for (alone, lens) in [((0x8000, 3, 0, 0), (3, 0)), ((0xa000, 2, WRITE, 0), (0, 2))] {
            let chain = walk(&ram, Direction::Both, &[alone]).unwrap();
            assert_eq!((chain.readable_len(), chain.writable_len()), lens);
        }
    }

    #[test]
    fn a_table_of_descriptors_is_as_good_as_the_descriptors() {
        let ram = ram();
        let entries = [(0x8000, 16, NEXT, 2), (0, 1, 0, 0), (0x9000, 5, WRITE, 0)];
        // Anywhere in RAM, at an odd address and across two regions of it too.
        for table in [0x4000, 0x4001, 0xffe8] {
            let chain = walk_indirect(&ram, (table, 48), &entries).unwrap();
            assert_eq!((chain.readable_len(), chain.writable_len()), (16, 5), "{table:#x}");
        }
        let direct = [(0x8000, 16, NEXT, 1), (0x4000, 16, INDIRECT | WRITE, 0)];
        ram.write_obj(
            RawDescriptor::from(Descriptor::new(0x9000, 5, WRITE, 0)),
            GuestAddress(0x4000),
        )
        .unwrap();
        let chain = walk(&ram, Direction::Both, &direct).unwrap();
        assert_eq!((chain.readable_len(), chain.writable_len()), (16, 5), "behind a descriptor");
    }

    #[test]
    fn broken_tables_are_refused() {
        let ram = ram();
        let sound = (0x8000, 16, 0, 0);
        let long: Vec<_> = (1..=5).map(|next| (0x8000, 1, NEXT, next)).chain([sound]).collect();
        for (name, table, entries) in [
            ("a table inside", (0x4000, 32), &[(0x5000, 16, INDIRECT, 0), sound][..]),
            ("a table behind", (0x4000, 32), &[(0x8000, 1, NEXT, 1), (0x4000, 32, INDIRECT, 0)]),
            ("no whole descriptors", (0x4000, 24), &[sound]),
            ("less than one", (0x4000, 15), &[sound]),
            ("empty", (0x4000, 0), &[sound]),
            ("huge", (0x4000, u32::MAX - 15), &[sound]),
            ("outside RAM", (0x20000, 16), &[sound]),
            ("half outside RAM", (0x1fff8, 16), &[sound]),
            ("at the end of the address space", (u64::MAX - 7, 32), &[(0x8000, 1, NEXT, 1)]),
            ("link out of the table", (0x4000, 32), &[(0x8000, 1, NEXT, 2), sound]),
            ("loop", (0x4000, 32), &[(0x8000, 1, NEXT, 1), (0x8000, 1, NEXT, 0)]),
            ("longer than the queue", (0x4000, 96), &long),
        ] {
            assert_eq!(walk_indirect(&ram, table, entries).err(), Some(BadChain), "{name}");
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
