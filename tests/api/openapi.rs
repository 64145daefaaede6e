//! The OpenAPI document and the server say the same: each path and method of one is the other's, and bodies fit their schemas.

use std::collections::BTreeSet;

use serde_json::{Value, json};
use vmm::api::route::ROUTES;

use super::with_agent;
use crate::harness::api::{Api, Response, request};

fn document() -> Value {
    serde_json::from_str(include_str!("../../vmm/openapi.json")).unwrap()
}

/// Each operation: its method in upper case, its path, and itself.
fn operations(document: &Value) -> Vec<(String, String, &Value)> {
    let mut all = Vec::new();
    for (path, methods) in document["paths"].as_object().unwrap() {
        for (method, operation) in methods.as_object().unwrap() {
            all.push((method.to_uppercase(), path.clone(), operation));
        }
    }
    all
}

/// Why `value` does not fit `schema`: JSON Schema, as far as the document uses it. What it uses beyond is a failure of the test.
fn misfit(document: &Value, schema: &Value, value: &Value) -> Option<String> {
    const KNOWN: [&str; 10] = [
        "$ref",
        "anyOf",
        "type",
        "enum",
        "minimum",
        "maximum",
        "items",
        "properties",
        "required",
        "additionalProperties",
    ];
    let fields = schema.as_object().unwrap();
    let unknown = fields.keys().find(|key| !KNOWN.contains(&key.as_str()) && *key != "description");
    assert!(unknown.is_none(), "the test does not know {unknown:?}");
    if let Some(reference) = schema["$ref"].as_str() {
        let target = document.pointer(reference.strip_prefix('#').unwrap());
        let target = target.unwrap_or_else(|| panic!("{reference} leads nowhere"));
        return misfit(document, target, value);
    }
    if let Some(choices) = schema["anyOf"].as_array() {
        let fits = choices.iter().any(|choice| misfit(document, choice, value).is_none());
        return (!fits).then(|| format!("{value} fits none of {choices:?}"));
    }
    let kind = match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(number) if number.is_i64() || number.is_u64() => "integer",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    };
    let of_kind = match &schema["type"] {
        Value::String(wanted) => wanted == kind,
        Value::Array(wanted) => wanted.contains(&json!(kind)),
        _ => true,
    };
    let is_listed = schema["enum"].as_array().is_none_or(|listed| listed.contains(value));
    let above = |limit: &Value| limit.as_i64().is_some_and(|limit| value.as_i64() < Some(limit));
    let below = |limit: &Value| limit.as_i64().is_some_and(|limit| value.as_i64() > Some(limit));
    let in_range = kind != "integer" || !above(&schema["minimum"]) && !below(&schema["maximum"]);
    if !of_kind || !is_listed || !in_range {
        return Some(format!("{value} is not {schema}"));
    }
    for item in value.as_array().into_iter().flatten() {
        if let Some(why) = misfit(document, &schema["items"], item) {
            return Some(why);
        }
    }
    let object = value.as_object()?;
    for name in schema["required"].as_array().into_iter().flatten() {
        if !object.contains_key(name.as_str().unwrap()) {
            return Some(format!("{value} lacks {name}"));
        }
    }
    object.iter().find_map(|(name, value)| match schema["properties"].get(name) {
        Some(schema) => misfit(document, schema, value).map(|why| format!("{name}: {why}")),
        None if schema["additionalProperties"] == json!(false) => {
            Some(format!("{name} is not in the schema"))
        }
        None => None,
    })
}

/// Fails unless the document has the answer.
#[track_caller]
fn expect_fit(document: &Value, operation: &Value, response: &Response) {
    let responses = &operation["responses"];
    let status = response.status.to_string();
    let described = responses.get(&status).unwrap_or(&responses["default"]);
    assert!(described.is_object(), "{status} is not described: {response:?}");
    match described["content"].as_object() {
        None => assert_eq!(response.body, "", "{response:?}"),
        Some(contents) => {
            let (kind, content) = contents.iter().next().unwrap();
            assert!(response.head.contains(&format!("content-type: {kind}")), "{response:?}");
            if kind == "application/json" {
                let why = misfit(document, &content["schema"], &response.json());
                assert!(why.is_none(), "{why:?}: {response:?}");
            }
        }
    }
}

#[test]
fn the_document_has_every_route_and_no_other() {
    let document = document();
    let described: BTreeSet<_> =
        operations(&document).into_iter().map(|(method, path, _)| (method, path)).collect();
    let routed: BTreeSet<_> =
        ROUTES.iter().map(|route| (route.method.to_string(), route.path.to_owned())).collect();
    assert_eq!(described, routed);
}

#[test]
fn the_document_says_which_routes_are_only_refused() {
    let document = document();
    for (method, path, operation) in operations(&document) {
        let route = ROUTES.iter().find(|r| r.method.to_string() == method && r.path == path);
        let only_refused = operation["responses"].as_object().unwrap().keys().eq(["400"]);
        assert_eq!(only_refused, route.unwrap().is_lacking(), "{method} {path}");
    }
}

/// Asks for everything and compares what comes with the document.
#[track_caller]
fn ask_for_everything(api: &Api) {
    let document = document();
    for (method, path, operation) in operations(&document) {
        let path = match path.split_once('{') {
            Some((start, _)) => format!("{start}name"),
            None => path,
        };
        for body in [&b""[..], b"{}", b"{\"no such field\":1}", b"[1]"] {
            // Its only use is to end what others look at.
            if path == "/actions" || (path == "/cleanslate/reset" && body.len() < 3) {
                continue;
            }
            let response = request(&api.socket, &method, &path, body);
            assert!(!response.body.contains("Invalid request method"), "{method} {path}");
            expect_fit(&document, operation, &response);
        }
    }
}

#[test]
fn every_answer_is_as_the_document_says_before_and_after_the_start() {
    let api = Api::start();
    ask_for_everything(&api);
    api.end();
    let api = with_agent();
    ask_for_everything(&api);
    api.end();
}

/// An example for each body; with what the document and the server think of it.
#[test]
fn the_document_and_the_server_take_the_same_bodies() {
    let api = Api::start();
    let socket = api.path("v");
    let file = api.path("file");
    std::fs::write(&file, [0; 512]).unwrap();
    let good = [
        (
            "PUT",
            "/machine-config",
            json!({ "vcpu_count": 2, "mem_size_mib": 64, "smt": false, "track_dirty_pages": false }),
        ),
        ("PATCH", "/machine-config", json!({ "vcpu_count": 1 })),
        ("PUT", "/boot-source", json!({ "kernel_image_path": file, "boot_args": "x" })),
        (
            "PUT",
            "/drives/{drive_id}",
            json!({ "drive_id": "name", "is_root_device": true, "path_on_host": file, "is_read_only": true, "io_engine": "Async", "cache_type": "Writeback" }),
        ),
        ("PUT", "/entropy", json!({ "rate_limiter": null })),
        ("PUT", "/vsock", json!({ "guest_cid": 3, "uds_path": socket })),
        ("PUT", "/logger", json!({ "level": "Info", "show_level": true })),
        ("PUT", "/metrics", json!({ "metrics_path": api.path("metrics") })),
        ("PUT", "/serial", json!({ "serial_out_path": null })),
        (
            "PUT",
            "/cpu-config",
            json!({ "kvm_capabilities": ["1"], "msr_modifiers": [{ "addr": "0x10", "bitmap": "0b1" }] }),
        ),
        (
            "PUT",
            "/cleanslate/machine",
            json!({ "pmu": "off", "on_guest_reset": "end", "dma_audit": "report" }),
        ),
    ];
    let document = document();
    let schema = |method: &str, path: &str| {
        let operation = &document["paths"][path][method.to_lowercase()];
        operation["requestBody"]["content"]["application/json"]["schema"].clone()
    };
    for (method, path, body) in good {
        let schema = schema(method, path);
        let why = misfit(&document, &schema, &body);
        assert!(why.is_none(), "{path}: {why:?}");
        let target = path.replace("{drive_id}", "name");
        request(&api.socket, method, &target, body.to_string().as_bytes()).expect_done();
        // Each field with a value of another kind is refused by both.
        for name in body.as_object().unwrap().keys() {
            let mut wrong = body.clone();
            wrong[name] = json!({ "not": ["this"] });
            assert!(misfit(&document, &schema, &wrong).is_some(), "{path} {name}");
            let refused = request(&api.socket, method, &target, wrong.to_string().as_bytes());
            refused.expect_refused("");
        }
    }
    let why = misfit(
        &document,
        &json!({ "$ref": "#/components/schemas/VmConfig" }),
        &api.get_json("/vm/config"),
    );
    assert!(why.is_none(), "{why:?}");
    api.end();
}
