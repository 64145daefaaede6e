//! End-to-end tests: what the README and the issue tracker promise, tried on the built program and a real `/dev/kvm`.
//!
//! Contents: one module for each promise.

/// How tests run the program, make guests and read what they say.
mod harness;

/// `api`: Firecracker's interface over HTTP, and our own beside it.
mod api;
/// An agent that is after its monitor: the next life is clean, and nothing grows.
mod attacks;
/// Wrong usage and wrong input: one line, exit status 2, nothing left.
mod bad_input;
/// Host clients that break rules hurt only themselves.
mod clients;
/// `--pmu emulated`: a guest finds AMD's counters, and they count, overflow and interrupt like those.
mod counters;
/// `--disk` and `--rng`: devices that a guest uses, and what becomes of them when files or users are wrong.
mod disks;
/// `--dma-audit`: what is wrong with a guest's DMA buffers is found on the host as in the guest, and ours are as they should be.
mod dma_audit;
/// `doctor`: what a host is, and which known faults its KVM has.
mod doctor;
/// The documents name what exists.
mod documents;
/// The agent's image boots in monitors of other people.
mod elsewhere;
/// Many resets leave nothing behind on the host.
mod endurance;
/// `--inject`: each step that a reset leaves out on purpose is found under its name.
mod faults;
/// Filters of system calls: what they forbid ends the machine, and they allow no more than is used.
mod filters;
/// What must not be there is found, by name and by exit status.
mod findings;
/// `--kernel`: other guests, and the ways in which they end.
mod guests;
/// Guests that break rules hurt only themselves.
mod hostile;
/// Every machine runs in a jail, and the jail is what it should be.
mod jail;
/// `cleanslate lab`, and in it our own agent on hardware virtualization.
mod lab;
/// `launch`: sandboxes do jobs, are recycled if they prove to be clean, and thrown away if not.
mod launches;
/// Jailed launches leave nothing behind, whoever is killed.
mod leftovers;
/// Linux as a guest, in the lab.
mod linux;
/// `run` boots the agent, takes its report and resets it by every cause.
mod lives;
/// Sockets for messages over vsock, both ways, and as many connections as there may be.
mod messages;
/// `probe`: figures of a machine's vsock, and the rules that it keeps.
mod probe;
/// `--poison`: state that was dirty before a reset is clean after it, item by item.
mod residue;
/// A machine that obeys orders over a socket: what `launch` and the API are made of.
mod sandbox;
/// A machine that is captured goes on in another one.
mod snapshot;
/// `snapshot`: the same by command, with files and their faults.
mod snapshot_command;
/// `soak`: many machines at random moments, whatever happens to their processes.
mod soak;
/// `launch` when somebody is killed, stops, or never ends.
mod storms;
/// Bytes in either direction, on connections that either side has opened.
mod transfers;
/// Host clients and the guest over vsock, in Firecracker's socket convention.
mod vsock;
/// `cleanslate vsock`: pipes between a shell and a guest's ports, of any monitor that has the convention.
mod vsock_command;
/// Intel's virtualization, emulated by Bochs.
mod vtx;
