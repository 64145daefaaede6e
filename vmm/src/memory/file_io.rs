//! Reads and writes between files and guest RAM, without a copy in between.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use vm_memory::VolatileSlice;

use super::pieces::Pieces;

/// Reads from `file` at `offset` into `slices`, as many bytes as come at once: 0 at the file's end.
///
/// # Errors
/// preadv(2).
pub fn read_at<'ram>(
    file: &File,
    offset: u64,
    slices: impl Iterator<Item = VolatileSlice<'ram>>,
) -> io::Result<usize> {
    let pieces = Pieces::new(slices);
    // SAFETY: the first `count` vectors are slices of guest RAM, which is mapped as long as `'ram` lasts, and to which nobody
    // has references: the guest may change it at any time, and so may the kernel.
    let read = unsafe {
        let count = pieces.count as libc::c_int;
        libc::preadv(file.as_raw_fd(), pieces.vectors.as_ptr(), count, offset as libc::off_t)
    };
    usize::try_from(read).map_err(|_| io::Error::last_os_error())
}

/// Writes `slices` to `file` at `offset`, as many bytes as are taken at once. With `is_durable` they are on the medium
/// when the call is over.
///
/// # Errors
/// pwritev2(2).
pub fn write_at<'ram>(
    file: &File,
    offset: u64,
    slices: impl Iterator<Item = VolatileSlice<'ram>>,
    is_durable: bool,
) -> io::Result<usize> {
    let pieces = Pieces::new(slices);
    let flags = if is_durable { libc::RWF_DSYNC } else { 0 };
    // SAFETY: as above; the kernel only reads.
    let written = unsafe {
        let count = pieces.count as libc::c_int;
        let (fd, offset) = (file.as_raw_fd(), offset as libc::off_t);
        libc::pwritev2(fd, pieces.vectors.as_ptr(), count, offset, flags)
    };
    usize::try_from(written).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions};

    use super::super::pieces::MOST;
    use super::*;
    use crate::memory::GuestRam;

    #[test]
    fn bytes_go_between_a_file_and_pieces_of_ram() {
        let ram =
            GuestRam::from_ranges(&[(GuestAddress(0), 0x1000), (GuestAddress(0x1000), 0x1000)])
                .unwrap();
        let slices = |ranges: &'static [(u64, usize)]| {
            ranges
                .iter()
                .flat_map(|(at, len)| {
                    ram.get_slices(GuestAddress(*at), *len, Permissions::ReadWrite).unwrap()
                })
                .map(Result::unwrap)
        };
        let file = tempfile::tempfile().unwrap();
        ram.write_slice(b"abcdef", GuestAddress(0xffd)).unwrap();
        assert_eq!(write_at(&file, 10, slices(&[(0xffd, 6), (0xffd, 2)]), false).unwrap(), 8);
        assert_eq!(write_at(&file, 18, slices(&[(0x1001, 2)]), true).unwrap(), 2);
        assert_eq!(read_at(&file, 11, slices(&[(0x100, 3), (0x200, 20)])).unwrap(), 9);
        let mut read = [0; 7];
        ram.read_slice(&mut read[..3], GuestAddress(0x100)).unwrap();
        assert_eq!(&read[..3], b"bcd");
        ram.read_slice(&mut read, GuestAddress(0x200)).unwrap();
        assert_eq!(&read, b"efabef\0");
        assert_eq!(read_at(&file, 20, slices(&[(0x100, 3)])).unwrap(), 0, "the file's end");
        let many = std::iter::repeat_n((0x100, 1), MOST + 1);
        let many: &'static [_] = many.collect::<Vec<_>>().leak();
        assert_eq!(write_at(&file, 0, slices(many), false).unwrap(), MOST);
        let read_only = File::open("/dev/null").unwrap();
        let error = write_at(&read_only, 0, slices(&[(0, 1)]), false).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EBADF));
    }
}
