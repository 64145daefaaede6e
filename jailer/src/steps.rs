//! What makes a process a jailed one, step by step. The order is the content: each step relies on those before it.

use std::borrow::Cow;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, Scope,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{DumpableBehavior, Signal};
use rustix::thread::{CapabilitySet, CapabilitySets, Gid, Uid};

use crate::cgroup::Cgroup;
use crate::jail::Jail;
use crate::janitor::Janitor;
use crate::network::{self, Network};
use crate::user::User;
use crate::{root, sys};

/// A step that the kernel refused.
#[derive(Debug, thiserror::Error)]
#[error("jail: {step}")]
pub struct StepError {
    step: Cow<'static, str>,
    source: io::Error,
}

/// For `map_err`: names the step.
pub(crate) fn step<E: Into<io::Error>>(
    step: impl Into<Cow<'static, str>>,
) -> impl FnOnce(E) -> StepError {
    move |error| StepError { step: step.into(), source: error.into() }
}

/// What a process has in hand on its way into a jail.
pub(crate) struct Entrance<'a> {
    pub jail: &'a Jail,
    pub cgroup: Option<&'a Cgroup>,
    pub janitor: &'a Janitor,
    /// The process is root in a new user namespace instead of on the host. The first byte says that the caller has done its
    /// part.
    pub rootless: Option<BorrowedFd<'a>>,
    /// What the process works with later.
    pub kept: &'a [BorrowedFd<'a>],
}

/// Takes this process into the jail. It was born in the new namespaces (and in the control group, if that is of version 2)
/// and has one thread; when this returns it may no longer do anything but work with the descriptors that it has.
pub(crate) fn confine(entrance: &Entrance<'_>) -> Result<(), StepError> {
    let Entrance { jail, cgroup, janitor, rootless, kept } = *entrance;
    // 1. Descriptors first: the caller's may lead anywhere, and the janitor must see the caller's end of its orders close.
    let mut descriptors = janitor.descriptors().to_vec();
    descriptors.extend(rootless);
    descriptors.extend(cgroup.iter().flat_map(|cgroup| cgroup.entries()));
    descriptors.extend(jail.network.descriptor());
    sys::close_all_but(&[kept, &descriptors].concat());
    // 2. In a new user namespace nothing is allowed before the caller has said who is who.
    if let Some(caller) = rootless {
        rustix::io::read(caller, &mut [0]).map_err(step("wait for the user namespace"))?;
    }
    // 3. Away from the caller's terminal: its signals are for the caller, who hands them on, and nobody in here types into it.
    rustix::process::setsid().map_err(step("leave the caller's session"))?;
    // 4. Limits from here on.
    cgroup.map_or(Ok(()), Cgroup::join).map_err(step("join the control group"))?;
    // 5. Limits of the process itself.
    for limit in &jail.limits {
        limit.set().map_err(step(format!("limit {limit}")))?;
    }
    // 6. The environment may hold secrets.
    sys::wipe_environment();
    //    And so may keys that the caller has. Who runs no program may not ask for them.
    if jail.runs_a_program {
        sys::leave_keyrings().map_err(step("leave the caller's keys"))?;
    }
    // 7. No program that it starts can have more rights than it. While it still has the right to say so.
    sys::drop_bounding_set().map_err(step("drop the bounding set"))?;
    // 8. No network, or the one that was asked for; nobody else's shared memory. A janitor of this jail alone has had all the
    //    time until here to make these namespaces; with another one this process was born in them.
    janitor.join_namespaces().map_err(step("make namespaces"))?;
    if let Network::Join(namespace) = &jail.network {
        network::join(namespace.as_fd()).map_err(step("join the network namespace"))?;
    }
    // 9. No files of the host.
    root::enter(&jail.root, &jail.mounts)?;
    // 10. A name of its own, so that the host's does not tell where this is.
    rustix::system::sethostname(jail.id.as_str().as_bytes()).map_err(step("set the host name"))?;
    // 11. No rights: groups before the group, the group before the user, and what capabilities are left at last.
    give_up_rights(jail, rootless.is_some())?;
    // 12. Programs that would give rights do not. The filters and Landlock need it as well.
    rustix::thread::set_no_new_privs(true).map_err(step("set no_new_privs"))?;
    // 13. Die with the caller. After the change of user, which would undo it; should the caller have died before, its end
    //     of the pipe is closed.
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(step("die with the caller"))?;
    caller_lives(janitor.life_of_caller()).map_err(step("die with the caller"))?;
    // 14. Landlock, as far as this kernel has it.
    restrict_by_landlock(jail.runs_a_program)?;
    // 15. Of the descriptors, what the process works with is left.
    sys::close_all_but(kept);
    Ok(())
}

fn give_up_rights(jail: &Jail, rootless: bool) -> Result<(), StepError> {
    // In a user namespace of its own the process is nobody already, and may not drop groups.
    if !rootless {
        let User { uid, gid } = jail.user.unwrap_or(User::NOBODY);
        rustix::thread::set_thread_groups(&[]).map_err(step("drop supplementary groups"))?;
        let group = Gid::from_raw(gid);
        rustix::thread::set_thread_res_gid(group, group, group)
            .map_err(step(format!("become group {gid}")))?;
        let user = Uid::from_raw(uid);
        rustix::thread::set_thread_res_uid(user, user, user)
            .map_err(step(format!("become user {uid}")))?;
        // A change of user says so already, unless the host hands such dumps to a program (fs.suid_dumpable=2): it would get
        // the guest's memory. (Without root the user may look into a process of his own.)
        rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
            .map_err(step("forbid dumps"))?;
    }
    let none = CapabilitySet::empty();
    rustix::thread::clear_ambient_capability_set().map_err(step("drop capabilities"))?;
    rustix::thread::set_capabilities(
        None,
        CapabilitySets { effective: none, permitted: none, inheritable: none },
    )
    .map_err(step("drop capabilities"))
}

/// An error if the caller is dead.
fn caller_lives(caller: BorrowedFd<'_>) -> io::Result<()> {
    let mut ends = [PollFd::new(&caller, PollFlags::empty())];
    poll(&mut ends, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))?;
    match ends[0].revents().contains(PollFlags::HUP) {
        true => Err(Errno::SRCH.into()),
        false => Ok(()),
    }
}

/// No file may be opened (unless the process is to run a program), no TCP port bound or connected, no process outside
/// signalled, no abstract socket of others reached.
fn restrict_by_landlock(runs_a_program: bool) -> Result<(), StepError> {
    let attempt = || -> Result<(), landlock::RulesetError> {
        let mut rules = Ruleset::default().set_compatibility(CompatLevel::BestEffort);
        if !runs_a_program {
            rules = rules.handle_access(AccessFs::from_all(ABI::V5))?;
            rules = rules.handle_access(AccessNet::from_all(ABI::V4))?;
        }
        rules.scope(Scope::from_all(ABI::V6))?.create()?.restrict_self()?;
        Ok(())
    };
    attempt().map_err(|error| step("restrict by Landlock")(io::Error::other(error.to_string())))
}
