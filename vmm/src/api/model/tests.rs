//! What is refused, and that what is sent to the other process comes out as it went in.

use agent_protocol::frame;

use super::*;
use crate::api::call::{Call, Method, Request};
use crate::api::route;

fn request(method: Method, path: &str, body: &str) -> Request {
    route::request(Some(method), path, body.as_bytes())
}

/// Fails unless the body is refused with a reason that has `text`.
#[track_caller]
fn refused(method: Method, path: &str, body: &str, text: &str) {
    match request(method, path, body) {
        Request::Refused { reason, .. } => assert!(reason.contains(text), "{reason}"),
        other => panic!("{path} {body} became {other:?}"),
    }
}

#[test]
fn what_no_machine_has_is_refused_by_name() {
    use Method::{Patch, Put};
    let machine = |more: &str| format!(r#"{{"vcpu_count":1,"mem_size_mib":128{more}}}"#);
    refused(Put, "/machine-config", &machine(r#","smt":true"#), "smt");
    refused(Put, "/machine-config", &machine(r#","cpu_template":"T2""#), "PUT /cpu-config");
    refused(Put, "/machine-config", &machine(r#","huge_pages":"2M""#), "huge_pages");
    refused(Put, "/machine-config", &machine(r#","bogus":1"#), "unknown field `bogus`");
    refused(Put, "/machine-config", r#"{"vcpu_count":0,"mem_size_mib":128}"#, "vcpu_count 0");
    refused(Put, "/machine-config", r#"{"vcpu_count":33,"mem_size_mib":128}"#, "vcpu_count 33");
    refused(Put, "/machine-config", r#"{"vcpu_count":1,"mem_size_mib":3}"#, "mem_size_mib 3");
    refused(Put, "/machine-config", r#"{"vcpu_count":1}"#, "missing field `mem_size_mib`");
    let limiter = r#""rate_limiter":{"ops":{"size":1,"refill_time":1}}"#;
    refused(Put, "/entropy", &format!("{{{limiter}}}"), "rate_limiter");
    let drive = |more: &str| format!(r#"{{"drive_id":"d","is_root_device":false{more}}}"#);
    refused(Put, "/drives/d", &drive(r#","socket":"/s""#), "vhost-user");
    refused(Put, "/drives/d", &drive(""), "path_on_host");
    refused(
        Put,
        "/drives/d",
        &drive(&format!(r#","path_on_host":"/d",{limiter}"#)),
        "rate_limiter",
    );
    refused(Put, "/drives/d", &drive(r#","path_on_host":"/d","partuuid":"0a""#), "partuuid");
    let vsock = |cid: u64| format!(r#"{{"guest_cid":{cid},"uds_path":"/v"}}"#);
    refused(Put, "/vsock", &vsock(2), "guest_cid 2 is reserved");
    refused(Put, "/vsock", &vsock(0xffff_ffff), "guest_cid 4294967295 is reserved");
    let both = r#"{"snapshot_path":"/s","mem_file_path":"/s"}"#;
    refused(Put, "/snapshot/create", both, "the same file");
    refused(Put, "/snapshot/load", r#"{"snapshot_path":"/s"}"#, "missing field: either");
    refused(Put, "/logger", r#"{"level":"loud"}"#, "level \"loud\" is none of");
    refused(Patch, "/machine-config", r#"{"bogus":1}"#, "unknown field `bogus`");
    refused(Put, "/cleanslate/machine", r#"{"pmu_counters":4}"#, "\"pmu\": \"emulated\"");
    refused(Put, "/network-interfaces/eth0", "{}", "over vsock");
}

#[test]
fn a_limiter_that_limits_nothing_is_none() {
    let body = r#"{"rate_limiter":{"bandwidth":{"size":0,"refill_time":0},"ops":null}}"#;
    assert!(matches!(request(Method::Put, "/entropy", body), Request::PutEntropy(_)));
}

#[test]
fn a_change_of_the_machine_keeps_the_rest() {
    let old = MachineConfig { mem_size_mib: 256, ..MachineConfig::default() };
    let update = MachineConfigUpdate { vcpu_count: Some(2), ..Default::default() };
    let new = update.applied_to(&old).unwrap();
    assert_eq!((new.vcpu_count, new.mem_size_mib), (2, 256));
    assert!(MachineConfigUpdate::default().applied_to(&old).is_err());
    let wrong = MachineConfigUpdate { vcpu_count: Some(0), ..Default::default() };
    assert!(wrong.applied_to(&old).is_err());
}

#[test]
fn levels_have_firecrackers_names() {
    let check = |name: &str, expected| assert_eq!(name.parse().ok(), expected, "{name:?}");
    check("warning", Some(Level::Warn));
    check("WARN", Some(Level::Warn));
    check("Info", Some(Level::Info));
    check("off", Some(Level::Off));
    check("", None);
    assert!(Level::Trace > Level::Debug && Level::Error > Level::Off);
}

#[test]
fn requests_survive_the_way_to_the_other_process() {
    let bodies = [
        (Method::Put, "/machine-config", r#"{"vcpu_count":2,"mem_size_mib":64}"#),
        (Method::Patch, "/machine-config", r#"{"vcpu_count":2}"#),
        (Method::Put, "/boot-source", r#"{"kernel_image_path":"/k","boot_args":"a b"}"#),
        (Method::Put, "/logger", r#"{"level":"Warning","show_level":true}"#),
        (
            Method::Put,
            "/cpu-config",
            r#"{"kvm_capabilities":["!56"],"cpuid_modifiers":[{"leaf":"0x1","subleaf":"0x0","flags":0,
            "modifiers":[{"register":"ecx","bitmap":"0b0x1"}]}],"msr_modifiers":[{"addr":"0x10a","bitmap":"0b1"}]}"#,
        ),
        (
            Method::Put,
            "/drives/d",
            r#"{"drive_id":"d","is_root_device":true,"path_on_host":"/d","io_engine":"Async"}"#,
        ),
        (
            Method::Put,
            "/snapshot/load",
            r#"{"snapshot_path":"/s","mem_backend":{"backend_type":"Uffd","backend_path":"/m"}}"#,
        ),
        (Method::Put, "/cleanslate/machine", r#"{"pmu":"emulated","on_guest_reset":"end"}"#),
        (Method::Put, "/nowhere", "{}"),
    ];
    for (method, path, body) in bodies {
        let request = request(method, path, body);
        let is_refused = matches!(request, Request::Refused { .. });
        assert_eq!(is_refused, path == "/nowhere", "{request:?}");
        let call = Call { id: 7, method: Some(method), path: path.into(), request };
        let bytes = frame::encode(&call).unwrap();
        assert_eq!(frame::decode(&bytes), Ok(Some((call, bytes.len()))));
    }
}
