//! The janitor: a process that outlives whatever is killed, and removes what was made for jails.
//!
//! It hears of each thing before the thing is made. While the caller lives it removes what belongs to jails that the caller
//! says are over, and tells when that is done; when the caller drops it or dies, it removes everything. Should the janitor itself be killed,
//! the caller does its work. Neither remembers anything of a jail that is gone.
//!
//! For a single jail it also makes some of the namespaces, the network's above all: that takes as long as half of everything else, and
//! here it takes place beside the caller's own work.

mod list;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::rc::Rc;

use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags,
    SocketType, recv, sendmsg, socketpair,
};
use rustix::process::{Pid, WaitId, WaitIdOptions};
use rustix::thread::ThreadNameSpaceType;

use crate::sys::{self, Child};
use list::{Order, Thing, clean, serve};

/// What belongs to no single jail goes in the end.
const NO_JAIL: u64 = 0;

/// The caller's end of its janitor. Dropping it has everything removed and waits for that.
#[derive(Debug)]
pub struct Janitor {
    process: Child,
    /// `None` when the end was said.
    orders: Option<OwnedFd>,
    namespaces: ThreadNameSpaceType,
    /// Tells when they are made.
    made: OwnedFd,
    /// The reader is at its end when the caller is dead: jailed processes look there.
    life: (OwnedFd, OwnedFd),
    /// By jail. What is over stays here until the janitor says that it is gone.
    things: RefCell<BTreeMap<u64, Vec<Thing>>>,
    jails: Cell<u64>,
}

/// A jail of a janitor's: when this is dropped, the jail is over, and what was made for it goes at once.
#[derive(Debug)]
pub(crate) struct Ward {
    pub janitor: Rc<Janitor>,
    number: u64,
}

impl Janitor {
    /// Starts one for things that no jail has, or for jails that share it ([`crate::Jail::prepare_with`]). The caller has one
    /// thread.
    ///
    /// # Errors
    /// What the kernel says when it has no process or no descriptor left.
    pub fn start() -> io::Result<Self> {
        Self::with_namespaces(ThreadNameSpaceType::empty())
    }

    /// Starts one that moves into new `namespaces` first, for [`Janitor::join_namespaces`]. The caller has one thread.
    ///
    /// # Errors
    /// What the kernel says when it has no process or no descriptor left.
    pub(crate) fn with_namespaces(namespaces: ThreadNameSpaceType) -> io::Result<Self> {
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        let pipe = || rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC);
        let (made, tell) = pipe()?;
        let life = pipe()?;
        match sys::clone_process(0, None)? {
            Some(process) => {
                if !namespaces.is_empty() {
                    run_beside(process.pid);
                }
                let (orders, things, jails) = (Some(ours), RefCell::default(), Cell::new(NO_JAIL));
                Ok(Self { process, orders, namespaces, made, life, things, jails })
            }
            None => serve(&theirs, tell, namespaces),
        }
    }

    /// Has the directory `dir` removed in the end if nothing is in it. To be said before it is made.
    pub fn remove_directory(&self, dir: &Path) {
        self.remove(NO_JAIL, Thing::Directory(dir.into()));
    }

    /// Has the file at `path`, which a mount is to cover, removed in the end. To be said before it is made.
    pub(crate) fn remove_file(&self, path: &Path) {
        self.remove(NO_JAIL, Thing::Socket(path.into(), None));
    }

    /// Has the socket's file at `path` removed in the end. To be said before it is made.
    pub fn remove_socket(&self, path: &Path) {
        self.remove(NO_JAIL, Thing::Socket(path.into(), None));
    }

    /// The socket at `path` was made and is the file with this device and inode: another in its place stays.
    pub fn identify_socket(&self, path: &Path, identity: (u64, u64)) {
        self.remove(NO_JAIL, Thing::Socket(path.into(), Some(identity)));
    }

    /// The thing at `path` was not made after all.
    pub fn forget(&self, path: &Path) {
        self.not_made(NO_JAIL, path);
    }

    /// Takes on a jail.
    pub(crate) fn take_on(self: &Rc<Self>) -> Ward {
        self.hear_what_is_gone();
        self.jails.set(self.jails.get() + 1);
        Ward { janitor: Rc::clone(self), number: self.jails.get() }
    }

    /// What [`Janitor::join_namespaces`] needs, and the end of the caller's life.
    pub(crate) fn descriptors(&self) -> [BorrowedFd<'_>; 3] {
        [self.process.pidfd.as_fd(), self.made.as_fd(), self.life_of_caller()]
    }

    /// Is at its end when the caller is dead.
    pub(crate) fn life_of_caller(&self) -> BorrowedFd<'_> {
        self.life.0.as_fd()
    }

    /// Namespaces that it makes.
    pub(crate) fn namespaces(&self) -> ThreadNameSpaceType {
        self.namespaces
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

    fn remove(&self, jail: u64, thing: Thing) {
        self.say(jail, &Order::Remove(thing.clone()), &[]);
        let mut things = self.things.borrow_mut();
        let things = things.entry(jail).or_default();
        things.retain(|known| known.path() != thing.path());
        things.push(thing);
    }

    fn not_made(&self, jail: u64, path: &Path) {
        if let Some(things) = self.things.borrow_mut().get_mut(&jail) {
            things.retain(|thing| thing.path() != path);
        }
        self.say(jail, &Order::Forget(path.into()), &[]);
    }

    /// A jail is over.
    fn over(&self, jail: u64) {
        self.hear_what_is_gone();
        if !self.say(jail, &Order::Over, &[]) {
            let things = self.things.borrow_mut().remove(&jail);
            clean(things.unwrap_or_default());
        }
    }

    /// Forgets what the janitor has removed.
    fn hear_what_is_gone(&self) {
        let mut jail = [0; 8];
        let hear = |jail: &mut [u8; 8]| {
            let orders = self.orders.as_ref()?;
            recv(orders, jail, RecvFlags::DONTWAIT).ok().filter(|(_, bytes)| *bytes == 8)
        };
        while hear(&mut jail).is_some() {
            self.things.borrow_mut().remove(&u64::from_ne_bytes(jail));
        }
    }

    /// Tells the janitor; false if it is dead, and the caller has to do its work.
    fn say(&self, jail: u64, order: &Order, fds: &[BorrowedFd<'_>]) -> bool {
        let message = order.message(jail);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            ancillary.push(SendAncillaryMessage::ScmRights(fds));
        }
        let Some(orders) = &self.orders else { return false };
        let parts = [IoSlice::new(&message)];
        sendmsg(orders, &parts, &mut ancillary, SendFlags::NOSIGNAL).is_ok()
    }
}

impl Ward {
    /// Has the control group `dir` removed when the jail is over, with all that runs in it. To be said before it is made.
    pub fn remove_group(&self, dir: &Path) {
        self.janitor.remove(self.number, Thing::Group(dir.into()));
    }

    /// The group was not made after all.
    pub fn forget(&self, dir: &Path) {
        self.janitor.not_made(self.number, dir);
    }

    /// Has this process killed if the caller dies.
    pub fn guard(&self, process: BorrowedFd<'_>) {
        self.janitor.say(self.number, &Order::Guard, &[process]);
    }
}

impl Drop for Ward {
    fn drop(&mut self) {
        self.janitor.over(self.number);
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
            let things = std::mem::take(self.things.get_mut()).into_values().flatten();
            clean(things.collect());
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
