//! Machines in the test's own process, for what no command line can be told: stand still at this moment, be captured, be another.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use agent_protocol::AGENT_PORT;
use vmm::agent::Agent;
use vmm::boot::Payload;
use vmm::device::vsock::GuestPort;
use vmm::kvm::identity::HostIdentity;
use vmm::machine::{
    self, CaptureError, Config, Event, Handle, Interrupts, MachineError, MachineState, NmiOutcome,
    NmiVia, RamSource, Resources, Restore, SnapshotKind, Stop,
};
use vmm::snapshot::{self, Snapshot, Summary, Targets};

use super::PATIENCE;

/// A machine without a jail.
pub struct Vm {
    pub handle: Handle,
    pub config: Config,
}

/// The files of a snapshot.
pub struct Files {
    dir: tempfile::TempDir,
}

impl Files {
    pub fn new() -> Self {
        Self { dir: super::temp_dir() }
    }

    pub fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    pub fn memory(&self) -> PathBuf {
        self.dir.path().join("memory")
    }

    fn targets(&self) -> Targets {
        let create =
            |path: &Path| File::options().read(true).write(true).create_new(true).open(path);
        Targets { state: create(&self.state()).unwrap(), memory: create(&self.memory()).unwrap() }
    }

    /// What the state file says.
    pub fn read(&self) -> Snapshot<MachineState> {
        let file = snapshot::open(&self.state()).unwrap();
        let host: HostIdentity = snapshot::read_header(&file).unwrap().host;
        snapshot::read_state(&file, &host).unwrap()
    }

    /// The configuration of a machine that is restored from it, with what is the host's business as in `config`.
    pub fn restored(&self, config: Config) -> Config {
        Self::stacked(std::slice::from_ref(self), config)
    }

    /// The same with snapshots that build on each other, the base first.
    pub fn stacked(files: &[Self], config: Config) -> Config {
        let layers = files.iter().map(|files| (files.read().header, files.memory())).collect();
        let Snapshot { header, state } = files.last().expect("a snapshot").read();
        let payload = config.payload.clone();
        let config = state.description().configure(config, payload);
        Config {
            restore: Some(Restore {
                header,
                state: Arc::new(state),
                ram: RamSource::Files(layers),
            }),
            ..config
        }
    }
}

/// The embedded agent with 64 MiB.
pub fn agent() -> Config {
    Config::new(Payload::Agent(None), 64)
}

impl Vm {
    /// Launches the machine.
    pub fn launch(config: Config) -> Result<Self, MachineError> {
        let (resources, _files) = Resources::open(&config)?;
        let handle = machine::launch(&config, resources, Interrupts::catch()?)?;
        Ok(Self { handle, config })
    }

    /// A connection to the agent.
    #[track_caller]
    pub fn agent(&self) -> Agent {
        let stream = self.handle.connect(GuestPort(AGENT_PORT)).expect("connect to the agent");
        Agent::greet(stream, PATIENCE).expect("the agent's hello")
    }

    /// The next event for which `pick` has an answer; the machine may not end before.
    #[track_caller]
    pub fn event<T>(&self, mut pick: impl FnMut(Event) -> Result<T, Event>) -> T {
        let began = Instant::now();
        loop {
            assert!(began.elapsed() < PATIENCE, "the event never came");
            match self.handle.next_event(Duration::from_millis(100)).map(&mut pick) {
                Some(Ok(answer)) => return answer,
                Some(Err(Event::Stopped(stop))) => panic!("the machine stopped: {stop:?}"),
                Some(Err(_)) | None => {}
            }
        }
    }

    #[track_caller]
    pub fn pause(&self) {
        self.handle.pause();
        self.event(|event| if matches!(event, Event::Paused) { Ok(()) } else { Err(event) });
    }

    #[track_caller]
    pub fn resume(&self) {
        self.handle.resume();
        self.event(|event| if matches!(event, Event::Resumed) { Ok(()) } else { Err(event) });
    }

    #[track_caller]
    pub fn nmi(&self, via: NmiVia) -> NmiOutcome {
        self.handle.inject_nmi(via);
        self.event(|event| if let Event::Nmi(outcome) = event { Ok(outcome) } else { Err(event) })
    }

    #[track_caller]
    pub fn reset(&self) -> u32 {
        self.handle.reset();
        self.event(
            |event| if let Event::Reset { life, .. } = event { Ok(life) } else { Err(event) },
        )
    }

    /// Why the machine ended.
    #[track_caller]
    pub fn stopped(&self) -> Stop {
        let began = Instant::now();
        loop {
            assert!(began.elapsed() < PATIENCE, "the machine never stopped");
            if let Some(Event::Stopped(stop)) = self.handle.next_event(Duration::from_millis(100)) {
                return stop;
            }
        }
    }

    /// Writes a snapshot.
    pub fn try_snapshot(&self, files: &Files) -> Result<Summary, CaptureError> {
        self.try_snapshot_of(files, SnapshotKind::Full)
    }

    /// The same of all of RAM or a part.
    pub fn try_snapshot_of(
        &self,
        files: &Files,
        kind: SnapshotKind,
    ) -> Result<Summary, CaptureError> {
        self.handle.snapshot(files.targets(), kind);
        *self.event(
            |event| if let Event::Snapshot(result) = event { Ok(result) } else { Err(event) },
        )
    }

    /// Writes a snapshot of the machine, which then stands still.
    #[track_caller]
    pub fn snapshot(&self) -> Files {
        let files = Files::new();
        self.pause();
        self.try_snapshot(&files).expect("a snapshot");
        files
    }

    /// A machine that was restored from `files`.
    #[track_caller]
    pub fn restore(&self, files: &Files) -> Self {
        Self::launch(files.restored(self.config.clone())).expect("restore a machine")
    }
}
