//! The handler of the signal that a forbidden call raises, and its registration. The part of [`super`] that may be unsafe.

use std::arch::asm;
use std::ffi::{c_int, c_void};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{IntoRawFd, OwnedFd};
use std::sync::atomic::{AtomicI32, Ordering};

use super::Report;

/// Where the handler writes.
static REPORT: AtomicI32 = AtomicI32::new(-1);

/// Status of a process that made a forbidden call, as shells give it for SIGSYS.
const EXIT_FORBIDDEN: i32 = 128 + libc::SIGSYS;

/// `siginfo_t` of SIGSYS (asm-generic/siginfo.h), which libc has no names for.
#[repr(C)]
struct SigsysInfo {
    signal: c_int,
    /// The data of the filter.
    errno: c_int,
    code: c_int,
    _padding: c_int,
    _call_address: u64,
    call: c_int,
    architecture: u32,
}

/// Has a forbidden call of any thread reported to `report` before it ends the process.
///
/// # Errors
/// sigaction(2).
pub fn handle_sigsys(report: OwnedFd) -> io::Result<()> {
    // For as long as the process lives.
    REPORT.store(report.into_raw_fd(), Ordering::Relaxed);
    let handler: extern "C" fn(c_int, *const SigsysInfo, *const c_void) -> ! = end;
    // SAFETY: all fields of `action` may be zero; the mask is initialised by sigfillset. The handler has the signature that
    // SA_SIGINFO asks for and does only what a handler may.
    let result = unsafe {
        let mut action: libc::sigaction = MaybeUninit::zeroed().assume_init();
        action.sa_sigaction = handler as usize;
        action.sa_flags = libc::SA_SIGINFO;
        // Nothing interrupts it; a second SIGSYS, while it is blocked, is one that kills.
        libc::sigfillset(&raw mut action.sa_mask);
        libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut())
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Reports the call and ends the process. One straight line without a lock, an allocation or a way back; should the report
/// fail, the end comes all the same.
extern "C" fn end(_: c_int, info: *const SigsysInfo, context: *const c_void) -> ! {
    let context = context.cast::<libc::ucontext_t>();
    // SAFETY: the kernel passes both to a handler with SA_SIGINFO, valid until it returns.
    let (info, registers) = unsafe { (&*info, &(*context).uc_mcontext.gregs) };
    let argument = |register: c_int| registers[register as usize] as u64;
    let report = Report {
        thread: info.errno,
        code: info.code,
        call: info.call,
        architecture: info.architecture,
        arguments: [libc::REG_RDI, libc::REG_RSI, libc::REG_RDX].map(argument),
    };
    // SAFETY: write(2) reads the report, which lives, and exit_group(2) does not return.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") libc::SYS_write => _,
            in("rdi") i64::from(REPORT.load(Ordering::Relaxed)),
            in("rsi") &raw const report,
            in("rdx") size_of::<Report>(),
            lateout("rcx") _, lateout("r11") _,
            options(nostack),
        );
        asm!(
            "syscall",
            "ud2",
            in("rax") libc::SYS_exit_group,
            in("rdi") EXIT_FORBIDDEN,
            options(noreturn, nostack),
        );
    }
}
