//! The filters, tried on processes that make forbidden calls and allowed ones. Each is this program again, told by its
//! environment what to do in the one test that does it.

use std::arch::asm;
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus, Stdio};

use jailer::seccomp::{ThreadKind, Violation, catch_violations, restrict};

/// Says what the process does: the number of a kind of thread and a name.
const TASK: &str = "SECCOMP_TEST";

/// What a process does once it is restricted.
type Act = fn();

macro_rules! call {
    ($name:ident $(, $argument:expr)*) => {
        // SAFETY: a filter forbids the call, or its arguments lead nowhere.
        || { unsafe { libc::syscall(libc::$name $(, $argument as u64)*) }; }
    };
}

/// Calls that no thread may make, and what the report has to begin with.
const FORBIDDEN: &[(&str, Act)] = &[
    ("open(", call!(SYS_open, c"/".as_ptr(), 0)),
    ("openat(", call!(SYS_openat, libc::AT_FDCWD, c"/".as_ptr(), 0)),
    ("openat2(", call!(SYS_openat2, libc::AT_FDCWD, 0, 0, 0)),
    ("execve(", call!(SYS_execve, c"/bin/true".as_ptr(), 0, 0)),
    ("execveat(", call!(SYS_execveat, 0, c"".as_ptr(), 0, 0, libc::AT_EMPTY_PATH)),
    ("ptrace(", call!(SYS_ptrace, 0, 0, 0, 0)),
    ("process_vm_writev(", call!(SYS_process_vm_writev, 1, 0, 0, 0, 0, 0)),
    ("mount(", call!(SYS_mount, 0, 0, 0, 0, 0)),
    ("unshare(", call!(SYS_unshare, libc::CLONE_NEWUSER)),
    ("setns(", call!(SYS_setns, 0, 0)),
    ("socket(0x2,", call!(SYS_socket, libc::AF_INET, libc::SOCK_STREAM, 0)),
    ("socket(0x11,", call!(SYS_socket, libc::AF_PACKET, libc::SOCK_RAW, 0)),
    ("socket(0x1,", call!(SYS_socket, libc::AF_UNIX, libc::SOCK_DGRAM, 0)),
    ("fork(", call!(SYS_fork)),
    ("clone(0x11,", call!(SYS_clone, libc::SIGCHLD, 0, 0, 0, 0)),
    ("clone(0x10f00,", call!(SYS_clone, 0x10f00, 0, 0, 0, 0)),
    ("clone3(", call!(SYS_clone3, 0, 0)),
    ("kill(", call!(SYS_kill, 0, 0)),
    ("tgkill(", call!(SYS_tgkill, 1, 1, libc::SIGKILL)),
    ("mmap(", call!(SYS_mmap, 0, 4096, 7, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, !0, 0)),
    ("mmap(", call!(SYS_mmap, 0, 4096, 3, libc::MAP_SHARED, 0, 0)),
    ("mprotect(", call!(SYS_mprotect, 0, 0, libc::PROT_READ | libc::PROT_EXEC)),
    ("pkey_mprotect(", call!(SYS_pkey_mprotect, 0, 0, libc::PROT_EXEC, 0)),
    ("ioctl(0x0, 0x5412,", call!(SYS_ioctl, 0, libc::TIOCSTI, 0)),
    ("ioctl(0x0, 0xae01,", call!(SYS_ioctl, 0, 0xae01, 0)),
    ("prctl(", call!(SYS_prctl, libc::PR_GET_DUMPABLE)),
    ("seccomp(", call!(SYS_seccomp, 0, 0, 0)),
    ("rt_sigaction(", call!(SYS_rt_sigaction, libc::SIGSYS, 0, 0, 8)),
    ("memfd_create(", call!(SYS_memfd_create, c"".as_ptr(), 0)),
    ("bpf(", call!(SYS_bpf, 0, 0, 0)),
    ("io_uring_setup(", call!(SYS_io_uring_setup, 0, 0)),
    ("userfaultfd(", call!(SYS_userfaultfd, 0)),
    ("futex(", call!(SYS_futex, 0, libc::FUTEX_CMP_REQUEUE_PI, 0)),
    ("sendmsg(", call!(SYS_sendmsg, 0, 0, 0)),
    ("dup2(", call!(SYS_dup2, 0, 0)),
    ("x32 write(", x32_write),
];

fn x32_write() {
    // SAFETY: writes nothing.
    unsafe { libc::syscall(0x4000_0000 | libc::SYS_write, 1, 0, 0) };
}

/// getpid of the 32-bit interface.
fn call_of_i386() {
    // SAFETY: the call takes no argument and changes no register but the one that it returns in.
    unsafe {
        asm!("int 0x80", inlateout("eax") 20 => _, out("r8") _, out("r9") _, out("r10") _, out("r11") _)
    };
}

fn forbidden_with_the_signal_blocked() {
    let set = u64::MAX;
    // SAFETY: the kernel reads 8 bytes, which live.
    unsafe { libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_BLOCK, &raw const set, 0, 8) };
    x32_write();
}

/// What any thread may do.
fn allowed() {
    let word = 0u32;
    let wake = libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG;
    // SAFETY: the kernel looks for waiters at a word that lives, and nobody waits there; the other calls touch no memory.
    unsafe {
        assert_eq!(libc::syscall(libc::SYS_futex, &raw const word, wake, 1), 0);
        assert!(libc::syscall(libc::SYS_brk, 0) > 0);
        libc::write(-1, std::ptr::null(), 0);
        libc::_exit(7);
    }
}

const OTHERS: &[(&str, Act)] = &[
    ("i386", call_of_i386),
    ("blocked", forbidden_with_the_signal_blocked),
    ("allowed", allowed),
    ("abort", || std::process::abort()),
];

/// Not a test of its own: what the processes of the others do.
#[test]
fn process() {
    let Ok(task) = std::env::var(TASK) else { return };
    let words: Vec<_> = task.split(' ').collect();
    let (kind, index) = (words[0].parse::<usize>().unwrap(), words[1].parse::<usize>().unwrap());
    if words[2] == "caught" {
        catch_violations(rustix::io::dup(rustix::stdio::stdin()).unwrap()).unwrap();
    }
    let (_, act) = FORBIDDEN.iter().chain(OTHERS).nth(index).unwrap();
    if words[3] == "signal" {
        // SAFETY: raise has no requirement.
        unsafe { libc::raise(libc::SIGSYS) };
    }
    restrict(ThreadKind::ALL[kind]).unwrap();
    act();
    // Past a call that was to be forbidden.
    // SAFETY: ends the process.
    unsafe { libc::_exit(99) };
}

fn try_out(kind: ThreadKind, index: usize, how: &str) -> (ExitStatus, Option<Violation>) {
    let (reports, report) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    let status = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "process", "--nocapture"])
        .env(TASK, format!("{} {index} {how}", kind as usize))
        .stdin(Stdio::from(report))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .unwrap();
    (status, Violation::read(reports.as_fd()))
}

fn other(name: &str) -> usize {
    FORBIDDEN.len() + OTHERS.iter().position(|(other, _)| *other == name).unwrap()
}

#[test]
fn a_forbidden_call_ends_the_process_and_is_named_with_its_thread() {
    for kind in ThreadKind::ALL {
        for (index, (begin, _)) in FORBIDDEN.iter().enumerate() {
            let (status, violation) = try_out(kind, index, "caught quiet");
            let text = violation.map(|violation| violation.to_string()).unwrap_or_default();
            assert!(text.starts_with(begin), "{kind}: {begin} gave {text:?}, {status}");
            assert!(text.ends_with(&format!(" on {kind}")), "{text:?}");
            assert_eq!(status.code(), Some(128 + libc::SIGSYS), "{kind}: {begin}");
        }
    }
}

#[test]
fn a_call_of_the_32_bit_interface_ends_the_process() {
    for kind in ThreadKind::ALL {
        let (status, violation) = try_out(kind, other("i386"), "caught quiet");
        match violation {
            Some(violation) => {
                let text = violation.to_string();
                assert!(text.starts_with("call 20 of another architecture"), "{text:?}");
                assert_eq!(status.code(), Some(128 + libc::SIGSYS));
            }
            // A kernel without that interface.
            None => assert_eq!(status.signal(), Some(libc::SIGSEGV), "{status}"),
        }
    }
}

#[test]
fn without_the_handler_or_with_the_signal_blocked_the_kernel_kills() {
    for kind in ThreadKind::ALL {
        for (index, how) in [(0, "uncaught quiet"), (other("blocked"), "caught quiet")] {
            let (status, violation) = try_out(kind, index, how);
            assert_eq!(status.signal(), Some(libc::SIGSYS), "{kind}, {how}: {status}");
            assert_eq!(violation, None);
        }
    }
}

#[test]
fn allowed_calls_go_through_and_an_abort_is_one() {
    for kind in ThreadKind::ALL {
        let (status, violation) = try_out(kind, other("allowed"), "caught quiet");
        assert_eq!((status.code(), violation), (Some(7), None), "{kind}");
        let (status, violation) = try_out(kind, other("abort"), "caught quiet");
        assert_eq!((status.signal(), violation), (Some(libc::SIGABRT), None), "{kind}");
    }
}

#[test]
fn a_signal_that_somebody_sends_is_no_violation() {
    let (status, violation) = try_out(ThreadKind::Main, other("allowed"), "caught signal");
    assert_eq!((status.code(), violation), (Some(128 + libc::SIGSYS), None));
}
