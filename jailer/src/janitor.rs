//! The janitor: a process that outlives whatever is killed, and removes what was made for a jail.
//!
//! It hears of each thing before the thing is made, does nothing while the caller lives, and removes everything when the
//! caller says so or dies. Should the janitor itself be killed, the caller does its work.
//!
//! It also makes some of the jail's namespaces, the network's above all: that takes as long as half of everything else, and
//! here it takes place beside the caller's own work.

use std::fs;
use std::io::{self, IoSlice, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions};
use rustix::thread::{ThreadNameSpaceType, UnshareFlags};

use crate::sys::{self, Child};

/// Longest message: a kind, an identity and a path.
const MESSAGE_MAX: usize = 1 + 16 + 4096;

/// How often a control group that still has processes is tried, a millisecond apart. The kernel takes tens of milliseconds
/// to take down a machine.
const TRIES: u32 = 10_000;

/// Something that must not stay behind.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Thing {
    /// A control group, with all that runs in it.
    Group(PathBuf),
    /// A directory, if nothing is in it.
    Directory(PathBuf),
    /// A socket's file; if known, that with this device and inode alone.
    Socket(PathBuf, Option<(u64, u64)>),
}

/// The caller's end of its janitor. Dropping it has everything removed and waits for that.
#[derive(Debug)]
pub struct Janitor {
    process: Child,
    /// `None` when the end was said.
    orders: Option<OwnedFd>,
    namespaces: ThreadNameSpaceType,
    /// Tells when they are made.
    made: OwnedFd,
    things: Vec<Thing>,
}

impl Janitor {
    /// Starts one for things that no jail has. The caller has one thread.
    ///
    /// # Errors
    /// What the kernel says when it has no process or no descriptor left.
    pub fn without_jail() -> io::Result<Self> {
        Self::start(ThreadNameSpaceType::empty())
    }

    /// Starts one that moves into new `namespaces` first, for [`Janitor::join_namespaces`]. The caller has one thread.
    ///
    /// # Errors
    /// What the kernel says when it has no process or no descriptor left.
    pub(crate) fn start(namespaces: ThreadNameSpaceType) -> io::Result<Self> {
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        let (made, tell) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        match sys::clone_process(0, None)? {
            Some(process) => {
                if !namespaces.is_empty() {
                    run_beside(process.pid);
                }
                Ok(Self { process, orders: Some(ours), namespaces, made, things: Vec::new() })
            }
            None => serve(&theirs, tell, namespaces),
        }
    }

    /// Has the control group `dir` removed in the end, with all that runs in it. To be said before it is made.
    pub(crate) fn remove_group(&mut self, dir: &Path) {
        self.remove(Thing::Group(dir.into()));
    }

    /// Has the directory `dir` removed in the end if nothing is in it. To be said before it is made.
    pub fn remove_directory(&mut self, dir: &Path) {
        self.remove(Thing::Directory(dir.into()));
    }

    /// Has the file at `path`, which a mount is to cover, removed in the end. To be said before it is made.
    pub(crate) fn remove_file(&mut self, path: &Path) {
        self.remove(Thing::Socket(path.into(), None));
    }

    /// Has the socket's file at `path` removed in the end. To be said before it is made.
    pub fn remove_socket(&mut self, path: &Path) {
        self.remove(Thing::Socket(path.into(), None));
    }

    /// The socket at `path` was made and is the file with this device and inode: another in its place stays.
    pub fn identify_socket(&mut self, path: &Path, identity: (u64, u64)) {
        self.things.retain(|thing| thing.path() != path);
        self.remove(Thing::Socket(path.into(), Some(identity)));
    }

    /// The thing at `path` was not made after all.
    pub fn forget(&mut self, path: &Path) {
        self.things.retain(|thing| thing.path() != path);
        self.say(b'f', None, path, &[]);
    }

    /// Has this process killed if the caller dies.
    pub(crate) fn guard(&self, process: BorrowedFd<'_>) {
        self.say(b'p', None, Path::new(""), &[process]);
    }

    /// What [`Janitor::join_namespaces`] needs.
    pub(crate) fn descriptors(&self) -> [BorrowedFd<'_>; 2] {
        [self.process.pidfd.as_fd(), self.made.as_fd()]
    }

    /// Moves this process into the namespaces that the janitor was to make, and waits for them if it has to.
    ///
    /// # Errors
    /// Why there are none, or that the janitor was killed.
    pub(crate) fn join_namespaces(&self) -> io::Result<()> {
        if self.namespaces.is_empty() {
            return Ok(());
        }
        let mut errno = [0; 4];
        match rustix::io::read(&self.made, &mut errno)? {
            4 if errno == [0; 4] => {}
            4 => return Err(io::Error::from_raw_os_error(i32::from_ne_bytes(errno))),
            _ => return Err(io::Error::other("the janitor was killed")),
        }
        Ok(rustix::thread::move_into_thread_name_spaces(
            self.process.pidfd.as_fd(),
            self.namespaces,
        )?)
    }

    fn remove(&mut self, thing: Thing) {
        match &thing {
            Thing::Group(path) => self.say(b'g', None, path, &[]),
            Thing::Directory(path) => self.say(b'd', None, path, &[]),
            Thing::Socket(path, identity) => self.say(b's', *identity, path, &[]),
        }
        self.things.push(thing);
    }

    /// Tells the janitor. If it is dead, the caller does its work in the end.
    fn say(&self, kind: u8, identity: Option<(u64, u64)>, path: &Path, fds: &[BorrowedFd<'_>]) {
        let (device, inode) = identity.unwrap_or_default();
        let message =
            [&[kind][..], &device.to_ne_bytes(), &inode.to_ne_bytes(), path.as_os_str().as_bytes()]
                .concat();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            ancillary.push(SendAncillaryMessage::ScmRights(fds));
        }
        if let Some(orders) = &self.orders {
            let parts = [IoSlice::new(&message)];
            let _ = sendmsg(orders, &parts, &mut ancillary, SendFlags::NOSIGNAL);
        }
    }
}

impl Drop for Janitor {
    fn drop(&mut self) {
        self.orders = None;
        let id = WaitId::PidFd(self.process.pidfd.as_fd());
        let ended = rustix::process::waitid(id, WaitIdOptions::EXITED);
        let done = matches!(ended, Ok(Some(status)) if status.exit_status() == Some(0));
        if !done {
            // It was killed, or could not do it: whoever removes things twice finds nothing the second time.
            clean(&self.things);
        }
    }
}

/// Has a new process run on another processor than this one. The scheduler likes to leave it here, where it would wait until
/// this process sleeps. No more than a wish: without it the work is done one after the other.
fn run_beside(process: Pid) {
    if let Ok(mut processors) = rustix::thread::sched_getaffinity(None) {
        processors.unset(rustix::thread::sched_getcpu());
        // There may be no other.
        let _ = rustix::thread::sched_setaffinity(Some(process), &processors);
    }
}

/// What the janitor does all its life.
fn serve(orders: &OwnedFd, made: OwnedFd, namespaces: ThreadNameSpaceType) -> ! {
    // The caller may be told to end; the janitor ends after it.
    sys::block_all_signals();
    let _ = rustix::process::setsid();
    let _ = rustix::thread::set_name(c"jail-janitor");
    // stdout too: whoever reads the program's output to its end does not wait for the janitor. stderr is for complaints.
    sys::close_all_but(&[rustix::stdio::stderr(), orders.as_fd(), made.as_fd()]);
    if !namespaces.is_empty() {
        // Both kinds of flags are CLONE_NEW….
        let result = sys::unshare(UnshareFlags::from_bits_retain(namespaces.bits()));
        let errno = result.err().map_or(0, |errno| errno.raw_os_error());
        // Nobody reads it if the caller has died already.
        let _ = rustix::io::write(&made, &errno.to_ne_bytes());
    }
    drop(made);
    let mut list = List::default();
    while list.hear(orders) {}
    if let Some(process) = &list.guarded {
        end(process);
    }
    std::process::exit(i32::from(!clean(&list.things)))
}

/// What the janitor has been told.
#[derive(Default)]
struct List {
    things: Vec<Thing>,
    guarded: Option<OwnedFd>,
}

impl List {
    /// Takes one message; false at the end of all messages.
    fn hear(&mut self, orders: &OwnedFd) -> bool {
        let mut bytes = [0; MESSAGE_MAX];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let received = recvmsg(orders, &mut parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC);
        let Ok(received) = received else { return false };
        let fds = ancillary.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        });
        let process = fds.flatten().next();
        if received.bytes == 0 {
            return false;
        }
        self.note(&bytes[..received.bytes], process);
        true
    }

    fn note(&mut self, message: &[u8], process: Option<OwnedFd>) {
        let Some((head, path)) = message.split_at_checked(17) else { return };
        let number =
            |at: usize| u64::from_ne_bytes(head[at..at + 8].try_into().unwrap_or_default());
        let identity = (number(1), number(9));
        let path = PathBuf::from(std::ffi::OsString::from_vec(path.into()));
        match head[0] {
            b'g' => self.things.push(Thing::Group(path)),
            b'd' => self.things.push(Thing::Directory(path)),
            b's' => {
                // What was said of it before was less. In one message: between two the caller could die.
                self.things.retain(|thing| thing.path() != path);
                self.things.push(Thing::Socket(path, (identity != (0, 0)).then_some(identity)));
            }
            b'f' => self.things.retain(|thing| thing.path() != path),
            _ => self.guarded = process,
        }
    }
}

/// Kills a process and waits for its death; that of a process which has died already costs nothing.
fn end(process: &OwnedFd) {
    let _ = rustix::process::pidfd_send_signal(process, Signal::KILL);
    let _ = poll(&mut [PollFd::new(process, PollFlags::IN)], None);
}

/// Removes `things`, the last one first; true if none is left.
fn clean(things: &[Thing]) -> bool {
    things.iter().rev().fold(true, |clean, thing| match thing.remove() {
        Ok(()) => clean,
        Err(error) => {
            eprintln!("jailer: remove {:?}: {error}", thing.path());
            false
        }
    })
}

impl Thing {
    fn path(&self) -> &Path {
        match self {
            Self::Group(path) | Self::Directory(path) | Self::Socket(path, _) => path,
        }
    }

    fn remove(&self) -> io::Result<()> {
        let removed = match self {
            Self::Group(dir) => remove_group(dir),
            // What somebody has put there is not ours.
            Self::Directory(dir) => match fs::remove_dir(dir) {
                Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => Ok(()),
                result => result,
            },
            Self::Socket(path, identity) => {
                path.symlink_metadata().and_then(|metadata| match identity {
                    Some(ours) if (metadata.dev(), metadata.ino()) != *ours => Ok(()),
                    _ => fs::remove_file(path),
                })
            }
        };
        match removed {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result,
        }
    }
}

/// Removes a control group. What still runs in it is killed; the kernel may take a while.
fn remove_group(dir: &Path) -> io::Result<()> {
    for _ in 0..TRIES {
        match fs::remove_dir(dir) {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                kill_all(dir);
                std::thread::sleep(Duration::from_millis(1));
            }
            result => return result,
        }
    }
    Err(io::ErrorKind::ResourceBusy.into())
}

fn kill_all(dir: &Path) {
    // Version 2 has a file for it (Linux 5.14), which no fork can outrun.
    let all_at_once = fs::File::options().write(true).open(dir.join("cgroup.kill"));
    if all_at_once.and_then(|mut file| file.write_all(b"1")).is_ok() {
        return;
    }
    let members = || -> Vec<Pid> {
        let numbers = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
        numbers.lines().filter_map(|line| Pid::from_raw(line.parse().ok()?)).collect()
    };
    let opened: Vec<(Pid, OwnedFd)> = members()
        .into_iter()
        .filter_map(|pid| Some((pid, rustix::process::pidfd_open(pid, PidfdFlags::empty()).ok()?)))
        .collect();
    // A number may have gone to another process before it was opened. The descriptor of one that is still a member is that
    // member's, or leads to one that has ended.
    let members = members();
    for (_, process) in opened.iter().filter(|(pid, _)| members.contains(pid)) {
        let _ = rustix::process::pidfd_send_signal(process, Signal::KILL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u8, identity: (u64, u64), path: &str) -> Vec<u8> {
        [&[kind][..], &identity.0.to_ne_bytes(), &identity.1.to_ne_bytes(), path.as_bytes()]
            .concat()
    }

    #[test]
    fn what_is_told_is_noted_and_what_is_taken_back_forgotten() {
        let mut list = List::default();
        list.note(&message(b'g', (0, 0), "/group"), None);
        list.note(&message(b's', (0, 0), "socket"), None);
        list.note(&message(b'd', (0, 0), "/dir"), None);
        list.note(&message(b'f', (0, 0), "/dir"), None);
        list.note(&message(b's', (7, 8), "socket"), None);
        list.note(b"short", None);
        assert_eq!(
            list.things,
            [Thing::Group("/group".into()), Thing::Socket("socket".into(), Some((7, 8)))]
        );
    }

    #[test]
    fn what_belongs_to_others_stays() {
        let dir = tempfile::tempdir().unwrap();
        let (file, full) = (dir.path().join("file"), dir.path().join("full"));
        fs::write(&file, "").unwrap();
        fs::create_dir(&full).unwrap();
        fs::write(full.join("theirs"), "").unwrap();
        assert!(clean(&[
            Thing::Socket(file.clone(), Some((0, 1))),
            Thing::Directory(full.clone()),
            Thing::Directory(dir.path().join("never made")),
        ]));
        assert!(file.exists() && full.exists());
        let inode = file.metadata().unwrap();
        assert!(clean(&[Thing::Socket(file.clone(), Some((inode.dev(), inode.ino())))]));
        assert!(!file.exists());
    }
}
