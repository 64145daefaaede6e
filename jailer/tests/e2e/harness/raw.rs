//! System calls that no crate of ours has a safe function for. The one place of these tests that is unsafe.

use std::ffi::CStr;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use rustix::process::{Pid, Signal};

/// A descriptor by its number, open or not.
pub fn borrow(number: RawFd) -> BorrowedFd<'static> {
    // SAFETY: it is used for calls that say EBADF if it is not open, and nobody here closes what others own.
    unsafe { BorrowedFd::borrow_raw(number) }
}

/// Makes a copy of this process that does `work` and ends with the status that this returns.
pub fn fork(work: impl FnOnce() -> i32) -> io::Result<Pid> {
    // SAFETY: each test is a process of its own with one thread, and so is a probe: the copy has all that it needs.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            let status = work();
            // SAFETY: ends the copy without running what the original has registered.
            unsafe { libc::_exit(status) }
        }
        pid => Ok(Pid::from_raw(pid).expect("a child has a number")),
    }
}

/// Becomes the tracer of a process, which goes on (`PTRACE_SEIZE`).
pub fn seize(pid: Pid) -> io::Result<()> {
    // SAFETY: this request touches no memory of ours.
    check(unsafe { libc::ptrace(libc::PTRACE_SEIZE, pid.as_raw_pid(), 0, 0) })
}

/// Runs the program behind a descriptor in place of this one.
pub fn execute(program: &impl AsFd, argument: &CStr) -> io::Error {
    let arguments = [c"program".as_ptr(), argument.as_ptr(), std::ptr::null()];
    let environment: [*const libc::c_char; 1] = [std::ptr::null()];
    // SAFETY: both arrays end with a null pointer and live until the call is over, and so do the strings.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            program.as_fd().as_raw_fd(),
            c"".as_ptr(),
            arguments.as_ptr(),
            environment.as_ptr(),
            libc::AT_EMPTY_PATH,
        );
    }
    io::Error::last_os_error()
}

/// Gives this process, which has one thread, new namespaces.
pub fn unshare(flags: rustix::thread::UnshareFlags) -> io::Result<()> {
    // SAFETY: only the sharing of descriptors among threads would be dangerous, and there is one thread.
    Ok(unsafe { rustix::thread::unshare_unsafe(flags) }?)
}

/// Becomes this user.
pub fn become_user(uid: u32) -> io::Result<()> {
    // SAFETY: the call touches no memory.
    check(unsafe { libc::setresuid(uid, uid, uid) }.into())
}

/// How many capabilities a program could still get.
pub fn count_bounding_set() -> usize {
    // SAFETY: the request takes a number and touches no memory.
    let has = |number: &u64| unsafe { libc::prctl(libc::PR_CAPBSET_READ, *number, 0, 0, 0) } == 1;
    (0..64).filter(has).count()
}

/// Ignores a signal, as do programs that this process starts.
pub fn ignore(signal: Signal) {
    // SAFETY: ignoring a signal installs no handler.
    unsafe { libc::signal(signal.as_raw(), libc::SIG_IGN) };
}

/// Blocks signals, to be waited for.
pub fn block(signals: &[Signal]) {
    // SAFETY: the set is initialised before it is read; no handler is touched.
    unsafe { libc::sigprocmask(libc::SIG_BLOCK, &set(signals), std::ptr::null_mut()) };
}

/// Waits for one of these signals, which are blocked.
pub fn wait_for(signals: &[Signal]) -> i32 {
    let mut signal = 0;
    // SAFETY: the set is initialised, and `signal` is alive.
    let result = unsafe { libc::sigwait(&set(signals), &raw mut signal) };
    assert_eq!(result, 0, "sigwait");
    signal
}

fn set(signals: &[Signal]) -> libc::sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigemptyset initialises the set before it is used.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for signal in signals {
            libc::sigaddset(set.as_mut_ptr(), signal.as_raw());
        }
        set.assume_init()
    }
}

/// Gives this process a session's keyring of its own, with a key of this name in it.
pub fn add_key_to_new_session(name: &CStr) -> io::Result<()> {
    const JOIN_SESSION_KEYRING: libc::c_int = 1;
    const SESSION: libc::c_int = -3;
    let none = std::ptr::null::<libc::c_char>();
    let kind = c"user".as_ptr();
    // SAFETY: the kernel reads the strings and one byte, which live.
    unsafe {
        check(libc::syscall(libc::SYS_keyctl, JOIN_SESSION_KEYRING, none))?;
        check(libc::syscall(
            libc::SYS_add_key,
            kind,
            name.as_ptr(),
            c"x".as_ptr(),
            1_usize,
            SESSION,
        ))
    }
}

/// Looks for a key of this name in the keyrings of this process.
pub fn find_key(name: &CStr) -> io::Result<()> {
    let (kind, none) = (c"user".as_ptr(), std::ptr::null::<libc::c_char>());
    // SAFETY: the kernel reads the strings, which live.
    check(unsafe { libc::syscall(libc::SYS_request_key, kind, name.as_ptr(), none, 0) })
}

/// Shared memory that everybody may use who finds it by its key (shmget(2)).
pub struct SharedMemory {
    key: i32,
    number: i32,
}

impl SharedMemory {
    pub fn new() -> Self {
        let key = std::process::id() as i32;
        // SAFETY: makes memory that is mapped nowhere.
        let number = unsafe { libc::shmget(key, 4096, libc::IPC_CREAT | libc::IPC_EXCL | 0o666) };
        assert_ne!(number, -1, "make shared memory: {}", io::Error::last_os_error());
        Self { key, number }
    }

    pub fn find(&self) -> io::Result<()> {
        // SAFETY: finds memory and does not map it.
        check(i64::from(unsafe { libc::shmget(self.key, 4096, 0) }).min(0))
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        // SAFETY: nobody has it mapped.
        unsafe { libc::shmctl(self.number, libc::IPC_RMID, std::ptr::null_mut()) };
    }
}

/// Which version of Landlock this kernel has; 0 if it has none (landlock_create_ruleset(2)).
pub fn landlock_version() -> i64 {
    const VERSION: libc::c_long = 1;
    // SAFETY: with this flag the call takes no memory and returns a number.
    unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, 0_usize, 0_usize, VERSION) }.max(0)
}

/// Gives the loopback interface its address (netdevice(7)).
pub fn bring_up_loopback() -> io::Result<()> {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
    // SAFETY: all fields are integers and a union of such, for which zero is a value.
    let mut request: libc::ifreq = unsafe { MaybeUninit::zeroed().assume_init() };
    for (place, letter) in request.ifr_name.iter_mut().zip(*b"lo") {
        *place = letter as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
    // SAFETY: the kernel reads `request`, which is alive, and of the union the field that was written.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) }.into())
}

/// Waits until a terminal has sent everything that was written to stdout.
pub fn drain_stdout() {
    // SAFETY: the call touches no memory. Whoever is no terminal has nothing to wait for.
    unsafe { libc::tcdrain(libc::STDOUT_FILENO) };
}

fn check(result: i64) -> io::Result<()> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
