//! One system call between a descriptor and many pieces of guest RAM: nothing is copied on the way.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd};

use vm_memory::VolatileSlice;

/// Most pieces of one call. Guests use one or two for a packet; what lies in more takes more calls.
const MOST: usize = 64;

/// Pieces of guest RAM in the order of their bytes.
#[derive(Debug)]
pub struct Pieces<'a> {
    vectors: [libc::iovec; MOST],
    count: usize,
    len: usize,
    ram: PhantomData<VolatileSlice<'a>>,
}

impl<'a> Pieces<'a> {
    /// The first pieces of `slices`, at most as many as one call takes: [`Pieces::len`] says how many bytes that is.
    pub fn new(slices: impl Iterator<Item = VolatileSlice<'a>>) -> Self {
        let none = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
        let mut pieces = Self { vectors: [none; MOST], count: 0, len: 0, ram: PhantomData };
        for (vector, slice) in pieces.vectors.iter_mut().zip(slices) {
            vector.iov_base = slice.ptr_guard_mut().as_ptr().cast();
            vector.iov_len = slice.len();
            pieces.count += 1;
            pieces.len += slice.len();
        }
        pieces
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
        length(unsafe { libc::readv(fd, self.vectors.as_ptr(), self.count as i32) })
    }

    /// Fills the pieces from the socket `fd` and leaves the bytes in it (`MSG_PEEK`).
    pub fn peek_from(&self, fd: impl AsFd) -> io::Result<usize> {
        let fd = fd.as_fd().as_raw_fd();
        // SAFETY: a header of zeroes has no name, no control data and no vectors.
        let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
        header.msg_iov = self.vectors.as_ptr().cast_mut();
        header.msg_iovlen = self.count as _;
        // SAFETY: as in `read_from`; the kernel reads the vectors and does not write to them.
        length(unsafe { libc::recvmsg(fd, &raw mut header, libc::MSG_PEEK) })
    }

    /// Writes the pieces to `fd`; as many bytes as it takes.
    pub fn write_to(&self, fd: impl AsFd) -> io::Result<usize> {
        let fd = fd.as_fd().as_raw_fd();
        // SAFETY: as in `read_from`.
        length(unsafe { libc::writev(fd, self.vectors.as_ptr(), self.count as i32) })
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

    use super::*;

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
        assert!(Pieces::new(std::iter::empty()).is_empty());
    }
}
