//! Tries to reach the network, to use more than is allowed, and to find what the caller left.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::Path;

use jailer::{CgroupPlan, End, Jail, Network, ResourceLimit};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketType};
use rustix::process::Signal;

use super::{check, machine, program, try_in, try_without_jail, works_in};
use crate::harness::runner::tests;
use crate::harness::{memory_setting, new_id, not_run, pause, probe, raw, swap_setting};

tests! {
    Root there_is_no_network,
    Nobody there_is_no_network_for_nobody,
    Root abstract_sockets_of_a_shared_network_are_out_of_reach,
    Root shared_memory_of_others_is_out_of_reach,
    Nobody shared_memory_of_others_is_out_of_reach_for_nobody,
    Root a_fork_bomb_meets_the_limit_and_is_removed,
    Root memory_over_the_limit_ends_the_process,
    Root descriptors_end_at_the_limit,
    Nobody descriptors_end_at_the_limit_for_nobody,
    Root what_the_caller_has_open_or_in_its_environment_stays_outside,
    Nobody what_a_caller_who_is_nobody_has_open_or_in_its_environment_stays_outside,
    Root keys_of_the_callers_session_stay_outside,
    Nobody keys_of_the_session_of_a_caller_who_is_nobody_stay_outside,
}

fn check_network() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    // Landlock forbids it if it knows of TCP (since version 4, Linux 6.7); otherwise there is nobody to reach and to be
    // reached by.
    const TCP: i64 = 4;
    let knows_tcp = raw::landlock_version() >= TCP;
    let to_connect = if knows_tcp { Errno::ACCESS } else { Errno::NETUNREACH };
    let jails = [(machine(), to_connect), (program(), Errno::NETUNREACH)];
    check("connect", &|| TcpStream::connect(address).map(drop), jails);
    let jails = knows_tcp.then_some((machine(), Errno::ACCESS));
    check("listen", &|| TcpListener::bind("127.0.0.1:0").map(drop), jails);
    let name = SocketAddr::from_abstract_name(new_id()).unwrap();
    let _listener = UnixListener::bind_addr(&name).unwrap();
    let jails = [(machine(), Errno::CONNREFUSED), (program(), Errno::CONNREFUSED)];
    check("connect to an abstract socket", &|| UnixStream::connect_addr(&name).map(drop), jails);
}

fn there_is_no_network() {
    check_network();
    for (family, kind) in
        [(AddressFamily::INET, SocketType::RAW), (AddressFamily::PACKET, SocketType::RAW)]
    {
        let protocol = (family == AddressFamily::INET).then_some(rustix::net::ipproto::ICMP);
        let attempt = || Ok(rustix::net::socket(family, kind, protocol).map(drop)?);
        let jails = [(machine(), Errno::PERM), (program(), Errno::PERM)];
        check("make a raw socket", &attempt, jails);
    }
}

fn there_is_no_network_for_nobody() {
    check_network();
}

fn abstract_sockets_of_a_shared_network_are_out_of_reach() {
    const SCOPES: i64 = 6;
    if raw::landlock_version() < SCOPES {
        return not_run(
            "this kernel's Landlock does not keep abstract sockets out; it takes Linux 6.12",
        );
    }
    let name = SocketAddr::from_abstract_name(new_id()).unwrap();
    let _listener = UnixListener::bind_addr(&name).unwrap();
    let ours = || Network::open(Path::new("/proc/self/ns/net")).unwrap();
    let attempt = || UnixStream::connect_addr(&name).map(drop);
    check(
        "connect to an abstract socket",
        &attempt,
        [
            (Jail { network: ours(), ..machine() }, Errno::PERM),
            (Jail { network: ours(), ..program() }, Errno::PERM),
        ],
    );
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let attempt = || TcpStream::connect(address).map(drop);
    check("connect", &attempt, [(Jail { network: ours(), ..machine() }, Errno::ACCESS)]);
    works_in(
        "connect in a network that is joined",
        Jail { network: ours(), ..program() },
        &attempt,
    );
}

fn check_shared_memory() {
    let memory = raw::SharedMemory::new();
    let jails = [(machine(), Errno::NOENT), (program(), Errno::NOENT)];
    check("find shared memory", &|| memory.find(), jails);
}

fn shared_memory_of_others_is_out_of_reach() {
    check_shared_memory();
}

fn shared_memory_of_others_is_out_of_reach_for_nobody() {
    check_shared_memory();
}

fn a_fork_bomb_meets_the_limit_and_is_removed() {
    const CHILDREN: usize = 40;
    const MOST: u64 = 20;
    // Whoever lives holds the pipe.
    let (alive, held) = rustix::pipe::pipe().unwrap();
    let attempt = || {
        for _ in 0..CHILDREN {
            rustix::io::write(rustix::stdio::stdin(), b"x")?;
            raw::fork(|| pause())?;
        }
        Ok(())
    };
    // The standard descriptors are the ones that a jailed process keeps.
    rustix::stdio::dup2_stdin(&held).unwrap();
    drop(held);
    let without = {
        let attempt = || {
            rustix::process::setsid()?;
            let result = attempt();
            // Whoever has forked is not waited for: it ends with all its group.
            rustix::process::kill_process_group(rustix::process::getpid(), Signal::TERM)?;
            result
        };
        try_without_jail(&attempt)
    };
    assert_eq!(without, -1, "without a jail there is room for all, and they end by a signal");
    let mut bytes = [0; 256];
    assert_eq!(rustix::io::read(&alive, &mut bytes).unwrap(), CHILDREN);
    for jail in [machine(), program()] {
        let cgroup = CgroupPlan { pids: Some(MOST), ..CgroupPlan::default() };
        let end = try_in(Jail { cgroup, ..jail }, &attempt);
        assert!(
            matches!(end, End::Exited(status) if i32::from(status) == Errno::AGAIN.raw_os_error()),
            "{end:?}"
        );
        // Itself, and one more try than there is room for.
        assert_eq!(rustix::io::read(&alive, &mut bytes).unwrap(), MOST as usize);
    }
    let null = File::open("/dev/null").unwrap();
    rustix::stdio::dup2_stdin(&null).unwrap();
    // The pipe's end comes when the last of them is dead.
    assert_eq!(rustix::io::read(&alive, &mut bytes).unwrap(), 0);
}

fn memory_over_the_limit_ends_the_process() {
    const LIMIT: u64 = 32 << 20;
    let attempt = |mib| {
        move || {
            drop(probe::eat(mib));
            Ok(())
        }
    };
    let limited = |jail: Jail, settings: Vec<&str>| Jail {
        cgroup: CgroupPlan {
            memory_bytes: Some(LIMIT),
            settings: settings.iter().map(|setting| setting.parse().unwrap()).collect(),
            ..CgroupPlan::default()
        },
        ..jail
    };
    assert_eq!(try_without_jail(&attempt(128)), 0);
    for jail in [machine, program] {
        works_in("use some memory", limited(jail(), vec![swap_setting()]), &attempt(8));
        let end = try_in(limited(jail(), vec![swap_setting()]), &attempt(128));
        assert!(matches!(end, End::OutOfMemory), "{end:?}");
    }
    // What the user says comes after the limit.
    let more = memory_setting(256 << 20);
    works_in("use what is allowed", limited(machine(), vec![&more]), &attempt(128));
}

fn check_descriptors() {
    const MOST: u64 = 32;
    let attempt = || {
        let copies = (0..MOST).map(|_| rustix::io::dup(rustix::stdio::stdin()));
        copies.collect::<Result<Vec<_>, _>>().map(drop).map_err(io::Error::from)
    };
    let limited = |jail: Jail| Jail { limits: vec![ResourceLimit::descriptors(MOST)], ..jail };
    check(
        "open descriptors",
        &attempt,
        [(limited(machine()), Errno::MFILE), (limited(program()), Errno::MFILE)],
    );
}

fn descriptors_end_at_the_limit() {
    check_descriptors();
}

fn descriptors_end_at_the_limit_for_nobody() {
    check_descriptors();
}

fn check_secrets() {
    let secret = File::open("/etc/passwd").unwrap();
    let secret = secret.as_raw_fd();
    let attempt =
        || rustix::io::fcntl_getfd(raw::borrow(secret)).map(drop).map_err(io::Error::from);
    check(
        "use a descriptor of the caller's",
        &attempt,
        [(machine(), Errno::BADF), (program(), Errno::BADF)],
    );
    // Of those that the way into the jail takes, one is left: for reports of forbidden calls.
    let _another = File::open("/etc/passwd").unwrap();
    let attempt = || {
        let is_open = |number: &i32| rustix::io::fcntl_getfd(raw::borrow(*number)).is_ok();
        let more = (3..256).filter(is_open).count();
        if more > 1 { Ok(()) } else { Err(Errno::BADF.into()) }
    };
    check(
        "find descriptors of the jail's makers",
        &attempt,
        [(machine(), Errno::BADF), (program(), Errno::BADF)],
    );
    let attempt = || match std::env::var_os("PATH") {
        Some(_) => Ok(()),
        None => Err(Errno::NOENT.into()),
    };
    check("read the environment", &attempt, [(machine(), Errno::NOENT), (program(), Errno::NOENT)]);
}

fn what_the_caller_has_open_or_in_its_environment_stays_outside() {
    check_secrets();
}

fn what_a_caller_who_is_nobody_has_open_or_in_its_environment_stays_outside() {
    check_secrets();
}

fn check_keys() {
    let name = CString::new(new_id()).unwrap();
    match raw::add_key_to_new_session(&name) {
        Err(error) if error.raw_os_error() == Some(Errno::NOSYS.raw_os_error()) => {
            return not_run("this kernel keeps no keys");
        }
        result => result.expect("add a key"),
    }
    check("find a key", &|| raw::find_key(&name), [(program(), Errno::NOKEY)]);
}

fn keys_of_the_callers_session_stay_outside() {
    check_keys();
}

fn keys_of_the_session_of_a_caller_who_is_nobody_stay_outside() {
    check_keys();
}
