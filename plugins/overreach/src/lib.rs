//! A tool that asks the host for what its arguments say, as often as they say: for tests of capabilities.
//!
//! Arguments: `do`, a word; `text`, what to do it with; `times`, how often (once if left out). It stops at the first error.

use galerne_sdk::json::{Value, json};
use galerne_sdk::tool::{Error, RequestInfo, Tool, Tools, text_argument, tool};
use galerne_sdk::{http, kv, log, secrets};

struct Overreach;

impl Tools for Overreach {
    fn list(_: &Value) -> Result<Vec<Tool>, String> {
        Ok(vec![tool("ask", "", &json!({"type": "object"}))])
    }

    fn call(_: &Value, _: &RequestInfo, _: &str, arguments: &Value) -> Result<String, Error> {
        let (word, text) = (text_argument(arguments, "do")?, text_argument(arguments, "text")?);
        let times = arguments["times"].as_u64().unwrap_or(1);
        let mut answer = String::new();
        for number in 0..times {
            answer =
                ask(word, text, number).map_err(|error| Error::Failed(format!("after {number}: {error}")))?;
        }
        Ok(answer)
    }
}

fn ask(word: &str, text: &str, number: u64) -> Result<String, String> {
    let stored = |error: kv::Error| kv::reason(&error).to_owned();
    match word {
        "log" => log::info(text),
        "get" => return get(text),
        "post" => return post(text),
        "secret" => return secrets::get(text).map_err(|error| secrets::reason(&error).to_owned()),
        "kv-get" => {
            let value = kv::get(text).map_err(stored)?;
            return Ok(value.map_or("nothing".to_owned(), |value| {
                String::from_utf8_lossy(&value).into_owned()
            }));
        }
        "kv-set" => kv::set(&format!("{text}{number}"), b"value").map_err(stored)?,
        "kv-set-large" => kv::set(text, &vec![b'x'; 1 << 20]).map_err(stored)?,
        "kv-delete" => kv::delete(text).map_err(stored)?,
        "kv-keys" => return kv::keys(text, "").map(|keys| keys.join(" ")).map_err(stored),
        other => return Err(format!("do: expected a known word, got \"{other}\"")),
    }
    Ok("done".to_owned())
}

fn get(url: &str) -> Result<String, String> {
    let headers = [("authorization", "Bearer token"), ("accept", "text/plain")];
    shown(http::get(url, &headers))
}

/// Posts to the URL the letter x, a mebibyte of it behind a `#`.
fn post(url: &str) -> Result<String, String> {
    let (url, large) = match url.split_once('#') {
        Some((url, _)) => (url, true),
        None => (url, false),
    };
    shown(http::send(&http::Request {
        method: "POST".to_owned(),
        url: url.to_owned(),
        headers: vec![],
        body: vec![b'x'; if large { 1 << 20 } else { 1 }],
    }))
}

fn shown(response: Result<http::Response, http::Error>) -> Result<String, String> {
    let response = response.map_err(|error| format!("{error:?}"))?;
    Ok(format!(
        "{} {}",
        response.status,
        String::from_utf8_lossy(&response.body)
    ))
}

galerne_sdk::export_tool!(Overreach);
