//! One system call between a descriptor and many pieces of guest RAM: nothing is copied on the way.

use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd};

use vm_memory::VolatileSlice;
use vm_memory::bitmap::Bitmap;

use super::writes::{Mark, WriteMark};

/// Most pieces of one call. Guests use one or two for a packet; what lies in more takes more calls.
const MOST: usize = 64;

/// Pieces of guest RAM in the order of their bytes.
#[derive(Debug)]
pub struct Pieces<'a> {
    vectors: [libc::iovec; MOST],
    count: usize,
    len: usize,
    /// Where it is noted what is written to them and how long they are, from the first to the last; none where nobody wants to know.
    marks: Vec<(WriteMark<'a>, usize)>,
    ram: PhantomData<VolatileSlice<'a>>,
}

impl<'a> Pieces<'a> {
    /// The first pieces of `slices`, at most as many as one call takes: [`Pieces::len`] says how many bytes that is.
    pub fn new<B: Mark<'a>>(slices: impl Iterator<Item = VolatileSlice<'a, B>>) -> Self {
        let none = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
        let (vectors, marks) = ([none; MOST], Vec::new());
        let mut pieces = Self { vectors, count: 0, len: 0, marks, ram: PhantomData };
        for (vector, slice) in pieces.vectors.iter_mut().zip(slices) {
            vector.iov_base = slice.ptr_guard_mut().as_ptr().cast();
            vector.iov_len = slice.len();
            pieces.count += 1;
            pieces.len += slice.len();
            let mark = slice.bitmap().mark();
            if mark.is_some() {
                pieces.marks.push((mark, slice.len()));
            }
        }
        pieces
    }

    /// Notes that so many bytes were written.
    fn written(&self, count: io::Result<usize>) -> io::Result<usize> {
        let mut left = *count.as_ref().unwrap_or(&0);
        for (mark, len) in &self.marks {
            mark.mark_dirty(0, left.min(*len));
            left -= left.min(*len);
        }
        count
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True if there is not a byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Fills the pieces from `fd`; as many bytes as there are.
    pub fn read_from(&self, fd: impl AsFd) -> io::Result<usize> {
        let fd = fd.as_fd().as_raw_fd();
        // SAFETY: the vectors are memory of slices that live as long as `self`, which other code too takes to be changing at
        // any time; the count is at most MOST.
        let count = unsafe { libc::readv(fd, self.vectors.as_ptr(), self.count as i32) };
        self.written(length(count))
    }

    /// Fills the pieces from the socket `fd` and leaves the bytes in it (`MSG_PEEK`).
    pub fn peek_from(&self, fd: impl AsFd) -> io::Result<usize> {
        let fd = fd.as_fd().as_raw_fd();
        // SAFETY: a header of zeroes has no name, no control data and no vectors.
        let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
        header.msg_iov = self.vectors.as_ptr().cast_mut();
        header.msg_iovlen = self.count as _;
        // SAFETY: as in `read_from`; the kernel reads the vectors and does not write to them.
        let count = unsafe { libc::recvmsg(fd, &raw mut header, libc::MSG_PEEK) };
        self.written(length(count))
    }

    /// Writes the pieces to `fd`; as many bytes as it takes.
    pub fn write_to(&self, fd: impl AsFd) -> io::Result<usize> {
        let fd = fd.as_fd().as_raw_fd();
        // SAFETY: as in `read_from`.
        length(unsafe { libc::writev(fd, self.vectors.as_ptr(), self.count as i32) })
    }

    /// Fills the pieces from `file` at `offset`; as many bytes as come at once, 0 at the file's end.
    pub fn read_at(&self, file: &File, offset: u64) -> io::Result<usize> {
        let (fd, offset) = (file.as_raw_fd(), offset as libc::off_t);
        // SAFETY: as in `read_from`.
        let count = unsafe { libc::preadv(fd, self.vectors.as_ptr(), self.count as i32, offset) };
        self.written(length(count))
    }

    /// Writes the pieces to `file` at `offset`; as many bytes as are taken at once. With `is_durable` they are on the medium
    /// when the call is over (`RWF_DSYNC`, pwritev2(2)).
    pub fn write_at(&self, file: &File, offset: u64, is_durable: bool) -> io::Result<usize> {
        let (fd, offset) = (file.as_raw_fd(), offset as libc::off_t);
        let flags = if is_durable { libc::RWF_DSYNC } else { 0 };
        // SAFETY: as in `read_from`.
        length(unsafe {
            libc::pwritev2(fd, self.vectors.as_ptr(), self.count as i32, offset, flags)
        })
    }
}

/// From now on each [`Pieces::peek_from`] the socket `fd` begins where the last one ended, until the message is read (`SO_PEEK_OFF`,
/// socket(7)).
pub fn peek_goes_on(fd: impl AsFd) -> io::Result<()> {
    let start: libc::c_int = 0;
    // SAFETY: the value is an integer of this function, of the length that is said.
    let result = unsafe {
        libc::setsockopt(
            fd.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEEK_OFF,
            (&raw const start).cast(),
            size_of_val(&start) as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn length(result: libc::ssize_t) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions};

    use super::*;
    use crate::memory::GuestRam;

    #[test]
    fn pieces_are_filled_and_written_in_order() {
        let (mut near, far) = UnixStream::pair().unwrap();
        far.set_nonblocking(true).unwrap();
        let (mut first, mut second) = ([0; 3], [0; 4]);
        {
            let slices =
                [VolatileSlice::from(&mut first[..]), VolatileSlice::from(&mut second[..])];
            let pieces = Pieces::new(slices.into_iter());
            assert_eq!(pieces.len(), 7);
            assert_eq!(pieces.read_from(&far).unwrap_err().kind(), io::ErrorKind::WouldBlock);
            near.write_all(b"abcdef").unwrap();
            assert_eq!(pieces.peek_from(&far).unwrap(), 6);
            assert_eq!(pieces.read_from(&far).unwrap(), 6);
            assert_eq!(pieces.write_to(&far).unwrap(), 7);
        }
        assert_eq!((&first, &second), (b"abc", b"def\0"));
        let mut back = [0; 7];
        near.read_exact(&mut back).unwrap();
        assert_eq!(&back, b"abcdef\0");
    }

    #[test]
    fn more_pieces_than_one_call_takes_are_left_for_the_next() {
        let mut bytes = [7; MOST + 10];
        let slice = VolatileSlice::from(&mut bytes[..]);
        let one = |at| slice.subslice(at, 1).unwrap();
        assert_eq!(Pieces::new((0..MOST + 10).map(one)).len(), MOST);
        assert!(Pieces::new(std::iter::empty::<VolatileSlice<'_>>()).is_empty());
    }

    #[test]
    fn bytes_go_between_a_file_and_pieces_of_ram() {
        let ram =
            GuestRam::from_ranges(&[(GuestAddress(0), 0x1000), (GuestAddress(0x1000), 0x1000)])
                .unwrap();
        let pieces = |ranges: &[(u64, usize)]| {
            let slices = ranges.iter().flat_map(|(at, len)| {
                ram.get_slices(GuestAddress(*at), *len, Permissions::ReadWrite).unwrap()
            });
            Pieces::new(slices.map(Result::unwrap))
        };
        let file = tempfile::tempfile().unwrap();
        ram.write_slice(b"abcdef", GuestAddress(0xffd)).unwrap();
        assert_eq!(pieces(&[(0xffd, 6), (0xffd, 2)]).write_at(&file, 10, false).unwrap(), 8);
        assert_eq!(pieces(&[(0x1001, 2)]).write_at(&file, 18, true).unwrap(), 2);
        assert_eq!(pieces(&[(0x100, 3), (0x200, 20)]).read_at(&file, 11).unwrap(), 9);
        let mut read = [0; 7];
        ram.read_slice(&mut read[..3], GuestAddress(0x100)).unwrap();
        assert_eq!(&read[..3], b"bcd");
        ram.read_slice(&mut read, GuestAddress(0x200)).unwrap();
        assert_eq!(&read, b"efabef\0");
        assert_eq!(pieces(&[(0x100, 3)]).read_at(&file, 20).unwrap(), 0, "the file's end");
        let read_only = File::open("/dev/null").unwrap();
        let error = pieces(&[(0, 1)]).write_at(&read_only, 0, false).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EBADF));
    }
}

#[cfg(test)]
mod marks {
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use vm_memory::{GuestAddress, GuestMemory, Permissions};

    use super::*;
    use crate::memory::{Backing, Memory, MemoryError, Template};

    #[test]
    fn what_goes_past_vm_memory_is_noted_as_far_as_it_was_written() {
        let template = Template::build(4 << 20, |_| Ok::<_, MemoryError>(())).unwrap().0;
        let memory = Memory::map(Backing::private(&template).unwrap()).unwrap();
        memory.track_writes();
        let pieces = |ranges: &[(u64, usize)]| {
            let slices = ranges.iter().flat_map(|(at, len)| {
                let slices =
                    memory.ram().get_slices(GuestAddress(*at), *len, Permissions::ReadWrite);
                slices.unwrap().map(Result::unwrap)
            });
            Pieces::new(slices)
        };
        let check = |expected: u64| {
            let noted: Vec<_> = memory.take_host_writes().flatten().collect();
            assert_eq!(noted[0], expected);
            assert!(noted[1..].iter().all(|word| *word == 0));
        };
        let (mut near, far) = UnixStream::pair().unwrap();
        near.write_all(&[7; 0x2010]).unwrap();
        let three = [(0x1ff0, 0x20), (0x5000, 0x10), (0x8000, 0x3000)];
        pieces(&three).write_to(&far).unwrap();
        check(0);
        assert_eq!(pieces(&[(0x1000, 4)]).peek_from(&far).unwrap(), 4);
        check(1 << 1);
        assert_eq!(pieces(&three).read_from(&far).unwrap(), 0x2010);
        check(1 << 1 | 1 << 2 | 1 << 5 | 1 << 8 | 1 << 9);
        far.set_nonblocking(true).unwrap();
        assert!(pieces(&three).read_from(&far).is_err());
        check(0);
        let file = tempfile::tempfile().unwrap();
        assert_eq!(pieces(&three).write_at(&file, 0, false).unwrap(), 0x3030);
        check(0);
        assert_eq!(pieces(&[(0x3000, 1), (0x4000, 0x2000)]).read_at(&file, 0x3020).unwrap(), 0x10);
        check(1 << 3 | 1 << 4);
    }
}
