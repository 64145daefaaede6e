//! System calls that no crate of ours has a safe function for. The one module of this crate that may be unsafe, apart from
//! `seccomp::sys`.

use std::ffi::{CStr, c_char, c_int};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::io::Errno;
use rustix::mount::MountAttrFlags;
use rustix::process::Pid;
use rustix::thread::UnshareFlags;

/// `NS_GET_NSTYPE` (ioctl_nsfs(2)).
const NS_GET_NSTYPE: libc::c_ulong = 0xb703;

/// clone(2); libc's constant has too few bits.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// A child process: its number, and a descriptor that stays its own.
#[derive(Debug)]
pub(crate) struct Child {
    /// Its number in this process's namespace.
    pub pid: Pid,
    /// Its descriptor (pidfd_open(2)).
    pub pidfd: OwnedFd,
}

/// Makes a copy of this process, which must have one thread, with the namespaces of `flags` new (`CLONE_NEW…`) and in the
/// control group behind `cgroup`. `None` in the copy.
///
/// # Errors
/// clone3(2).
pub(crate) fn clone_process(
    flags: u64,
    cgroup: Option<BorrowedFd<'_>>,
) -> io::Result<Option<Child>> {
    let mut pidfd: c_int = -1;
    // SAFETY: all fields are integers, for which zero means "not wanted".
    let mut arguments: libc::clone_args = unsafe { MaybeUninit::zeroed().assume_init() };
    arguments.flags = flags | libc::CLONE_PIDFD as u64;
    arguments.pidfd = &raw mut pidfd as u64;
    arguments.exit_signal = libc::SIGCHLD as u64;
    if let Some(cgroup) = cgroup {
        arguments.flags |= CLONE_INTO_CGROUP;
        arguments.cgroup = cgroup.as_raw_fd() as u64;
    }
    // SAFETY: without CLONE_VM this is a fork: the copy has memory of its own, and all of it, since the caller keeps the
    // process single-threaded: no lock is held by a thread that the copy lacks. The kernel reads `arguments` and
    // writes `pidfd`, both alive. The C library's own record of the thread's number is stale in the copy; it looks at it
    // for nobody but other threads.
    let pid = unsafe {
        libc::syscall(libc::SYS_clone3, &raw mut arguments, size_of::<libc::clone_args>())
    };
    if pid < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(Pid::from_raw(pid as i32).map(|pid| {
        // SAFETY: the kernel has just made this descriptor for us, and nobody else knows of it.
        let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
        Child { pid, pidfd }
    }))
}

/// Gives this process, which must have one thread, namespaces of its own.
pub(crate) fn unshare(flags: UnshareFlags) -> rustix::io::Result<()> {
    // SAFETY: only the sharing of descriptors among threads would be dangerous, and there is one thread.
    unsafe { rustix::thread::unshare_unsafe(flags) }
}

/// Closes every descriptor but these.
pub(crate) fn close_all_but(kept: &[BorrowedFd<'_>]) {
    let mut numbers: Vec<u32> = kept.iter().map(|fd| fd.as_raw_fd() as u32).collect();
    numbers.sort_unstable();
    let mut first = 0;
    for number in numbers.into_iter().chain([u32::MAX]) {
        if first < number {
            // SAFETY: closes descriptors whose owners in this process are not used any more: the caller is a fresh copy
            // of a process, works with `kept` alone, and leaves without dropping what it had before.
            unsafe { libc::syscall(libc::SYS_close_range, first, number - 1, 0) };
        }
        first = number.saturating_add(1);
    }
}

/// Adds `attributes` to the mount behind `mount`, its descriptor. Those that it has stay.
pub(crate) fn set_mount_attributes(
    mount: &impl AsFd,
    attributes: MountAttrFlags,
) -> rustix::io::Result<()> {
    let change = libc::mount_attr {
        attr_set: attributes.bits().into(),
        attr_clr: 0,
        propagation: 0,
        userns_fd: 0,
    };
    // SAFETY: the kernel reads the empty string and `change`, both alive, and is told the size of the latter.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_fd().as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const change,
            size_of_val(&change),
        )
    };
    if result == 0 { Ok(()) } else { Err(last_errno()) }
}

fn last_errno() -> Errno {
    Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)
}

/// Blocks every signal that can be blocked.
pub(crate) fn block_all_signals() {
    // SAFETY: `set` is initialised by sigfillset before it is read; no handler is touched.
    unsafe {
        let mut set = MaybeUninit::uninit();
        libc::sigfillset(set.as_mut_ptr());
        libc::sigprocmask(libc::SIG_BLOCK, set.as_ptr(), std::ptr::null_mut());
    }
}

fn is_ignored(signal: c_int) -> bool {
    let mut action: MaybeUninit<libc::sigaction> = MaybeUninit::uninit();
    // SAFETY: the call changes nothing and writes `action`, unless it fails; then that is not looked at.
    unsafe {
        libc::sigaction(signal, std::ptr::null(), action.as_mut_ptr()) == 0
            && action.assume_init().sa_sigaction == libc::SIG_IGN
    }
}

/// Gives SIGCHLD its default action. Where it is ignored, a child's end cannot be waited for, and a process may be started so.
pub(crate) fn let_children_be_waited_for() {
    // SAFETY: a default action is no handler.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
}

/// Which signals were blocked at some time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SignalMask(libc::sigset_t);

impl SignalMask {
    /// Those that are blocked now, but for `signals`.
    pub fn now_without(signals: &[c_int]) -> Self {
        let mut now = MaybeUninit::uninit();
        // SAFETY: without a set the call changes nothing, and initialises `now`, which is read and changed after that.
        unsafe {
            libc::sigprocmask(libc::SIG_BLOCK, std::ptr::null(), now.as_mut_ptr());
            signals.iter().for_each(|signal| {
                libc::sigdelset(now.as_mut_ptr(), *signal);
            });
            Self(now.assume_init())
        }
    }

    /// Blocks these signals and no others in this thread.
    pub fn set(&self) {
        // SAFETY: the set came from sigprocmask.
        unsafe { libc::sigprocmask(libc::SIG_SETMASK, &raw const self.0, std::ptr::null_mut()) };
    }
}

/// Signals that a waiting process takes from a descriptor instead of being interrupted by them.
#[derive(Debug)]
pub struct SignalFd {
    fd: OwnedFd,
    /// How it was before.
    pub(crate) before: SignalMask,
}

impl SignalFd {
    /// Blocks `signals`, to be read from the descriptor, but for those that are ignored: whoever started this process (nohup(1),
    /// a shell's background) wants them to do nothing.
    ///
    /// # Errors
    /// signalfd(2).
    pub fn new(signals: &[c_int]) -> io::Result<Self> {
        let (mut set, mut before) = (MaybeUninit::uninit(), MaybeUninit::uninit());
        // SAFETY: `set` is initialised by sigemptyset before it is read, `before` by sigprocmask before `assume_init`.
        let (fd, before) = unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            for signal in signals.iter().filter(|signal| !is_ignored(**signal)) {
                libc::sigaddset(set.as_mut_ptr(), *signal);
            }
            libc::sigprocmask(libc::SIG_BLOCK, set.as_ptr(), before.as_mut_ptr());
            (libc::signalfd(-1, set.as_ptr(), libc::SFD_CLOEXEC), before.assume_init())
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made this descriptor for us.
        Ok(Self { fd: unsafe { OwnedFd::from_raw_fd(fd) }, before: SignalMask(before) })
    }

    /// Takes one signal; waits for it.
    ///
    /// # Errors
    /// read(2).
    pub fn take(&self) -> io::Result<c_int> {
        let mut bytes = [0; size_of::<libc::signalfd_siginfo>()];
        rustix::io::read(&self.fd, &mut bytes)?;
        // `ssi_signo` is the first field.
        Ok(c_int::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }
}

impl AsFd for SignalFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Stops this process, as SIGTSTP does by default.
pub(crate) fn stop_this_process() {
    // SAFETY: raise has no requirement.
    unsafe { libc::raise(libc::SIGSTOP) };
}

/// True if `file` is an open network namespace (ioctl_nsfs(2)).
pub(crate) fn is_network_namespace(file: &impl AsFd) -> bool {
    // Other files may know another request by this number.
    let is_namespace = rustix::fs::fstatfs(file).is_ok_and(|fs| fs.f_type == libc::NSFS_MAGIC);
    // SAFETY: this request takes no argument, touches no memory and returns a number.
    let kind = || unsafe { libc::ioctl(file.as_fd().as_raw_fd(), NS_GET_NSTYPE) };
    is_namespace && kind() == libc::CLONE_NEWNET
}

/// Overwrites the environment and forgets it: a copy of the caller has it in its memory. The process has one thread.
pub(crate) fn wipe_environment() {
    unsafe extern "C" {
        static mut environ: *mut *mut c_char;
    }
    // SAFETY: with one thread nobody else reads or changes the environment. It is an array of pointers to strings that ends
    // with a null pointer, both writable, and nobody holds a reference into it: the standard library copies what it reads.
    unsafe {
        let mut entry = environ;
        while !entry.is_null() && !(*entry).is_null() {
            let len = CStr::from_ptr(*entry).count_bytes();
            std::ptr::write_bytes(*entry, 0, len);
            entry = entry.add(1);
        }
        if !environ.is_null() {
            *environ = std::ptr::null_mut();
        }
    }
}

/// Leaves the session's keyring for an empty one: by the old one, its keys could be used whoever the process becomes
/// (session-keyring(7)).
///
/// # Errors
/// keyctl(2), such as EDQUOT.
pub(crate) fn leave_keyrings() -> io::Result<()> {
    /// linux/keyctl.h
    const KEYCTL_JOIN_SESSION_KEYRING: c_int = 1;
    let anonymous = std::ptr::null::<c_char>();
    // SAFETY: without a name the call reads no memory.
    if unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, anonymous) } >= 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        // The kernel has no keys, or a filter of the caller's forbids to use them: inside, too.
        Some(libc::ENOSYS | libc::EPERM) => Ok(()),
        _ => Err(error),
    }
}

/// Removes every capability from the bounding set, so that no program that this process starts can have one.
pub(crate) fn drop_bounding_set() -> io::Result<()> {
    /// The kernel's capability masks have 64 bits.
    const NUMBERS: u64 = 64;
    for capability in 0..NUMBERS {
        // SAFETY: the request takes a number and touches no memory.
        if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) } != 0 {
            let error = io::Error::last_os_error();
            return match error.raw_os_error() {
                // The kernel knows no capability of this number, nor of a higher one.
                Some(libc::EINVAL) if capability > 0 => Ok(()),
                _ => Err(error),
            };
        }
    }
    Ok(())
}

/// Runs the program behind `program` in place of this one, with an empty environment. SIGPIPE gets its default action, which
/// the standard library has taken from it before `main`.
///
/// # Errors
/// Why that failed; it does not return otherwise.
pub(crate) fn execute(program: BorrowedFd<'_>, arguments: &[std::ffi::CString]) -> io::Error {
    let mut pointers: Vec<*const c_char> = arguments.iter().map(|text| text.as_ptr()).collect();
    pointers.push(std::ptr::null());
    let environment: [*const c_char; 1] = [std::ptr::null()];
    // SAFETY: both arrays end with a null pointer and live until the call is over, and so do the strings. A default action is
    // no handler.
    unsafe {
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
        libc::syscall(
            libc::SYS_execveat,
            program.as_raw_fd(),
            c"".as_ptr(),
            pointers.as_ptr(),
            environment.as_ptr(),
            libc::AT_EMPTY_PATH,
        );
    }
    io::Error::last_os_error()
}

/// Which version of Landlock the kernel has; `None` if it has none, or does not use it (landlock_create_ruleset(2)).
pub fn landlock_version() -> Option<u32> {
    const VERSION: libc::c_ulong = 1 << 0;
    // SAFETY: with this flag the call reads nothing and makes nothing.
    let version = unsafe {
        libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<u8>(), 0_usize, VERSION)
    };
    u32::try_from(version).ok()
}
