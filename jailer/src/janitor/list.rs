//! What the janitor's own process does: keeps a list of what it is told, and removes.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, recvmsg, send};
use rustix::process::{Pid, PidfdFlags, Signal};
use rustix::thread::{ThreadNameSpaceType, UnshareFlags};

use crate::sys;

/// Longest message: its head and a path.
const MESSAGE_MAX: usize = HEAD + 4096;
/// A kind, the number of a jail, and a device and an inode.
const HEAD: usize = 1 + 8 + 16;

/// How often a control group that still has processes is tried, and how long after the time before. The kernel takes tens of
/// milliseconds to take down a machine.
const TRIES: u32 = 10_000;
const PAUSE: Duration = Duration::from_millis(1);

/// What the caller tells its janitor.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// This is about to be made.
    Remove(Thing),
    /// What was to be made here was not.
    Forget(PathBuf),
    /// The process that comes with this has to die if the caller does.
    Guard,
    /// The jail is over: everything of it can go.
    Over,
}

/// Something that must not stay behind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Thing {
    /// A control group, with all that runs in it.
    Group(PathBuf),
    /// A directory, if nothing is in it.
    Directory(PathBuf),
    /// A socket's file; if known, that with this device and inode alone.
    Socket(PathBuf, Option<(u64, u64)>),
}

impl Order {
    /// As a message about the jail of this number.
    pub fn message(&self, jail: u64) -> Vec<u8> {
        let (kind, identity, path) = match self {
            Self::Remove(Thing::Group(path)) => (b'g', None, path.as_path()),
            Self::Remove(Thing::Directory(path)) => (b'd', None, path.as_path()),
            Self::Remove(Thing::Socket(path, identity)) => (b's', *identity, path.as_path()),
            Self::Forget(path) => (b'f', None, path.as_path()),
            Self::Guard => (b'p', None, Path::new("")),
            Self::Over => (b'o', None, Path::new("")),
        };
        let (device, inode) = identity.unwrap_or_default();
        let numbers = [jail, device, inode].map(u64::to_ne_bytes).concat();
        [&[kind], &numbers[..], path.as_os_str().as_bytes()].concat()
    }

    /// The jail and the order of a message.
    fn parse(message: &[u8]) -> Option<(u64, Self)> {
        let (head, path) = message.split_at_checked(HEAD)?;
        let number = |at: usize| Some(u64::from_ne_bytes(*head.get(at..)?.first_chunk()?));
        let identity = (number(9)?, number(17)?);
        let path = PathBuf::from(std::ffi::OsString::from_vec(path.into()));
        let order = match head[0] {
            b'g' => Self::Remove(Thing::Group(path)),
            b'd' => Self::Remove(Thing::Directory(path)),
            b's' => Self::Remove(Thing::Socket(path, (identity != (0, 0)).then_some(identity))),
            b'f' => Self::Forget(path),
            b'p' => Self::Guard,
            b'o' => Self::Over,
            _ => return None,
        };
        Some((number(1)?, order))
    }
}

/// What the janitor does all its life.
pub(super) fn serve(orders: &OwnedFd, made: OwnedFd, namespaces: ThreadNameSpaceType) -> ! {
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
    while list.hear(orders) {
        list.clean_over(Instant::now(), |jail| {
            send(orders, &jail.to_ne_bytes(), SendFlags::DONTWAIT | SendFlags::NOSIGNAL).is_ok()
        });
    }
    list.end_guarded();
    let things = list.jails.into_values().flat_map(|jail| jail.things);
    std::process::exit(i32::from(!clean(things.collect())))
}

/// What the janitor has been told.
#[derive(Default)]
struct List {
    jails: BTreeMap<u64, Told>,
    /// Those that are over, and how often they were tried.
    over: BTreeMap<u64, u32>,
    /// When those that were tried before are tried again.
    again: Option<Instant>,
}

/// What it has been told of one jail.
#[derive(Default)]
struct Told {
    things: Vec<Thing>,
    guarded: Option<OwnedFd>,
}

impl List {
    /// Takes one message, if there comes one before something has to be tried again; false at the end of all messages.
    fn hear(&mut self, orders: &OwnedFd) -> bool {
        let pause = Timespec { tv_sec: 0, tv_nsec: PAUSE.subsec_nanos().into() };
        let pause = (!self.over.is_empty()).then_some(&pause);
        match poll(&mut [PollFd::new(orders, PollFlags::IN)], pause) {
            Ok(0) => return true,
            Ok(_) => {}
            Err(_) => return false,
        }
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
        if let Some((jail, order)) = Order::parse(&bytes[..received.bytes]) {
            self.note(jail, order, process);
        }
        true
    }

    fn note(&mut self, jail: u64, order: Order, process: Option<OwnedFd>) {
        let told = self.jails.entry(jail).or_default();
        match order {
            Order::Remove(thing) => {
                // What was said of it before was less. In one message: between two the caller could die.
                told.things.retain(|known| known.path() != thing.path());
                told.things.push(thing);
            }
            Order::Forget(path) => told.things.retain(|thing| thing.path() != path),
            Order::Guard => told.guarded = process,
            Order::Over => {
                self.over.insert(jail, 0);
            }
        }
    }

    /// Tries once to remove what belongs to jails that are over, and forgets those of which nothing is left and `told` has
    /// told the caller so.
    fn clean_over(&mut self, now: Instant, told: impl Fn(u64) -> bool) {
        let Self { jails, over, again } = self;
        // However many messages come meanwhile.
        let is_time = again.is_none_or(|again| now >= again);
        if is_time {
            *again = Some(now + PAUSE);
        }
        over.retain(|jail, tries| {
            if *tries > 0 && !is_time {
                return true;
            }
            *tries += 1;
            let things = jails.get_mut(jail).map(|told| &mut told.things);
            if let Some(things) = things {
                while let Some(thing) = things.last() {
                    match thing.try_remove() {
                        Err(error) if error.kind() == io::ErrorKind::ResourceBusy => break,
                        Err(error) => eprintln!("jailer: remove {:?}: {error}", thing.path()),
                        Ok(()) => {}
                    }
                    things.pop();
                }
                if !things.is_empty() {
                    // In the end it is tried again, and complained of.
                    return *tries < TRIES;
                }
            }
            let is_done = told(*jail);
            if is_done {
                jails.remove(jail);
            }
            !is_done
        });
    }

    /// Kills the processes that are guarded and waits for their death; that of one which has died already costs nothing.
    fn end_guarded(&mut self) {
        let guarded: Vec<_> =
            self.jails.values_mut().filter_map(|told| told.guarded.take()).collect();
        for process in &guarded {
            let _ = rustix::process::pidfd_send_signal(process, Signal::KILL);
        }
        for process in &guarded {
            let _ = poll(&mut [PollFd::new(process, PollFlags::IN)], None);
        }
    }
}

/// Removes `things`, the last one first, and waits until that has worked; true if none is left.
pub(super) fn clean(mut things: Vec<Thing>) -> bool {
    let mut clean = true;
    let mut tries = 0;
    while let Some(thing) = things.last() {
        match thing.try_remove() {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy && tries < TRIES => {
                tries += 1;
                std::thread::sleep(PAUSE);
                continue;
            }
            Err(error) => {
                eprintln!("jailer: remove {:?}: {error}", thing.path());
                clean = false;
            }
            Ok(()) => {}
        }
        things.pop();
        tries = 0;
    }
    clean
}

impl Thing {
    pub fn path(&self) -> &Path {
        match self {
            Self::Group(path) | Self::Directory(path) | Self::Socket(path, _) => path,
        }
    }

    /// Removes it. What still runs in a control group is killed, and the error is `ResourceBusy` until it is gone.
    fn try_remove(&self) -> io::Result<()> {
        let removed = match self {
            Self::Group(dir) => {
                let removed = fs::remove_dir(dir);
                if removed.as_ref().is_err_and(|e| e.kind() == io::ErrorKind::ResourceBusy) {
                    kill_all(dir);
                }
                removed
            }
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

    /// As the list hears it.
    fn note(list: &mut List, jail: u64, order: Order) {
        let message = order.message(jail);
        let (parsed_jail, parsed) = Order::parse(&message).unwrap();
        assert_eq!((parsed_jail, &parsed), (jail, &order));
        list.note(jail, parsed, None);
    }

    fn group(path: &str) -> Order {
        Order::Remove(Thing::Group(path.into()))
    }

    fn socket(identity: Option<(u64, u64)>) -> Thing {
        Thing::Socket("socket".into(), identity)
    }

    #[test]
    fn what_is_told_is_noted_and_what_is_taken_back_forgotten() {
        let mut list = List::default();
        note(&mut list, 0, group("/group"));
        note(&mut list, 0, Order::Remove(socket(None)));
        note(&mut list, 0, Order::Remove(Thing::Directory("/dir".into())));
        note(&mut list, 0, Order::Forget("/dir".into()));
        note(&mut list, 0, Order::Remove(socket(Some((7, 8)))));
        assert_eq!(Order::parse(b"short"), None);
        assert_eq!(list.jails[&0].things, [Thing::Group("/group".into()), socket(Some((7, 8)))]);
    }

    #[test]
    fn what_is_over_is_removed_told_and_forgotten_and_the_rest_stays() {
        let dir = tempfile::tempdir().unwrap();
        let mut list = List::default();
        let path = |jail: u64| dir.path().join(jail.to_string());
        for jail in 0..1000 {
            // An empty directory goes as a control group does.
            fs::create_dir(path(jail)).unwrap();
            note(&mut list, jail, Order::Remove(Thing::Group(path(jail))));
            if jail % 2 == 1 {
                note(&mut list, jail, Order::Over);
            }
        }
        // Nobody hears it yet.
        let now = Instant::now();
        list.clean_over(now, |_| false);
        assert_eq!((list.jails.len(), list.over.len()), (1000, 500));
        list.clean_over(now, |_| true);
        assert_eq!((list.jails.len(), list.over.len()), (1000, 500), "too early");
        list.clean_over(now + PAUSE, |_| true);
        assert_eq!((list.jails.len(), list.over.len()), (500, 0));
        assert!((0..1000).all(|jail| path(jail).exists() == (jail % 2 == 0)));
    }

    #[test]
    fn what_belongs_to_others_stays() {
        let dir = tempfile::tempdir().unwrap();
        let (file, full) = (dir.path().join("file"), dir.path().join("full"));
        fs::write(&file, "").unwrap();
        fs::create_dir(&full).unwrap();
        fs::write(full.join("theirs"), "").unwrap();
        assert!(clean(vec![
            Thing::Socket(file.clone(), Some((0, 1))),
            Thing::Directory(full.clone()),
            Thing::Directory(dir.path().join("never made")),
        ]));
        assert!(file.exists() && full.exists());
        let inode = file.metadata().unwrap();
        assert!(clean(vec![Thing::Socket(file.clone(), Some((inode.dev(), inode.ino())))]));
        assert!(!file.exists());
    }
}
