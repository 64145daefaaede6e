//! What a configuration makes of a machine.

use super::*;

fn no_files(_: &PathBuf) -> Result<Vec<u8>, Refusal> {
    Err(Refusal::new("no files here"))
}

fn from_file(text: &str) -> Result<VmConfig, Refusal> {
    VmConfig::from_file(text.as_bytes(), no_files)
}

fn drive(id: &str, is_root_device: bool) -> Drive {
    let text = format!(
        r#"{{"drive_id":"{id}","is_root_device":{is_root_device},"path_on_host":"/{id}"}}"#
    );
    serde_json::from_str(&text).unwrap()
}

#[test]
fn the_root_device_comes_first_and_is_the_only_one() {
    let mut config = VmConfig::default();
    for (id, is_root) in [("a", false), ("b", true), ("c", false)] {
        config.set_drive(drive(id, is_root)).unwrap();
    }
    let names = |config: &VmConfig| -> Vec<_> {
        config.drives.iter().map(|drive| drive.drive_id.clone()).collect()
    };
    assert_eq!(names(&config), ["b", "a", "c"]);
    let error = config.set_drive(drive("c", true)).unwrap_err();
    assert_eq!(error.to_string(), "A root block device already exists!");
    config.set_drive(drive("b", false)).unwrap();
    config.set_drive(drive("c", true)).unwrap();
    assert_eq!(names(&config), ["c", "b", "a"]);
}

#[test]
fn there_are_no_more_drives_than_places() {
    let mut config = VmConfig::default();
    for number in 0..MOST_DISKS {
        config.set_drive(drive(&format!("d{number}"), false)).unwrap();
    }
    assert!(config.set_drive(drive("one_more", false)).is_err());
    config.set_drive(drive("d3", true)).unwrap();
}

#[test]
fn linux_is_told_its_root_device() {
    let check = |boot_args: Option<&str>, root: Option<Drive>, expected: &str| {
        let boot = BootSource {
            kernel_image_path: "/k".into(),
            initrd_path: None,
            boot_args: boot_args.map(Into::into),
        };
        let drives = root.into_iter().collect();
        let config = VmConfig { boot: Some(boot), drives, ..VmConfig::default() };
        assert_eq!(config.machine().unwrap().command_line, expected);
    };
    check(Some("a b"), None, "a b");
    check(Some("a b"), Some(drive("r", true)), "a b root=/dev/vda rw");
    check(Some(""), Some(drive("r", true)), "root=/dev/vda rw");
    check(Some("a -- b"), Some(drive("r", true)), "a root=/dev/vda rw -- b");
    let partition =
        Drive { partuuid: Some("0a-1".into()), is_read_only: Some(true), ..drive("r", true) };
    check(Some("a"), Some(partition), "a root=PARTUUID=0a-1 ro");
    check(None, Some(drive("d", false)), DEFAULT_BOOT_ARGS);
}

#[test]
fn a_file_says_all_at_once_and_is_given_out_again() {
    let text = r#"{
        "boot-source": {"kernel_image_path": "/k", "boot_args": "a"},
        "drives": [{"drive_id": "r", "is_root_device": true, "path_on_host": "/r"}],
        "machine-config": {"vcpu_count": 2, "mem_size_mib": 64},
        "vsock": {"guest_cid": 3, "uds_path": "/v"},
        "entropy": {},
        "serial": {"serial_out_path": "/s"},
        "cleanslate": {"dma_audit": "strict"},
        "network-interfaces": [],
        "balloon": null
    }"#;
    let config = from_file(text).unwrap();
    let mut again = VmConfig::from_file(config.to_json().to_string().as_bytes(), no_files).unwrap();
    // Told in words, as Firecracker does.
    assert_eq!(again.machine.huge_pages.take().as_deref(), Some("None"));
    assert_eq!(again, config);
    let machine = config.machine().unwrap();
    assert_eq!((machine.vcpus, machine.mem_mib, machine.rng), (2, 64, true));
    assert_eq!(machine.reset_policy, ResetPolicy::Limited(0));
    assert_eq!(machine.vsock_path, Some("/v".into()));
}

#[test]
fn a_file_with_what_is_not_here_is_refused() {
    let check = |text: &str, expected: &str| {
        let error = from_file(text).unwrap_err().to_string();
        assert!(error.contains(expected), "{text}: {error}");
    };
    check("", "EOF");
    check(r#"{"bogus": 1}"#, "unknown field `bogus`");
    check(r#"{"balloon": {}}"#, "balloon");
    check(r#"{"network-interfaces": [{}]}"#, "network");
    check(r#"{"machine-config": {"vcpu_count": 0, "mem_size_mib": 64}}"#, "vcpu_count 0");
    check(r#"{"cpu-config": "/template"}"#, "no files here");
    check(r#"{"vsock": {"guest_cid": 1, "uds_path": "/v"}}"#, "reserved");
}

#[test]
fn without_a_kernel_the_agent_boots_and_is_reset_in_place() {
    let config = VmConfig::default();
    assert!(!config.describes_a_machine());
    let machine = config.machine().unwrap();
    assert!(matches!(machine.payload, Payload::Agent(None)));
    assert_eq!(machine.reset_policy, ResetPolicy::InPlace);
    let logged = VmConfig { logger: Some(Logger::default()), ..VmConfig::default() };
    assert!(!logged.describes_a_machine());
    let described = VmConfig { entropy: Some(Entropy { rate_limiter: None }), ..logged };
    assert!(described.describes_a_machine());
}
