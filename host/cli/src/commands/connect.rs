//! Connecting to a host over HTTP/3, and asking its admin routes. Knows no command.

use std::path::PathBuf;

use anyhow::{Context, Result, anyhow, bail};
use bytes::Bytes;
use clap::Args;
use galerne_server::client::Client;
use galerne_server::client::connect::ClientOptions;
use galerne_server::error::ClientError;
use http::header::{AUTHORIZATION, CONTENT_TYPE};
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use serde_json::Value;

use crate::admin_token;
use crate::config::DataArgs;

/// Longest answer of an admin route.
const ANSWER_BYTES_MAX: usize = 16 << 20;

/// Which host.
#[derive(Debug, Clone, Args)]
pub(super) struct ServerArgs {
    /// The host
    #[arg(long, value_name = "URL", default_value = "https://localhost:8443")]
    pub(super) server: String,
    /// Certificate to trust, in PEM [default: the data folder's development certificate]
    #[arg(long, value_name = "FILE", conflicts_with = "insecure")]
    ca: Option<PathBuf>,
    /// Trust any certificate: only for tests
    #[arg(long)]
    insecure: bool,
}

impl ServerArgs {
    /// How to connect.
    pub(super) fn options(&self, data: &DataArgs) -> Result<ClientOptions> {
        let ca = match (&self.ca, self.insecure) {
            (Some(file), _) => Some(file.clone()),
            (None, true) => None,
            (None, false) => Some(data.folder()?.join("tls/cert.pem")).filter(|file| file.exists()),
        };
        Ok(ClientOptions {
            insecure: self.insecure,
            ..ClientOptions::new(self.server.clone(), ca)
        })
    }
}

/// Which host, whose plugins and deployments, and the right to change them.
#[derive(Debug, Clone, Args)]
pub(super) struct AdminArgs {
    #[command(flatten)]
    server: ServerArgs,
    /// The host's admin token [default: the data folder's]
    #[arg(
        long,
        value_name = "TOKEN",
        env = "GALERNE_ADMIN_TOKEN",
        hide_env_values = true
    )]
    admin_token: Option<String>,
    /// Whose plugins and deployments
    #[arg(long, value_name = "NAME", default_value = "default")]
    tenant: String,
}

/// A question to an admin route.
pub(super) struct AdminRequest {
    pub(super) method: Method,
    /// Below `/v1/admin`.
    pub(super) path: String,
    /// Names and values; both need no escaping.
    pub(super) query: Vec<(&'static str, String)>,
    pub(super) body: Vec<u8>,
}

impl AdminRequest {
    pub(super) fn get(path: impl Into<String>) -> Self {
        Self {
            method: Method::GET,
            path: path.into(),
            query: Vec::new(),
            body: Vec::new(),
        }
    }

    pub(super) fn post(path: impl Into<String>, body: Vec<u8>) -> Self {
        Self {
            method: Method::POST,
            body,
            ..Self::get(path)
        }
    }
}

impl AdminArgs {
    /// Asks, and gives the answer's JSON; what the host refuses is an error in its words.
    pub(super) fn ask(&self, data: &DataArgs, request: AdminRequest) -> Result<Value> {
        let (path, headers) = self.head(data, &request)?;
        let (status, body) = runtime()?.block_on(async {
            let client = Client::connect(self.server.options(data)?).await?;
            let answer = client
                .request(request.method, &path, headers, Bytes::from(request.body))
                .await?;
            let status = answer.status;
            anyhow::Ok((status, answer.bytes(ANSWER_BYTES_MAX).await?))
        })?;
        let answer: Value = serde_json::from_slice(&body).unwrap_or(Value::Null);
        if status.is_success() {
            return Ok(answer);
        }
        Err(refused(&answer, status))
    }

    /// Asks, and gives each event's JSON to `take` as it comes, until the host ends.
    pub(super) fn follow(
        &self,
        data: &DataArgs,
        request: AdminRequest,
        mut take: impl FnMut(Value) -> Result<()>,
    ) -> Result<()> {
        let (path, headers) = self.head(data, &request)?;
        runtime()?.block_on(async {
            let client = Client::connect(self.server.options(data)?).await?;
            let events = client.events(request.method, &path, headers, Bytes::from(request.body));
            let mut events = match events.await {
                Err(ClientError::Status { status, body }) => {
                    return Err(refused(&serde_json::from_str(&body).unwrap_or_default(), status));
                }
                events => events?,
            };
            while let Some(event) = events.next().await? {
                let value: Value = serde_json::from_str(&event.data).context("read an event")?;
                match value["error"]["message"].as_str() {
                    Some(message) => bail!("{message}"),
                    None => take(value)?,
                }
            }
            Ok(())
        })
    }

    /// Path and headers of a request.
    fn head(&self, data: &DataArgs, request: &AdminRequest) -> Result<(String, HeaderMap)> {
        let token = match &self.admin_token {
            Some(token) => token.clone(),
            None => admin_token::load(&data.folder()?)?,
        };
        let mut headers = HeaderMap::new();
        let mut bearer =
            HeaderValue::from_str(&format!("Bearer {token}")).context("--admin-token: not a token")?;
        bearer.set_sensitive(true);
        headers.insert(AUTHORIZATION, bearer);
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
        let mut path = format!("/v1/admin/{}?tenant={}", request.path, plain(&self.tenant)?);
        for (name, value) in &request.query {
            path.push_str(&format!("&{name}={}", plain(value)?));
        }
        Ok((path, headers))
    }
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    Ok(builder.enable_all().build()?)
}

/// What the host refused, in its words.
fn refused(answer: &Value, status: StatusCode) -> anyhow::Error {
    match answer["error"]["message"].as_str() {
        Some(message) => anyhow!("{message}"),
        None => anyhow!("the host answered {status}"),
    }
}

/// A name or version as it stands in a query. What would need escaping is no name.
fn plain(text: &str) -> Result<&str> {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"._-+".contains(&byte);
    if text.bytes().all(fits) && !text.is_empty() {
        return Ok(text);
    }
    bail!("{text:?}: expected letters, digits, \".\", \"_\", \"-\" and \"+\"")
}
