//! Makes sandboxes: a jail for each, and the worker in it.

use std::os::fd::AsFd;
use std::rc::Rc;

use jailer::{Id, Inside, Janitor, Running};

use crate::cli::{Error, jail};
use crate::lifecycle::chain;
use crate::machine::{Config, Interrupts, MachineError, Resources};
use crate::sandbox::{self, Guidance, Sandbox};

/// What all sandboxes have in common, opened and made once.
pub(super) struct Starter<'a> {
    wishes: &'a jail::Wishes,
    config: Config,
    guidance: Guidance,
    id: Id,
    /// Taken by each process, which is a copy of this one with a copy of it.
    resources: Option<Resources>,
    told_of_lacks: bool,
    // Last: it removes what is left of any.
    janitor: Rc<Janitor>,
}

impl<'a> Starter<'a> {
    /// For up to `count` sandboxes.
    pub fn new(
        wishes: &'a jail::Wishes,
        config: Config,
        guidance: Guidance,
        count: u64,
    ) -> Result<Self, Error> {
        let id = wishes.id().cloned().unwrap_or_else(Id::of_this_process);
        // What is wrong with the longest name, or with the jail, is wrong before anything is made.
        wishes.jail(&config, numbered(&id, count.saturating_mul(2))?)?;
        let janitor = Rc::new(Janitor::start()?);
        let (resources, _) = Resources::open(&config)?;
        let resources = Some(resources.prepared(&config)?);
        Ok(Self { wishes, config, guidance, id, resources, told_of_lacks: false, janitor })
    }

    /// Makes a sandbox.
    pub fn start(&mut self, number: u64) -> Result<(Running, Sandbox), Error> {
        let jail = self.wishes.jail(&self.config, numbered(&self.id, number)?)?;
        let prepared = jail.prepare_with(&self.janitor)?;
        if !std::mem::replace(&mut self.told_of_lacks, true) {
            for lack in prepared.lacks() {
                eprintln!("cleanslate: the jail is weaker than it should be: {lack}");
            }
        }
        let (sandbox, socket) = Sandbox::new()?;
        let (config, guidance) = (&self.config, self.guidance);
        let running = prepared.start(
            (&mut self.resources, socket),
            |(resources, socket)| {
                let resources = resources.iter().flat_map(Resources::descriptors);
                resources.chain([socket.as_fd()]).collect()
            },
            |(resources, socket), entered| {
                let ready = entered.map_err(Error::from).and_then(|inside| catch(inside));
                match (ready, resources.take()) {
                    (Ok(interrupts), Some(resources)) => {
                        // Whoever orders is told why, if it could be; nobody reads what is printed here.
                        let served =
                            sandbox::serve(socket, config, guidance, resources, interrupts);
                        u8::from(served.is_err())
                    }
                    (Err(error), _) => {
                        sandbox::refuse(socket, chain(&*error));
                        1
                    }
                    (Ok(_), None) => unreachable!("only copies take it, each its own"),
                }
            },
        )?;
        Ok((running, sandbox))
    }
}

/// The rest of the way into the jail.
fn catch(inside: Inside) -> Result<Interrupts, Error> {
    let interrupts = Interrupts::catch()?.and_transport_resets()?;
    inside.let_signals_come();
    jailer::seccomp::catch_violations(inside.report)
        .map_err(MachineError::host("catch forbidden system calls"))?;
    Ok(interrupts)
}

/// The name of a jail by its number.
fn numbered(id: &Id, number: u64) -> Result<Id, Error> {
    Ok(format!("{id}-{number}").parse()?)
}
