//! Tools that misbehave: how, by the parameter `misbehave`; in which call, by the parameter `in`.

use galerne_sdk::json::{Value, json};
use galerne_sdk::tool::{Error, RequestInfo, Tool, Tools, tool};

use crate::{hoard, recurse, spin};

/// More than an answer may have, and less than a call may pass to the host.
const LARGE_BYTES: usize = 1 << 20;
/// More than one call may pass to the host.
const GIGANTIC_BYTES: usize = 20 << 20;

struct HostileTools;

impl Tools for HostileTools {
    fn list(params: &Value) -> Result<Vec<Tool>, String> {
        misbehave(params, "list");
        let schema = json!({"type": "object"});
        let named = |name: &str| tool(name, "", &schema);
        Ok(match word(params, "misbehave") {
            "million" => (0..1_000_000).map(|_| named("a")).collect(),
            "hundred" => (0..100).map(|number| named(&format!("f{number}"))).collect(),
            "wordy" => vec![tool("a", &"x".repeat(LARGE_BYTES), &schema)],
            "twins" => vec![named("a"), named("a")],
            "name" => vec![named("drop table")],
            "schema" => vec![Tool {
                parameters_json: "{type: object}".to_owned(),
                ..named("a")
            }],
            "list-schema" => vec![tool("a", "", &json!([]))],
            "refuse" => return Err("no\nparameters\nplease".to_owned()),
            _ => vec![named("a")],
        })
    }

    fn call(params: &Value, _: &RequestInfo, _: &str, _: &Value) -> Result<String, Error> {
        misbehave(params, "call");
        match word(params, "misbehave") {
            "large" => Ok("x".repeat(LARGE_BYTES)),
            "gigantic" => Ok("x".repeat(GIGANTIC_BYTES)),
            "wordy-error" => Err(Error::Failed("x".repeat(LARGE_BYTES))),
            _ => Ok("all is well".to_owned()),
        }
    }
}

fn word<'a>(params: &'a Value, name: &str) -> &'a str {
    params[name].as_str().unwrap_or_default()
}

/// Does what any call can do, if this is the one.
fn misbehave(params: &Value, call: &str) {
    if word(params, "in") != call {
        return;
    }
    match word(params, "misbehave") {
        "loop" => spin(),
        "trap" => panic!("the guest gives up"),
        "alloc" => hoard(),
        "recurse" => {
            recurse(1);
        }
        _ => {}
    }
}

galerne_sdk::export_tool!(HostileTools);
