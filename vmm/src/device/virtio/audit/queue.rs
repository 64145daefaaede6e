//! One queue as the audit sees it: which chains the device has, and what is in a chain that is new.

use std::sync::atomic::Ordering;

use virtio_bindings::bindings::virtio_ring::{
    VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::books::Place;
use super::log::Kind;
use super::rules::Rules;
use super::spans::{Span, Use};
use crate::memory::GuestRam;

/// Bytes of a descriptor (virtio 1.2, section 2.7.5).
pub const DESCRIPTOR_LEN: u64 = 16;

/// A queue whose driver runs.
#[derive(Debug)]
pub struct AuditedQueue {
    pub rules: Rules,
    size: u16,
    indirect_agreed: bool,
    table: u64,
    available: u64,
    used: u64,
    /// Index of the next entry of the available ring that was not looked at.
    next: u16,
    /// The ring makes no sense any more.
    broken: bool,
    /// Of each descriptor, the head of the chain in flight that it is in.
    owners: Vec<Option<u16>>,
    /// The chain in flight that each descriptor is the head of.
    chains: Vec<Option<Chain>>,
}

/// A chain that the device has.
#[derive(Debug, Default)]
struct Chain {
    /// Its descriptors in the queue's own table.
    descriptors: Vec<u16>,
    /// First bytes of what is noted of it.
    noted: Vec<u64>,
}

/// A descriptor, copied once.
#[derive(Clone, Copy, Debug)]
pub struct Link {
    /// Its index in its table.
    pub index: u16,
    /// The address that it names.
    pub addr: u64,
    /// And the length.
    pub len: u32,
    /// The device writes there.
    pub writes: bool,
    /// It is a table instead of a buffer.
    pub is_table: bool,
}

/// Something wrong with a chain itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flaw {
    pub kind: Kind,
    /// The descriptor.
    pub index: u16,
    /// In words that follow "descriptor N".
    pub what: &'static str,
}

/// Where a ring of the queue is.
#[derive(Clone, Copy, Debug)]
pub struct RingRange {
    pub used_as: Use,
    start: u64,
    len: u64,
}

impl RingRange {
    /// The same as memory that is in use.
    pub fn span(&self, Place { device, queue }: Place) -> Span {
        let Self { used_as, start, len } = *self;
        Span { start, len, used_as, device, queue, descriptor: 0 }
    }
}

impl AuditedQueue {
    /// A queue as the driver has set it up; `None` if it left it alone.
    pub fn new(queue: &Queue, rules: Rules, indirect_agreed: bool) -> Option<Self> {
        queue.ready().then(|| Self {
            rules,
            size: queue.size(),
            indirect_agreed,
            table: queue.desc_table(),
            available: queue.avail_ring(),
            used: queue.used_ring(),
            // Of a driver that runs already, in a restored machine, what the device has not taken yet is new.
            next: queue.next_avail(),
            broken: false,
            owners: vec![None; queue.size().into()],
            chains: std::iter::repeat_with(|| None).take(queue.size().into()).collect(),
        })
    }

    /// Its rings, with the fields for event indices (virtio 1.2, section 2.7).
    pub fn rings(&self) -> [RingRange; 3] {
        let size = u64::from(self.size);
        let ring = |used_as, start, len| RingRange { used_as, start, len };
        [
            ring(Use::Descriptors, self.table, DESCRIPTOR_LEN * size),
            ring(Use::Available, self.available, 6 + 2 * size),
            ring(Use::Used, self.used, 6 + 8 * size),
        ]
    }

    /// Leaves the queue alone from now on: its rings are not where they could be read.
    pub fn give_up(&mut self) {
        self.broken = true;
    }

    /// How many entries of the available ring were not looked at.
    ///
    /// # Errors
    /// The index jumped: by this much.
    pub fn new_entries(&mut self, ram: &GuestRam) -> Result<u16, u16> {
        if self.broken {
            return Ok(0);
        }
        // With `Acquire` what the driver wrote before the index is there.
        let index = ram.load::<u16>(GuestAddress(self.available + 2), Ordering::Acquire);
        let added = u16::from_le(index.unwrap_or(self.next)).wrapping_sub(self.next);
        if added > self.size {
            self.broken = true;
            return Err(added);
        }
        Ok(added)
    }

    /// The head that the next entry names, and its address.
    pub fn next_head(&mut self, ram: &GuestRam) -> (u16, u64) {
        let at = self.available + 4 + 2 * u64::from(self.next % self.size);
        self.next = self.next.wrapping_add(1);
        // The ring is in RAM, or the queue was given up.
        let head = ram.read_obj::<u16>(GuestAddress(at)).unwrap_or_default();
        (u16::from_le(head), at)
    }

    /// Follows the chain that begins at `head`: hands each descriptor to `visit`, up to the queue's size. What `visit` wants
    /// noted goes with the chain.
    ///
    /// # Errors
    /// [`Flaw`]; descriptors before it were visited.
    pub fn follow(
        &mut self,
        ram: &GuestRam,
        head: u16,
        mut visit: impl FnMut(&Link) -> Option<u64>,
    ) -> Result<(), Flaw> {
        let flaw = |kind, index, what| Err(Flaw { kind, index, what });
        if head >= self.size {
            return flaw(Kind::BrokenChain, head, "is beyond the table");
        }
        if self.chains[usize::from(head)].is_some() {
            return flaw(Kind::PostedTwice, head, "is made available again before it was used");
        }
        let mut chain = Chain::default();
        let result = self.walk(ram, head, &mut chain, &mut visit);
        self.chains[usize::from(head)] = Some(chain);
        result
    }

    fn walk(
        &mut self,
        ram: &GuestRam,
        head: u16,
        chain: &mut Chain,
        visit: &mut impl FnMut(&Link) -> Option<u64>,
    ) -> Result<(), Flaw> {
        let flaw = |kind, index, what| Err(Flaw { kind, index, what });
        let (mut table, mut table_size, mut in_indirect) = (self.table, self.size, false);
        let mut index = head;
        // The table itself is no part of the chain, and there is one at most.
        let mut buffers = 0;
        while buffers < self.size {
            if index >= table_size {
                return flaw(Kind::BrokenChain, index, "is beyond the table");
            }
            if !in_indirect {
                let owner = &mut self.owners[usize::from(index)];
                match *owner {
                    None => *owner = Some(head),
                    Some(owner) if owner == head => {
                        return flaw(Kind::BrokenChain, index, "follows itself");
                    }
                    Some(_) => {
                        return flaw(Kind::PostedTwice, index, "is in another chain in flight");
                    }
                }
                chain.descriptors.push(index);
            }
            // Lies in RAM: the queue's table as its rings do, an indirect one since that was visited.
            let at = GuestAddress(table + DESCRIPTOR_LEN * u64::from(index));
            let Ok(descriptor) = ram.read_obj::<Descriptor>(at) else {
                return flaw(Kind::OutsideRam, index, "cannot be read");
            };
            let has = |flag: u32| u32::from(descriptor.flags()) & flag != 0;
            let (is_table, has_next) = (has(VRING_DESC_F_INDIRECT), has(VRING_DESC_F_NEXT));
            let (addr, len) = (descriptor.addr().0, descriptor.len());
            let entries = u64::from(len) / DESCRIPTOR_LEN;
            if is_table {
                // Virtio 1.2, section 2.7.5.3.1.
                let what = match () {
                    () if !self.indirect_agreed => "is an indirect table, which was not agreed on",
                    () if in_indirect => "is an indirect table in an indirect table",
                    () if has_next => "is an indirect table with something behind it",
                    () if entries == 0 || u64::from(len) % DESCRIPTOR_LEN != 0 => {
                        "is an indirect table that is no whole number of descriptors"
                    }
                    () if entries > self.size.into() => {
                        "is an indirect table of more descriptors than the queue has"
                    }
                    () => "",
                };
                if !what.is_empty() {
                    return flaw(Kind::BrokenChain, index, what);
                }
            }
            let link = Link { index, addr, len, writes: has(VRING_DESC_F_WRITE), is_table };
            let noted = visit(&link);
            chain.noted.extend(noted);
            buffers += u16::from(!is_table);
            index = match (is_table, has_next) {
                // It was found not to be in RAM, or in the way of something.
                (true, _) if noted.is_none() => return Ok(()),
                (true, _) => {
                    (table, table_size, in_indirect) = (addr, entries as u16, true);
                    0
                }
                (false, true) => descriptor.next(),
                (false, false) => return Ok(()),
            };
        }
        flaw(Kind::BrokenChain, index, "comes after as many as the queue has")
    }

    /// The device is about to give the chain back that begins at `head`: the first bytes of what was noted of it. None if it
    /// was given twice and comes back for the second time.
    pub fn release(&mut self, head: u16) -> Option<Vec<u64>> {
        let chain = self.chains.get_mut(usize::from(head))?.take()?;
        for index in &chain.descriptors {
            self.owners[usize::from(*index)] = None;
        }
        Some(chain.noted)
    }

    /// The heads of all chains in flight.
    pub fn heads(&self) -> impl Iterator<Item = u16> {
        (0..self.size).filter(|head| self.chains[usize::from(*head)].is_some())
    }
}
