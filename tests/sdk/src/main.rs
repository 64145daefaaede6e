//! fctools, a Firecracker SDK, drives a cleanslate that it takes for Firecracker: boots the guest agent as a kernel, talks to it
//! over vsock, pauses and resumes, reads information and metrics, takes a snapshot and goes on from it.
//!
//! `sdk-test PROGRAM`; every step that fails ends it with a panic.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;

use agent_protocol::{AGENT_PORT, Hello, frame};
use fctools::extension::metrics::Metrics;
use fctools::process_spawner::DirectProcessSpawner;
use fctools::runtime::tokio::TokioRuntime;
use fctools::vm::api::VmApi;
use fctools::vm::configuration::{InitMethod, VmConfiguration, VmConfigurationData};
use fctools::vm::models::{
    BootSource, CreateSnapshot, LoggerSystem, MachineConfiguration, MetricsSystem, SnapshotType,
    VsockDevice,
};
use fctools::vm::shutdown::{VmShutdownAction, VmShutdownMethod};
use fctools::vm::snapshot::PrepareVmFromSnapshotOptions;
use fctools::vm::{Vm, VmState};
use fctools::vmm::arguments::{VmmApiSocket, VmmArguments, VmmLogLevel};
use fctools::vmm::executor::unrestricted::UnrestrictedVmmExecutor;
use fctools::vmm::id::VmmId;
use fctools::vmm::installation::VmmInstallation;
use fctools::vmm::ownership::VmmOwnershipModel;
use fctools::vmm::resource::system::ResourceSystem;
use fctools::vmm::resource::{CreatedResourceType, MovedResourceType, ResourceType};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// The life of an agent that was booted as any kernel is: nobody has told it a number.
const UNNUMBERED: u32 = 0;

const PATIENCE: Duration = Duration::from_secs(60);

type Machine = Vm<UnrestrictedVmmExecutor, DirectProcessSpawner, TokioRuntime>;

fn executor(dir: &Path, socket: &str) -> UnrestrictedVmmExecutor {
    let arguments = VmmArguments::new(VmmApiSocket::Enabled(dir.join(socket)))
        .log_level(VmmLogLevel::Info)
        .show_log_level()
        .show_log_origin()
        .api_max_payload_bytes(100_000);
    UnrestrictedVmmExecutor::new(arguments).id(VmmId::new("from-an-sdk").unwrap())
}

fn installation(firecracker: &Path) -> VmmInstallation {
    VmmInstallation::new(firecracker, Path::new("/no/jailer"), Path::new("/no/snapshot-editor"))
}

/// A machine that boots the agent, described by calls or by a file.
async fn prepare(firecracker: &Path, dir: &Path, socket: &str, init_method: InitMethod) -> Machine {
    let mut system =
        ResourceSystem::new(DirectProcessSpawner, TokioRuntime, VmmOwnershipModel::Shared);
    let mut resource =
        |name: &str, kind| system.create_resource(dir.join(name), kind).expect("a resource");
    let created = ResourceType::Created(CreatedResourceType::File);
    let data = VmConfigurationData {
        boot_source: BootSource {
            kernel_image: resource("agent.elf", ResourceType::Moved(MovedResourceType::Copied)),
            boot_args: Some("quiet".into()),
            initrd: None,
        },
        drives: Vec::new(),
        pmem_devices: Vec::new(),
        machine_configuration: MachineConfiguration {
            vcpu_count: 1,
            mem_size_mib: 32,
            smt: None,
            track_dirty_pages: Some(true),
            huge_pages: None,
        },
        cpu_template: None,
        network_interfaces: Vec::new(),
        balloon_device: None,
        vsock_device: Some(VsockDevice {
            guest_cid: 3,
            uds: resource(&format!("{socket}.vsock"), ResourceType::Produced),
        }),
        logger_system: Some(LoggerSystem {
            logs: Some(resource(&format!("{socket}.log"), created)),
            ..LoggerSystem::default()
        }),
        metrics_system: Some(MetricsSystem {
            metrics: resource(&format!("{socket}.metrics"), created),
        }),
        memory_hotplug_configuration: None,
        mmds_configuration: None,
        entropy_device: None,
    };
    let configuration = VmConfiguration::New { init_method, data };
    Vm::prepare(executor(dir, socket), system, installation(firecracker), configuration)
        .await
        .expect("prepare a machine")
}

/// What the agent says when a client connects, as soon as it does.
async fn hello(socket: PathBuf) -> Hello {
    let heard = async {
        loop {
            if let Some(hello) = try_hello(&socket).await {
                return hello;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, heard).await.expect("the agent greets")
}

async fn try_hello(socket: &Path) -> Option<Hello> {
    let mut stream = UnixStream::connect(socket).await.ok()?;
    stream.write_all(format!("CONNECT {AGENT_PORT}\n").as_bytes()).await.ok()?;
    let mut bytes = Vec::new();
    while !bytes.ends_with(b"\n") {
        bytes.push(stream.read_u8().await.ok()?);
    }
    assert!(bytes.starts_with(b"OK "), "{bytes:?}");
    bytes.clear();
    loop {
        if let Some((hello, _)) = frame::decode(&bytes).expect("a frame") {
            return Some(hello);
        }
        bytes.push(stream.read_u8().await.ok()?);
    }
}

async fn end(mut vm: Machine) {
    let kill = VmShutdownAction {
        method: VmShutdownMethod::PauseThenKill,
        timeout: Some(PATIENCE),
        graceful: false,
    };
    vm.shutdown([kill]).await.expect("kill it");
    assert!(matches!(vm.get_state(), VmState::Crashed(_)));
    vm.cleanup().await.expect("clean up");
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let program = PathBuf::from(std::env::args_os().nth(1).expect("usage: sdk-test PROGRAM"));
    let program = program.canonicalize().expect("the program");
    let temporary = tempfile::tempdir().expect("a directory");
    let dir = temporary.path();
    let firecracker = dir.join("firecracker");
    symlink(&program, &firecracker).expect("a link");
    let agent = dir.join("agent.elf");
    let exported =
        std::process::Command::new(&program).args(["agent", "export"]).arg(&agent).status();
    assert!(exported.expect("export the agent").success());

    let mut vm = prepare(&firecracker, dir, "first", InitMethod::ViaApiCalls).await;
    vm.start(PATIENCE).await.expect("start the machine");
    assert_eq!(hello(dir.join("first.vsock")).await.life, UNNUMBERED);
    println!("started by calls; the agent greets over vsock");
    let info = vm.get_info().await.expect("information");
    assert_eq!((info.id.as_str(), info.is_paused), ("from-an-sdk", false));
    assert!(vm.get_firecracker_version().await.expect("a version").starts_with("1."));
    let machine = vm.get_machine_configuration().await.expect("the configuration");
    assert_eq!((machine.vcpu_count, machine.mem_size_mib), (1, 32));
    println!("information, version and configuration are understood");
    vm.flush_metrics().await.expect("metrics");
    let metrics = std::fs::read_to_string(dir.join("first.metrics")).expect("metrics");
    let metrics: Metrics = serde_json::from_str(metrics.trim_end()).expect("metrics");
    assert!(metrics.vsock.tx_bytes_count > 0 && metrics.put_api_requests.actions_count > 0);
    println!("metrics are understood, field by field");
    vm.pause().await.expect("pause");
    assert!(vm.get_info().await.expect("information").is_paused);
    vm.resume().await.expect("resume");
    hello(dir.join("first.vsock")).await;
    println!("paused and resumed");
    vm.pause().await.expect("pause");
    let system = vm.get_resource_system_mut();
    let snapshot = system.create_resource(dir.join("state"), ResourceType::Produced).unwrap();
    let mem_file = system.create_resource(dir.join("memory"), ResourceType::Produced).unwrap();
    let snapshot_type = Some(SnapshotType::Full);
    let snapshot = vm
        .create_snapshot(CreateSnapshot { snapshot_type, snapshot, mem_file })
        .await
        .expect("a snapshot");
    vm.resume().await.expect("resume");
    hello(dir.join("first.vsock")).await;
    println!("a snapshot was taken, and the machine goes on");
    let options = PrepareVmFromSnapshotOptions {
        executor: executor(dir, "second"),
        process_spawner: DirectProcessSpawner,
        runtime: TokioRuntime,
        moved_resource_type: MovedResourceType::Copied,
        ownership_model: VmmOwnershipModel::Shared,
        track_dirty_pages: None,
        resume_vm: Some(true),
        network_overrides: Vec::new(),
    };
    // The restored machine has the socket of the first one, which has to be over.
    let mut restored =
        snapshot.clone().prepare_vm(&mut vm, options).await.expect("prepare another");
    let kept = ["state", "memory", "agent.elf"].map(|name| dir.join(name));
    for path in &kept {
        std::fs::copy(path, path.with_extension("kept")).expect("keep a file");
    }
    end(vm).await;
    for path in &kept {
        // Cleaning up has removed what the machine had made.
        std::fs::copy(path.with_extension("kept"), path).expect("put a file back");
    }
    restored.start(PATIENCE).await.expect("start from the snapshot");
    assert_eq!(hello(dir.join("first.vsock")).await.life, UNNUMBERED);
    assert!(!restored.get_info().await.expect("information").is_paused);
    println!("another machine goes on from the snapshot");
    end(restored).await;

    let config = InitMethod::ViaJsonConfiguration(dir.join("config.json"));
    let mut vm = prepare(&firecracker, dir, "third", config).await;
    vm.start(PATIENCE).await.expect("start the machine");
    assert_eq!(hello(dir.join("third.vsock")).await.life, UNNUMBERED);
    println!("started by a configuration file");
    end(vm).await;
    println!("all passed");
}
