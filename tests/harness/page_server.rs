//! A page server, as Firecracker documents what one does: it is given a userfaultfd and where RAM is, and gives each page of a memory
//! file when it is touched first.

use std::fs::File;
use std::io::{self, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use serde::Deserialize;

/// A range of RAM.
#[derive(Deserialize)]
struct Mapping {
    base_host_virt_addr: u64,
    size: u64,
    offset: u64,
    page_size: u64,
}

/// Serves the next machine from `file`, until it is gone or has had `most` pages. Gives how many it had.
pub fn serve(listener: &UnixListener, file: &File, most: usize) -> usize {
    let (socket, _) = listener.accept().unwrap();
    let (mut text, mut space) =
        ([0; 4096], [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))]);
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received =
        recvmsg(&socket, &mut [IoSliceMut::new(&mut text)], &mut control, RecvFlags::empty());
    let mappings: Vec<Mapping> = serde_json::from_slice(&text[..received.unwrap().bytes]).unwrap();
    let faults = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    let faults = File::from(faults.unwrap());
    for served in 0..most {
        let mut ready = [PollFd::new(&faults, PollFlags::IN), PollFd::new(&socket, PollFlags::IN)];
        poll(&mut ready, None).unwrap();
        if !ready[1].revents().is_empty() {
            return served;
        }
        let mut message = [0_u8; 32];
        assert_eq!((&faults).read(&mut message).unwrap(), 32);
        let word = |at: usize| u64::from_le_bytes(*message[at..].first_chunk().unwrap());
        // `UFFD_EVENT_PAGEFAULT`
        assert_eq!(message[0], 0x12);
        let address = word(16);
        let within = |mapping: &&Mapping| {
            (mapping.base_host_virt_addr..mapping.base_host_virt_addr + mapping.size)
                .contains(&address)
        };
        let mapping = mappings.iter().find(within).unwrap();
        let offset =
            (address - mapping.base_host_virt_addr) / mapping.page_size * mapping.page_size;
        let mut page = vec![0_u8; mapping.page_size as usize];
        file.read_exact_at(&mut page, mapping.offset + offset).unwrap();
        put(&faults, mapping.base_host_virt_addr + offset, &page);
    }
    most
}

/// `UFFDIO_COPY`.
fn put(faults: &File, address: u64, page: &[u8]) {
    #[repr(C)]
    struct Copy {
        dst: u64,
        src: u64,
        len: u64,
        mode: u64,
        copy: i64,
    }
    vmm_sys_util::ioctl_iowr_nr!(UFFDIO_COPY, 0xaa, 0x03, Copy);
    let (src, len) = (page.as_ptr() as u64, page.len() as u64);
    let mut copy = Copy { dst: address, src, len, mode: 0, copy: 0 };
    // SAFETY: the kernel reads the page and this structure, and writes to the process that the userfaultfd is of.
    let result = unsafe { libc::ioctl(faults.as_raw_fd(), UFFDIO_COPY(), &raw mut copy) };
    assert_eq!((result, copy.copy), (0, page.len() as i64), "{}", io::Error::last_os_error());
}
