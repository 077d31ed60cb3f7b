//! Answers guests' questions in this process, for one deployment: what is granted, and what each request has used.

use std::sync::Arc;
use std::time::{Duration, Instant};

use galerne_core::capability::{
    Ask, Capabilities, CapabilityError, CapabilitySession, Grants, HttpRequest, KvStore, LogLevel, LogLine,
    LogTail, Reply, SecretName, SecretSource,
};
use galerne_core::filter::RequestInfo;
use galerne_core::limits::{Allowance, CapabilityLimits};

use crate::capability::log::{GuestLog, escaped, time_ms};
use crate::http::HttpClient;

/// What a [`HostCapabilities`] is made of.
pub struct CapabilityParts {
    /// Whose the deployment is; for the log.
    pub tenant: String,
    /// Its name; for the log.
    pub deployment: String,
    /// What its guests may do.
    pub grants: Grants,
    /// How much of it.
    pub allowance: Allowance,
    /// Keeps their lines.
    pub log: Arc<GuestLog>,
    /// Makes their calls. One for all deployments.
    pub http: Arc<HttpClient>,
    /// The tenant's.
    pub kv: Arc<dyn KvStore>,
    /// The tenant's.
    pub secrets: Arc<dyn SecretSource>,
}

/// The capabilities of one deployment's guests. Cloning is cheap.
#[derive(Clone)]
pub struct HostCapabilities {
    parts: Arc<CapabilityParts>,
}

impl std::fmt::Debug for HostCapabilities {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HostCapabilities")
            .field("tenant", &self.parts.tenant)
            .field("deployment", &self.parts.deployment)
            .field("grants", &self.parts.grants)
            .finish_non_exhaustive()
    }
}

impl HostCapabilities {
    /// From its parts.
    #[must_use]
    pub fn new(parts: CapabilityParts) -> Self {
        Self {
            parts: Arc::new(parts),
        }
    }
}

impl Capabilities for HostCapabilities {
    fn grants(&self) -> &Grants {
        &self.parts.grants
    }

    fn allowance(&self) -> &Allowance {
        &self.parts.allowance
    }

    fn session(&self, guest: &str, info: &RequestInfo) -> Box<dyn CapabilitySession> {
        Box::new(Session {
            parts: Arc::clone(&self.parts),
            guest: guest.to_owned(),
            request: info.id.clone(),
            log_bytes: 0,
            http_calls: 0,
        })
    }

    fn log_after(&self, number: u64) -> LogTail {
        self.parts.log.after(number)
    }
}

/// What one guest uses in one request.
struct Session {
    parts: Arc<CapabilityParts>,
    guest: String,
    request: String,
    log_bytes: usize,
    http_calls: u32,
}

impl CapabilitySession for Session {
    fn ask(&mut self, ask: Ask, time_left: Duration) -> Result<Reply, CapabilityError> {
        let grants = &self.parts.grants;
        // A guest in this process cannot import what is not granted; one in another process may ask anything.
        match &ask {
            Ask::Log { .. } if !grants.log => return Err(not_granted("log = true")),
            Ask::KvGet(_) | Ask::KvSet { .. } | Ask::KvDelete(_) | Ask::KvList { .. } if !grants.kv => {
                return Err(not_granted("kv = true"));
            }
            // Hosts and secrets are granted one by one.
            _ => {}
        }
        match ask {
            Ask::Log { level, message } => self.log(level, &message),
            Ask::Http(request) => self.http(request, time_left),
            Ask::KvGet(key) => self.parts.kv.get(&key).map(Reply::Value),
            Ask::KvSet { key, value } => {
                let set = self.parts.kv.set(&key, &value, &self.parts.allowance);
                set.map(|()| Reply::Done)
            }
            Ask::KvDelete(key) => self.parts.kv.delete(&key).map(|()| Reply::Done),
            Ask::KvList { prefix, after } => {
                let listed_max = self.limits().kv.listed_max;
                self.parts.kv.list(&prefix, &after, listed_max).map(Reply::Keys)
            }
            Ask::Secret(name) => self.secret(&name),
            Ask::Pipeline(_) => Err(CapabilityError::Denied(
                "only pipelines may ask the model".to_owned(),
            )),
            Ask::Grammar(_) => Err(CapabilityError::Denied(
                "only samplers may ask for grammars".to_owned(),
            )),
        }
    }
}

fn not_granted(grant: &str) -> CapabilityError {
    CapabilityError::Denied(format!(
        "not granted; to grant it, write {grant} in the table [capabilities] of the deployment"
    ))
}

impl Session {
    fn limits(&self) -> &CapabilityLimits {
        &self.parts.allowance.limits.capability
    }

    fn log(&mut self, level: LogLevel, message: &str) -> Result<Reply, CapabilityError> {
        let parts = &self.parts;
        self.log_bytes = self.log_bytes.saturating_add(message.len());
        let limit_bytes = self.limits().log_request_bytes_max;
        if self.log_bytes > limit_bytes {
            return Err(CapabilityError::Limit(format!(
                "log lines of at most {limit_bytes} bytes per request ({})",
                parts.allowance.who("log_request_bytes_max")
            )));
        }
        let line = LogLine {
            // Given when it is kept.
            number: 0,
            time_ms: time_ms(),
            level,
            guest: self.guest.clone(),
            request: self.request.clone(),
            text: escaped(message, self.limits().log_line_bytes_max),
        };
        if let Some(line) = parts.log.push(Instant::now(), line) {
            trace(parts, &line);
        }
        Ok(Reply::Done)
    }

    fn http(&mut self, request: HttpRequest, time_left: Duration) -> Result<Reply, CapabilityError> {
        let allowance = &self.parts.allowance;
        let calls_max = self.limits().http_calls_max;
        if self.http_calls >= calls_max {
            return Err(CapabilityError::Limit(format!(
                "http: at most {calls_max} calls of a guest per request ({})",
                allowance.who("http_calls_max")
            )));
        }
        self.http_calls += 1;
        let time_left = time_left.min(self.limits().http_time_max);
        let response = self
            .parts
            .http
            .send(request, &self.parts.grants.http, allowance, time_left)?;
        Ok(Reply::Http(response))
    }

    fn secret(&self, name: &str) -> Result<Reply, CapabilityError> {
        let known = SecretName::new(name).ok();
        let granted = known.filter(|name| self.parts.grants.secrets.contains(name));
        let Some(name) = granted else {
            let name = escaped(name, 64);
            return Err(not_granted(&format!("secrets = [\"{name}\"]")));
        };
        let value = self.parts.secrets.secret(&name)?;
        let (bytes, bytes_max) = (value.len(), self.limits().secret_bytes_max);
        if bytes > bytes_max {
            return Err(CapabilityError::Failed(format!(
                "secret {}: expected at most {bytes_max} bytes (secret_bytes_max), it has {bytes}",
                name.as_str()
            )));
        }
        Ok(Reply::Secret(value))
    }
}

/// To the host's own log. The level of a tracing event cannot be a variable.
fn trace(parts: &CapabilityParts, line: &LogLine) {
    macro_rules! event {
        ($level:ident) => {
            tracing::$level!(
                target: "galerne_guest",
                tenant = %parts.tenant,
                deployment = %parts.deployment,
                guest = %line.guest,
                request = %line.request,
                "{}",
                line.text
            )
        };
    }
    match line.level {
        LogLevel::Debug => event!(debug),
        LogLevel::Info => event!(info),
        LogLevel::Warn => event!(warn),
        LogLevel::Error => event!(error),
    }
}
