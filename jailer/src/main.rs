//! The `jailer` program: runs any command line in a jail. Flags become a [`Jail`]; everything else is the library's.

#![forbid(unsafe_code)]

use std::error::Error;
use std::ffi::{CString, OsString};
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStringExt;
use std::path::{Component, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use jailer::cgroup::Setting;
use jailer::daemon::{self, Front, Readiness, Side};
use jailer::{
    CgroupPlan, End, Id, Jail, Mount, Network, Program, ResourceLimit, Root, User, chroot,
};

/// Exit status for wrong usage and for a host that refused a step.
const REFUSED: u8 = 2;

/// A command that was ended by a signal has this and the signal's number for an exit status, as in a shell.
const KILLED: u8 = 128;

// Each paragraph in one line: clap wraps it where the terminal ends.
const EXAMPLES: &str = "\
Examples:
  A static program that sees no file of the host but /dev/kvm:
    jailer --id vm1 --uid nobody --gid kvm --bind /dev/kvm -- ./monitor --flag

  At most 64 processes and 256 MiB, all of which end with the command:
    jailer --id vm1 --new-pid-ns --cgroup pids.max=64 --cgroup memory.max=268435456 -- ./monitor
  (memory.limit_in_bytes on hosts with control groups of version 1)

  A program with its own files, which are in /srv/jail/monitor/vm1/root:
    jailer --id vm1 --uid vm --chroot-base-dir /srv/jail -- /usr/bin/monitor

  In the background, and its end:
    pid=$(jailer --id vm1 --daemonize -- ./monitor)
    kill $pid

The command gets an empty environment and standard input, output and error, nothing else. It must be linked statically \
unless its root has its loader and libraries. It is handed SIGINT, SIGTERM, SIGHUP and SIGUSR1, and dies with the jailer; what it \
has started dies with it if there is --new-pid-ns or --cgroup. What was made for the jail is removed in the end, whoever \
is killed, but for files that the command left in its root.

Without root, the jail is in a user namespace: there is no --uid and no --netns, --bind takes no directory in which \
something else is mounted, and --new-pid-ns is implied.

Exit status: that of the command; 128+N if signal N ended it; 2 with one line that starts with \"jailer:\" for wrong \
usage or if a step was refused, and then nothing is left of the others. With --daemonize: 0 when the command runs, or 2.";

/// Runs a command in a jail: namespaces, a root of its own, a control group, limits, no rights
#[derive(Debug, Parser)]
#[command(name = "jailer", version, after_help = EXAMPLES)]
struct Arguments {
    /// Name of the jail: its control group, its host name, its directory
    #[arg(long, value_name = "ID")]
    id: Id,

    /// User of the command: a name, a number, or +NUMBER for one without a name [default: nobody]
    #[arg(long, value_name = "USER")]
    uid: Option<String>,

    /// Group of the command [default: the user's]
    #[arg(long, value_name = "GROUP", requires = "uid")]
    gid: Option<String>,

    /// Make DIR/COMMAND/ID/root the root, and the directory too if it is not there [default: an empty, read-only root]
    #[arg(long, value_name = "DIR")]
    chroot_base_dir: Option<PathBuf>,

    /// Show this file, device or directory of the host at the same path; may be repeated
    #[arg(long, value_name = "PATH", value_parser = shown)]
    bind: Vec<Mount>,

    /// Write VALUE to FILE of the jail's control group, such as pids.max=64; may be repeated [default: no group]
    #[arg(long, value_name = "FILE=VALUE")]
    cgroup: Vec<Setting>,

    /// Make the control group in this one, a path below each hierarchy's top [default: the one that this process is in]
    #[arg(long, value_name = "PATH", requires = "cgroup")]
    parent_cgroup: Option<PathBuf>,

    /// Limit a resource: no-file=NUMBER or fsize=BYTES; may be repeated
    #[arg(long, value_name = "NAME=VALUE")]
    resource_limit: Vec<ResourceLimit>,

    /// Join this network namespace instead of a new, empty one
    #[arg(long, value_name = "PATH")]
    netns: Option<PathBuf>,

    /// Let the command see no processes but its own
    #[arg(long)]
    new_pid_ns: bool,

    /// Print the number of a supervisor and return as soon as the command runs. SIGTERM to the supervisor ends it
    #[arg(long)]
    daemonize: bool,

    /// The command and its arguments. Without a slash it is looked for in PATH
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        // Help and version.
        Err(error) if !error.use_stderr() => error.exit(),
        Err(error) => {
            eprintln!("jailer: {}; see jailer --help", in_one_line(&error.to_string()));
            return REFUSED.into();
        }
    };
    status(start(&arguments)).into()
}

/// The exit status; an error is told in one line first.
fn status(result: Result<u8, Box<dyn Error>>) -> u8 {
    result.unwrap_or_else(|error| {
        let mut line = error.to_string();
        let mut source = error.source();
        while let Some(error) = source {
            line = format!("{line}: {error}");
            source = error.source();
        }
        let _ = writeln!(std::io::stderr(), "jailer: {line}");
        REFUSED
    })
}

/// Does what the command line says, here or in the background.
fn start(arguments: &Arguments) -> Result<u8, Box<dyn Error>> {
    let program = Program::find(&arguments.command[0], std::env::var_os("PATH").as_deref())?;
    let jail = jail(arguments, &program)?;
    program.check_loader(&jail.root, &jail.mounts)?;
    if !arguments.daemonize {
        return run(jail, program, arguments, None);
    }
    match daemon::detach().map_err(|error| format!("detach: {error}"))? {
        Side::Front(front) => report(&front),
        Side::Supervisor(readiness) => run(jail, program, arguments, Some(readiness)),
    }
}

/// The jail that the flags ask for.
fn jail(arguments: &Arguments, program: &Program) -> Result<Jail, Box<dyn Error>> {
    let Arguments { id, uid, gid, netns, .. } = arguments;
    Ok(Jail {
        id: id.clone(),
        user: match uid {
            Some(user) => Some(User::find(user, gid.as_deref())?),
            None => None,
        },
        network: match netns {
            Some(path) => Network::open(path)?,
            None => Network::New,
        },
        new_pid_namespace: arguments.new_pid_ns,
        root: match &arguments.chroot_base_dir {
            Some(base) => {
                let own = base.join(program.name()).join(id.as_str()).join("root");
                Root::Directory(std::path::absolute(own)?)
            }
            None => Root::Empty,
        },
        mounts: arguments.bind.clone(),
        cgroup: CgroupPlan {
            settings: arguments.cgroup.clone(),
            parent: arguments.parent_cgroup.clone(),
            ..CgroupPlan::default()
        },
        limits: [&[ResourceLimit::NO_CORE][..], &arguments.resource_limit].concat(),
        runs_a_program: true,
    })
}

/// Runs `program` in `jail` and waits for its end.
fn run(
    jail: Jail,
    program: Program,
    arguments: &Arguments,
    readiness: Option<Readiness>,
) -> Result<u8, Box<dyn Error>> {
    let words: Vec<CString> = arguments
        .command
        .iter()
        .map(|word| CString::new(word.clone().into_vec()))
        .collect::<Result<_, _>>()?;
    let (root, mounts) = (jail.root.clone(), jail.mounts.clone());
    let prepared = jail.prepare()?;
    for lack in prepared.lacks() {
        eprintln!("jailer: the jail is weaker than it should be: {lack}");
    }
    if let Root::Directory(dir) = &root {
        let owner = prepared.user();
        chroot::make(dir, &mounts, owner, prepared.janitor())?;
    }
    let end = prepared.run(
        (program, readiness),
        |(program, readiness)| {
            let front = readiness.iter().flat_map(Readiness::descriptors);
            [program.as_fd()].into_iter().chain(front).collect()
        },
        |(program, readiness), entered| {
            let execute = || -> Result<u8, Box<dyn Error>> {
                let inside = entered?;
                if let Some(readiness) = &readiness {
                    readiness.executing().map_err(|error| format!("tell the front: {error}"))?;
                }
                let error = inside.execute(program.as_fd(), &words);
                readiness.iter().for_each(Readiness::failed);
                Err(format!("execute {:?} in the jail: {error}", program.path()).into())
            };
            status(execute())
        },
    )?;
    Ok(exit_status(&end))
}

/// The command's exit status, or what stands for it.
fn exit_status(end: &End) -> u8 {
    match end {
        End::Exited(status) => *status,
        End::Forbidden(violation) => {
            eprintln!("jailer: the command made a forbidden system call: {violation}");
            REFUSED
        }
        End::OutOfMemory => {
            eprintln!(
                "jailer: the command was killed by signal 9: it used more memory than its control group may"
            );
            KILLED + 9
        }
        End::Killed(signal) => {
            eprintln!("jailer: the command was killed by signal {signal}");
            KILLED.saturating_add(*signal as u8)
        }
    }
}

/// The front's part of `--daemonize`.
fn report(front: &Front) -> Result<u8, Box<dyn Error>> {
    match front.wait()? {
        None => Ok(REFUSED),
        Some(supervisor) => match writeln!(std::io::stdout(), "{supervisor}") {
            Ok(()) => Ok(0),
            Err(error) => {
                // A jail that nobody knows how to end.
                front.give_up();
                Err(format!("print the supervisor's number: {error}").into())
            }
        },
    }
}

/// Reads the value of `--bind`.
fn shown(path: &str) -> Result<Mount, &'static str> {
    let path = PathBuf::from(path);
    let is_plain = path.components().skip(1).all(|part| matches!(part, Component::Normal(_)));
    if !path.is_absolute() || !is_plain || path.parent().is_none() {
        return Err("it has to be an absolute path without .., and not / itself");
    }
    Ok(Mount { source: path.clone(), target: path, read_only: false })
}

/// What clap says, without the label in front and the usage behind.
fn in_one_line(message: &str) -> String {
    let paragraphs = message
        .split("\n\n")
        .map(|paragraph| paragraph.lines().map(str::trim).collect::<Vec<_>>().join(" "))
        .take_while(|text| !text.starts_with("Usage:") && !text.starts_with("For more"));
    let text = paragraphs.collect::<Vec<_>>().join("; ");
    text.strip_prefix("error: ").unwrap_or(&text).to_owned()
}
