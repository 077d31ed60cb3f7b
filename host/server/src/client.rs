//! HTTP/3 client for `galerne chat` and the tests; a plain one for measuring. Knows no routes and parses no JSON.

pub mod connect;
pub mod plain;
pub mod sse;

use std::future::poll_fn;
use std::net::SocketAddr;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use h3::client::{RequestStream, SendRequest};
use h3::error::StreamError;
use http::header::{ACCEPT, CONTENT_LENGTH, CONTENT_TYPE};
use http::{HeaderMap, HeaderValue, Method, Request, StatusCode, Uri};
use tokio::task::AbortHandle;

use self::connect::Target;
use self::sse::{SseEvent, SseParser};
use crate::error::ClientError;
use crate::quic::adapter::{OpenStreams, Shared};
use crate::quic::body::{BodyError, BodyReader};
use crate::quic::stream::{RecvStream, SendStream};

pub use self::connect::ClientOptions;

/// Largest event that a stream may carry.
const EVENT_BYTES_MAX: usize = 4 << 20;
/// As much of an error's body as is worth showing.
const ERROR_BODY_BYTES_MAX: usize = 64 << 10;
/// Body pieces of one write: cancelling waits for no more than this.
const SEND_PIECE_BYTES: usize = 64 << 10;
/// The event that ends an answer. A stream that ends without it was cut off.
const DONE: &str = "[DONE]";

/// One HTTP/3 connection. Cheap to share by reference; requests run side by side on it.
pub struct Client {
    sender: SendRequest<OpenStreams, Bytes>,
    shared: Arc<Shared>,
    quic: quinn::Connection,
    target: Target,
    server: SocketAddr,
    // Dropped last: it owns the socket.
    _endpoint: quinn::Endpoint,
}

impl Client {
    /// Connects, trying every address of the host at once.
    ///
    /// # Errors
    /// See [`ClientError`]; refused, untrusted, timed out and not HTTP/3 are told apart.
    pub async fn connect(options: ClientOptions) -> Result<Self, ClientError> {
        connect::connect(options).await
    }

    /// Address of the server.
    #[must_use]
    pub fn server(&self) -> SocketAddr {
        self.server
    }

    /// Smoothed round-trip time of the connection.
    #[must_use]
    pub fn rtt(&self) -> std::time::Duration {
        self.quic.rtt()
    }

    /// Sends a request and waits for the response's header. The body is sent in the background meanwhile.
    ///
    /// # Errors
    /// When the connection is gone, the server closes, or the request cannot be put into HTTP.
    pub async fn request(
        &self,
        method: Method,
        path: &str,
        headers: HeaderMap,
        body: Bytes,
    ) -> Result<Response, ClientError> {
        let is_head = method == Method::HEAD;
        let request = self.build(method, path, headers, &body)?;
        // The clone keeps the connection open for as long as this response lives, even past the client.
        let mut sender = self.sender.clone();
        let stream = sender
            .send_request(request)
            .await
            .map_err(|error| self.failed(error))?;
        let watch = self.shared.take_watch(stream.id());
        let (send, mut recv) = stream.split();
        let sending = Sending(tokio::spawn(send_body(send, body)).abort_handle());
        let response = recv.recv_response().await.map_err(|error| self.failed(error))?;
        let Some(watch) = watch else {
            return Err(ClientError::Stream(
                "bug: the request's stream has no watch".to_owned(),
            ));
        };
        let (parts, ()) = response.into_parts();
        let mut body = BodyReader::new(recv, watch.gate, &parts.headers);
        if is_head {
            body.end();
        }
        Ok(Response {
            status: parts.status,
            headers: parts.headers,
            body,
            _sending: sending,
            _sender: sender,
        })
    }

    /// Posts JSON and reads the answer as an event stream.
    ///
    /// # Errors
    /// Besides those of [`Client::request`], [`ClientError::Status`] when the answer is no event stream.
    pub async fn sse(&self, path: &str, json: &serde_json::Value) -> Result<SseStream, ClientError> {
        self.sse_with(path, json, HeaderMap::new()).await
    }

    /// Like [`Client::sse`], with further headers (a key, for example).
    ///
    /// # Errors
    /// As [`Client::sse`].
    pub async fn sse_with(
        &self,
        path: &str,
        json: &serde_json::Value,
        mut headers: HeaderMap,
    ) -> Result<SseStream, ClientError> {
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        self.events(Method::POST, path, headers, json.to_string().into())
            .await
    }

    /// Sends any request and reads the answer as an event stream.
    ///
    /// # Errors
    /// As [`Client::sse`].
    pub async fn events(
        &self,
        method: Method,
        path: &str,
        mut headers: HeaderMap,
        body: Bytes,
    ) -> Result<SseStream, ClientError> {
        headers.insert(ACCEPT, HeaderValue::from_static("text/event-stream"));
        let response = self.request(method, path, headers, body).await?;
        let content_type = response
            .headers
            .get(CONTENT_TYPE)
            .and_then(|value| value.to_str().ok());
        if response.status != StatusCode::OK
            || !content_type.is_some_and(|t| t.starts_with("text/event-stream"))
        {
            let status = response.status;
            let body = response.bytes(ERROR_BODY_BYTES_MAX).await?;
            return Err(ClientError::Status {
                status,
                body: String::from_utf8_lossy(&body).into_owned(),
            });
        }
        Ok(SseStream {
            response,
            parser: SseParser::new(EVENT_BYTES_MAX),
            done: false,
        })
    }

    /// Closes the connection and waits until the server can know.
    pub async fn close(self) {
        let endpoint = self._endpoint.clone();
        drop(self);
        let _ = tokio::time::timeout(std::time::Duration::from_millis(500), endpoint.wait_idle()).await;
    }

    fn build(
        &self,
        method: Method,
        path: &str,
        headers: HeaderMap,
        body: &Bytes,
    ) -> Result<Request<()>, ClientError> {
        let refused = |reason: String| ClientError::Request {
            path: path.to_owned(),
            reason,
        };
        let uri = Uri::builder()
            .scheme("https")
            .authority(self.target.authority.as_str())
            .path_and_query(path)
            .build()
            .map_err(|error| refused(error.to_string()))?;
        let mut request = Request::new(());
        *request.method_mut() = method;
        *request.uri_mut() = uri;
        *request.headers_mut() = headers;
        if !body.is_empty() {
            request.headers_mut().insert(CONTENT_LENGTH, body.len().into());
        }
        Ok(request)
    }

    fn failed(&self, error: StreamError) -> ClientError {
        match error {
            StreamError::RemoteClosing { .. } => ClientError::ServerClosing,
            StreamError::ConnectionError { 0: error, .. } => {
                let reason = match self.quic.close_reason() {
                    Some(reason) => reason.to_string(),
                    None => error.to_string(),
                };
                ClientError::Connection {
                    server: self.server,
                    reason,
                }
            }
            other => ClientError::Stream(other.to_string()),
        }
    }
}

/// Ends the sending of a request's body when the response is dropped, which resets the stream.
struct Sending(AbortHandle);

impl Drop for Sending {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Errors need no report: a server that stops the body says why in its response, and a lost connection shows there.
async fn send_body(mut stream: RequestStream<SendStream<Bytes>, Bytes>, mut body: Bytes) {
    while !body.is_empty() {
        let piece = body.split_to(body.len().min(SEND_PIECE_BYTES));
        if stream.send_data(piece).await.is_err() {
            return;
        }
    }
    let _ = stream.finish().await;
}

/// A response whose body is still arriving. Dropping it cancels the request at the server.
pub struct Response {
    /// HTTP status.
    pub status: StatusCode,
    /// Response headers.
    pub headers: HeaderMap,
    body: BodyReader<RequestStream<RecvStream, Bytes>>,
    _sending: Sending,
    _sender: SendRequest<OpenStreams, Bytes>,
}

impl Response {
    /// The next piece of the body; `None` at its end.
    ///
    /// # Errors
    /// When the server resets the stream, the connection is lost, or the body is shorter than declared.
    pub async fn chunk(&mut self) -> Result<Option<Bytes>, ClientError> {
        poll_fn(|cx| self.body.poll_chunk(cx))
            .await
            .map_err(|error| match error {
                BodyError::Length {
                    expected_bytes,
                    got_bytes,
                } => ClientError::ShortBody {
                    expected_bytes,
                    got_bytes,
                },
                other => ClientError::Stream(other.to_string()),
            })
    }

    /// The whole body, at most `limit_bytes`.
    ///
    /// # Errors
    /// As [`Response::chunk`], and when the body is longer.
    pub async fn bytes(mut self, limit_bytes: usize) -> Result<Bytes, ClientError> {
        let mut whole = BytesMut::new();
        while let Some(chunk) = self.chunk().await? {
            if whole.len() + chunk.len() > limit_bytes {
                return Err(ClientError::LongBody { limit_bytes });
            }
            whole.extend_from_slice(&chunk);
        }
        Ok(whole.freeze())
    }
}

/// An answer as events. Dropping it cancels the request at the server.
pub struct SseStream {
    response: Response,
    parser: SseParser,
    done: bool,
}

impl SseStream {
    /// Status and headers of the response.
    #[must_use]
    pub fn headers(&self) -> &HeaderMap {
        &self.response.headers
    }

    /// The next event; `None` after the server's `[DONE]`, which is not itself returned.
    ///
    /// # Errors
    /// [`ClientError::Truncated`] when the stream ends without `[DONE]`; otherwise as [`Response::chunk`].
    pub async fn next(&mut self) -> Result<Option<SseEvent>, ClientError> {
        loop {
            if self.done {
                return Ok(None);
            }
            if let Some(event) = self.parser.next_event() {
                if event.data != DONE {
                    return Ok(Some(event));
                }
                self.done = true;
                continue;
            }
            match self.response.chunk().await? {
                Some(chunk) => self.parser.push(&chunk)?,
                None => return Err(ClientError::Truncated),
            }
        }
    }
}
