//! Event streams over plain HTTP/1.1, from any server, one connection per request. Knows no routes and parses no JSON.

use std::io;

use bytes::Bytes;
use http::header::{ACCEPT, AUTHORIZATION, CONNECTION, CONTENT_TYPE, HOST};
use http::uri::Scheme;
use http::{HeaderValue, Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::task::AbortHandle;

use super::sse::{SseEvent, SseParser};
use super::{DONE, ERROR_BODY_BYTES_MAX, EVENT_BYTES_MAX};

/// A failure of the plain client.
#[derive(Debug, thiserror::Error)]
pub enum PlainError {
    /// The server's address makes no sense.
    #[error("connect to {url:?}: expected http://HOST[:PORT]: {reason}")]
    Url {
        /// What was given.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Nobody listens there, or the name is not known.
    #[error("connect to {server}: {source}; is the server running, and does it offer plain HTTP there?")]
    Connect {
        /// Host and port.
        server: String,
        /// The operating system's reason.
        source: io::Error,
    },
    /// The key cannot be put into a header.
    #[error("request: the key has characters that no HTTP header can carry")]
    Key,
    /// The connection or its HTTP is broken.
    #[error("request to {server}: {source}")]
    Http {
        /// Host and port.
        server: String,
        /// What HTTP met.
        source: hyper::Error,
    },
    /// An event stream was asked for and something else came.
    #[error("expected an event stream, got status {status}: {body}")]
    Status {
        /// HTTP status.
        status: StatusCode,
        /// Beginning of the body.
        body: String,
    },
    /// The event stream broke its own format.
    #[error(transparent)]
    Sse(#[from] super::sse::SseError),
    /// The event stream ended without `[DONE]`.
    #[error("the answer was cut off: the stream ended without its [DONE] event")]
    Truncated,
}

/// Where requests go. Holds no connection.
#[derive(Debug, Clone)]
pub struct PlainClient {
    /// Host and port, as the operating system takes them.
    server: String,
    /// The `host` header.
    host: HeaderValue,
    authorization: Option<HeaderValue>,
}

impl PlainClient {
    /// For a server at `http://HOST[:PORT]`, with a key if it wants one.
    ///
    /// # Errors
    /// [`PlainError::Url`] and [`PlainError::Key`]; nothing is connected yet.
    pub fn new(url: &str, key: Option<&str>) -> Result<Self, PlainError> {
        let refused = |reason: &str| PlainError::Url {
            url: url.to_owned(),
            reason: reason.to_owned(),
        };
        let uri: Uri = url.parse().map_err(|_| refused("this is no URL"))?;
        if uri.scheme() != Some(&Scheme::HTTP) {
            return Err(refused("only http is spoken here"));
        }
        if !matches!(uri.path(), "" | "/") {
            return Err(refused("leave the path away"));
        }
        let authority = uri.authority().ok_or_else(|| refused("the host is missing"))?;
        let host = HeaderValue::from_str(authority.as_str()).map_err(|_| refused("the host is no header"))?;
        let authorization = key.map(|key| HeaderValue::from_str(&format!("Bearer {key}")));
        Ok(Self {
            server: format!("{}:{}", authority.host(), authority.port_u16().unwrap_or(80)),
            host,
            authorization: authorization.transpose().map_err(|_| PlainError::Key)?,
        })
    }

    /// Posts JSON on a new connection and waits for the head of the event stream that answers.
    ///
    /// # Errors
    /// Nobody listens, the connection breaks, or [`PlainError::Status`] when the answer is no event stream.
    pub async fn sse(&self, path: &str, json: String) -> Result<PlainStream, PlainError> {
        let connect = |source| PlainError::Connect {
            server: self.server.clone(),
            source,
        };
        let stream = TcpStream::connect(&self.server).await.map_err(connect)?;
        stream.set_nodelay(true).map_err(connect)?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|source| self.broken(source))?;
        // What ends the connection shows in the response as well.
        let driver = Driver(tokio::spawn(async { drop(connection.await) }).abort_handle());
        let request = self.request(path, json)?;
        let response = sender
            .send_request(request)
            .await
            .map_err(|source| self.broken(source))?;
        let content_type = response.headers().get(CONTENT_TYPE);
        let is_stream = content_type.is_some_and(|value| value.as_bytes().starts_with(b"text/event-stream"));
        if response.status() != StatusCode::OK || !is_stream {
            return Err(refusal(response).await);
        }
        Ok(PlainStream {
            server: self.server.clone(),
            body: response.into_body(),
            parser: SseParser::new(EVENT_BYTES_MAX),
            done: false,
            _driver: driver,
        })
    }

    fn request(&self, path: &str, json: String) -> Result<Request<Full<Bytes>>, PlainError> {
        let mut request = Request::new(Full::new(Bytes::from(json)));
        *request.method_mut() = http::Method::POST;
        *request.uri_mut() = path.parse().map_err(|_| PlainError::Url {
            url: path.to_owned(),
            reason: "this is no path".to_owned(),
        })?;
        let headers = request.headers_mut();
        headers.insert(HOST, self.host.clone());
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert(ACCEPT, HeaderValue::from_static("text/event-stream"));
        headers.insert(CONNECTION, HeaderValue::from_static("close"));
        if let Some(authorization) = &self.authorization {
            headers.insert(AUTHORIZATION, authorization.clone());
        }
        Ok(request)
    }

    fn broken(&self, source: hyper::Error) -> PlainError {
        PlainError::Http {
            server: self.server.clone(),
            source,
        }
    }
}

async fn refusal(response: Response<Incoming>) -> PlainError {
    let status = response.status();
    let body = Limited::new(response.into_body(), ERROR_BODY_BYTES_MAX);
    let body = match body.collect().await {
        Ok(body) => String::from_utf8_lossy(&body.to_bytes()).into_owned(),
        Err(error) => format!("(the body cannot be read: {error})"),
    };
    PlainError::Status { status, body }
}

/// Ends the connection when its response is dropped.
#[derive(Debug)]
struct Driver(AbortHandle);

impl Drop for Driver {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// An answer as events. Dropping it closes the connection.
#[derive(Debug)]
pub struct PlainStream {
    server: String,
    body: Incoming,
    parser: SseParser,
    done: bool,
    _driver: Driver,
}

impl PlainStream {
    /// The next event; `None` after the server's `[DONE]`, which is not itself returned.
    ///
    /// # Errors
    /// [`PlainError::Truncated`] when the stream ends without `[DONE]`; the connection or the format breaks.
    pub async fn next(&mut self) -> Result<Option<SseEvent>, PlainError> {
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
            let frame = match self.body.frame().await {
                None => return Err(PlainError::Truncated),
                Some(Err(source)) => {
                    let server = self.server.clone();
                    return Err(PlainError::Http { server, source });
                }
                Some(Ok(frame)) => frame,
            };
            // Trailers carry no events.
            if let Some(bytes) = frame.data_ref() {
                self.parser.push(bytes)?;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_urls_without_a_path_are_taken() {
        for (url, server) in [
            ("http://localhost:8000", "localhost:8000"),
            ("http://[::1]:8000/", "[::1]:8000"),
            ("http://galerne.example", "galerne.example:80"),
        ] {
            assert_eq!(PlainClient::new(url, None).expect(url).server, server);
        }
        for url in [
            "https://localhost:8443",
            "localhost:8000",
            "http://localhost/v1",
            "http://",
            "",
        ] {
            let error = PlainClient::new(url, None).expect_err(url);
            assert!(matches!(error, PlainError::Url { .. }), "{url}: {error}");
        }
    }
}
