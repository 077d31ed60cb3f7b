//! Requests over HTTP/3, the transport clients are meant to use. Knows no test.

use std::sync::OnceLock;

use bytes::Bytes;
use galerne_server::client::connect::ClientOptions;
use galerne_server::client::{Client, Response};
use http::{HeaderMap, Method};
use serde_json::Value;
use tokio::runtime::{Builder, Runtime};

use super::Host;

/// Longest answer a test reads.
const ANSWER_BYTES_MAX: usize = 64 << 20;

/// Drives all connections of a test's process, also when nobody waits for them.
fn runtime() -> &'static Runtime {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    RUNTIME.get_or_init(|| {
        let mut builder = Builder::new_multi_thread();
        builder.worker_threads(1).enable_all().build().expect("a runtime")
    })
}

/// An answer whose body is still coming. Dropping it cancels the request.
pub(crate) struct Answer {
    pub(crate) status: u16,
    response: Response,
    _client: Client,
}

impl Answer {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.response.headers.get(name)?.to_str().ok()
    }

    /// Waits for the first piece of the body.
    pub(crate) fn chunk(&mut self) -> Option<Bytes> {
        let chunk = runtime().block_on(self.response.chunk());
        chunk.expect("the stream goes on")
    }

    /// The rest of the body.
    pub(crate) fn text(self) -> String {
        let body = runtime().block_on(self.response.bytes(ANSWER_BYTES_MAX));
        String::from_utf8(body.expect("the body comes to its end").to_vec()).expect("text")
    }
}

/// An answer, once its header is there.
fn open(
    host: &Host,
    method: &str,
    path: &str,
    headers: HeaderMap,
    body: &str,
) -> impl Future<Output = Answer> + Send + 'static {
    let options = ClientOptions::new(host.https.clone(), Some(host.data.join("tls/cert.pem")));
    let method = Method::from_bytes(method.as_bytes()).expect("a method");
    let (path, body) = (path.to_owned(), Bytes::from(body.to_owned()));
    async move {
        let client = Client::connect(options).await.expect("connect over HTTP/3");
        let response = client.request(method, &path, headers, body).await;
        let response = response.expect("an answer over HTTP/3");
        Answer {
            status: response.status.as_u16(),
            response,
            _client: client,
        }
    }
}

/// Sends a request and waits for the answer's header.
pub(crate) fn begin(host: &Host, method: &str, path: &str, body: &str) -> Answer {
    runtime().block_on(open(host, method, path, HeaderMap::new(), body))
}

/// The answer of a route that needs the admin token.
pub(crate) fn authorized(host: &Host, path: &str, token: &str) -> Answer {
    let bearer = format!("Bearer {token}").parse().expect("a header");
    let headers = HeaderMap::from_iter([(http::header::AUTHORIZATION, bearer)]);
    runtime().block_on(open(host, "GET", path, headers, ""))
}

/// A whole exchange: status and body.
pub(crate) fn h3(host: &Host, method: &str, path: &str, body: &str) -> (u16, String) {
    let answer = begin(host, method, path, body);
    (answer.status, answer.text())
}

/// Begins to stream a chat completion.
pub(crate) fn stream(host: &Host, body: &Value) -> Answer {
    let mut body = body.clone();
    body["stream"] = Value::Bool(true);
    begin(host, "POST", "/v1/chat/completions", &body.to_string())
}

/// Asks for a streamed chat completion and goes away when `until` returns, whatever has come.
pub(crate) fn leaves(host: &Host, body: &Value, until: impl FnOnce()) {
    let mut body = body.clone();
    body["stream"] = Value::Bool(true);
    let (path, body) = ("/v1/chat/completions", body.to_string());
    let asking = runtime().spawn(open(host, "POST", path, HeaderMap::new(), &body));
    until();
    asking.abort();
}

/// The chunks of a whole stream, which ends as it should.
pub(crate) fn chunks(text: &str) -> Vec<Value> {
    assert!(text.trim_end().ends_with("data: [DONE]"), "cut off: {text}");
    text.lines()
        .filter_map(|line| serde_json::from_str(line.strip_prefix("data: ")?).ok())
        .collect()
}

/// The content of a stream's chunks.
pub(crate) fn streamed(chunks: &[Value]) -> String {
    chunks
        .iter()
        .filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str())
        .collect()
}
