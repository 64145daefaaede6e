//! Init of a guest whose only work is to answer the host: mounts what it reads from, loads drivers, listens, serves.

use std::error::Error;
use std::fs;
use std::sync::Arc;
use std::thread;

use linux_agent::agent::Agent;
use linux_agent::modules::{self, Group};
use linux_agent::serve;
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};
use vsock::{VMADDR_CID_ANY, VsockListener};

fn main() {
    let agent = Agent::new();
    let error = match run(agent) {
        Ok(never) => match never {},
        Err(error) => error,
    };
    // Standard error is the console. Whoever waits for a greeting is told why there is none, and need not wait longer.
    eprintln!("cleanslate agent: {error}");
    let Err(error) = reboot(RebootMode::RB_POWER_OFF);
    eprintln!("cleanslate agent: power off: {error}");
}

enum Never {}

fn run(mut agent: Agent) -> Result<Never, Box<dyn Error>> {
    for (kind, place) in [("devtmpfs", "/dev"), ("proc", "/proc"), ("sysfs", "/sys")] {
        fs::create_dir_all(place)?;
        mount(Some(kind), place, Some(kind), MsFlags::empty(), None::<&str>)
            .map_err(|error| format!("mount {kind} at {place}: {error}"))?;
    }
    agent.read_command_line()?;
    // Listens before there is a device, so that its first connection finds somebody.
    modules::load(Group::Socket)?;
    let listener = VsockListener::bind_with_cid_port(VMADDR_CID_ANY, agent_protocol::AGENT_PORT)
        .map_err(|error| format!("no vsock in this kernel (CONFIG_VSOCKETS): {error}"))?;
    modules::load(Group::Transport)?;
    if !modules::has_vsock_device() {
        return Err("no vsock device: the kernel lacks virtio_mmio or the transport of vsock \
             (CONFIG_VIRTIO_MMIO, CONFIG_VIRTIO_VSOCKETS)"
            .into());
    }
    agent.set_ready();
    let agent = Arc::new(agent);
    loop {
        let (stream, _) = listener.accept().map_err(|error| format!("accept: {error}"))?;
        let agent = Arc::clone(&agent);
        thread::Builder::new().spawn(move || serve::serve(&stream, &agent))?;
    }
}
