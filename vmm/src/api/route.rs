//! Which paths there are, and how a request is made of a method, a path and a body. The OpenAPI document lists the same; a
//! test compares them.

use serde::de::DeserializeOwned;

use super::call::{Method, Request};
use super::model::cpu::CpuConfig;
use super::model::{
    Action, BootSource, Drive, DriveUpdate, Entropy, LoadSnapshot, Logger, MachineConfig,
    MachineConfigUpdate, Metrics, NewSnapshot, Own, Refusal, Serial, Vm, Vsock,
};

/// A method on a path.
pub struct Route {
    /// The method.
    pub method: Method,
    /// The path; `{id}` stands for one part of any name.
    pub path: &'static str,
    parse: Parse,
}

/// How its request is made.
enum Parse {
    /// There is no body.
    Plain(fn() -> Request),
    /// The body has everything.
    Body(fn(&[u8]) -> Result<Request, Refusal>),
    /// The same, but it may be missing.
    Optional(fn(&[u8]) -> Result<Request, Refusal>),
    /// The body, and the part of the path that is the name.
    Named(fn(&str, &[u8]) -> Result<Request, Refusal>),
    /// Firecracker has it and this program does not: what it is, and what to do instead.
    Lacking(&'static str),
}

#[expect(missing_docs)]
pub const NO_NETWORK: &str =
    "network interfaces: there are none here; talk to the guest over vsock (PUT /vsock)";
#[expect(missing_docs)]
pub const NO_BALLOON: &str = "balloon: there is none here; what a guest gives back is freed by a reset (PUT /cleanslate/reset)";
#[expect(missing_docs)]
pub const NO_MMDS: &str = "mmds: there is no metadata service here, as there is no network; send data over vsock (PUT /vsock), or \
                       put it into boot_args";
#[expect(missing_docs)]
pub const NO_HOTPLUG: &str =
    "hotplug: a machine's memory is fixed when it starts; set mem_size_mib in PUT /machine-config";
#[expect(missing_docs)]
pub const NO_PMEM: &str =
    "pmem: there are no such devices here; use a drive (PUT /drives/{drive_id})";

/// All of them.
pub const ROUTES: &[Route] = &[
    get("/", || Request::GetInstance),
    get("/version", || Request::GetVersion),
    get("/machine-config", || Request::GetMachineConfig),
    put("/machine-config", |body| {
        let config: MachineConfig = parse(body)?;
        config.check().map(|()| Request::PutMachineConfig(config))
    }),
    patch("/machine-config", |body| {
        parse::<MachineConfigUpdate>(body).map(Request::PatchMachineConfig)
    }),
    put("/boot-source", |body| parse::<BootSource>(body).map(Request::PutBootSource)),
    put("/cpu-config", |body| {
        let config: CpuConfig = parse(body)?;
        config.template().map(|_| Request::PutCpuConfig(config))
    }),
    Route {
        method: Method::Put,
        path: "/drives/{drive_id}",
        parse: Parse::Named(|id, body| {
            let drive: Drive = parse(body)?;
            check_id(id, &drive.drive_id)?;
            drive.check().map(|()| Request::PutDrive(drive))
        }),
    },
    Route {
        method: Method::Patch,
        path: "/drives/{drive_id}",
        parse: Parse::Named(|id, body| {
            let update: DriveUpdate = parse(body)?;
            check_id(id, &update.drive_id)?;
            update.check().map(|()| Request::PatchDrive(update))
        }),
    },
    put("/entropy", |body| {
        let entropy: Entropy = parse(body)?;
        entropy.check().map(|()| Request::PutEntropy(entropy))
    }),
    put("/vsock", |body| {
        let vsock: Vsock = parse(body)?;
        vsock.check().map(|()| Request::PutVsock(vsock))
    }),
    put("/logger", |body| parse::<Logger>(body).map(Request::PutLogger)),
    put("/metrics", |body| parse::<Metrics>(body).map(Request::PutMetrics)),
    put("/serial", |body| {
        let serial: Serial = parse(body)?;
        serial.check().map(|()| Request::PutSerial(serial))
    }),
    patch("/vm", |body| parse::<Vm>(body).map(|vm| Request::PatchVm(vm.state))),
    get("/vm/config", || Request::GetVmConfig),
    put("/actions", |body| {
        parse::<Action>(body).map(|action| Request::PutAction(action.action_type))
    }),
    put("/snapshot/create", |body| {
        let snapshot: NewSnapshot = parse(body)?;
        snapshot.check().map(|()| Request::CreateSnapshot(snapshot))
    }),
    put("/snapshot/load", |body| {
        let snapshot: LoadSnapshot = parse(body)?;
        snapshot.check().map(|()| Request::LoadSnapshot(snapshot))
    }),
    get("/cleanslate/machine", || Request::GetOwn),
    put("/cleanslate/machine", |body| {
        let own: Own = parse(body)?;
        own.check().map(|()| Request::PutOwn(own))
    }),
    optional("/cleanslate/reset", |body| parse::<Nothing>(body).map(|_| Request::Reset)),
    optional("/cleanslate/nmi", |body| parse::<Nothing>(body).map(|_| Request::Nmi)),
    get("/cleanslate/report", || Request::GetReport),
    get("/cleanslate/verdict", || Request::GetVerdict),
    get("/cleanslate/dma-audit", || Request::GetDmaAudit),
    get("/cleanslate/console", || Request::GetConsole),
    get("/cleanslate/metrics", || Request::GetMetrics),
    lacking(Method::Put, "/network-interfaces/{iface_id}", NO_NETWORK),
    lacking(Method::Patch, "/network-interfaces/{iface_id}", NO_NETWORK),
    lacking(Method::Get, "/balloon", NO_BALLOON),
    lacking(Method::Put, "/balloon", NO_BALLOON),
    lacking(Method::Patch, "/balloon", NO_BALLOON),
    lacking(Method::Get, "/balloon/statistics", NO_BALLOON),
    lacking(Method::Patch, "/balloon/statistics", NO_BALLOON),
    lacking(Method::Patch, "/balloon/hinting/start", NO_BALLOON),
    lacking(Method::Get, "/balloon/hinting/status", NO_BALLOON),
    lacking(Method::Patch, "/balloon/hinting/stop", NO_BALLOON),
    lacking(Method::Get, "/mmds", NO_MMDS),
    lacking(Method::Put, "/mmds", NO_MMDS),
    lacking(Method::Patch, "/mmds", NO_MMDS),
    lacking(Method::Put, "/mmds/config", NO_MMDS),
    lacking(Method::Get, "/hotplug/memory", NO_HOTPLUG),
    lacking(Method::Put, "/hotplug/memory", NO_HOTPLUG),
    lacking(Method::Patch, "/hotplug/memory", NO_HOTPLUG),
    lacking(Method::Put, "/pmem/{id}", NO_PMEM),
    lacking(Method::Patch, "/pmem/{id}", NO_PMEM),
];

const fn get(path: &'static str, request: fn() -> Request) -> Route {
    Route { method: Method::Get, path, parse: Parse::Plain(request) }
}

const fn put(path: &'static str, parse: fn(&[u8]) -> Result<Request, Refusal>) -> Route {
    Route { method: Method::Put, path, parse: Parse::Body(parse) }
}

const fn patch(path: &'static str, parse: fn(&[u8]) -> Result<Request, Refusal>) -> Route {
    Route { method: Method::Patch, path, parse: Parse::Body(parse) }
}

const fn optional(path: &'static str, parse: fn(&[u8]) -> Result<Request, Refusal>) -> Route {
    Route { method: Method::Put, path, parse: Parse::Optional(parse) }
}

const fn lacking(method: Method, path: &'static str, reason: &'static str) -> Route {
    Route { method, path, parse: Parse::Lacking(reason) }
}

/// `{}`.
#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Nothing {}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Refusal> {
    serde_json::from_slice(body).map_err(|error| {
        Refusal::new(format!(
            "An error occurred when deserializing the json body of a request: {error}."
        ))
    })
}

/// Names are of letters, digits and underscores, and the same in path and body.
fn check_id(of_path: &str, of_body: &str) -> Result<(), Refusal> {
    const MOST: usize = 64;
    let is_name = |name: &str| name.chars().all(|c| c == '_' || c.is_ascii_alphanumeric());
    if of_path.is_empty() || of_path.len() > MOST || !is_name(of_path) {
        return Err(Refusal::new(format!(
            "API Resource IDs can only contain alphanumeric characters and underscores, 1 to {MOST} of them."
        )));
    }
    match of_path == of_body {
        true => Ok(()),
        false => Err(Refusal::new("The id from the path does not match the id from the body!")),
    }
}

/// Makes a request. `None` stands for a method that Firecracker's interface does not have.
pub fn request(method: Option<Method>, path: &str, body: &[u8]) -> Request {
    let unknown = || {
        let method = method.map_or_else(|| "Unknown".into(), |method| method.to_string());
        Refusal::new(format!("Invalid request method and/or path: {method} {path}."))
    };
    let result = ROUTES
        .iter()
        .filter(|route| Some(route.method) == method)
        .find_map(|route| Some((route, name_in(route.path, path)?)))
        .ok_or_else(unknown)
        .and_then(|(route, name)| route.request(name, body));
    result.unwrap_or_else(Request::from)
}

impl Route {
    /// Whether Firecracker has it and this program does not.
    pub fn is_lacking(&self) -> bool {
        matches!(self.parse, Parse::Lacking(_))
    }

    fn request(&self, name: &str, body: &[u8]) -> Result<Request, Refusal> {
        let needs_body = matches!(self.parse, Parse::Body(_) | Parse::Named(_));
        match (&self.parse, body) {
            (Parse::Lacking(reason), _) => Err(Refusal::new(*reason)),
            (Parse::Plain(request), []) => Ok(request()),
            (Parse::Plain(_), _) => Err(Refusal::new("GET request cannot have a body.")),
            (_, []) if needs_body => Err(Refusal::new(format!("Empty {} request.", self.method))),
            (Parse::Optional(parse), []) => parse(b"{}"),
            (Parse::Body(parse) | Parse::Optional(parse), body) => parse(body),
            (Parse::Named(parse), body) => parse(name, body),
        }
    }
}

/// What stands in `path` for the name in `pattern`, if it fits: an empty text if the pattern has no name.
fn name_in<'a>(pattern: &str, path: &'a str) -> Option<&'a str> {
    let path = path.strip_suffix('/').unwrap_or(path);
    match pattern.split_once('{') {
        Some((start, _)) => path.strip_prefix(start).filter(|name| !name.contains('/')),
        None => (pattern.strip_suffix('/').unwrap_or(pattern) == path).then_some(""),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(method: Method, path: &str, body: &str) -> String {
        match request(Some(method), path, body.as_bytes()) {
            Request::Refused { reason, too_long: false } => reason,
            other => panic!("{method} {path} {body} is {other:?}"),
        }
    }

    #[test]
    fn every_route_is_found_by_its_own_path() {
        for route in ROUTES {
            let path = route.path.split('{').next().unwrap();
            let path = if path == route.path { path.to_owned() } else { format!("{path}name") };
            let made = request(Some(route.method), &path, b"");
            if let Request::Refused { reason, .. } = made {
                assert!(
                    !reason.starts_with("Invalid request"),
                    "{} {path}: {reason}",
                    route.method
                );
            }
        }
    }

    #[test]
    fn what_is_no_route_is_refused_as_firecracker_does() {
        let check = |method, path: &str| {
            let expected = format!("Invalid request method and/or path: {method} {path}.");
            assert_eq!(refusal(method, path, "{}"), expected);
        };
        check(Method::Get, "/nothing");
        check(Method::Put, "/version");
        check(Method::Put, "/drives/a/b");
        check(Method::Put, "/cleanslate");
    }

    #[test]
    fn a_drive_has_one_name() {
        let put = |path: &str, id: &str| {
            let body =
                format!(r#"{{"drive_id":"{id}","is_root_device":false,"path_on_host":"/d"}}"#);
            request(Some(Method::Put), path, body.as_bytes())
        };
        assert!(matches!(put("/drives/root_1", "root_1"), Request::PutDrive(_)));
        assert!(matches!(put("/drives/root", "other"), Request::Refused { .. }));
        assert!(matches!(put("/drives/ro-ot", "ro-ot"), Request::Refused { .. }));
        assert!(matches!(put("/drives/", ""), Request::Refused { .. }));
    }

    #[test]
    fn bodies_are_there_where_they_belong() {
        assert_eq!(refusal(Method::Get, "/version", "{}"), "GET request cannot have a body.");
        assert_eq!(refusal(Method::Put, "/vsock", ""), "Empty PUT request.");
        assert_eq!(refusal(Method::Patch, "/vm", ""), "Empty PATCH request.");
        assert_eq!(request(Some(Method::Put), "/cleanslate/reset", b""), Request::Reset);
        assert_eq!(request(Some(Method::Put), "/cleanslate/reset", b"{}"), Request::Reset);
        assert_eq!(request(Some(Method::Put), "/cleanslate/nmi", b""), Request::Nmi);
    }

    #[test]
    fn deep_and_broken_json_is_a_refusal() {
        let deep = "[".repeat(100_000);
        for body in [deep.as_str(), "{", "\u{0}", "null", "{\"state\":\"Paused\",\"x\":1}"] {
            let reason = refusal(Method::Patch, "/vm", body);
            assert!(reason.starts_with("An error occurred when deserializing"), "{reason}");
        }
        assert!(matches!(
            request(Some(Method::Patch), "/vm", b"{\"state\":\"\xff\"}"),
            Request::Refused { .. }
        ));
    }
}
