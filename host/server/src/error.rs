//! What can go wrong in listening, in TLS set-up and in the client. Knows no routes: those answer with a status.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

/// A failure to start listening.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Another process holds the port.
    #[error(
        "listen on {addr} ({transport}): the port is in use; stop the other process or pass another address with {flag}"
    )]
    PortInUse {
        /// `udp` or `tcp`.
        transport: &'static str,
        /// Address that was asked for.
        addr: SocketAddr,
        /// Command-line flag that chooses this address.
        flag: &'static str,
    },
    /// The operating system refused the socket.
    #[error("listen on {addr} ({transport}): {source}")]
    Socket {
        /// `udp` or `tcp`.
        transport: &'static str,
        /// Address that was asked for.
        addr: SocketAddr,
        /// The operating system's reason.
        source: io::Error,
    },
    /// No port was free for UDP and TCP at once.
    #[error(
        "listen on {ip}: no port was free on both udp and tcp in {attempts} attempts; pass a port with --listen"
    )]
    NoSharedPort {
        /// Address that was asked for.
        ip: std::net::IpAddr,
        /// How often it was tried.
        attempts: u32,
    },
    /// Plain HTTP was asked for on an address that other machines can reach.
    #[error(
        "listen on {addr} without TLS: expected a loopback address, because keys and prompts would cross the network \
         in clear; use --http 127.0.0.1:{} or let remote clients use the TLS address of --listen", addr.port()
    )]
    PlainNotLoopback {
        /// Address that was asked for.
        addr: SocketAddr,
    },
    /// The certificate or key cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

/// A certificate or key that cannot be made, read or used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read or written.
    #[error("{operation} {}: {source}", path.display())]
    File {
        /// What was tried.
        operation: &'static str,
        /// On which file.
        path: PathBuf,
        /// The operating system's reason.
        source: io::Error,
    },
    /// A file is not the PEM that it should be.
    #[error("read {}: expected {expected} in PEM form: {reason}", path.display())]
    Pem {
        /// Which file.
        path: PathBuf,
        /// What should be in it.
        expected: &'static str,
        /// What the parser met.
        reason: String,
    },
    /// A name that a certificate cannot carry.
    #[error("make development certificate: name {name:?} is neither a host name nor an IP address")]
    Name {
        /// The name.
        name: String,
    },
    /// The certificate could not be made.
    #[error("make development certificate: {0}")]
    Generate(#[from] rcgen::Error),
    /// The TLS library refused the certificate and key.
    #[error("set up TLS: {0}; do certificate and key belong together?")]
    Rejected(#[from] rustls::Error),
    /// The TLS configuration lacks what QUIC needs.
    #[error("set up TLS for QUIC: {0}")]
    Quic(#[from] quinn::crypto::rustls::NoInitialCipherSuite),
}

/// A failure of the HTTP/3 client.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The server's address makes no sense.
    #[error("connect to {url:?}: expected https://HOST[:PORT]: {reason}")]
    Url {
        /// What was given.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The name did not resolve.
    #[error("connect to {host}: name not found: {source}")]
    Resolve {
        /// Host name.
        host: String,
        /// The resolver's reason.
        source: io::Error,
    },
    /// No local socket.
    #[error("connect: open a UDP socket: {0}")]
    Socket(io::Error),
    /// Nobody listens there.
    #[error(
        "connect to {server}: refused: nothing listens on that UDP port; is the server running (galerne serve)?"
    )]
    Refused {
        /// Address that was tried.
        server: SocketAddr,
    },
    /// No answer.
    #[error(
        "connect to {server}: no answer in {} ms; is the server running, and does the network let UDP through?",
        timeout.as_millis()
    )]
    Timeout {
        /// Address that was tried.
        server: SocketAddr,
        /// How long it was waited for.
        timeout: Duration,
    },
    /// The certificate failed verification.
    #[error("connect to {server}: certificate not trusted: pass --ca FILE or --insecure ({reason})")]
    Certificate {
        /// Address that was tried.
        server: SocketAddr,
        /// What the verifier said.
        reason: String,
    },
    /// The peer speaks QUIC but not HTTP/3.
    #[error("connect to {server}: the server does not speak HTTP/3 (no common ALPN protocol)")]
    Alpn {
        /// Address that was tried.
        server: SocketAddr,
    },
    /// The connection ended.
    #[error("connection to {server} lost: {reason}")]
    Connection {
        /// Address of the server.
        server: SocketAddr,
        /// Why.
        reason: String,
    },
    /// Trust roots or TLS configuration.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The request cannot be built.
    #[error("request {path:?}: {reason}")]
    Request {
        /// Path that was asked for.
        path: String,
        /// What is wrong.
        reason: String,
    },
    /// The stream was reset or broken.
    #[error("request failed: {0}")]
    Stream(String),
    /// The server is shutting down and takes no new request.
    #[error("the server is shutting down and takes no new request; try again")]
    ServerClosing,
    /// The body ended before its declared length.
    #[error("response body ended early: expected {expected_bytes} bytes, got {got_bytes}")]
    ShortBody {
        /// Declared by `content-length`.
        expected_bytes: u64,
        /// Received.
        got_bytes: u64,
    },
    /// The body is longer than the caller allows.
    #[error("response body too long: expected at most {limit_bytes} bytes")]
    LongBody {
        /// The caller's bound.
        limit_bytes: usize,
    },
    /// An event stream was asked for and something else came.
    #[error("expected an event stream, got status {status}: {body}")]
    Status {
        /// HTTP status.
        status: http::StatusCode,
        /// Beginning of the body.
        body: String,
    },
    /// The event stream broke its own format.
    #[error(transparent)]
    Sse(#[from] crate::client::sse::SseError),
    /// The event stream ended without `[DONE]`.
    #[error("the answer was cut off: the stream ended without its [DONE] event")]
    Truncated,
}
