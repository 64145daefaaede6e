//! RAM whose pages somebody else serves, in Firecracker's protocol: the monitor connects to a Unix socket and sends a userfaultfd and
//! where each range of RAM is; a page that is touched for the first time comes from whoever listens there.
//!
//! A thread that touches such a page sleeps in the kernel until it is there, whoever it is: a vCPU in `KVM_RUN`, the event loop or a
//! disk's thread in the middle of a request. A page server that hangs makes all of them hang. SIGINT is still heard, for
//! its handler runs on the main thread, which touches no RAM; if the machine cannot be stopped in good order, the second one ends the
//! process, and the kernel lets threads out of such a sleep when their process ends.
//!
//! A page server that ends must end the machine. If nobody had the userfaultfd any more, the kernel would take the pages that
//! are missing for empty, and guest and disks would have zeroes for data. So this process keeps it, and a thread of its own,
//! which touches no RAM, waits for the end of the connection.
//!
//! Three requests of the kernel's interface are all it takes (linux/userfaultfd.h), so there is no crate for it: the one that there is
//! generates its bindings from C headers at each build, and knows no `/dev/userfaultfd`.

use std::fs::File;
use std::io::{self, IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde::Serialize;

use super::{Memory, PAGE};

const DEVICE: &str = "/dev/userfaultfd";

/// Why RAM cannot come from a page server.
#[derive(Debug, thiserror::Error)]
pub enum PagingError {
    /// An old kernel.
    #[error("{DEVICE} does not exist: Linux has it since 6.1; restore from a memory file instead")]
    Missing,
    /// Not for this user.
    #[error(
        "open {DEVICE}: permission denied; give this user access to it (setfacl -m u:$USER:rw {DEVICE}), run as root, or restore \
         from a memory file"
    )]
    Denied,
    /// Another reason.
    #[error("open {DEVICE}")]
    Open(#[source] io::Error),
    /// Nobody listens.
    #[error("connect to the page server's socket {0:?}")]
    Connect(PathBuf, #[source] io::Error),
    /// The kernel refused.
    #[error("{action}")]
    Request {
        /// What was asked of it.
        action: &'static str,
        /// What it said.
        source: io::Error,
    },
    /// The page server did not take what it needs.
    #[error("send the page server where RAM is")]
    Send(#[source] io::Error),
}

/// A page server to be used, opened by name before the process is confined.
#[derive(Debug)]
pub struct PageSource {
    device: File,
    socket: UnixStream,
}

impl PageSource {
    /// Connects to the server at `path`.
    ///
    /// # Errors
    /// [`PagingError`].
    pub fn connect(path: &Path) -> Result<Self, PagingError> {
        let device = File::options().read(true).write(true).open(DEVICE);
        let device = device.map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => PagingError::Missing,
            io::ErrorKind::PermissionDenied => PagingError::Denied,
            _ => PagingError::Open(error),
        })?;
        let socket = UnixStream::connect(path)
            .map_err(|error| PagingError::Connect(path.to_owned(), error))?;
        Ok(Self { device, socket })
    }

    /// What a jail has to let through.
    pub fn descriptors(&self) -> [BorrowedFd<'_>; 2] {
        [self.device.as_fd(), self.socket.as_fd()]
    }

    /// Has the server serve the pages of `memory`, none of which was touched yet. In the process that runs the machine: a
    /// userfaultfd is of the address space of who makes it.
    ///
    /// # Errors
    /// [`PagingError::Request`] or [`PagingError::Send`].
    pub fn serve(self, memory: &Memory) -> Result<PageServer, PagingError> {
        let faults = new_userfaultfd(&self.device)?;
        let mut offset = 0;
        let mut regions = Vec::new();
        for range in memory.ranges() {
            // SAFETY: the range is a mapping that `memory` owns. From here on its first touch waits for the server, which may put
            // any bytes there: guest memory is expected to change at any time.
            unsafe { register(&faults, range.host, range.bytes) }?;
            regions.push(Region {
                base_host_virt_addr: range.host,
                size: range.bytes,
                offset,
                page_size: PAGE as u64,
                page_size_kib: PAGE as u64,
            });
            offset += range.bytes;
        }
        send(&self.socket, &regions, &faults)?;
        Ok(PageServer { socket: self.socket, _faults: faults, is_needed: AtomicBool::new(true) })
    }
}

/// A range of RAM in the words of Firecracker's protocol.
#[derive(Serialize)]
struct Region {
    base_host_virt_addr: u64,
    size: u64,
    /// In the memory file.
    offset: u64,
    /// In bytes.
    page_size: u64,
    /// The same, in bytes despite its name: servers of earlier versions look for it.
    page_size_kib: u64,
}

/// A server that has the pages of a machine's RAM.
#[derive(Debug)]
pub struct PageServer {
    socket: UnixStream,
    /// Kept so that missing pages are waited for whatever becomes of the server.
    _faults: OwnedFd,
    is_needed: AtomicBool,
}

impl PageServer {
    /// From now on RAM comes from elsewhere ([`Memory::replace`]).
    pub fn dismiss(&self) {
        self.is_needed.store(false, Ordering::SeqCst);
        // Whoever waits wakes up. If the connection is gone already, nobody does.
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
    }

    /// Waits until the server is gone or dismissed; true if it is missed.
    pub fn wait_gone(&self) -> bool {
        let mut ignored = [0; 64];
        loop {
            match (&self.socket).read(&mut ignored) {
                // The protocol has nothing to say in this direction.
                Ok(1..) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(0) | Err(_) => return self.is_needed.load(Ordering::SeqCst),
            }
        }
    }

    /// Starts a thread that waits until the server is gone, and then does `end` if it is missed, which is [`end_without_pages`]
    /// unless somebody tests. `begin` is done at its start: where there are filters, it gets that of `ThreadKind::Pages`.
    ///
    /// # Errors
    /// What the host says when it has no thread left.
    pub fn watch(
        self: &Arc<Self>,
        begin: impl FnOnce() + Send + 'static,
        end: impl FnOnce() + Send + 'static,
    ) -> io::Result<()> {
        let server = Arc::clone(self);
        std::thread::Builder::new().name("pages".into()).spawn(move || {
            begin();
            if server.wait_gone() {
                end();
            }
        })?;
        Ok(())
    }
}

/// Ends the process because RAM has no source any more. Threads that wait for pages cannot be waited for, so nothing is put in order.
pub fn end_without_pages() -> ! {
    eprintln!(
        "cleanslate: the page server is gone, and with it pages of the guest's RAM: the machine cannot go on"
    );
    signal_hook::low_level::exit(crate::exit::USAGE_OR_HOST.into())
}

mod request {
    use vmm_sys_util::{ioctl_io_nr, ioctl_iowr_nr};

    /// `struct uffdio_api`.
    #[repr(C)]
    pub struct Api {
        pub api: u64,
        pub features: u64,
        pub ioctls: u64,
    }

    /// `struct uffdio_register`.
    #[repr(C)]
    pub struct Register {
        pub start: u64,
        pub len: u64,
        pub mode: u64,
        pub ioctls: u64,
    }

    /// `UFFD_API`.
    pub const API: u64 = 0xaa;
    /// `UFFDIO_REGISTER_MODE_MISSING`.
    pub const MISSING: u64 = 1;

    ioctl_io_nr!(USERFAULTFD_IOC_NEW, 0xaa, 0x00);
    ioctl_iowr_nr!(UFFDIO_API, 0xaa, 0x3f, Api);
    ioctl_iowr_nr!(UFFDIO_REGISTER, 0xaa, 0x00, Register);
}

/// A userfaultfd of this process, for faults of the kernel's as well: KVM's are.
fn new_userfaultfd(device: &File) -> Result<OwnedFd, PagingError> {
    let failed = |action| PagingError::Request { action, source: io::Error::last_os_error() };
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: the request takes flags and makes a descriptor.
    let fd = unsafe { libc::ioctl(device.as_raw_fd(), request::USERFAULTFD_IOC_NEW(), flags) };
    if fd < 0 {
        return Err(failed("make a userfaultfd"));
    }
    // SAFETY: the descriptor was just made, and nobody else has it.
    let faults = unsafe { OwnedFd::from_raw_fd(fd) };
    let mut api = request::Api { api: request::API, features: 0, ioctls: 0 };
    // SAFETY: the kernel reads and writes this structure alone.
    let result = unsafe { libc::ioctl(faults.as_raw_fd(), request::UFFDIO_API(), &raw mut api) };
    match result {
        0 => Ok(faults),
        _ => Err(failed("agree with the kernel on the userfaultfd's interface")),
    }
}

/// Has `faults` told of pages that are missing in a range of this process.
///
/// # Safety
/// Nobody may hold references into the range: who has `faults` decides what is in it.
unsafe fn register(faults: &OwnedFd, start: u64, len: u64) -> Result<(), PagingError> {
    let mut range = request::Register { start, len, mode: request::MISSING, ioctls: 0 };
    let faults = faults.as_raw_fd();
    // SAFETY: the kernel reads and writes this structure alone; what it does to the range is the caller's matter.
    let result = unsafe { libc::ioctl(faults, request::UFFDIO_REGISTER(), &raw mut range) };
    match result {
        0 => Ok(()),
        _ => Err(PagingError::Request {
            action: "have missing pages of RAM told of",
            source: io::Error::last_os_error(),
        }),
    }
}

/// One message: the ranges as JSON, and the descriptor.
fn send(socket: &UnixStream, regions: &[Region], faults: &OwnedFd) -> Result<(), PagingError> {
    let text = serde_json::to_vec(regions).map_err(|error| PagingError::Send(error.into()))?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let descriptors = [faults.as_fd()];
    assert!(control.push(SendAncillaryMessage::ScmRights(&descriptors)), "there is room for one");
    let sent = sendmsg(socket, &[IoSlice::new(&text)], &mut control, SendFlags::NOSIGNAL)
        .map_err(|errno| PagingError::Send(errno.into()))?;
    match sent == text.len() {
        true => Ok(()),
        false => Err(PagingError::Send(io::ErrorKind::WriteZero.into())),
    }
}

#[cfg(test)]
mod tests;
