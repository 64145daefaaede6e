//! `cleanslate doctor`: what this host is, and which known faults its KVM has.

use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::process;
use std::time::Duration;

use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::run::{PrintError, die_with};
use super::{Error, jail};
use crate::boot::Payload;
use crate::doctor::host::Host;
use crate::doctor::report::{Finding, Floor, Report, json, table};
use crate::doctor::vmcs_fields::Features;
use crate::doctor::{Behaviour, Judgement, Unseen, Verdict, runner, vmrun};
use crate::exit;
use crate::kvm;
use crate::kvm::bare::{InUse, launch_floor};
use crate::lifecycle::chain;
use crate::machine::{self, Config, Handle};

/// Look at this host: what its KVM can, and which known faults it has
///
/// Prints what matters of kernel, KVM and limits, with what each lack costs, how long the bare KVM calls of a launch take, and eight
/// behaviours of KVM that were wrong in some release: fixed, affected, or not to be told on this host. Each is tried in a process of
/// its own with a time limit. Nothing on the host changes.
#[derive(Debug, Args)]
#[command(after_help = "\
Exit status:
  0    no known fault was found
  1    affected by at least one
  2    wrong usage, or no usable KVM: what is known without it is printed all the same

Examples:
  cleanslate doctor
  cleanslate doctor --json")]
pub(super) struct Arguments {
    /// Print one JSON object instead of the table
    #[arg(long)]
    json: bool,

    /// How long each check may take, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    timeout: u64,

    /// Run the machine of one of the checks without a jail
    #[arg(long)]
    no_jail: bool,

    /// Be the process of this check
    #[arg(long, value_name = "NAME", value_parser = Task::parse, requires = "child_of", hide = true)]
    check: Option<Task>,

    /// Die with the process of this number, which has to be the parent
    #[arg(long, value_name = "PID", hide = true)]
    child_of: Option<u32>,
}

/// What a process of its own does.
#[derive(Clone, Copy, Debug)]
enum Task {
    LaunchFloor,
    Observe(Behaviour),
}

impl Task {
    const LAUNCH_FLOOR: &str = "launch-floor";

    fn parse(name: &str) -> Result<Self, String> {
        let behaviour = || Behaviour::ALL.into_iter().find(|behaviour| behaviour.name() == name);
        match name {
            Self::LAUNCH_FLOOR => Ok(Self::LaunchFloor),
            _ => behaviour().map(Self::Observe).ok_or_else(|| "there is no such check".into()),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::LaunchFloor => Self::LAUNCH_FLOOR,
            Self::Observe(behaviour) => behaviour.name(),
        }
    }
}

/// What such a process prints.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Said {
    Seen(Value),
    /// This host cannot show it, and why.
    Unseen(String),
}

pub(super) fn main(arguments: &Arguments) -> Result<u8, Error> {
    if let Some(task) = arguments.check {
        if let Some(parent) = arguments.child_of {
            die_with(parent)?;
        }
        return arguments.work(task);
    }
    let (host, kvm) = Host::look();
    // Machines come and go in the checks. If this one cannot be had, they tell why.
    let _in_use = kvm.as_ref().ok().and_then(|kvm| InUse::new(kvm).ok());
    let unusable = kvm.as_ref().err().map(|error| chain(error));
    let report = Report {
        host,
        floor: match &unusable {
            None => arguments.floor(),
            Some(why) => Err(why.clone()),
        },
        findings: Behaviour::ALL
            .map(|behaviour| match &unusable {
                Some(why) if behaviour.needs_kvm() => Finding {
                    behaviour,
                    judgement: Judgement::cannot_tell(why.clone()),
                    observed: None,
                },
                _ => arguments.look_at(behaviour),
            })
            .into(),
    };
    print(&if arguments.json { json(&report) } else { table(&report) })?;
    kvm?;
    Ok(if report.count(Verdict::Affected) > 0 { exit::FINDINGS } else { exit::CLEAN })
}

fn print(text: &str) -> Result<(), PrintError> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        // A reader that went away, as `head` does, is no error of ours.
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(PrintError(error)),
        _ => Ok(()),
    }
}

impl Arguments {
    /// Has another process do it; `Err` is why nothing came of that.
    fn ask(&self, task: Task) -> Result<Value, String> {
        let mut command = process::Command::new("/proc/self/exe");
        command.arg0("cleanslate").args(["doctor", "--check", task.name()]);
        command.args(["--child-of", &process::id().to_string()]);
        command.args(self.no_jail.then_some("--no-jail"));
        let limit = Duration::from_secs(self.timeout);
        let text = runner::run(command, limit).map_err(|failure| failure.to_string())?;
        match serde_json::from_str(&text) {
            Ok(Said::Seen(observed)) => Ok(observed),
            Ok(Said::Unseen(why)) => Err(why),
            Err(error) => Err(format!("its process printed something else: {error}")),
        }
    }

    fn look_at(&self, behaviour: Behaviour) -> Finding {
        match self.ask(Task::Observe(behaviour)) {
            Ok(observed) => Finding {
                behaviour,
                judgement: behaviour.judge(&observed),
                observed: Some(observed),
            },
            Err(why) => {
                Finding { behaviour, judgement: Judgement::cannot_tell(why), observed: None }
            }
        }
    }

    fn floor(&self) -> Result<Floor, String> {
        serde_json::from_value(self.ask(Task::LaunchFloor)?).map_err(|error| error.to_string())
    }

    /// What the other process does.
    fn work(&self, task: Task) -> Result<u8, Error> {
        let said = match task {
            Task::Observe(Behaviour::VmrunExitCode) => return self.with_machine(vmrun::observe),
            Task::Observe(Behaviour::VmcsFields) => match kvm_features() {
                Ok(features) if features.has_vmx() => {
                    return self
                        .with_machine(|machine, timeout| features.with_guest(machine, timeout));
                }
                features => said(features.map(Features::alone)),
            },
            Task::Observe(behaviour) => said(behaviour.observe()),
            Task::LaunchFloor => Said::Seen(serde_json::to_value(measure_floor()?)?),
        };
        print(&serde_json::to_string(&said)?)?;
        Ok(exit::CLEAN)
    }

    /// In a jail and in the process of a machine.
    fn with_machine(
        &self,
        observe: impl FnOnce(&Handle, Duration) -> Result<Value, Unseen>,
    ) -> Result<u8, Error> {
        let jail = jail::Arguments::plain(self.no_jail);
        let timeout = Duration::from_secs(self.timeout);
        // Only what is wrong enough to fail is of interest here.
        let notice = |_: &str| {};
        jail.run(machine_of_agent(), notice, |config, resources, interrupts| {
            let machine = machine::launch(config, resources, interrupts)?;
            print(&serde_json::to_string(&said(observe(&machine, timeout)))?)?;
            Ok(exit::CLEAN)
        })
    }
}

fn kvm_features() -> Result<Features, Unseen> {
    Features::read(&kvm::open()?)
}

fn said(observed: Result<Value, Unseen>) -> Said {
    observed.map_or_else(|why| Said::Unseen(chain(&why)), Said::Seen)
}

fn measure_floor() -> Result<Floor, Error> {
    const LAUNCHES: usize = 21;
    const MEM_MIB: usize = 128;
    let mut times = (0..LAUNCHES).map(|_| launch_floor(MEM_MIB)).collect::<Result<Vec<_>, _>>()?;
    times.sort_unstable();
    let us = |index: usize| times[index].as_micros() as u64;
    Ok(Floor {
        launches: LAUNCHES,
        mem_mib: MEM_MIB,
        median_us: us(LAUNCHES / 2),
        shortest_us: us(0),
    })
}

/// The smallest machine that runs the agent.
fn machine_of_agent() -> Config {
    const MEM_MIB: u64 = 16;
    Config::new(Payload::Agent(None), MEM_MIB)
}
