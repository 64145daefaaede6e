//! What tests run inside of jails: a static program that looks around, waits, or dies.

use std::ffi::CStr;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::process::ExitCode;

use rustix::io::Errno;
use rustix::process::{Pid, Signal};

use super::{pause, raw};

/// The one argument with which the probe says by its exit status whether it is root: 0, or else EPERM.
pub const AM_I_ROOT: &CStr = c"--am-i-root";

/// The one argument with which the probe does nothing and succeeds.
pub const NOTHING: &CStr = c"--nothing";

/// See [`AM_I_ROOT`].
pub fn am_i_root() -> ExitCode {
    match rustix::process::geteuid().is_root() {
        true => ExitCode::SUCCESS,
        false => (Errno::PERM.raw_os_error() as u8).into(),
    }
}

/// The name of the jail is the first argument, so that the process can be found by it; the probe itself does not use it.
pub fn main(_id: &str, what: &[&str]) -> ExitCode {
    match what {
        ["exit", status] => return status.parse::<u8>().expect("a status").into(),
        ["look"] => look(),
        ["descriptors"] => say(&descriptors()),
        ["write", path] => std::fs::write(path, "written").expect("write a file"),
        ["read", path] => say(std::fs::read_to_string(path).expect("read a file").trim_end()),
        ["link", path] => say(&std::fs::read_link(path).expect("read a link").to_string_lossy()),
        ["list", path] => list(path),
        ["wait"] => wait(),
        ["wait-with-child"] => {
            raw::fork(|| pause()).expect("fork");
            wait();
        }
        ["catch"] => catch(),
        ["ignore-children", program, arguments @ ..] => {
            raw::ignore(Signal::CHILD);
            panic!("{}", std::process::Command::new(program).args(arguments.iter()).exec());
        }
        ["kill-self", signal] => {
            let signal = signal.parse().ok().and_then(Signal::from_named_raw).expect("a signal");
            rustix::process::kill_process(rustix::process::getpid(), signal).expect("kill");
            wait();
        }
        ["eat", mib] => drop(eat(mib.parse().expect("a size"))),
        _ => panic!("no such probe: {what:?}"),
    }
    ExitCode::SUCCESS
}

fn say(line: &str) {
    let mut stdout = std::io::stdout();
    writeln!(stdout, "{line}").expect("write to stdout");
    stdout.flush().expect("write to stdout");
}

fn look() {
    use rustix::process;
    let parent = process::getppid().map_or(0, Pid::as_raw_pid);
    say(&format!("pid {}", process::getpid().as_raw_pid()));
    say(&format!("parent {parent}"));
    say(&format!("session leader {}", process::getsid(None).ok() == Some(process::getpid())));
    say(&format!("user {} {}", process::getuid().as_raw(), process::geteuid().as_raw()));
    say(&format!("group {} {}", process::getgid().as_raw(), process::getegid().as_raw()));
    say(&format!("groups {}", process::getgroups().expect("ask for groups").len()));
    say(&format!("host {}", rustix::system::uname().nodename().to_string_lossy()));
    say(&format!("environment {}", std::env::vars_os().count()));
    say(&format!("privileges {}", !rustix::thread::no_new_privs().expect("ask")));
    let capabilities = rustix::thread::capabilities(None).expect("ask for capabilities");
    say(&format!("capabilities {}", (capabilities.permitted | capabilities.effective).bits()));
    say(&format!("bounding {}", raw::count_bounding_set()));
    say(&format!("core {:?}", process::getrlimit(process::Resource::Core).maximum));
    say(&format!("files {:?}", process::getrlimit(process::Resource::Nofile).current));
    say(&format!("directory {}", std::env::current_dir().expect("ask").display()));
    list("/");
}

fn list(path: &str) {
    let mut names: Vec<String> = std::fs::read_dir(path)
        .expect("read a directory")
        .map(|entry| entry.expect("read a directory").file_name().into_string().unwrap())
        .collect();
    names.sort();
    say(&format!("{path} {names:?}"));
}

fn descriptors() -> String {
    let open = (0..256).filter(|number| rustix::io::fcntl_getfd(raw::borrow(*number)).is_ok());
    format!("{:?}", open.collect::<Vec<i32>>())
}

/// Says its number and waits with default actions for all signals.
fn wait() {
    say(&rustix::process::getpid().as_raw_pid().to_string());
    pause();
}

/// Takes signals one by one and says which; SIGTERM is the last one.
fn catch() {
    let signals = [Signal::INT, Signal::HUP, Signal::TERM];
    raw::block(&signals);
    say("waiting");
    loop {
        let signal = raw::wait_for(&signals);
        say(&format!("signal {signal}"));
        if signal == Signal::TERM.as_raw() {
            break;
        }
    }
}

/// Uses memory, page by page.
pub fn eat(mib: usize) -> Vec<u8> {
    let mut memory = vec![0_u8; mib << 20];
    memory.iter_mut().step_by(4096).for_each(|byte| *byte = 1);
    std::hint::black_box(memory)
}
