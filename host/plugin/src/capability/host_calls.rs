//! The functions guests import, each one question. Converts and decides nothing.

use galerne_core::capability::{Ask, CapabilityError, HttpRequest, LogLevel, Reply};

use crate::bindings::http::galerne::http::client as http;
use crate::bindings::kv::galerne::kv::store as kv;
use crate::bindings::log::galerne::log::logging as log;
use crate::bindings::secrets::galerne::secrets::vault as secrets;
use crate::capability::asking::OverLimit;
use crate::limiter::StoreState;

/// An answer to another question than was asked: whoever answers is broken.
pub(super) fn mixed_up(reply: &Reply) -> CapabilityError {
    tracing::error!(?reply, "bug of the host: the answer to another question");
    CapabilityError::Failed("bug of the host: the answer to another question".to_owned())
}

impl log::Host for StoreState {
    fn log(&mut self, level: log::Level, message: String) -> wasmtime::Result<()> {
        let level = match level {
            log::Level::Debug => LogLevel::Debug,
            log::Level::Info => LogLevel::Info,
            log::Level::Warn => LogLevel::Warn,
            log::Level::Error => LogLevel::Error,
        };
        match self.asking().ask(Ask::Log { level, message }) {
            Err(CapabilityError::Limit(limit) | CapabilityError::Over(limit)) => Err(OverLimit(limit).into()),
            // What cannot be written is no reason to end a request.
            Ok(_) | Err(_) => Ok(()),
        }
    }
}

impl http::Host for StoreState {
    fn send(&mut self, request: http::Request) -> Result<http::Response, http::Error> {
        let request = HttpRequest {
            method: request.method,
            url: request.url,
            headers: request.headers,
            body: request.body,
        };
        match self.asking().ask(Ask::Http(request)) {
            Ok(Reply::Http(response)) => Ok(http::Response {
                status: response.status,
                headers: response.headers,
                body: response.body,
            }),
            Ok(other) => Err(http_error(mixed_up(&other))),
            Err(error) => Err(http_error(error)),
        }
    }
}

fn http_error(error: CapabilityError) -> http::Error {
    match error {
        CapabilityError::Denied(text) => http::Error::Denied(text),
        CapabilityError::Invalid(text) => http::Error::Invalid(text),
        CapabilityError::Limit(text) => http::Error::Limit(text),
        CapabilityError::Timeout(text) => http::Error::Timeout(text),
        CapabilityError::Failed(text) | CapabilityError::Over(text) => http::Error::Failed(text),
    }
}

impl kv::Host for StoreState {
    fn get(&mut self, key: String) -> Result<Option<Vec<u8>>, kv::Error> {
        match self.asking().ask(Ask::KvGet(key)).map_err(kv_error)? {
            Reply::Value(value) => Ok(value),
            other => Err(kv_error(mixed_up(&other))),
        }
    }

    fn set(&mut self, key: String, value: Vec<u8>) -> Result<(), kv::Error> {
        match self.asking().ask(Ask::KvSet { key, value }).map_err(kv_error)? {
            Reply::Done => Ok(()),
            other => Err(kv_error(mixed_up(&other))),
        }
    }

    fn delete(&mut self, key: String) -> Result<(), kv::Error> {
        match self.asking().ask(Ask::KvDelete(key)).map_err(kv_error)? {
            Reply::Done => Ok(()),
            other => Err(kv_error(mixed_up(&other))),
        }
    }

    fn keys(&mut self, prefix: String, after: String) -> Result<Vec<String>, kv::Error> {
        match self
            .asking()
            .ask(Ask::KvList { prefix, after })
            .map_err(kv_error)?
        {
            Reply::Keys(keys) => Ok(keys),
            other => Err(kv_error(mixed_up(&other))),
        }
    }
}

fn kv_error(error: CapabilityError) -> kv::Error {
    match error {
        CapabilityError::Invalid(text) => kv::Error::Invalid(text),
        CapabilityError::Limit(text) => kv::Error::Limit(text),
        CapabilityError::Denied(text)
        | CapabilityError::Timeout(text)
        | CapabilityError::Failed(text)
        | CapabilityError::Over(text) => kv::Error::Failed(text),
    }
}

impl secrets::Host for StoreState {
    fn get(&mut self, name: String) -> Result<String, secrets::Error> {
        match self.asking().ask(Ask::Secret(name)) {
            Ok(Reply::Secret(value)) => Ok(value),
            Ok(other) => Err(secrets::Error::Failed(mixed_up(&other).to_string())),
            Err(CapabilityError::Denied(text)) => Err(secrets::Error::Denied(text)),
            Err(other) => Err(secrets::Error::Failed(other.to_string())),
        }
    }
}
