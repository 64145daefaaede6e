//! Writes of the guest that wait for an answer (`KVM_REGISTER_COALESCED_MMIO`): KVM keeps them in a ring and lets the guest
//! go on, so they cost no exit. Whoever comes back from guest mode answers them before anything else.
//!
//! The ring is one page for all vCPUs of a machine: the indices `first` and `last`, then entries of address, length, a mark
//! for ports, and 8 bytes of data. KVM writes `last` and the entries under a lock of its own, this module writes `first`.

use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::atomic::Ordering;
use std::sync::{Mutex, PoisonError};

use vm_memory::{Bytes, VolatileSlice};

use super::KvmError;

const PAGE: usize = 4096;
const FIRST: usize = 0;
const LAST: usize = 4;
const HEADER: usize = 8;
const ENTRY: usize = 24;
/// KVM leaves one of them free, to tell a full ring from an empty one.
const ENTRIES: u32 = ((PAGE - HEADER) / ENTRY) as u32;

/// The writes that wait in one machine.
#[derive(Debug)]
pub struct CoalescedWrites {
    page: Page,
    /// The oldest entry. Its copy in the page is never read: only this module writes it.
    first: Mutex<u32>,
}

impl CoalescedWrites {
    /// Maps the ring at page `number` of a vCPU's descriptor, which every vCPU of the machine has there.
    pub(super) fn map(vcpu: &impl AsRawFd, number: usize) -> Result<Self, KvmError> {
        let page = Page::map(vcpu, number).map_err(|source| KvmError::Request {
            action: "map the ring of coalesced writes",
            source,
        })?;
        Ok(Self { page, first: Mutex::new(0) })
    }

    /// Gives `answer` the address and the data of each waiting write, oldest first. When this returns, every write that the
    /// guest made before the call has been answered, by this thread or by another. Writes that come meanwhile may be left,
    /// so that a guest that writes for ever keeps nobody.
    pub fn answer_all(&self, mut answer: impl FnMut(u64, &[u8])) {
        // Held to the end: a thread that finds the ring empty may rely on the answers.
        let mut first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        // Acquire: KVM completes an entry before it moves the index.
        let last = self.page.index(LAST);
        // KVM appends nothing at an index that is none, so there is nothing behind it; writes exit instead.
        if last == *first || last >= ENTRIES {
            return;
        }
        while *first != last {
            let entry = self.page.entry(*first);
            if let Some((address, data)) = parse(&entry) {
                answer(address, data);
            }
            *first = (*first + 1) % ENTRIES;
        }
        // Release: the entries have been read before KVM fills them again.
        self.page.set_index(FIRST, last);
    }
}

/// The address and the data, unless it is no memory write of 1 to 8 bytes.
fn parse(entry: &[u8; ENTRY]) -> Option<(u64, &[u8])> {
    let (address, rest) = entry.split_first_chunk::<8>()?;
    let (len, rest) = rest.split_first_chunk::<4>()?;
    let (port, data) = rest.split_first_chunk::<4>()?;
    let data = data.get(..u32::from_le_bytes(*len) as usize)?;
    (*port == [0; 4] && !data.is_empty()).then_some((u64::from_le_bytes(*address), data))
}

/// The mapping.
#[derive(Debug)]
struct Page(NonNull<u8>);

// SAFETY: `Page` owns the mapping, which belongs to no thread, and reaches into it through volatile and atomic accesses alone.
unsafe impl Send for Page {}
// SAFETY: as for `Send`.
unsafe impl Sync for Page {}

impl Page {
    fn map(fd: &impl AsRawFd, number: usize) -> io::Result<Self> {
        let (access, offset) = (libc::PROT_READ | libc::PROT_WRITE, (number * PAGE) as i64);
        // SAFETY: without MAP_FIXED and with no wish for an address, the kernel maps where nothing was.
        let page = unsafe {
            let fd = fd.as_raw_fd();
            libc::mmap(std::ptr::null_mut(), PAGE, access, libc::MAP_SHARED, fd, offset)
        };
        match NonNull::new(page) {
            Some(page) if page.as_ptr() != libc::MAP_FAILED => Ok(Self(page.cast())),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn bytes(&self) -> VolatileSlice<'_> {
        // SAFETY: the mapping is PAGE bytes long and lives as long as `self`, which the slice borrows. Nobody makes a
        // reference into it: the pointer is private, and this is its only use besides the end of the mapping.
        unsafe { VolatileSlice::new(self.0.as_ptr(), PAGE) }
    }

    fn index(&self, offset: usize) -> u32 {
        self.bytes().load(offset, Ordering::Acquire).expect("the indices are in the page")
    }

    fn set_index(&self, offset: usize, value: u32) {
        self.bytes().store(value, offset, Ordering::Release).expect("the indices are in the page");
    }

    fn entry(&self, index: u32) -> [u8; ENTRY] {
        let mut entry = [0; ENTRY];
        let offset = HEADER + index as usize * ENTRY;
        self.bytes().read_slice(&mut entry, offset).expect("the index is below ENTRIES");
        entry
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: `map` made exactly this mapping, and slices into it borrow `self`.
        unsafe { libc::munmap(self.0.as_ptr().cast(), PAGE) };
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;
    use std::sync::atomic::AtomicU32;

    use super::*;

    /// The kernel's side of a ring.
    struct Fake(File);

    impl Fake {
        fn new(first: u32) -> (Self, CoalescedWrites) {
            let file = tempfile::tempfile().unwrap();
            // Not the first page, as with a vCPU.
            file.set_len(3 * PAGE as u64).unwrap();
            let writes = CoalescedWrites::map(&file, 2).unwrap();
            *writes.first.lock().unwrap() = first;
            let fake = Self(file);
            fake.put(FIRST, &first.to_le_bytes());
            fake.put(LAST, &first.to_le_bytes());
            (fake, writes)
        }

        fn put(&self, offset: usize, bytes: &[u8]) {
            self.0.write_all_at(bytes, (2 * PAGE + offset) as u64).unwrap();
        }

        fn index(&self, offset: usize) -> u32 {
            let mut bytes = [0; 4];
            self.0.read_exact_at(&mut bytes, (2 * PAGE + offset) as u64).unwrap();
            u32::from_le_bytes(bytes)
        }

        /// As `coalesced_mmio_write` of Linux; false if the write has to exit.
        fn write(&self, address: u64, len: u32, port: u32, data: u64) -> bool {
            let last = self.index(LAST);
            if last >= ENTRIES || (last + 1) % ENTRIES == self.index(FIRST) {
                return false;
            }
            let mut entry = address.to_le_bytes().to_vec();
            entry.extend(len.to_le_bytes());
            entry.extend(port.to_le_bytes());
            entry.extend(data.to_le_bytes());
            self.put(HEADER + last as usize * ENTRY, &entry);
            self.put(LAST, &((last + 1) % ENTRIES).to_le_bytes());
            true
        }
    }

    fn answered(writes: &CoalescedWrites) -> Vec<(u64, Vec<u8>)> {
        let mut all = Vec::new();
        writes.answer_all(|address, data| all.push((address, data.to_vec())));
        all
    }

    #[test]
    fn writes_come_once_and_in_order_wherever_the_ring_begins() {
        for first in [0, 7, ENTRIES - 2, ENTRIES - 1] {
            let (fake, writes) = Fake::new(first);
            assert_eq!(answered(&writes), []);
            assert!(fake.write(0xd000_0030, 4, 0, 2));
            assert!(fake.write(0xd000_0080, 1, 0, 0xa5));
            assert!(fake.write(0xd000_0038, 8, 0, u64::MAX - 1));
            let expected = [
                (0xd000_0030, vec![2, 0, 0, 0]),
                (0xd000_0080, vec![0xa5]),
                (0xd000_0038, (u64::MAX - 1).to_le_bytes().to_vec()),
            ];
            assert_eq!(answered(&writes), expected, "from {first}");
            assert_eq!(fake.index(FIRST), fake.index(LAST));
            assert_eq!(answered(&writes), [], "from {first}");
        }
    }

    #[test]
    fn a_full_ring_is_answered_and_has_room_again() {
        for first in [0, 99] {
            let (fake, writes) = Fake::new(first);
            for _ in 0..3 {
                let taken = (0..).take_while(|i| fake.write(*i, 4, 0, *i)).count();
                assert_eq!(taken, ENTRIES as usize - 1);
                let addresses: Vec<_> =
                    answered(&writes).into_iter().map(|write| write.0).collect();
                assert_eq!(addresses, (0..taken as u64).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn a_thread_that_finds_nothing_may_rely_on_the_answers_of_another() {
        let (fake, writes) = Fake::new(0);
        let (entered, answering) = std::sync::mpsc::channel();
        let answers = AtomicU32::new(0);
        for i in 0..10 {
            assert!(fake.write(i, 4, 0, 0));
        }
        std::thread::scope(|scope| {
            scope.spawn(|| {
                writes.answer_all(|_, _| {
                    let _ = entered.send(());
                    std::thread::yield_now();
                    answers.fetch_add(1, Ordering::SeqCst);
                });
            });
            answering.recv().unwrap();
            assert_eq!(answered(&writes), []);
            assert_eq!(answers.load(Ordering::SeqCst), 10);
        });
    }

    #[test]
    fn junk_is_nobodys_write() {
        let (fake, writes) = Fake::new(0);
        for last in [ENTRIES, ENTRIES + 1, u32::MAX] {
            fake.put(LAST, &last.to_le_bytes());
            assert_eq!(answered(&writes), [], "last {last}");
        }
        fake.put(LAST, &0_u32.to_le_bytes());
        // A first index that somebody else wrote has no meaning here.
        fake.put(FIRST, &u32::MAX.to_le_bytes());
        for (len, port) in [(0, 0), (9, 0), (u32::MAX, 0), (4, 1)] {
            assert!(fake.write(0xd000_0030, len, port, 0));
        }
        assert!(fake.write(0xd000_0030, 4, 0, 1));
        assert_eq!(answered(&writes), [(0xd000_0030, vec![1, 0, 0, 0])]);
        assert_eq!(fake.index(FIRST), 5);
    }

    #[test]
    fn a_ring_that_cannot_be_mapped_is_an_error() {
        let read_only = File::open("/dev/null").unwrap();
        let error = CoalescedWrites::map(&read_only, 0).unwrap_err();
        assert_eq!(error.to_string(), "map the ring of coalesced writes");
    }
}
